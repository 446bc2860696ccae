"""The salt's way: each place that hands it on, or what was made of it, and the three ways to lose it there.

*Dropped*: nothing is handed on, as if there were no salt. *Swapped*: the neighbour's is handed on, of whoever came just
before. *Unset*: it was set once and never again, so everybody has the first one's. A hop is a function of
(patch, hand_on), where `hand_on` says what takes the place of a value.
"""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar

import msgspec
import pytest
from vllm.v1.request import Request

from saltern.core.blocks import Block
from saltern.core.extents import Extent, Run
from saltern.core.keys import UserId, UserKey, block_key, unsigned_user_key, user_id
from saltern.core.messages import Acquire, Acquired, Lookup, Reserve, Reserved
from saltern.core.tenants import Tenant, User
from saltern.vllm import connector as connector_module
from saltern.vllm import names as names_module
from saltern.vllm import planner as planner_module
from saltern.vllm.copies import Copies, Copy
from saltern.vllm.planner import Planner
from saltern.vllm.questions import Question
from saltern.vllm.session import Session
from saltern.vllm.track import Track
from saltern.vllm.worker import Worker

from . import engine as engine_module

T = TypeVar("T")
Patch = pytest.MonkeyPatch


class Way(Enum):
    """How the salt is lost."""

    DROPPED = "dropped"
    SWAPPED = "swapped"
    UNSET = "unset"


class Loss:
    """What a hop hands on instead of each value that comes along."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._seen: list[Any] = []

    def __call__(self, value: T, nothing: T) -> T:
        """Return what takes the place of `value`; `nothing` is what stands for no salt."""
        self._seen.append(value)
        stead: T
        match self._way:
            case Way.DROPPED:
                stead = nothing
            case Way.SWAPPED:
                stead = self._seen[-2] if len(self._seen) > 1 else value
            case Way.UNSET:
                stead = self._seen[0]
        return stead


def request(patch: Patch, loss: Loss) -> None:
    """The API's field `cache_salt` on its way into vLLM's request."""
    patch.setattr(
        engine_module, "Request", lambda *, cache_salt, **rest: Request(cache_salt=loss(cache_salt, None), **rest)
    )


def connector(patch: Patch, loss: Loss) -> None:
    """The connector's reading of the request."""
    salt_of = connector_module._salt_of
    patch.setattr(connector_module, "_salt_of", lambda *args, **rest: loss(salt_of(*args, **rest), ""))


def track(patch: Patch, loss: Loss) -> None:
    """What the planner remembers of the request."""

    def make(request: Any, salt: str, extras: bytes, **rest: Any) -> Track:
        return Track(request, loss(salt, ""), extras, **rest)

    patch.setattr(planner_module, "Track", make)


def user_key(patch: Patch, loss: Loss) -> None:
    """The user's key, made of the salt."""

    def make(secret: bytes, salt: str) -> UserKey:
        return loss(unsigned_user_key(secret, salt), unsigned_user_key(secret, ""))

    patch.setattr(names_module, "unsigned_user_key", make)


def user_name(patch: Patch, loss: Loss) -> None:
    """The user's id, made of the key."""
    patch.setattr(names_module, "user_id", lambda key: loss(user_id(key), UserId(bytes(16))))


def block_names(patch: Patch, loss: Loss) -> None:
    """The names of the user's blocks, made of the key."""
    patch.setattr(names_module, "block_key", lambda key, content: block_key(loss(key, UserKey(b"")), content))


def _message(kind: type[Any]) -> Callable[[Patch, Loss], None]:
    def message(patch: Patch, loss: Loss) -> None:
        send = Session.send

        def send_for(self: Session, message: Any) -> bool:
            if isinstance(message, kind):
                message = msgspec.structs.replace(message, user=loss(message.user, UserId(bytes(16))))
            return send(self, message)

        patch.setattr(Session, "send", send_for)

    return message


def acquired(patch: Patch, loss: Loss) -> None:
    """The answer with the extents of the user's blocks."""
    take = Planner._take_acquired

    def take_extents(self: Planner, question: Question | None, reply: Acquired) -> None:
        if reply.extents:
            extents = tuple(map(_first_pages, reply.extents))
            reply = msgspec.structs.replace(reply, extents=loss(reply.extents, extents))
        take(self, question, reply)

    patch.setattr(Planner, "_take_acquired", take_extents)


def reserved(patch: Patch, loss: Loss) -> None:
    """The answer with the extents that the user's blocks may be written to."""
    take = Planner._take_reserved

    def take_grants(self: Planner, question: Question | None, reply: Reserved) -> None:
        if reply.grants:
            nothing = tuple(msgspec.structs.replace(grant, extent=_first_pages(grant.extent)) for grant in reply.grants)
            reply = msgspec.structs.replace(reply, grants=loss(reply.grants, nothing))
        take(self, question, reply)

    patch.setattr(Planner, "_take_reserved", take_grants)


def metadata(patch: Patch, loss: Loss) -> None:
    """The copies that the scheduler hands to the workers: where each load comes from."""
    plan = Planner.plan

    def plan_loads(self: Planner, *args: Any) -> Copies:
        copies = plan(self, *args)
        return Copies([_with_extents(copy, loss) for copy in copies.loads], copies.stores)

    patch.setattr(Planner, "plan", plan_loads)


def _worker(*, is_store: bool) -> Callable[[Patch, Loss], None]:
    def worker(patch: Patch, loss: Loss) -> None:
        start = Worker.start

        def start_copies(self: Worker, copies: Copies, shards: Any) -> None:
            own = copies.stores if is_store else copies.loads
            mixed = [_with_blocks(copy, loss) for copy in own]
            start(self, Copies(copies.loads, mixed) if is_store else Copies(mixed, copies.stores), shards)

        patch.setattr(Worker, "start", start_copies)

    return worker


def dictionary(patch: Patch, loss: Loss) -> None:
    """The server's choice of the dictionary that a new block goes to."""
    user = Tenant.user

    def user_of(self: Tenant[Block], name: UserId) -> User[Block]:
        return user(self, loss(name, UserId(bytes(16))))

    patch.setattr(Tenant, "user", user_of)


def _first_pages(extent: Extent) -> Extent:
    return (Run(start=0, count=sum(run.count for run in extent)),)


def _with_extents(copy: Copy, loss: Loss) -> Copy:
    own = tuple(piece.extent for piece in copy.pieces)
    extents = loss(own, tuple(map(_first_pages, own)))
    return replace(
        copy, pieces=tuple(replace(piece, extent=extent) for piece, extent in zip(copy.pieces, extents, strict=True))
    )


def _with_blocks(copy: Copy, loss: Loss) -> Copy:
    own = tuple(piece.engine_blocks for piece in copy.pieces)
    blocks = loss(own, tuple((1,) * len(engine_blocks) for engine_blocks in own))
    return replace(
        copy,
        pieces=tuple(replace(piece, engine_blocks=taken) for piece, taken in zip(copy.pieces, blocks, strict=True)),
    )


HOPS: dict[str, Callable[[Patch, Loss], None]] = {
    "request": request,
    "connector": connector,
    "track": track,
    "user key": user_key,
    "user id": user_name,
    "block keys": block_names,
    "lookup": _message(Lookup),
    "acquire": _message(Acquire),
    "acquired": acquired,
    "load": metadata,
    "load in a worker": _worker(is_store=False),
    "reserve": _message(Reserve),
    "reserved": reserved,
    "store in a worker": _worker(is_store=True),
    "dictionary": dictionary,
}
"""All hops, in the order in which a request comes by them."""
