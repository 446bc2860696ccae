"""What holds for the core's garbage: there is none, since the server runs without a cycle collector."""

import gc
from random import Random

from saltern.core.cache import Cache
from saltern.core.effects import Disconnected, Gone, Received, Send
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    NAME_BYTES,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    Release,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.tenants import Limits

PAGE = 4096


def live(cache: Cache, random: Random, turns: int) -> None:
    """Let an engine come, store and read for users who come and go, and leave in the middle of both."""
    name, worker = random.randbytes(NAME_BYTES), random.randbytes(NAME_BYTES)
    control, lifeline = random.getrandbits(62), random.getrandbits(62)
    now = 0.0
    hello = SchedulerHello(engine="engine", incarnation=name, workers=(worker,), block_bytes=PAGE)
    cache.handle(Received(control, hello), now)
    rank = WorkerHello(engine="engine", name=worker, rank=0, world_size=1, outlives_socket=False)
    cache.handle(Received(lifeline, rank), now)

    def ask(message: Reserve | Acquire) -> Reply:
        return next(effect.message for effect in cache.handle(Received(control, message), now) if type(effect) is Send)

    for turn in range(turns):
        now += 1.0
        user = UserId(random.randbytes(USER_ID_BYTES))
        keys = tuple(Key(random.randbytes(KEY_BYTES)) for _ in range(random.randint(1, 8)))
        reserved = ask(Reserve(request=turn, user=user, keys=keys, start=0, acquired_at=now))
        assert isinstance(reserved, Reserved)
        if reserved.lease:
            end = Abort(reserved.lease) if turn % 5 == 0 else Commit(reserved.lease)
            cache.handle(Received(control, end), now)
        acquired = ask(Acquire(request=turn, user=user, keys=keys, start=0))
        assert isinstance(acquired, Acquired)
        if turn % 3 == 0:
            cache.handle(Received(control, Discard(user, keys[0])), now)
        if acquired.lease and turn % 7:
            cache.handle(Received(control, Release(acquired.lease)), now)
    cache.handle(Received(control, Release(lease=-1)), now)  # a violation
    for connection in (control, lifeline):
        cache.handle(Disconnected(connection), now)
        cache.handle(Gone(connection), now)


def test_what_the_core_lets_go_is_free_without_a_collector() -> None:
    cache = Cache(pages=300, page_bytes=PAGE, limits=Limits(limit_bytes=200 * PAGE, user_limit_bytes=5 * PAGE))
    random = Random(1)
    live(cache, random, turns=10)  # whatever is made once
    gc.collect()
    gc.disable()
    try:
        live(cache, random, turns=500)
        assert cache.tenant.tally.evicted > 500, "nothing was let go, so nothing was shown"
        assert gc.collect() == 0
    finally:
        gc.enable()
