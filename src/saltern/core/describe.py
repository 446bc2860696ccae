"""How a cache is described to an operator: what its counts and sums are taken from."""

from collections.abc import Mapping
from itertools import islice
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
"""Most users of all tenants in a snapshot, the largest first: a millisecond, for which lookups wait."""

USERS_SHOWN_AT_LEAST = 20
"""Of each tenant, however many there are."""


def describe(cache: "Cache") -> Snapshot:
    """Describe everything as of now; the cost is linear in the tenants, not in their users or blocks."""
    names = dict.fromkeys((*cache.tenant_by_name, *cache.disk.shares.tenant_by_name))
    with_users = sum(cache.census.users(name) > 0 for name in names)
    users_shown = max(USERS_SHOWN // max(with_users, 1), USERS_SHOWN_AT_LEAST)
    tenants = tuple(_tenant_stats(cache, name, users_shown) for name in names)
    owners = cache.tenant_by_name.values()
    return Snapshot(
        arena=ArenaStats(
            total_bytes=cache.pool.pages * cache.page_bytes,
            used_bytes=(cache.pool.pages - cache.pool.free_pages) * cache.page_bytes,
            page_bytes=cache.page_bytes,
            blocks=sum(tenant.blocks for tenant in tenants),
            pinned_blocks=sum(owner.held_blocks - owner.leased_to_write for owner in owners if not owner.is_pool),
            writing_blocks=sum(owner.leased_to_write for owner in owners),
        ),
        tenants=tenants,
        sessions=tuple(
            SessionStats(
                engine=session.engine,
                state=session.state.value,
                workers=len(session.workers),
                block_bytes=session.block_bytes,
                read_leases=len(session.lease_by_id) - session.write_leases,
                write_leases=session.write_leases,
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
    """Say what a user holds in all tiers, or with None all users of a tenant; what is pinned is gone only later.

    Of a whole tenant, what remains of users who were erased before counts as well.
    """
    tenant, stored = cache.tenant_by_name.get(tenant_name), cache.disk.shares.tenant_by_name.get(tenant_name)
    in_ram = _holder(tenant, user_id)
    on_disk = _holder(stored, user_id)
    users = cache.census.users(tenant_name) if user_id is None else in_ram is not None or on_disk is not None
    return ErasedStats(
        users=int(users),
        ram_bytes=in_ram.used_pages * cache.page_bytes if in_ram is not None else 0,
        leased_bytes=in_ram.held_pages * cache.page_bytes if in_ram is not None else 0,
        disk_bytes=on_disk.used_pages * DISK_PAGE_BYTES if on_disk is not None else 0,
    )


def _holder(tenant: Tenant[B] | None, user_id: UserId | None) -> Tenant[B] | User[B] | None:
    return tenant if tenant is None or user_id is None else tenant.user_by_id.get(user_id)


def _tenant_stats(cache: "Cache", name: str, users_shown: int) -> TenantStats:
    tenant, stored = cache.tenant_by_name.get(name), cache.disk.shares.tenant_by_name.get(name)
    limits = tenant.limits if tenant is not None else NO_LIMITS
    disk_limits = stored.limits if stored is not None else NO_LIMITS
    return TenantStats(
        tenant=name,
        blocks=tenant.blocks if tenant is not None else 0,
        used_bytes=tenant.used_pages * cache.page_bytes if tenant is not None else 0,
        limit_bytes=limits.limit_bytes,
        user_limit_bytes=limits.user_limit_bytes,
        guarantee_bytes=limits.guarantee_bytes,
        weight=limits.weight,
        ttl_seconds=limits.ttl_seconds,
        counts=_counts(
            tenant.tally if tenant is not None else Tally(), stored.tally if stored is not None else Tally()
        ),
        users=_user_stats(cache, tenant, stored, users_shown),
        users_total=cache.census.users(name),
        disk_blocks=stored.blocks if stored is not None else 0,
        disk_used_bytes=stored.used_pages * DISK_PAGE_BYTES if stored is not None else 0,
        disk_guarantee_bytes=disk_limits.guarantee_bytes,
        disk_limit_bytes=disk_limits.limit_bytes,
        disk_user_limit_bytes=disk_limits.user_limit_bytes,
    )


def _user_stats(
    cache: "Cache", tenant: Tenant[Block] | None, stored: Tenant[StoredBlock] | None, users_shown: int
) -> tuple[UserStats, ...]:
    """Describe the users with most in memory, and among those with nothing there, with most on disk.

    Whoever isn't shown has less than twice what the least of those has who are: sizes are known by their bits.
    """
    in_ram: Mapping[UserId, User[Block]] = tenant.user_by_id if tenant is not None else {}
    on_disk: Mapping[UserId, User[StoredBlock]] = stored.user_by_id if stored is not None else {}
    shown = [user.id for user in islice(tenant.largest_users(), users_shown)] if tenant is not None else []
    if stored is not None and len(shown) < users_shown:  # then all who are in memory are in there
        others = (user.id for user in stored.largest_users() if user.id not in in_ram)
        shown += islice(others, users_shown - len(shown))
    users = [
        UserStats(
            user=id_.hex(),
            blocks=len(in_ram[id_].block_by_key) if id_ in in_ram else 0,
            used_bytes=in_ram[id_].used_pages * cache.page_bytes if id_ in in_ram else 0,
            disk_blocks=len(on_disk[id_].block_by_key) if id_ in on_disk else 0,
            disk_used_bytes=on_disk[id_].used_pages * DISK_PAGE_BYTES if id_ in on_disk else 0,
        )
        for id_ in shown
    ]
    return tuple(sorted(users, key=lambda user: (user.used_bytes, user.disk_used_bytes), reverse=True))


def _disk_stats(disk: Disk) -> DiskStats | None:
    if not disk.pool.pages:
        return None
    tenants = disk.shares.tenant_by_name.values()
    return DiskStats(
        total_bytes=disk.pool.pages * DISK_PAGE_BYTES,
        used_bytes=(disk.pool.pages - disk.pool.free_pages) * DISK_PAGE_BYTES,
        blocks=sum(tenant.blocks for tenant in tenants),
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
