"""A simulation: one seed draws the sizes, the load and the faults, lets it all run, and checks after every event."""

from dataclasses import dataclass
from random import Random

from saltern.core.keys import UserKey, unsigned_user_key, user_id
from saltern.core.messages import Abort, Commit, Release
from saltern.core.tenants import Limits
from tests.simulator.claims import Invariant, violated
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
    limits: Limits
    request_delay: float
    message_delay: float
    copy_delay: float
    failure_rate: float
    give_up_rate: float
    fault_delay: float | None
    fault_weights: tuple[float, ...]
    users_share_keys: bool

    @classmethod
    def draw(cls, random: Random) -> "Habits":
        """Draw the habits of a run."""
        pages = random.choice((4, 6, 12, 24, 40))
        page_bytes = random.choice((2, 3, 4))
        arena = pages * page_bytes
        return cls(
            pages=pages,
            page_bytes=page_bytes,
            limits=Limits(
                limit_bytes=random.choice((None, random.randint(arena // 3, 2 * arena))),
                user_limit_bytes=random.choice((None, random.randint(arena // 6, arena))),
            ),
            request_delay=random.choice((2.0, 4.0, 8.0)),
            message_delay=random.choice((0.2, 1.0, 5.0)),
            copy_delay=random.choice((0.5, 2.0, 6.0)),
            failure_rate=random.choice((0.0, 0.0, 0.02, 0.1)),
            give_up_rate=random.choice((0.0, 0.1, 0.4)),
            fault_delay=random.choice((None, 100.0, 40.0, 20.0)),
            fault_weights=tuple(random.choice((0.0, 1.0, 4.0)) for _ in range(9)),
            users_share_keys=random.random() < 0.5,
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
        self.retry_delay = random.choice((2.0, 10.0))
        self.is_calm = False
        self._is_over = False
        self.users = [self._user(number) for number in range(random.randint(1, 4))]
        self.prompts = _prompts(random)
        self.namespaces = [
            Namespace(b"model %d" % number, world_size=random.randint(1, 3), shard_bytes=random.randint(2, 5))
            for number in range(random.randint(1, 2))
        ]
        self.server: Server | None = self._new_server()
        self._servers = [self.server]
        self._names = 0
        self.engines: list[Engine] = []
        for _ in range(random.randint(1, 3)):
            self._start_engine()
        self.world.after(habits.request_delay, self._next_request)
        if habits.fault_delay is not None:
            self.world.after(habits.fault_delay, self._next_fault)

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
        self.server.checker.check_drained()

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
            if engine.pending:
                violated(Invariant.WAITS, f"{engine.name} waits for {engine.pending} for ever")
            if engine.is_alive and not engine.is_attached and not self.is_rival_alive(engine):
                violated(Invariant.WAITS, f"{engine.name} waits for its session for ever")

    # Load

    def _user(self, number: int) -> User:
        own = unsigned_user_key(b"naming secret of the simulation", f"user {number}")
        shared = unsigned_user_key(b"naming secret of the simulation", "everybody")
        key: UserKey = shared if self.habits.users_share_keys else own
        return User(id=user_id(own), key=key)

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
            violations = (Release(10_000_000), Commit(0), Abort(10_000_000), engine.hello())
            engine.link.to_server.send(self.world.random.choice(violations))

    def _restart_server(self) -> None:
        if self.server is not None:
            self.server.crash()
            self.server = None
            self.world.after(10.0, self._start_server)

    def _start_server(self) -> None:
        self.server = self._new_server()
        self._servers.append(self.server)

    def _new_server(self) -> Server:
        server = Server(
            self.world,
            pages=self.habits.pages,
            page_bytes=self.habits.page_bytes,
            limits=self.habits.limits,
            clock_offset=self.world.random.choice((0.0, 1e6)),
            mean_delay=self.habits.message_delay,
        )
        for namespace in self.namespaces:
            for user in self.users:
                for prompt in self.prompts:
                    for key in user.keys(namespace, prompt):
                        server.arena.register(key, namespace.block_bytes)
        return server


def _prompts(random: Random) -> list[tuple[int, ...]]:
    """Draw prompts, in tokens of a block each, many of which share their beginnings."""
    prompts: list[tuple[int, ...]] = [()]
    for _ in range(random.randint(2, 12)):
        stem = random.choice(prompts)
        stem = stem[: random.randint(0, len(stem))]
        prompts.append(stem + tuple(random.randint(0, 9) for _ in range(random.randint(1, 3))))
    return prompts[1:]
