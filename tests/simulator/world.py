"""The world of a simulation: its clock, its chance, and connections that delay, keep order and break.

Time is in milliseconds of nobody's clock. Everything that happens is a callable on one agenda, drawn and
ordered by one seed, so the same seed is the same run to the last message.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Generic, Protocol, TypeVar

from saltern.core.messages import Reply, Request

Message = TypeVar("Message")


class World:
    """The clock, the agenda and the only source of chance."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.verbose = verbose
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do `action` at `time`, after whatever was already planned for that very time."""
        heappush(self._agenda, (time, next(self._ties), action))

    def after(self, mean: float, action: Callable[[], None]) -> None:
        """Do `action` after a delay of `mean` on average, so that any two things may come in either order."""
        self.at(self.now + self.random.expovariate(1 / mean), action)

    def chance(self, probability: float) -> bool:
        """Return True that often."""
        return self.random.random() < probability

    def run(self, *, until: float | None = None, steps_max: int = 20_000) -> bool:
        """Let things happen up to a time, or until nothing is left to happen; False if that never comes."""
        for _ in range(steps_max):
            if not self._agenda or (until is not None and self._agenda[0][0] > until):
                return True
            self.now, _, action = heappop(self._agenda)
            self.steps += 1
            action()
        return False

    def note(self, *words: object) -> None:
        """Tell what happened, where somebody watches."""
        if self.verbose:
            print(f"{self.steps:6} {self.now:9.3f}", *words)


class Pipe(Generic[Message]):
    """One direction of a connection: late, but in order; whatever is in flight can be lost. None is its end."""

    def __init__(self, world: World, mean_delay: float, deliver: Callable[[Message | None], None]) -> None:
        self._world = world
        self._mean_delay = mean_delay
        self._deliver = deliver
        self._last = 0.0
        self._in_flight: deque[Message | None] = deque()
        self._frozen = False

    def send(self, message: Message | None) -> None:
        """Send a message, or the end."""
        self._last = max(self._last, self._world.now + self._world.random.expovariate(1 / self._mean_delay))
        self._in_flight.append(message)
        in_flight = self._in_flight
        self._world.at(self._last, lambda: self._arrive(in_flight))

    def lose(self) -> None:
        """Lose all that is in flight."""
        self._in_flight = deque()

    def freeze(self) -> None:
        """Keep what arrives from being received until `thaw()`."""
        self._frozen = True

    def thaw(self) -> None:
        """Receive what has piled up, as one goes on."""
        if self._frozen:
            self._frozen = False
            in_flight = self._in_flight
            for _ in range(len(in_flight)):
                self._world.at(max(self._last, self._world.now), lambda: self._arrive(in_flight))

    def _arrive(self, in_flight: deque[Message | None]) -> None:
        if in_flight is self._in_flight and in_flight and not self._frozen:
            self._deliver(in_flight.popleft())


class Listener(Protocol):
    """The server's end of connections."""

    def receive(self, link: "Link", message: Request) -> None:
        """Take a message."""

    def end(self, link: "Link") -> None:
        """Notice that the client's end is closed."""


class Client(Protocol):
    """The other end of a connection: a scheduler, a worker or an operator."""

    def receive(self, link: "Link", message: Reply) -> None:
        """Take a message."""

    def end(self, link: "Link") -> None:
        """Notice that the server's end is closed."""


class Link:
    """One connection. Its two pipes keep their order and know nothing of any other connection's."""

    def __init__(self, world: World, number: int, server: Listener, client: Client, *, mean_delay: float) -> None:
        self.number = number
        self.server = server
        self.client = client
        self.client_open = True
        self.server_open = True
        self.to_server: Pipe[Request] = Pipe(world, mean_delay, self._at_server)
        self.to_client: Pipe[Reply] = Pipe(world, mean_delay, self._at_client)

    def close_by_client(self, *, losing: bool = False) -> None:
        """Close the client's end; with `losing`, what it sent last is lost."""
        if self.client_open:
            self.client_open = False
            if losing:
                self.to_server.lose()
            self.to_server.send(None)

    def close_by_server(self, *, losing: bool = False) -> None:
        """Close the server's end; what was sent before still arrives, unless `losing`."""
        if self.server_open:
            self.server_open = False
            if losing:
                self.to_client.lose()
            self.to_client.send(None)

    def cut(self) -> None:
        """Break the connection with everything in flight in either direction; both ends notice some time later."""
        self.to_server.lose()
        self.to_client.lose()
        self.to_server.send(None)
        self.to_client.send(None)

    def _at_server(self, message: Request | None) -> None:
        if not self.server_open:
            return
        if message is None:
            self.close_by_server()
            self.server.end(self)
        else:
            self.server.receive(self, message)

    def _at_client(self, message: Reply | None) -> None:
        if not self.client_open:
            return
        if message is None:
            self.close_by_client()
            self.client.end(self)
        else:
            self.client.receive(self, message)
