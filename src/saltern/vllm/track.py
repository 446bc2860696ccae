"""A track: one request as the planner sees it, from its arrival to its end.

What it waits for, and what becomes of it (`Phase`):

              first ask                Acquired                 admitted with a hit
    IDLE ───────────────────► ASKED ───────────────► ANSWERED ─────────────────────► LOADING
     ▲                        │ ▲ │ Loading            ▲ │                              │
     │        patience is out │ │ ▼                    │ │ nothing beyond               ▼ admitted a second
     │                        │ │ COMING ──────────────┘ │ what the engine has         IDLE   time, loaded
     │                        │ │ ▼ that takes too long  │
     │                        │ LATE                     │
     │                        ▼                          ▼
     └──────────────────────  MISSED  ◄──────────────────┘
        admitted; a further ask comes only after a preemption, and starts anew
"""

from array import array
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from saltern.core.keys import Content, Key, UserId, UserKey
from saltern.core.messages import DEFAULT_TENANT, Acquired, PublicationId


class EngineRequest(Protocol):
    """What is read of vLLM's request. It is live: vLLM updates it in place."""

    request_id: str
    num_computed_tokens: int
    num_output_placeholders: int
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are known."""

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Return the ids of the known tokens."""


class Phase(Enum):
    """Where a request stands with us; see the drawing above."""

    IDLE = "idle"
    ASKED = "asked"
    COMING = "coming"  # from the server's disk
    LATE = "late"  # the disk is, or would be: what is there without it is asked for
    ANSWERED = "answered"
    MISSED = "missed"
    LOADING = "loading"


class Track:
    """One request: its identity, its growing chain of keys, and its phase."""

    def __init__(self, request: EngineRequest, salt: str, extras: bytes, *, began_at: float = 0.0) -> None:
        self.request = request
        self.salt = salt
        self.extras = extras
        self.began_at = began_at  # by the machine's monotonic clock
        self.publication: PublicationId | None = None  # of which this is the prompt
        self.phase = Phase.IDLE
        self.load_failed = False  # then it matches nothing for the rest of its life
        self.is_outdated = False  # what it computes or needs is of weights that are no more
        self.incarnation = b""  # of the session that the fields below belong to
        self.tenant = DEFAULT_TENANT
        self.user_key = UserKey(b"")
        self.user = UserId(b"")
        self.is_cached = True
        self.tokens = array("i")
        self.content = Content(b"")  # of the last key
        self.keys: list[Key] = []
        self.public: list[Key] = []  # what the first of them are called where they are published
        self.states: list[Key] = []  # of the state behind each of the keys, for models that have states
        self.start = 0  # first block asked for
        self.asked_at = 0.0
        self.waits_until = 0.0
        self.asks = 0
        self.awaited = 0  # number of the last Acquire: an answer to an earlier one only tells the time
        self.looked_up: int | None = None  # blocks that the early lookup saw
        self.looked_up_at = 0.0
        self.with_disk = True  # the last Acquire may wait for the server's disk
        self.coming_blocks = 0  # from there, that it waits for
        self.acquired: Acquired | None = None
        self.acquired_at = float("inf")  # until the server has named a time: then it counts the Reserve's own
        self.offered = 0  # blocks [0, offered) are in the cache or were offered to it
        self.settled = 0  # blocks [offered, settled) were turned down: they are offered again with the next block only
        self.state_offered = 0  # behind this many blocks
