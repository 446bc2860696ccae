"""The promises of a connector: short lives of an engine that any right connector passes, whatever the options.

Each promise takes a subject and the engine's options. That no slot is wrong and that everything is let go at the end
is checked by the engine in all of them; a promise adds what must have happened on the way.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from .engine import Engine
from .options import Options
from .subjects import Subject

Promise = Callable[[Subject, Options], None]


@contextmanager
def _engine(subject: Subject, options: Options, **kwargs: Any) -> Iterator[Engine]:
    """Start an engine that must be drained in the end."""
    with subject.engine(options, **kwargs) as engine:
        yield engine
        engine.run()
        engine.check_drained()


def _prompt(options: Options, blocks: float, start: int = 0) -> list[int]:
    count = int(blocks * options.block_tokens)
    return [(start + 7 * position) % 251 for position in range(count)]


def _fill(subject: Subject, options: Options, prompt: list[int], salt: str | None) -> list[int]:
    """Have an engine of its own compute a prompt, so that no later hit can come from vLLM's own prefix cache."""
    with _engine(subject, options) as engine:
        return engine.ask(f"fill-{salt}", prompt, salt, max_tokens=3).tokens


def same_user_hits(subject: Subject, options: Options) -> None:
    """The same prompt of the same user comes from the cache, after an engine restart, and is answered alike."""
    prompt = _prompt(options, 4.5)
    cold = _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        answer = engine.ask("again", prompt, "alice", max_tokens=3)
    assert answer.external_tokens == 4 * options.block_tokens
    assert answer.tokens == cold


def other_user_misses(subject: Subject, options: Options) -> None:
    """The same prompt under another salt, or under none, is computed."""
    prompt = _prompt(options, 4.5)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        assert engine.ask("bob", prompt, "bob").external_tokens == 0
        assert engine.ask("nobody", prompt, None).external_tokens == 0
    with _engine(subject, options) as engine:
        assert engine.ask("bob-again", prompt, "bob").external_tokens == 4 * options.block_tokens


def neighbours_in_a_batch_keep_their_salts(subject: Subject, options: Options) -> None:
    """Users who are served in one batch get their own blocks, or none."""
    prompt = _prompt(options, 2)
    _fill(subject, options, prompt, "alice")
    _fill(subject, options, prompt, None)
    with _engine(subject, options) as engine:
        for name, salt in (("bob", "bob"), ("alice", "alice"), ("nobody", None), ("carol", "carol")):
            engine.add(name, prompt, salt, max_tokens=2)
        engine.run()
        hits = {name for name, answer in engine.answers.items() if answer.external_tokens}
    assert hits == {"alice", "nobody"}


def shared_beginning_hits_in_part(subject: Subject, options: Options) -> None:
    """A prompt that goes on differently takes the blocks before the difference."""
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        other = prompt[: 2 * options.block_tokens + 3] + _prompt(options, 2, start=1)
        assert engine.ask("other", other, "alice").external_tokens == 2 * options.block_tokens


def same_block_elsewhere_misses(subject: Subject, options: Options) -> None:
    """Equal tokens behind another beginning are other KV."""
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        other = _prompt(options, 1, start=1) + prompt[options.block_tokens :]
        assert engine.ask("other", other, "alice").external_tokens == 0


def whole_prompt_hits(subject: Subject, options: Options) -> None:
    """A prompt of whole blocks is loaded whole; vLLM computes its last token anew."""
    prompt = _prompt(options, 4)
    cold = _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        answer = engine.ask("again", prompt, "alice", max_tokens=3)
    assert answer.external_tokens == 4 * options.block_tokens
    assert answer.tokens == cold


def short_prompt_is_left_alone(subject: Subject, options: Options) -> None:
    """A prompt below one block is neither stored nor matched."""
    prompt = _prompt(options, 0.5)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        assert engine.ask("again", prompt, "alice").external_tokens == 0


def unread_prompt_is_computed(subject: Subject, options: Options) -> None:
    """A request that must not read the cache doesn't, and leaves nothing pinned."""
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        engine.add("unread", prompt, "alice", skip_reading_prefix_cache=True)
        engine.run()
        assert engine.answers["unread"].external_tokens == 0


def hit_continues_the_local_one(subject: Subject, options: Options) -> None:
    """What vLLM's own prefix cache lacks is loaded behind what it has."""
    options = replace(options, prefix_caching=True)
    prompt = _prompt(options, 5.5)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        engine.ask("short", prompt[: 2 * options.block_tokens + 1], "alice")
        answer = engine.ask("long", prompt, "alice")
    assert (answer.local_tokens, answer.external_tokens) == (2 * options.block_tokens, 3 * options.block_tokens)


def many_at_once_share_a_prefix(subject: Subject, options: Options) -> None:
    """Requests of two users over one prefix, loading and computing side by side with local prefix caching on."""
    options = replace(options, prefix_caching=True)
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        for index in range(8):
            end = _prompt(options, 0.2 + index % 3, start=index)
            engine.add(f"r{index}", prompt + end, ("alice", "bob")[index % 2], max_tokens=4)
        engine.run()
        assert engine.counts.loads, "nothing was loaded"


def preempted_request_resumes(subject: Subject, options: Options) -> None:
    """A pool too small for all makes vLLM preempt, and what resumes reads its own KV again."""
    options = replace(options, blocks=12, sequences_max=4)
    with _engine(subject, options) as engine:
        for index in range(6):
            engine.add(f"r{index}", _prompt(options, 2.5, start=index), "alice", max_tokens=3 * options.block_tokens)
        engine.run()
        assert engine.counts.preemptions, "nobody was preempted"


def abort_while_loading_ends_clean(subject: Subject, options: Options, while_executing: bool) -> None:
    """A client that hangs up while its blocks are loading leaves nothing behind, and the next one still hits."""
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options) as engine:
        engine.add("gone", prompt, "alice", max_tokens=3)
        engine.run(until=lambda: engine.is_loading("gone"))
        engine.abort("gone", while_executing)
        assert engine.counts.aborts_during_load == 1
        assert engine.ask("next", prompt, "alice").external_tokens == 4 * options.block_tokens


def failed_load_is_recomputed(subject: Subject, options: Options, bad: int) -> None:
    """A load of which block `bad` failed is computed from there on, and the answer stays right."""
    prompt = _prompt(options, 4)
    cold = _fill(subject, options, prompt, "alice")

    def fault(rank: int, request_id: str, block_ids: list[int]) -> set[int]:
        # Only once: the connector did not see it happen, so it may well try the same blocks again.
        is_first = rank == options.ranks - 1 and engine.counts.loads_failed == 0
        return {block_ids[bad]} if is_first else set()

    with _engine(subject, options, load_fault=fault) as engine:
        answer = engine.ask("again", prompt, "alice", max_tokens=3)
        assert engine.counts.loads_failed == 1
    assert answer.finish_reason == "length"
    assert answer.tokens == cold


def failed_load_is_an_error_if_so_configured(subject: Subject, options: Options) -> None:
    """Under vLLM's other policy the request ends with an error, and nothing is left behind."""
    options = replace(options, load_failure_policy="fail")
    prompt = _prompt(options, 4)
    _fill(subject, options, prompt, "alice")
    with _engine(subject, options, load_fault=lambda rank, request_id, block_ids: {block_ids[-1]}) as engine:
        assert engine.ask("again", prompt, "alice").finish_reason == "error"


PROMISES: dict[str, Promise] = {
    "same user hits": same_user_hits,
    "other user misses": other_user_misses,
    "neighbours in a batch keep their salts": neighbours_in_a_batch_keep_their_salts,
    "shared beginning hits in part": shared_beginning_hits_in_part,
    "same block elsewhere misses": same_block_elsewhere_misses,
    "whole prompt hits": whole_prompt_hits,
    "short prompt is left alone": short_prompt_is_left_alone,
    "unread prompt is computed": unread_prompt_is_computed,
    "hit continues the local one": hit_continues_the_local_one,
    "many at once share a prefix": many_at_once_share_a_prefix,
    "preempted request resumes": preempted_request_resumes,
    "abort between steps of a load": functools.partial(abort_while_loading_ends_clean, while_executing=False),
    "abort during a step of a load": functools.partial(abort_while_loading_ends_clean, while_executing=True),
    "failed first block is recomputed": functools.partial(failed_load_is_recomputed, bad=0),
    "failed last block is recomputed": functools.partial(failed_load_is_recomputed, bad=-1),
}
"""All promises by name; `failed_load_is_an_error_if_so_configured` is apart, for connectors that allow that policy."""

ENGINES: dict[str, Options] = {
    "one rank in process": Options(tag_users=True),
    "one rank in a process": Options(tag_users=True, separate_processes=True, workers_lag=True),
    "two ranks": Options(tag_users=True, ranks=2),
    "two batches in flight": Options(tag_users=True, asynchronous=True),
    "two batches in flight, late workers, two ranks": Options(
        tag_users=True, asynchronous=True, workers_lag=True, ranks=2
    ),
    "second runner": Options(tag_users=True, runner_v2=True),
    "second runner, two batches in flight, late workers": Options(
        tag_users=True, runner_v2=True, asynchronous=True, workers_lag=True, separate_processes=True
    ),
    "blocks outermost": Options(tag_users=True, layout="BLHNC", block_tokens=32),
    "small chunks": Options(tag_users=True, batch_tokens=24, block_tokens=8, asynchronous=True),
}
"""Engines that differ in what a connector could trip over."""
