"""The server of a simulation: the real cache behind simulated connections, as its shell would drive it."""

from saltern.core.cache import Cache
from saltern.core.effects import Close, Disconnected, Event, Gone, Received, Send
from saltern.core.messages import GetStats, Reply, Request, Stats
from saltern.core.tenants import Limits
from tests.simulator.arena import Arena
from tests.simulator.claims import Invariant, violated
from tests.simulator.invariants import Checker, check_stats
from tests.simulator.world import Client, Link, World


class Process:
    """What is behind a lifeline: with `outlives_socket` it may touch the arena after its socket is closed."""

    def __init__(self, *, outlives_socket: bool) -> None:
        self.outlives_socket = outlives_socket
        self.is_gone = False


class Server:
    """One life of the server, with an arena of its own."""

    def __init__(
        self, world: World, *, pages: int, page_bytes: int, limits: Limits, clock_offset: float, mean_delay: float
    ) -> None:
        self.arena = Arena(pages=pages, page_bytes=page_bytes)
        self.cache = Cache(pages=pages, page_bytes=page_bytes, limits=limits)
        self.checker = Checker(self.cache, self.arena)
        self.events = 0
        self._world = world
        self._clock_offset = clock_offset
        self._mean_delay = mean_delay
        self._links: dict[int, Link] = {}
        self._process_by_link: dict[int, Process] = {}
        self._lingering: list[int] = []  # closed lifelines whose process may still write

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

    def crash(self) -> None:
        """Die: all connections close, each with or without what was last sent on it."""
        self._world.note("server crashes")
        for link in self._links.values():
            link.to_server.lose()
            link.close_by_server(losing=self._world.chance(0.5))

    def _handle(self, event: Event) -> None:
        now = self._world.now + self._clock_offset
        self._world.note("server ◄", event)
        try:
            effects = self.cache.handle(event, now)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            violated(Invariant.NO_CRASH, f"{event} raised {error!r}")
        self.events += 1
        self.checker.check(event, effects, now)
        for effect in effects:
            self._world.note("       ►", effect)
            match effect:
                case Send(connection, message):
                    self._send(self._links[connection], message)
                case Close(connection):
                    self._close(self._links[connection])
                case _:
                    pass

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
        self._page_bytes = page_bytes
        link = server.connect(self)
        link.to_server.send(GetStats())

    def receive(self, link: Link, message: Reply) -> None:
        """Check the answer, and go."""
        if isinstance(message, Stats):
            check_stats(message, self._page_bytes)
        link.close_by_client()

    def end(self, link: Link) -> None:
        """The server is gone."""
