"""Questions: what was asked of the server and is not answered yet, and for how long somebody waits for it.

    Lookup, Reserve ──► the answer, in the order of asking
    Acquire ──────────► Acquired, in the order of asking
         └────────────► Loading, in the order of asking ──► Acquired, as soon as the disk is done

While one answer is overdue, nothing more is asked. What the server loads is none of these: a disk may take its time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from saltern.core.messages import Acquired, Loading, LookedUp, Reserved
from saltern.vllm.geometry import Pages
from saltern.vllm.track import Track

Answer = LookedUp | Loading | Acquired | Reserved


@dataclass
class Question:
    """A request to the server that has no answer yet.

    A Reserve has the `pages` of what it offers, blocks `[first_block, end_block)` and perhaps a state, and `held` are
    the engine blocks among them. Where it `is_cut`, blocks before could not be offered any more.
    """

    track: Track
    since: float  # when it was asked, or the server has said that it loads
    pages: Mapping[int, Pages] = field(default_factory=dict)
    held: tuple[int, ...] = ()
    first_block: int = 0
    end_block: int = 0
    is_cut: bool = False
    is_dropped: bool = False  # nobody waits any more: what it brings is given back
    plans: int = 0  # how many steps it has been open

    def fits(self, answer: Answer) -> bool:
        """Return whether an answer stays within what was asked: numbers that don't would end the engine."""
        match answer:
            case LookedUp():
                return not self.pages
            case Loading(blocks=blocks):
                return not self.pages and blocks >= 0
            case Acquired(ready=ready, public=public):
                named = min(ready, len(self.track.public))
                return not self.pages and 0 <= public <= named and ready <= len(self.track.keys)
            case Reserved(grants=grants, upto=upto):
                indices = {grant.index for grant in grants}
                return upto >= 0 and len(indices) == len(grants) and indices <= self.pages.keys()


class Questions:
    """All open questions of a session, by their numbers."""

    def __init__(self, *, patience_seconds: float, load_patience_seconds: float, clock: Callable[[], float]) -> None:
        self._patience_seconds = patience_seconds
        self._load_patience_seconds = load_patience_seconds
        self._clock = clock
        self._asked: dict[int, Question] = {}  # in the order of asking
        self._loading: dict[int, Question] = {}

    def __iter__(self) -> Iterator[Question]:
        yield from self._asked.values()
        yield from self._loading.values()

    def __len__(self) -> int:
        return len(self._asked) + len(self._loading)

    def add(self, number: int, question: Question) -> None:
        """Take note of a question that was sent just now."""
        self._asked[number] = question

    def take(self, answer: Answer) -> Question | None:
        """Return the question that this is the answer to, and close it; None if there is no such (any more)."""
        if isinstance(answer, Acquired) and answer.request in self._loading:
            return self._loading.pop(answer.request)
        return self._asked.pop(answer.request, None)

    def wait_for_disk(self, number: int, question: Question) -> None:
        """Open a question again that the server has answered with `Loading`."""
        question.since = self._clock()
        self._loading[number] = question

    def drop(self, track: Track) -> None:
        """Stop waiting for lookups and acquires of a request; its reservations still stand."""
        for question in self:
            if question.track is track and not question.pages:
                question.is_dropped = True

    def clear(self) -> None:
        """Forget all: the session is lost that could have answered."""
        self._asked.clear()
        self._loading.clear()

    @property
    def responds(self) -> bool:
        """Return whether the server answers: while one answer is overdue, nothing more is asked."""
        oldest = next(iter(self._asked.values()), None)
        return oldest is None or self._clock() - oldest.since < self._patience_seconds or oldest.plans <= 1

    @property
    def are_awaited(self) -> bool:
        """Return whether steps are needed for an answer: to free what is held for it, or to give back what it brings.

        Not for ever: an engine that has nothing else to do doesn't spin for a server that has stopped.
        """
        now = self._clock()
        return any(
            question.held or question.plans == 0 or now - question.since < self._patience_seconds
            for question in self._asked.values()
        ) or any(now - question.since < self._load_patience_seconds for question in self._loading.values())

    def take_overdue(self) -> list[Question]:
        """Count a step, and return the reservations that the server doesn't answer.

        Forgets what it has been loading for too long: should it come, it is given back like any answer to no question.
        """
        now = self._clock()
        for question in self._asked.values():
            question.plans += 1
        self._loading = {
            number: question
            for number, question in self._loading.items()
            if now - question.since < self._load_patience_seconds
        }
        return [
            question
            for question in self._asked.values()
            if question.pages and question.plans > 1 and now - question.since >= self._patience_seconds
        ]
