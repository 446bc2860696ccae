"""Names: whose a request is, and what its blocks are called, by the secrets of the present session."""

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from saltern.core.keys import (
    Content,
    Key,
    UserId,
    UserKey,
    block_key,
    content_of,
    namespace_content,
    next_content,
    public_user_key,
    signed_user_key,
    state_key,
    unsigned_user_key,
    user_id,
)
from saltern.core.messages import DEFAULT_TENANT, KEYS_MAX, PUBLIC_TENANT, Reply, Request
from saltern.publishing import Mark
from saltern.signing import PREFIX, verify
from saltern.vllm.geometry import Geometry
from saltern.vllm.track import Track

assert sys.byteorder == "little" and array("i").itemsize == 4, "keys hash token ids as little-endian int32"


class ServerSession(Protocol):
    """The way to the server; `saltern.vllm.session.Session` is the real one."""

    incarnation: bytes
    naming_secret: bytes
    signing_secrets: tuple[bytes, ...]
    root: Content  # of the namespace that it says hello with

    @property
    def is_open(self) -> bool:
        """Return whether leases can be had."""

    def connect_if_due(self) -> None:
        """Connect where there is no connection and it is time to try."""

    def send(self, message: Request) -> bool:
        """Send; False if there is no session."""

    def receive(self, timeout: float = 0.0) -> list[Reply]:
        """Return answers that came in, waiting for the first."""


@dataclass
class SaltCounts:
    """What the salts of requests were. Those of a `bad_signature` are treated like any that nobody signed."""

    signed: int = 0
    unsigned: int = 0
    bad_signature: int = 0
    bad_mark: int = 0  # a publication mark that was not the server's, or not for this prompt, or too old: not believed


class Names:
    """All that names of one engine depend on, beside the request: namespace, secrets, and what is published."""

    def __init__(
        self,
        *,
        session: ServerSession,
        geometry: Geometry,
        namespace: bytes,
        naming_secret: bytes | None,
        strict: bool,
        wall_clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._geometry = geometry
        self._naming_secret = naming_secret
        self._strict = strict
        self._wall_clock = wall_clock
        self._public_key = UserKey(b"")
        self.public_depth = 0  # so many blocks the longest publication has
        self.root = Content(b"")
        self._salts = SaltCounts()
        self.change_namespace(namespace)

    def change_namespace(self, namespace: bytes) -> None:
        """Name no block any more as it was named before."""
        self.root = self._session.root = namespace_content(namespace)

    def renew(self) -> None:
        """Take note that there is another session, or none: nothing is known to be published in it."""
        self.public_depth = 0
        self._public_key = public_user_key(self._naming_secret or self._session.naming_secret)

    def count_bad_mark(self) -> None:
        """Count a publication mark that is not believed."""
        self._salts.bad_mark += 1

    def take_salt_counts(self) -> SaltCounts:
        """Return what the salts of requests were since the last call."""
        salts, self._salts = self._salts, SaltCounts()
        return salts

    def prepare(self, track: Track, tokens: int) -> bool:
        """Bring a request's keys up to its first `tokens` tokens, in the present session; False if it is not cached.

        Raises for token ids that are none, with or without a session: so `add` meets all that the prompt has.
        """
        size = self._geometry.block_tokens
        tokens = min(tokens, (KEYS_MAX - 1) * size)  # what no message can name is not cached; one may name a state
        if len(track.tokens) < tokens:
            track.tokens.extend(track.request.all_token_ids[len(track.tokens) : tokens])
        if not self._session.is_open:
            return False
        if track.incarnation != self._session.incarnation:
            self._identify(track)
            track.incarnation = self._session.incarnation
            track.content = self.root
            track.keys.clear()
            track.public.clear()
            track.states.clear()
            track.offered = track.settled = track.state_offered = 0
            track.acquired_at = float("inf")
        if track.is_outdated or not track.is_cached:
            return False
        for start in range(len(track.keys) * size, tokens - size + 1, size):
            track.content = next_content(track.content, track.tokens[start : start + size].tobytes(), track.extras)
            if len(track.keys) == len(track.public) < self.public_depth and not self._geometry.has_states:
                track.public.append(block_key(self._public_key, track.content))
            track.keys.append(block_key(track.user_key, track.content))
            if self._geometry.has_states:
                track.states.append(state_key(track.user_key, track.content))
        return True

    def publish(self, track: Track, mark: Mark) -> None:
        """Believe a mark that the server has signed for this very prompt in this namespace, and count any other."""
        size, tokens = self._geometry.block_tokens, track.request.num_prompt_tokens
        track.tokens.extend(track.request.all_token_ids[:tokens])
        content = content_of(self.root, track.tokens, size, track.extras)
        is_whole = not tokens % size and not self._geometry.has_states
        secrets = self._session.signing_secrets if self._session.is_open else ()
        if is_whole and mark.holds(root=self.root, content=content, secrets=secrets, now=self._wall_clock()):
            track.publication = mark.publication
        else:
            self.count_bad_mark()

    def wanted(self, track: Track) -> tuple[tuple[Key, ...], tuple[Key, ...], tuple[Key, ...]]:
        """Return the keys of the blocks that a request can use, of the states behind them, and of published ones.

        vLLM computes the last known token anew, even if all is loaded. A group that forgets can't go back by a token.
        """
        blocks = len(track.keys)
        if not self._geometry.keeps_all:
            blocks = min(blocks, (track.request.num_tokens - 1) // self._geometry.block_tokens)
        return tuple(track.keys[:blocks]), tuple(track.states[:blocks]), tuple(track.public[:blocks])

    def _identify(self, track: Track) -> None:
        """Find out whose a request is, and who is charged, by the secrets of the present session."""
        naming_secret = self._naming_secret or self._session.naming_secret
        if track.publication is not None:
            track.tenant, track.user, track.user_key = PUBLIC_TENANT, UserId(track.publication), self._public_key
            return
        signed = verify(track.salt, self._session.signing_secrets)
        if not track.incarnation:  # once a request, however many sessions it sees
            looks_signed = track.salt.startswith(PREFIX)
            self._salts.signed += signed is not None
            self._salts.unsigned += not looks_signed
            self._salts.bad_signature += looks_signed and signed is None
        if signed is None:
            track.tenant = DEFAULT_TENANT
            track.user_key = unsigned_user_key(naming_secret, track.salt)
        else:
            track.tenant = signed.tenant
            track.user_key = signed_user_key(naming_secret, signed.tenant, signed.user, signed.epoch)
        track.user = user_id(track.user_key)
        track.is_cached = signed is not None or not self._strict
