"""The server of a simulation: the real cache behind simulated connections, as its shell would drive it."""

from collections.abc import Mapping

from saltern.core.cache import Cache
from saltern.core.effects import (
    Close,
    Disconnected,
    Effect,
    Erased,
    Event,
    ForgetRecords,
    Gone,
    ReadRecord,
    Received,
    Send,
    TenantRemoved,
    TenantSet,
    Tick,
    WipePages,
    WriteRecord,
)
from saltern.core.keys import UserId
from saltern.core.messages import GetStats, Reply, Request, Stats
from saltern.core.tenants import Limits
from tests.simulator.arena import Arena
from tests.simulator.claims import Invariant, violated
from tests.simulator.disk import DiskTier, Platter
from tests.simulator.erasures import Erasures
from tests.simulator.invariants import Checker, check_stats
from tests.simulator.world import Client, Link, World


class Process:
    """What is behind a lifeline: with `outlives_socket` it may touch the arena after its socket is closed."""

    def __init__(self, *, outlives_socket: bool) -> None:
        self.outlives_socket = outlives_socket
        self.is_gone = False


class Server:
    """One life of the server, with an arena of its own; with a `platter` it has a disk, as earlier ones left it."""

    def __init__(
        self,
        world: World,
        platter: Platter | None,
        *,
        pages: int,
        page_bytes: int,
        disk_pages: int,
        tenants: Mapping[str, Limits],
        disk_tenants: Mapping[str, Limits],
        in_flight_max_bytes: int | None,
        tenant_by_user: Mapping[UserId, str],
        clock_offset: float,
        mean_delay: float,
        tick_delay: float,
        disk_in_flight_max: int,
        disk_delay: float,
        disk_failure_rate: float,
    ) -> None:
        self.erasures = Erasures(tenant_by_user, clock_offset)
        self.arena = Arena(pages=pages, page_bytes=page_bytes, erasures=self.erasures)
        self.cache = Cache(
            pages=pages,
            page_bytes=page_bytes,
            tenants=tenants,
            in_flight_max_bytes=in_flight_max_bytes,
            disk_pages=disk_pages if platter is not None else 0,
            disk_tenants=disk_tenants,
        )
        self.cache.disk.writes_in_flight_max = self.cache.disk.reads_in_flight_max = disk_in_flight_max
        self.cache.answered_blocks_max = disk_in_flight_max
        self.cache.erased_bytes_max = disk_in_flight_max * page_bytes
        self.tier: DiskTier | None = None
        if platter is not None:
            self.tier = DiskTier(
                world,
                platter,
                self.arena,
                self._handle,
                mean_delay=disk_delay,
                failure_rate=disk_failure_rate,
                clock_offset=clock_offset,
            )
        self.checker = Checker(
            self.cache,
            self.arena,
            self.tier,
            self.erasures,
            tenants=tenants,
            disk_tenants=disk_tenants,
            in_flight_max_bytes=in_flight_max_bytes,
        )
        self.events = 0
        self._world = world
        self._clock_offset = clock_offset
        self._mean_delay = mean_delay
        self._tick_delay = tick_delay
        self._tick_late = tick_delay
        self._tick_at: float | None = None
        self._is_down = False
        self._links: dict[int, Link] = {}
        self._process_by_link: dict[int, Process] = {}
        self._lingering: list[int] = []  # closed lifelines whose process may still write
        if self.tier is not None:
            self._restore(self.tier.platter)

    @property
    def now(self) -> float:
        """Return the time by this server's clock."""
        return self.time(self._world.now)

    def time(self, time: float) -> float:
        """Return what a time of the world's is by this server's clock."""
        return time + self._clock_offset

    def connect(self, client: Client, process: Process | None = None) -> Link:
        """Accept a connection, from a worker if there is a `process` behind it."""
        link = Link(self._world, len(self._links) + 1, self, client, mean_delay=self._mean_delay)
        self._links[link.number] = link
        if process is not None:
            self._process_by_link[link.number] = process
        return link

    def receive(self, link: Link, message: Request) -> None:
        """Take a message."""
        self._handle(Received(link.number, message))

    def end(self, link: Link) -> None:
        """A connection is closed; whoever was behind it is gone with it, unless its device may still write."""
        self._handle(Disconnected(link.number))
        process = self._process_by_link.get(link.number)
        if process is not None and process.outlives_socket and not process.is_gone:
            self._lingering.append(link.number)
        else:
            self._handle(Gone(link.number))

    def process_ended(self, process: Process) -> None:
        """The kernel says that a process has ended."""
        ended = [number for number in self._lingering if self._process_by_link[number] is process]
        for number in ended:
            self._lingering.remove(number)
            self._handle(Gone(number))

    def set_limits(self, name: str, limits: Limits | None, disk_limits: Limits) -> bool:
        """Let an operator change what a tenant may do, if it can be; return whether it could."""
        settings = {**self.checker.settings, name: limits or Limits()}
        disk_settings = {**self.checker.disk_settings, name: disk_limits if limits is not None else Limits()}
        if self.cache.check_tenants(settings, disk_settings) is not None:
            return False
        self._handle(TenantRemoved(name) if limits is None else TenantSet(name, limits, disk_limits))
        return True

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> None:
        """Let an operator erase: first the keys go, then the cache hears of it, then there may be new ones."""
        if self.tier is not None:
            self.tier.destroy_keys(tenant, user, for_good=for_good)
        delay = self._world.random.choice((0.1, self._mean_delay))
        self._world.after(delay, lambda: self._erase(tenant, user, for_good=for_good))

    def _erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> None:
        if self._is_down:
            return
        self._handle(Erased(tenant, user, for_good))
        if self.tier is not None:
            tier, after = self.tier, self.cache.last_op
            self._world.after(self._mean_delay, lambda: tier.allow(tenant, user, after))

    def users_being_read(self) -> set[UserId]:
        """Return whose blocks are on their way from the disk."""
        return {record.name.user for record, _ in self.cache.disk.reads.values()}

    def note_touched(self) -> None:
        """Have the disk know what was used lately, as a shell does now and then."""
        if self.tier is not None:
            self.tier.note_touched(self.cache.disk.take_touched())

    def crash(self) -> None:
        """Die: all connections close, each with or without what was last sent on it."""
        self._is_down = True
        if self.tier is not None:
            self.tier.crash()
        self.checker.witness.verify()
        self._world.note("server crashes")
        for link in self._links.values():
            link.to_server.lose()
            link.close_by_server(losing=self._world.chance(0.5))

    def _restore(self, platter: Platter) -> None:
        """Know what earlier servers have left, before anything else happens."""
        for (tenant, user), (at, for_good) in platter.erased.items():
            self.erasures.add(tenant, user, at=self.time(at), told_at=self.now, for_good=for_good)
        erased = [(tenant, user, for_good) for (tenant, user), (_, for_good) in platter.erased.items()]
        effects = self.cache.restore(platter.stored_records(self.now, self._clock_offset), erased, self.now)
        self.checker.check_restored(effects, self.now)
        self._perform(effects)

    def _handle(self, event: Event) -> None:
        if self._is_down:
            return
        self._world.note("server ◄", event)
        try:
            effects = self.cache.handle(event, self.now)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            violated(Invariant.NO_CRASH, f"{event} raised {error!r}")
        self.events += 1
        self.checker.check(event, effects, self.now)
        self._perform(effects)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._world.note("       ►", effect)
            match effect:
                case Send(connection, message):
                    self._send(self._links[connection], message)
                case Close(connection):
                    self._close(self._links[connection])
                case WipePages(extent):
                    self.arena.wipe(extent)
                case WriteRecord() | ReadRecord() | ForgetRecords():
                    assert self.tier is not None, "a cache without a disk asks for nothing of it"
                    self.tier.perform(effect)
                case _:
                    pass
        self.checker.check_wiped()
        self._plan_tick()

    def _plan_tick(self) -> None:
        """Come back when the cache says so, or later: a loop sleeps no longer than that, but may have much to do."""
        due_at = self.cache.due_at
        if due_at is not None:
            tick_at = max(due_at - self._clock_offset, self._world.now) + self._tick_late
            if self._tick_at is None or tick_at < self._tick_at:
                self._tick_at = tick_at
                self._world.at(tick_at, self._tick)

    def _tick(self) -> None:
        if self._tick_at == self._world.now:
            self._tick_at = None
            self._tick_late = self._world.random.choice((0.0, self._tick_delay))
            self._handle(Tick())

    def _send(self, link: Link, message: Reply) -> None:
        if link.server_open:
            link.to_client.send(message)

    def _close(self, link: Link) -> None:
        if link.server_open:
            link.close_by_server()
            link.to_server.lose()
            self._world.after(self._mean_delay, lambda: self.end(link))


class Operator:
    """Somebody who looks at the statistics."""

    def __init__(self, server: Server, page_bytes: int) -> None:
        self._server = server
        self._page_bytes = page_bytes
        link = server.connect(self)
        link.to_server.send(GetStats())

    def receive(self, link: Link, message: Reply) -> None:
        """Check the answer, and go."""
        if isinstance(message, Stats):
            check_stats(message, self._page_bytes, is_erasing=bool(self._server.erasures))
        link.close_by_client()

    def end(self, link: Link) -> None:
        """The server is gone."""
