"""What holds for the core's garbage: there is none, since the server runs without a cycle collector."""

import gc
from random import Random

from saltern.core.cache import Cache
from saltern.core.effects import Close, Disconnected, Gone, Received, Send
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    DEFAULT_TENANT,
    NAME_BYTES,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    Lookup,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.tenants import Limits

PAGE = 4096


def live(cache: Cache, random: Random, turns: int) -> int:
    """Let an engine come, store and read for users who come and go, break the protocol, and leave amid it all.

    Return how often a prefix was found that ends in a state.
    """
    states_found = 0
    name, worker = random.randbytes(NAME_BYTES), random.randbytes(NAME_BYTES)
    control, lifeline = random.getrandbits(62), random.getrandbits(62)
    now = 0.0
    hello = SchedulerHello(engine="engine", incarnation=name, workers=(worker,), block_bytes=PAGE, state_bytes=2 * PAGE)
    cache.handle(Received(control, hello), now)
    rank = WorkerHello(engine="engine", name=worker, rank=0, world_size=1, outlives_socket=False)
    cache.handle(Received(lifeline, rank), now)

    def ask(message: Reserve | Acquire) -> Reply:
        return next(effect.message for effect in cache.handle(Received(control, message), now) if type(effect) is Send)

    for turn in range(turns):
        now += 1.0
        user = UserId(random.randbytes(USER_ID_BYTES))
        keys = tuple(Key(random.randbytes(KEY_BYTES)) for _ in range(random.randint(1, 8)))
        states = tuple(Key(random.randbytes(KEY_BYTES)) for _ in keys) if turn % 2 else ()
        reserved = ask(Reserve(turn, user, keys + states[-1:], start=0, acquired_at=now, ends_in_state=bool(states)))
        assert isinstance(reserved, Reserved)
        if reserved.lease:
            end = Abort(reserved.lease) if turn % 5 == 0 else Commit(reserved.lease)
            cache.handle(Received(control, end), now)
        acquired = ask(Acquire(request=turn, user=user, keys=keys, start=0, states=states))
        assert isinstance(acquired, Acquired)
        states_found += bool(states) and acquired.ready > 0
        if turn % 3 == 0:
            cache.handle(Received(control, Discard(user, keys[0])), now)
        if acquired.lease and turn % 7:
            cache.handle(Received(control, Release(acquired.lease)), now)
    user, key = UserId(bytes(USER_ID_BYTES)), Key(bytes(KEY_BYTES))
    violations: list[Request] = [
        Release(lease=-1),
        Lookup(request=0, user=user, keys=(key,), states=(key, key)),
        Acquire(request=0, user=user, keys=(), start=0, states=(key,)),
        Reserve(request=0, user=user, keys=(key,), start=0, acquired_at=now, ends_in_state=True),
    ]
    for violation in violations:
        assert any(type(effect) is Close for effect in cache.handle(Received(control, violation), now)), violation
    for connection in (control, lifeline):
        cache.handle(Disconnected(connection), now)
        cache.handle(Gone(connection), now)
    return states_found


def test_what_the_core_lets_go_is_free_without_a_collector() -> None:
    limits = Limits(limit_bytes=200 * PAGE, user_limit_bytes=5 * PAGE)
    cache = Cache(pages=300, page_bytes=PAGE, tenants={DEFAULT_TENANT: limits})
    random = Random(1)
    live(cache, random, turns=10)  # whatever is made once
    gc.collect()
    gc.disable()
    try:
        assert live(cache, random, turns=500) > 50, "hardly a state was found, so nothing was shown of them"
        assert cache.default_tenant.tally.evicted > 500, "nothing was let go, so nothing was shown"
        assert gc.collect() == 0
    finally:
        gc.enable()
