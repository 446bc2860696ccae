"""How a cache is described to an operator: what its counts and sums are taken from."""

from heapq import nlargest
from typing import TYPE_CHECKING

from saltern.core.blocks import Block, BlockState
from saltern.core.disk import DISK_PAGE_BYTES, Disk, StoredBlock
from saltern.core.keys import UserId
from saltern.core.messages import PUBLIC_TENANT, PUBLIC_USER, Refusal
from saltern.core.publications import Publication
from saltern.core.snapshot import (
    ArenaStats,
    Counts,
    DiskStats,
    ErasedStats,
    PublicationStats,
    SessionStats,
    Snapshot,
    TenantStats,
    UserStats,
)
from saltern.core.tenants import NO_LIMITS, B, Tally, Tenant, User

if TYPE_CHECKING:
    from saltern.core.cache import Cache

USERS_SHOWN = 1_000
"""Most users in a snapshot, the largest first: ten thousand would still fit a frame, a million not."""


def describe(cache: "Cache") -> Snapshot:
    """Describe everything as of now; the cost is linear in the users, not in the blocks."""
    leases = [lease for session in cache.sessions for lease in session.lease_by_id.values()]
    names = dict.fromkeys((*cache.tenant_by_name, *cache.disk.shares.tenant_by_name))
    tenants = tuple(_tenant_stats(cache, name) for name in names)
    return Snapshot(
        arena=ArenaStats(
            total_bytes=cache.pool.pages * cache.page_bytes,
            used_bytes=(cache.pool.pages - cache.pool.free_pages) * cache.page_bytes,
            page_bytes=cache.page_bytes,
            blocks=sum(tenant.blocks for tenant in tenants),
            pinned_blocks=len({id(block) for lease in leases if not lease.is_write for block in lease.blocks}),
            writing_blocks=sum(len(lease.blocks) for lease in leases if lease.is_write),
        ),
        tenants=tenants,
        sessions=tuple(
            SessionStats(
                engine=session.engine,
                state=session.state.value,
                workers=len(session.workers),
                block_bytes=session.block_bytes,
                read_leases=sum(not lease.is_write for lease in session.lease_by_id.values()),
                write_leases=sum(lease.is_write for lease in session.lease_by_id.values()),
                root=session.root.hex(),
                block_tokens=session.block_tokens,
            )
            for session in cache.sessions
        ),
        publications=describe_publications(cache),
        disk=_disk_stats(cache.disk),
    )


def describe_publications(cache: "Cache") -> tuple[PublicationStats, ...]:
    """Describe what is published, the oldest first; the cost is linear in its blocks."""
    return tuple(_publication_stats(cache, publication) for publication in cache.publication_by_id.values())


def describe_erasable(cache: "Cache", tenant_name: str, user_id: UserId | None) -> ErasedStats:
    """Say what a user holds in all tiers, or with None all users of a tenant; what is leased is gone only later."""
    in_ram = _users(cache.tenant_by_name.get(tenant_name), user_id)
    on_disk = _users(cache.disk.shares.tenant_by_name.get(tenant_name), user_id)
    leased = {id(b): b for session in cache.sessions for lease in session.lease_by_id.values() for b in lease.blocks}
    users = {user.id for user in in_ram}
    return ErasedStats(
        users=len(users | {user.id for user in on_disk}),
        ram_bytes=sum(user.used_pages for user in in_ram) * cache.page_bytes,
        leased_bytes=sum(
            block.pages for block in leased.values() if block.user.id in users and block.user.tenant.name == tenant_name
        )
        * cache.page_bytes,
        disk_bytes=sum(user.used_pages for user in on_disk) * DISK_PAGE_BYTES,
    )


def _users(tenant: Tenant[B] | None, user_id: UserId | None) -> list[User[B]]:
    users = tenant.user_by_id.values() if tenant is not None else ()
    return [user for user in users if user_id in (None, user.id)]


def _tenant_stats(cache: "Cache", name: str) -> TenantStats:
    tenant, stored = cache.tenant_by_name.get(name), cache.disk.shares.tenant_by_name.get(name)
    users, records = _users(tenant, None), _users(stored, None)
    limits = tenant.limits if tenant is not None else NO_LIMITS
    disk_limits = stored.limits if stored is not None else NO_LIMITS
    return TenantStats(
        tenant=name,
        blocks=sum(len(user.block_by_key) for user in users),
        used_bytes=tenant.used_pages * cache.page_bytes if tenant is not None else 0,
        limit_bytes=limits.limit_bytes,
        user_limit_bytes=limits.user_limit_bytes,
        guarantee_bytes=limits.guarantee_bytes,
        weight=limits.weight,
        ttl_seconds=limits.ttl_seconds,
        counts=_counts(
            tenant.tally if tenant is not None else Tally(), stored.tally if stored is not None else Tally()
        ),
        users=_user_stats(cache, users, records),
        users_total=len({user.id for user in users} | {user.id for user in records}),
        disk_blocks=sum(len(user.block_by_key) for user in records),
        disk_used_bytes=stored.used_pages * DISK_PAGE_BYTES if stored is not None else 0,
        disk_guarantee_bytes=disk_limits.guarantee_bytes,
        disk_limit_bytes=disk_limits.limit_bytes,
        disk_user_limit_bytes=disk_limits.user_limit_bytes,
    )


def _user_stats(cache: "Cache", users: list[User[Block]], records: list[User[StoredBlock]]) -> tuple[UserStats, ...]:
    """Describe the users with most in memory, and among those with nothing there, with most on disk."""
    in_ram, on_disk = ({user.id: user.used_pages for user in each} for each in (users, records))
    blocks, disk_blocks = ({user.id: len(user.block_by_key) for user in each} for each in (users, records))
    largest = nlargest(USERS_SHOWN, {**in_ram, **on_disk}, key=lambda id_: (in_ram.get(id_, 0), on_disk.get(id_, 0)))
    return tuple(
        UserStats(
            user=id_.hex(),
            blocks=blocks.get(id_, 0),
            used_bytes=in_ram.get(id_, 0) * cache.page_bytes,
            disk_blocks=disk_blocks.get(id_, 0),
            disk_used_bytes=on_disk.get(id_, 0) * DISK_PAGE_BYTES,
        )
        for id_ in largest
    )


def _disk_stats(disk: Disk) -> DiskStats | None:
    if not disk.pool.pages:
        return None
    tenants = disk.shares.tenant_by_name.values()
    return DiskStats(
        total_bytes=disk.pool.pages * DISK_PAGE_BYTES,
        used_bytes=(disk.pool.pages - disk.pool.free_pages) * DISK_PAGE_BYTES,
        blocks=sum(len(user.block_by_key) for tenant in tenants for user in tenant.user_by_id.values()),
        writing_blocks=len(disk.writes),
        reading_blocks=len(disk.reads),
        written=disk.tally.stored,
        evicted=disk.tally.evicted,
        expired=disk.tally.expired,
        skipped=disk.tally.skipped,
        loaded=disk.tally.loaded,
        lost=disk.tally.lost,
    )


def _publication_stats(cache: "Cache", publication: Publication) -> PublicationStats:
    tenant = cache.tenant_by_name.get(PUBLIC_TENANT)
    user = tenant.user_by_id.get(PUBLIC_USER) if tenant is not None else None
    block_by_key = user.block_by_key if user is not None else {}
    blocks = [block_by_key[key] for key in publication.keys if key in block_by_key]
    ready = [block for block in blocks if block.state is BlockState.READY]
    return PublicationStats(
        publication=publication.id.hex(),
        label=publication.label,
        root=publication.root.hex(),
        blocks=publication.blocks,
        blocks_ready=len(ready),
        used_bytes=sum(block.pages for block in blocks) * cache.page_bytes,
        refusal=publication.refusal,
    )


def _counts(tally: Tally, disk: Tally) -> Counts:
    return Counts(
        acquires=tally.acquires,
        hit_blocks=tally.hit_blocks,
        missed_blocks=tally.missed_blocks,
        stored=tally.stored,
        stored_after_evicting=tally.stored_after_evicting,
        aborted=tally.aborted,
        evicted=tally.evicted,
        discarded=tally.discarded,
        expired=tally.expired,
        shortened=tally.shortened,
        public_blocks=tally.public_blocks,
        disk_written=disk.stored,
        disk_evicted=disk.evicted,
        disk_expired=disk.expired,
        disk_skipped=disk.skipped,
        disk_loaded=disk.loaded,
        disk_lost=disk.lost,
        **{f"refused_{reason.value.replace('-', '_')}": tally.refusals.get(reason.value, 0) for reason in Refusal},
    )
