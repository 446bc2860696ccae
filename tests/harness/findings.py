"""The findings of a run: what a connector did that it must never do."""


class Finding(AssertionError):  # noqa: N818 - the word of the field
    """A connector broke a promise. The message says which one, where, and for whom."""


class WrongKV(Finding):
    """A request attended to a slot whose bytes are not those of its own prefix."""


class StrayWrite(Finding):
    """KV changed in a block that no load was waiting for."""


class WrongOutput(Finding):
    """A request answered with other tokens than its prefix decides."""


class Stuck(Finding):
    """Steps went by and nothing moved, although requests or the connector were still waiting."""


class NotDrained(Finding):
    """After the last request something was still held, queued or remembered."""


class EngineDied(Finding):
    """An exception in the connector, or one of vLLM's assertions about it, ended the engine."""
