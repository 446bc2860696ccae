"""A snapshot: what the cache holds and has decided so far, immutable, for an operator to read."""

from msgspec import Struct


class Counts(Struct, frozen=True, rename="kebab"):
    """Decisions since the server's start, in blocks unless named otherwise."""

    acquires: int = 0  # requests
    hit_blocks: int = 0  # found by an Acquire, those that the engine had itself included
    public_blocks: int = 0  # of those hit, what the operator has published
    missed_blocks: int = 0  # asked for by an Acquire and not there
    stored: int = 0  # published without evicting anything for it
    stored_after_evicting: int = 0  # of this tenant: its own, or another user's where the tenant or arena was full
    aborted: int = 0
    evicted: int = 0
    discarded: int = 0  # reported bad, with their continuations
    expired: int = 0  # gone because nobody had used them for the tenant's `ttl`
    shortened: int = 0  # requests whose Acquire found more than might be pinned at one time
    refused_over_limit: int = 0  # refusals are counted in reservations: what follows a refused block is not tried
    refused_no_room: int = 0
    refused_all_pinned: int = 0
    refused_next_victim: int = 0
    refused_in_flight: int = 0
    refused_no_parent: int = 0
    refused_no_session: int = 0
    refused_not_published: int = 0
    refused_erased: int = 0
    disk_written: int = 0  # as long as the tenant has something on the disk
    disk_evicted: int = 0
    disk_expired: int = 0
    disk_skipped: int = 0  # not written: the disk was too slow, full or failing, or had no room for this tenant
    disk_loaded: int = 0
    disk_lost: int = 0  # could not be read, or was not what was written


class UserStats(Struct, frozen=True, rename="kebab"):
    """One user with blocks in memory or on disk. `user` is the opaque id in hexadecimal."""

    user: str
    blocks: int
    used_bytes: int
    disk_blocks: int = 0
    disk_used_bytes: int = 0


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
    guarantee_bytes: int = 0
    weight: float = 1.0
    ttl_seconds: float | None = None
    disk_blocks: int = 0
    disk_used_bytes: int = 0
    disk_guarantee_bytes: int = 0
    disk_limit_bytes: int | None = None
    disk_user_limit_bytes: int | None = None


class SessionStats(Struct, frozen=True, rename="kebab"):
    """One incarnation of one engine."""

    engine: str
    state: str
    workers: int
    block_bytes: int
    read_leases: int
    write_leases: int
    root: str = ""  # of its namespace, in hexadecimal
    block_tokens: int = 0


class ArenaStats(Struct, frozen=True, rename="kebab"):
    """The RAM tier."""

    total_bytes: int
    used_bytes: int
    page_bytes: int
    blocks: int
    pinned_blocks: int
    writing_blocks: int


class DiskStats(Struct, frozen=True, rename="kebab"):
    """The disk tier, and what it has decided since the start, in blocks, of whichever tenant."""

    total_bytes: int
    used_bytes: int
    blocks: int
    writing_blocks: int
    reading_blocks: int
    written: int
    evicted: int
    expired: int
    skipped: int
    loaded: int
    lost: int


class ErasedStats(Struct, frozen=True, rename="kebab"):
    """What was held of whoever is erased. What was leased at that time is gone when its leases are."""

    users: int
    ram_bytes: int
    leased_bytes: int
    disk_bytes: int


class PublicationStats(Struct, frozen=True, rename="kebab"):
    """What is published under one name: how many of its blocks are there, and why the last one refused was."""

    publication: str  # in hexadecimal
    label: str
    root: str  # in hexadecimal
    blocks: int
    blocks_ready: int
    used_bytes: int
    refusal: str | None


class Snapshot(Struct, frozen=True, rename="kebab"):
    """Everything at one moment."""

    arena: ArenaStats
    tenants: tuple[TenantStats, ...]
    sessions: tuple[SessionStats, ...]
    publications: tuple[PublicationStats, ...] = ()
    disk: DiskStats | None = None
