"""Publications: what the operator lets all users read, and may any time take back."""

from saltern.core.effects import StoredPublication
from saltern.core.keys import Key
from saltern.core.messages import PublicationId


class Publication:
    """The blocks of one prefix, in one namespace. Which keys they have is known when the first engine stores them."""

    def __init__(self, id_: PublicationId, *, root: bytes, blocks: int, label: str, keys: tuple[Key, ...] = ()) -> None:
        self.id = id_
        self.root = root
        self.blocks = blocks
        self.label = label
        self.keys = keys
        self.refusal: str | None = None  # why blocks of it were turned down last

    @property
    def stored(self) -> StoredPublication:
        """Return what is kept of it on the disk."""
        return StoredPublication(self.id, self.root, self.blocks, self.label, self.keys)

    def admits(self, root: bytes, keys: tuple[Key, ...]) -> bool:
        """Return whether these are its first blocks, as far as that is known; it is, once they were asked for."""
        known = min(len(keys), len(self.keys))
        if root != self.root or len(keys) > self.blocks or keys[:known] != self.keys[:known]:
            return False
        if len(keys) > known:
            self.keys = keys
        return True
