"""A prefix: what is there of a chain of keys, block by block.

The operator may have published the beginning, and the user has blocks of its own. What continues a published block is a
child of it, or of the user's own block at the same place, stored before that was published:

    public     P0 ── P1 ── P2                    is read as   P0 P1 P2 U3 U4
                             └─ (1)
    user       U0 ── U1 ── U2 ── U3 ── U4        (1): or so, where U0 to U2 were never stored

Both name the same tokens in the same namespace, so they hold the same KV.
"""

from saltern.core.blocks import Block, BlockState


class Prefix:
    """Goes down one chain; blocks that don't continue one another are no prefix.

    One without its parent would be touched alone, and one that is named a thousand times would fill the answer.
    """

    def __init__(self) -> None:
        self.own: Block | None = None  # at the present place, of whatever state
        self.public: Block | None = None  # there, and READY
        self._begins = True

    @property
    def block(self) -> Block | None:
        """Return the block that is read here, and that the next one hangs on: the published one, if there is one."""
        return self.public or self.own

    def descend(self, own: Block | None, public: Block | None, *, length: int) -> None:
        """Go to the next place, where these have the right names, and keep those of `length` bytes that continue it."""
        above = (None,) if self._begins else tuple(block for block in (self.own, self.public) if block is not None)
        public_above = (None,) if self._begins else above[-1:] if self.public is not None else ()
        fits = own is not None and own.length == length and own.parent in above
        is_public = public is not None and public.length == length and public.parent in public_above
        self.own = own if fits else None
        self.public = public if is_public and public is not None and public.state is BlockState.READY else None
        self._begins = False
