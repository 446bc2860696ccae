"""A simulation: one seed draws the sizes, the load and the faults, lets it all run, and checks after every event."""

from dataclasses import dataclass
from random import Random

from msgspec.structs import replace

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.keys import KEY_BYTES, Key, UserKey, unsigned_user_key, user_id
from saltern.core.messages import DEFAULT_TENANT, Abort, Acquire, Commit, Lookup, Release, Reserve
from saltern.core.tenants import Limits
from tests.simulator.arena import CELL_BYTES
from tests.simulator.claims import Invariant, violated
from tests.simulator.disk import Platter
from tests.simulator.engine import Engine, Namespace, User
from tests.simulator.server import Operator, Process, Server
from tests.simulator.world import World

DURATION = 300.0
"""How long load and faults last: some hundred events of the cache."""


@dataclass(frozen=True)
class Habits:
    """What differs from seed to seed, faults above all: most runs know only some of them, some none."""

    pages: int
    page_bytes: int
    tenants: dict[str, Limits]
    in_flight_max_bytes: int | None
    request_delay: float
    message_delay: float
    copy_delay: float
    failure_rate: float
    give_up_rate: float
    fault_delay: float | None
    fault_weights: tuple[float, ...]
    users_share_keys: bool
    tick_delay: float
    disk_pages: int
    disk_tenants: dict[str, Limits]
    disk_in_flight_max: int
    disk_delay: float
    disk_failure_rate: float
    block_seconds: float

    @classmethod
    def draw(cls, random: Random) -> "Habits":
        """Draw the habits of a run."""
        pages = random.choice((4, 6, 12, 24, 40, 64))
        page_bytes = random.choice((2, 3, 4)) * CELL_BYTES
        disk_pages = random.choice((0, 4, 16, 40, 80, 80))
        tenants = _tenants(random, pages, page_bytes)
        return cls(
            pages=pages,
            page_bytes=page_bytes,
            tenants=tenants,
            in_flight_max_bytes=random.choice((None, None, None, None, -(-pages // 8) * page_bytes)),
            request_delay=random.choice((2.0, 4.0, 8.0)),
            message_delay=random.choice((0.2, 1.0, 5.0)),
            copy_delay=random.choice((0.5, 2.0, 6.0)),
            failure_rate=random.choice((0.0, 0.0, 0.02, 0.1)),
            give_up_rate=random.choice((0.0, 0.1, 0.4)),
            fault_delay=random.choice((None, 80.0, 40.0, 15.0)),
            fault_weights=tuple(random.choice((0.0, 1.0, 4.0)) for _ in range(12)),
            users_share_keys=random.random() < 0.5,
            tick_delay=random.choice((0.0, 1.0, 20.0)),
            disk_pages=disk_pages,
            disk_tenants=_disk_tenants(random, disk_pages, tenants),
            disk_in_flight_max=random.choice((1, 2, 4, 8)),
            disk_delay=random.choice((0.5, 2.0, 6.0)),
            disk_failure_rate=random.choice((0.0, 0.05, 0.3)),
            block_seconds=random.choice((0.0, 0.0, 2.0)),
        )


class Simulation:
    """One run. `events` counts what the caches handled."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.world = World(seed, verbose=verbose)
        random = self.world.random
        self.habits = habits = Habits.draw(random)
        self.world.note(habits)
        self.copy_delay = habits.copy_delay
        self.failure_rate = habits.failure_rate
        self.give_up_rate = habits.give_up_rate
        self.block_seconds = habits.block_seconds
        self.retry_delay = random.choice((2.0, 10.0))
        self.is_calm = False
        self._is_over = False
        self.users = [self._user(number) for number in range(random.randint(1, 5))]
        self.prompts = _prompts(random)
        self.namespaces = [_namespace(random, number) for number in range(random.randint(1, 2))]
        self._platter = Platter(habits.disk_pages) if habits.disk_pages else None
        self.server: Server | None = self._new_server(habits.disk_pages)
        self._servers = [self.server]
        self._names = 0
        self.engines: list[Engine] = []
        for _ in range(random.randint(1, 3)):
            self._start_engine()
        self.world.after(habits.request_delay, self._next_request)
        if habits.fault_delay is not None:
            self.world.after(habits.fault_delay, self._next_fault)

    @property
    def hits_alone(self) -> int:
        """Return how many blocks the private caches found that every tenant was compared with."""
        return sum(server.checker.witness.hits for server in self._servers)

    @property
    def events(self) -> int:
        """Return how many events the caches have handled."""
        return sum(server.events for server in self._servers)

    def run(self) -> None:
        """Let load and faults come, then calm, then the end; raises `ViolationError`."""
        self.world.run(until=DURATION)
        self.is_calm = True
        if self.world.chance(0.7):  # or else the end comes in the middle of everything
            self.world.note("calm")
            self._rest()
            self._check_calm()
        self.world.note("the end")
        self._is_over = True
        for engine in self.engines:
            if engine.is_alive:
                self.world.random.choice((engine.stop, engine.die_at_once))()
        self._rest()
        assert self.server is not None, "the server comes back"
        self.server.checker.witness.verify()
        self.server.checker.check_drained()

    def server_time(self, time: float) -> float:
        """Return what a time is by the clock of the server, if it is up."""
        return time if self.server is None else self.server.time(time)

    def is_rival_alive(self, engine: Engine) -> bool:
        """Return whether another living engine goes by the same name."""
        return any(other.is_alive and other.name == engine.name for other in self.engines if other is not engine)

    def process_ended(self, process: Process) -> None:
        """Tell the server, if it is up, that a process has ended."""
        if self.server is not None:
            self.server.process_ended(process)

    def _rest(self) -> None:
        if not self.world.run():
            violated(Invariant.WAITS, "it never comes to rest")

    def _check_calm(self) -> None:
        assert self.server is not None, "the server is up when it is calm"
        self.server.checker.check_calm()
        for engine in self.engines:
            if engine.pending or engine.awaited:
                violated(Invariant.WAITS, f"{engine.name} waits for {engine.pending or engine.awaited} for ever")
            if engine.is_alive and not engine.is_attached and not self.is_rival_alive(engine):
                violated(Invariant.WAITS, f"{engine.name} waits for its session for ever")

    # Load

    def _user(self, number: int) -> User:
        own = unsigned_user_key(b"naming secret of the simulation", f"user {number}")
        shared = unsigned_user_key(b"naming secret of the simulation", "everybody")
        key: UserKey = shared if self.habits.users_share_keys else own
        tenants = (DEFAULT_TENANT, "acme", "unknown", *self.habits.tenants)
        return User(id=user_id(own), key=key, tenant=self.world.random.choice(tenants))

    def _start_engine(self, name: str | None = None, namespace: Namespace | None = None) -> None:
        self._names += 1
        engine = Engine(
            self,
            name or f"engine {self._names}",
            namespace or self.world.random.choice(self.namespaces),
            outlives_socket=self.world.chance(0.5),
        )
        self.engines.append(engine)

    def _next_request(self) -> None:
        if not self.is_calm:
            self.world.random.choice(self.engines).begin_request()
            if self.server is not None and self.world.chance(0.02):
                Operator(self.server, self.habits.page_bytes)
            if self.server is not None and self.world.chance(0.1):
                self.server.note_touched()
            if self.habits.fault_delay is not None and self.world.chance(0.01):
                self._change_a_tenant()
            self.world.after(self.habits.request_delay, self._next_request)

    # Faults

    def _next_fault(self) -> None:
        if self.is_calm or self.habits.fault_delay is None:
            return
        faults = (
            self._cut_control,
            self._cut_lifeline,
            self._kill_worker,
            self._kill_scheduler,
            self._kill_engine,
            self._restart_server,
            self._freeze,
            self._duplicate,
            self._misbehave,
            self._change_a_tenant,
            self._erase,
            self._stall_the_disk,
        )
        if any(self.habits.fault_weights):
            (fault,) = self.world.random.choices(faults, self.habits.fault_weights)
            self.world.note("fault:", fault.__name__)
            fault()
        self.world.after(self.habits.fault_delay, self._next_fault)

    def _pick(self) -> Engine:
        return self.world.random.choice([engine for engine in self.engines if engine.is_alive])

    def _cut_control(self) -> None:
        link = self._pick().link
        if link is not None:
            link.cut()

    def _cut_lifeline(self) -> None:
        """Only where EOF isn't death: a plain worker's socket closes when the worker does."""
        worker = self.world.random.choice(self._pick().workers)
        if worker.link is not None and worker.outlives_socket:
            worker.link.cut()

    def _kill_worker(self) -> None:
        """Lose a worker; its engine follows, for vLLM doesn't run on without one."""
        engine = self._pick()
        self.world.random.choice(engine.workers).die()
        self.world.after(20.0, lambda: self._replace(engine))

    def _kill_scheduler(self) -> None:
        engine = self._pick()
        engine.die_scheduler_first()
        self._replace(engine)

    def _kill_engine(self) -> None:
        self._replace(self._pick())

    def _replace(self, engine: Engine) -> None:
        """Let an engine of the same name start, perhaps before the old one's end is noticed."""
        was_replaced = engine not in self.engines
        engine.die_scheduler_first()
        for worker in engine.workers:
            self.world.after(self.copy_delay, worker.die)
        if not was_replaced:
            self.engines.remove(engine)
        if not (was_replaced or self._is_over):
            self._start_engine(engine.name, engine.namespace)

    def _freeze(self) -> None:
        self._pick().freeze(self.world.random.uniform(5.0, 80.0))

    def _duplicate(self) -> None:
        engine = self._pick()
        if len(self.engines) < 5:
            self._start_engine(engine.name, engine.namespace)

    def _misbehave(self) -> None:
        """Ask for what the protocol doesn't allow; the price is the session."""
        engine = self._pick()
        if engine.link is not None and not engine.is_stopping:
            user, key = self.users[0].id, Key(bytes(KEY_BYTES))
            violations = (
                Release(10_000_000),
                Commit(0),
                Abort(10_000_000),
                engine.hello(),
                Lookup(0, user, (), (key,)),
                Acquire(0, user, (key,), 0, (key, key)),
                Reserve(0, user, (key,), 0, 0.0, True),
            )
            engine.link.to_server.send(self.world.random.choice(violations))

    def _change_a_tenant(self) -> None:
        """Set or remove what an operator promises and forbids, as far as that can be."""
        random, habits = self.world.random, self.habits
        name = random.choice(sorted({user.tenant for user in self.users}))
        if self.server is None:
            return
        for _ in range(5):
            limits = _limits(random, habits.pages, habits.page_bytes)
            disk_limits = _disk_limits(random, habits.disk_pages, limits)
            if self.server.set_limits(name, None if random.random() < 0.2 else limits, disk_limits):
                break

    def _erase(self, *, patience: int = 50) -> None:
        """Erase a user, or all of a tenant, preferably while it is read. For good only who gets another name by it."""
        if self.server is None or self.is_calm:
            return
        read = self.server.users_being_read()
        if not read and patience and self.world.chance(0.96):
            self.world.after(2.0, lambda: self._erase(patience=patience - 1))
            return
        user = self.world.random.choice([user for user in self.users if not read or user.id in read])
        is_whole_tenant = self.world.chance(0.2)
        is_for_good = not is_whole_tenant and self.world.chance(0.2)
        self.server.erase(user.tenant, None if is_whole_tenant else user.id, for_good=is_for_good)

    def _stall_the_disk(self) -> None:
        if self.server is not None and self.server.tier is not None:
            self.server.tier.stall(self.world.random.uniform(5.0, 80.0))

    def _restart_server(self) -> None:
        """End the server's process, or the power of its machine; a few of its disks come back smaller."""
        if self.server is not None:
            self.server.crash()
            self.server = None
            if self._platter is not None and self.world.chance(0.3):
                self._platter.lose_power(self.world.random)
            self.world.after(10.0, self._start_server)

    def _start_server(self) -> None:
        pages = self.habits.disk_pages
        self.server = self._new_server(1 + pages // 40 if pages and self.world.chance(0.4) else pages)
        self._servers.append(self.server)

    def _new_server(self, disk_pages: int) -> Server:
        disk_tenants = self.habits.disk_tenants
        if disk_pages < self.habits.disk_pages:
            disk_tenants = {name: replace(limits, guarantee_bytes=0) for name, limits in disk_tenants.items()}
        server = Server(
            self.world,
            self._platter,
            pages=self.habits.pages,
            page_bytes=self.habits.page_bytes,
            disk_pages=disk_pages,
            tenants=self.habits.tenants,
            disk_tenants=disk_tenants,
            in_flight_max_bytes=self.habits.in_flight_max_bytes,
            tenant_by_user={user.id: user.tenant for user in self.users},
            clock_offset=self.world.random.choice((0.0, 1e6)),
            mean_delay=self.habits.message_delay,
            tick_delay=self.habits.tick_delay,
            disk_in_flight_max=self.habits.disk_in_flight_max,
            disk_delay=self.habits.disk_delay,
            disk_failure_rate=self.habits.disk_failure_rate,
        )
        for namespace in self.namespaces:
            for user in self.users:
                for prompt in self.prompts:
                    for key in user.keys(namespace, prompt):
                        server.arena.register(key, namespace.block_bytes)
                    for state in user.states(namespace, prompt):
                        server.arena.register(state, namespace.state_bytes)
        return server


def _tenants(random: Random, pages: int, page_bytes: int) -> dict[str, Limits]:
    """Draw what tenants are configured with, most often such that their guarantees fit beside each other."""
    tenants: dict[str, Limits] = {}
    guaranteed = 0
    for name in random.sample((DEFAULT_TENANT, "acme", "zeta"), random.randint(1, 3)):
        limits = _limits(random, pages, page_bytes)
        guaranteed += limits.guarantee_bytes // page_bytes
        if guaranteed <= pages - -(-pages // 8):
            tenants[name] = limits
    return tenants


def _limits(random: Random, pages: int, page_bytes: int) -> Limits:
    arena = pages * page_bytes
    some = random.randint(arena // 8, arena // 2)
    guarantee = random.choice((0, 0, some, some, 2 * arena // 3, 7 * arena // 8))
    limit = random.choice((None, None, random.randint(arena // 6, arena)))
    return Limits(
        guarantee_bytes=guarantee,
        limit_bytes=None if limit is None else max(limit, guarantee),
        user_limit_bytes=random.choice((None, None, None, random.randint(arena // 6, arena))),
        ttl_seconds=random.choice((None, None, None, random.uniform(10.0, 120.0))),
        weight=random.choice((1.0, 1.0, 0.5, 3.0)),
    )


def _disk_tenants(random: Random, pages: int, tenants: dict[str, Limits]) -> dict[str, Limits]:
    """Draw what the same tenants may do on the disk; its guarantees fit beside each other as well."""
    disk_tenants: dict[str, Limits] = {}
    guaranteed = 0
    for name, limits in tenants.items():
        disk_limits = _disk_limits(random, pages, limits)
        guaranteed += disk_limits.guarantee_bytes // DISK_PAGE_BYTES
        if guaranteed <= pages:
            disk_tenants[name] = disk_limits
    return disk_tenants


def _disk_limits(random: Random, pages: int, limits: Limits) -> Limits:
    """Draw what a tenant may do on a disk; how long its blocks live and what it weighs is the same in both tiers."""
    drawn = _limits(random, pages, DISK_PAGE_BYTES)
    return replace(drawn, ttl_seconds=limits.ttl_seconds, weight=limits.weight)


def _namespace(random: Random, number: int) -> Namespace:
    """Draw a model. One in three has states, smaller or larger than its blocks."""
    world_size, shard_cells = random.choice((1, 1, 2, 3)), random.randint(1, 5)
    state_shard_cells = random.choice((0, 0, random.choice([size for size in range(1, 10) if size != shard_cells])))
    return Namespace(b"model %d" % number, world_size, shard_cells * CELL_BYTES, state_shard_cells * CELL_BYTES)


def _prompts(random: Random) -> list[tuple[int, ...]]:
    """Draw prompts, in tokens of a block each, many of which share their beginnings."""
    prompts: list[tuple[int, ...]] = [()]
    for _ in range(random.randint(2, 12)):
        stem = random.choice(prompts)
        stem = stem[: random.randint(0, len(stem))]
        prompts.append(stem + tuple(random.randint(0, 9) for _ in range(random.randint(1, 3))))
    return prompts[1:]
