"""A snapshot: what the cache holds and has decided so far, immutable, for an operator to read."""

from msgspec import Struct


class Counts(Struct, frozen=True, rename="kebab"):
    """Decisions since the server's start, in blocks unless named otherwise."""

    acquires: int = 0  # requests
    hit_blocks: int = 0  # found by an Acquire, those that the engine had itself included
    missed_blocks: int = 0  # asked for by an Acquire and not there
    stored: int = 0  # published without evicting anything for it
    stored_after_evicting: int = 0  # of this tenant: its own, or another user's where the tenant or arena was full
    aborted: int = 0
    evicted: int = 0
    discarded: int = 0  # reported bad, with their continuations
    refused_over_limit: int = 0  # refusals are counted in reservations: what follows a refused block is not tried
    refused_no_room: int = 0
    refused_all_pinned: int = 0
    refused_next_victim: int = 0
    refused_no_parent: int = 0
    refused_no_session: int = 0


class UserStats(Struct, frozen=True, rename="kebab"):
    """One user with blocks in the cache. `user` is the opaque id in hexadecimal."""

    user: str
    blocks: int
    used_bytes: int


class TenantStats(Struct, frozen=True, rename="kebab"):
    """One tenant and its users, the largest first. A limit of None is none."""

    tenant: str
    blocks: int
    used_bytes: int
    limit_bytes: int | None
    user_limit_bytes: int | None
    counts: Counts
    users: tuple[UserStats, ...]
    users_total: int


class SessionStats(Struct, frozen=True, rename="kebab"):
    """One incarnation of one engine."""

    engine: str
    state: str
    workers: int
    block_bytes: int
    read_leases: int
    write_leases: int


class ArenaStats(Struct, frozen=True, rename="kebab"):
    """The RAM tier."""

    total_bytes: int
    used_bytes: int
    page_bytes: int
    blocks: int
    pinned_blocks: int
    writing_blocks: int


class Snapshot(Struct, frozen=True, rename="kebab"):
    """Everything at one moment."""

    arena: ArenaStats
    tenants: tuple[TenantStats, ...]
    sessions: tuple[SessionStats, ...]
