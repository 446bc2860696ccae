"""Tests of the public pool: all users read what is published, the operator alone decides what that is."""

from hashlib import blake2b
from itertools import count
from random import Random

import pytest

from saltern.core.blocks import Block, BlockState
from saltern.core.effects import (
    Effect,
    Event,
    KeepPublication,
    Loss,
    PublicationAdded,
    PublicationRemoved,
    ReadRecord,
    RecordLost,
    StoredPublication,
    StoredRecord,
    TenantSet,
)
from saltern.core.keys import Key, UserId
from saltern.core.messages import (
    PUBLIC_TENANT,
    PUBLIC_USER,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    NamespaceChanged,
    PublicationId,
    PublicDepth,
    Refusal,
    Release,
    Reserve,
    Reserved,
    SchedulerHello,
)
from saltern.core.snapshot import PublicationStats
from saltern.core.tenants import Limits

from .rig import ALICE, BOB, CAROL, PAGE_BYTES, keys
from .test_disk import DiskRig, Work

ROOT, OTHER_ROOT = b"r" * 32, b"o" * 32
SYSTEM, OTHER = PublicationId(b"system".ljust(16, b".")), PublicationId(b"other".ljust(16, b"."))


def public(prompt: str) -> tuple[Key, ...]:
    """Name the blocks of a prompt as they are called where they are published."""
    return tuple(Key(blake2b(key, digest_size=32, person=b"public").digest()) for key in keys(prompt))


class Pool(DiskRig):
    """A cache with a public pool of `public_pages`, of which one engine says how deep it is."""

    def __init__(self, *, pages: int = 16, public_pages: int = 4, disk_pages: int = 0) -> None:
        super().__init__(pages=pages, disk_pages=disk_pages)
        self.kept: dict[PublicationId, StoredPublication] = {}
        guarantee = Limits(guarantee_bytes=public_pages * PAGE_BYTES)
        self.cache.shares.set_limits(PUBLIC_TENANT, guarantee)
        self.numbers = count(1)
        self.worker(b"engine")
        self.engine_id = self.connect()
        name = b"engine".ljust(16, b".")
        self.say(self.engine_id, SchedulerHello("engine", b"i" * 16, (name,), PAGE_BYTES, root=ROOT, block_tokens=128))

    def handle(self, event: Event) -> list[Effect]:
        effects = super().handle(event)
        for effect in effects:
            if isinstance(effect, KeepPublication):
                self.kept[effect.publication.id] = effect.publication
        return effects

    def add(self, publication: PublicationId, prompt: str, root: bytes = ROOT) -> None:
        self.handle(PublicationAdded(publication, root=root, blocks=len(prompt), label="a prompt"))

    def fill(self, publication: PublicationId, prompt: str, *, commit: bool = True) -> Reserved:
        """Store a publication's blocks, as the engine does that computes them."""
        ask = Reserve(next(self.numbers), UserId(publication), public(prompt), 0, self.now + 1.0, tenant=PUBLIC_TENANT)
        self.say(self.engine_id, ask)
        (answer,) = self.sent(Reserved)
        if answer.lease and commit:
            self.say(self.engine_id, Commit(answer.lease))
        return answer

    def publish(self, publication: PublicationId, prompt: str) -> None:
        self.add(publication, prompt)
        assert self.fill(publication, prompt).refusal is None

    def find(self, user: UserId, prompt: str, start: int = 0, *, release: bool = True) -> Acquired:
        start = min(start, len(prompt))
        self.say(self.engine_id, Acquire(next(self.numbers), user, keys(prompt), start, public=public(prompt)))
        (answer,) = self.sent(Acquired)
        if release and answer.lease:
            self.say(self.engine_id, Release(answer.lease))
        return answer

    def save(self, user: UserId, prompt: str) -> Reserved:
        answer = self.reserve_only(user, prompt)
        if answer.lease:
            self.say(self.engine_id, Commit(answer.lease))
        return answer

    def reserve_only(self, user: UserId, prompt: str) -> Reserved:
        ask = Reserve(next(self.numbers), user, keys(prompt), 0, self.now + 1.0, public=public(prompt))
        self.say(self.engine_id, ask)
        (answer,) = self.sent(Reserved)
        return answer

    def stats(self, publication: PublicationId) -> PublicationStats:
        (found,) = [each for each in self.cache.snapshot().publications if each.publication == publication.hex()]
        return found


@pytest.fixture
def pool() -> Pool:
    return Pool()


class TestReading:
    """What is published is everybody's, and what continues it the user's own."""

    def test_a_user_who_never_came_before_finds_it(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        answer = pool.find(BOB, "sysbob")
        assert (answer.ready, answer.public) == (3, 3)

    def test_two_users_store_it_once(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        for user, prompt in ((ALICE, "sysab"), (BOB, "sysab")):
            assert [grant.index for grant in pool.save(user, prompt).grants] == [3, 4]
        assert pool.used_pages == 3 + 2 + 2

    def test_an_answer_is_public_first_and_then_own(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        pool.save(ALICE, "sysab")
        answer = pool.find(ALICE, "sysab")
        assert (answer.ready, answer.public) == (5, 3)
        assert pool.find(BOB, "sysab").ready == 3

    def test_what_a_user_had_before_it_was_published_is_found_behind_it(self, pool: Pool) -> None:
        pool.save(ALICE, "sysab")
        own = pool.find(ALICE, "sysab").extents
        pool.publish(SYSTEM, "sys")
        answer = pool.find(ALICE, "sysab")
        assert (answer.ready, answer.public) == (5, 3)
        assert answer.extents[3:] == own[3:]
        assert not set(answer.extents[:3]) & set(own[:3])

    def test_a_users_own_copy_ages_away_once_it_is_of_no_use(self) -> None:
        pool = Pool(pages=8, public_pages=3)
        pool.save(ALICE, "sysab")
        pool.publish(SYSTEM, "sys")
        pool.find(ALICE, "sysab")
        pool.save(BOB, "bob")  # needs what the copy has, and no more
        assert pool.find(ALICE, "sysab").ready == 5
        assert pool.find(BOB, "bob").ready == 3

    def test_without_its_names_nothing_public_is_found(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        assert pool.lookup(pool.engine_id, BOB, "sys") == 0

    def test_a_copy_that_is_being_read_may_be_adopted_away_from(self, pool: Pool) -> None:
        pool.save(ALICE, "sysab")
        reading = pool.find(ALICE, "sysab", release=False)
        pool.publish(SYSTEM, "sys")
        answer = pool.find(ALICE, "sysab")
        pool.say(pool.engine_id, Release(reading.lease))
        assert (answer.ready, answer.public) == (5, 3)
        assert all(block.pins == 0 for block in pool.cache.default_tenant.user_by_id[ALICE].block_by_key.values())


class TestWriting:
    """Only a publication's blocks become public, and only of the namespace that it is for."""

    @pytest.mark.parametrize(
        ("publication", "prompt", "root"),
        [(OTHER, "sys", ROOT), (SYSTEM, "sysx", ROOT), (SYSTEM, "sys", OTHER_ROOT)],
        ids=["unknown", "longer", "another namespace"],
    )
    def test_nothing_else_is_stored(self, pool: Pool, publication: PublicationId, prompt: str, root: bytes) -> None:
        pool.add(SYSTEM, "sys", root)
        assert pool.fill(publication, prompt).refusal is Refusal.NOT_PUBLISHED
        assert pool.used_pages == 0

    def test_the_first_to_store_it_decides_which_blocks_it_has(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        assert pool.fill(SYSTEM, "xys").refusal is Refusal.NOT_PUBLISHED
        assert pool.fill(SYSTEM, "sys").refusal is None  # once more changes nothing
        assert pool.used_pages == 3

    def test_a_removed_one_cannot_be_stored_again(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        pool.handle(PublicationRemoved(SYSTEM))
        assert pool.fill(SYSTEM, "sys").refusal is Refusal.NOT_PUBLISHED
        assert (pool.find(BOB, "sys").ready, pool.used_pages) == (0, 0)

    def test_no_more_is_published_than_is_guaranteed(self, pool: Pool) -> None:
        pool.add(SYSTEM, "systm")
        answer = pool.fill(SYSTEM, "systm")
        assert (len(answer.grants), answer.refusal) == (4, Refusal.ALL_PINNED)
        stats = pool.stats(SYSTEM)
        assert (stats.blocks_ready, stats.blocks, stats.refusal) == (4, 5, "all-pinned")

    def test_an_aborted_one_is_never_read(self, pool: Pool) -> None:
        pool.add(SYSTEM, "sys")
        answer = pool.fill(SYSTEM, "sys", commit=False)
        assert pool.find(BOB, "sys").ready == 0
        pool.say(pool.engine_id, Abort(answer.lease))
        assert (pool.find(BOB, "sys").ready, pool.used_pages) == (0, 0)
        assert pool.fill(SYSTEM, "sys").refusal is None
        assert pool.find(BOB, "sys").ready == 3

    def test_it_stays_however_much_others_store(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        for letter in "abcdefgh":
            pool.save(ALICE, letter * 8)
        assert pool.find(BOB, "sys").public == 3


class TestRemoving:
    """What is taken back is gone, with what continues it, but for what another publication has too."""

    def test_what_users_have_behind_it_goes_too(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        pool.save(ALICE, "sysab")
        pool.handle(PublicationRemoved(SYSTEM))
        assert (pool.find(ALICE, "sysab").ready, pool.used_pages) == (0, 0)

    def test_what_another_publication_has_too_stays(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "syst")
        pool.publish(OTHER, "sy")
        pool.handle(PublicationRemoved(SYSTEM))
        assert (pool.find(BOB, "syst").public, pool.used_pages) == (2, 2)
        pool.handle(PublicationRemoved(OTHER))
        assert pool.used_pages == 0

    def test_who_reads_it_may_finish(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        reading = pool.find(BOB, "sys", release=False)
        pool.handle(PublicationRemoved(SYSTEM))
        assert pool.used_pages == 3
        pool.say(pool.engine_id, Release(reading.lease))
        assert pool.used_pages == 0

    def test_a_bad_block_is_found_by_nobody_any_more(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        pool.save(ALICE, "sysab")
        pool.say(pool.engine_id, Discard(PUBLIC_USER, public("sys")[1], PUBLIC_TENANT))
        assert (pool.find(ALICE, "sysab").ready, pool.used_pages) == (1, 1)
        assert pool.stats(SYSTEM).blocks_ready == 1

    def test_what_it_had_pinned_of_users_is_let_go(self, pool: Pool) -> None:
        for _ in range(20):  # one page a round, if any were forgotten
            pool.publish(SYSTEM, "sys")
            pool.save(ALICE, "sysa")
            answer = pool.reserve_only(ALICE, "sysab")
            assert answer.refusal is None
            pool.handle(PublicationRemoved(SYSTEM))
            agrees(pool)
            pool.say(pool.engine_id, Commit(answer.lease))
            agrees(pool)

    def test_less_is_not_guaranteed_than_was_published_meanwhile(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        pool.handle(TenantSet(PUBLIC_TENANT, Limits(guarantee_bytes=PAGE_BYTES)))
        assert pool.cache.tenant_by_name[PUBLIC_TENANT].guarantee_pages == 3

    def test_less_cannot_be_guaranteed_than_is_published(self, pool: Pool) -> None:
        pool.publish(SYSTEM, "sys")
        reason = pool.cache.check_tenants({PUBLIC_TENANT: Limits(guarantee_bytes=2 * PAGE_BYTES)})
        assert reason is not None
        assert "30 bytes are published" in reason
        assert pool.cache.check_tenants({PUBLIC_TENANT: Limits(guarantee_bytes=3 * PAGE_BYTES)}) is None


def test_engines_are_told_how_deep_to_ask(pool: Pool) -> None:
    pool.add(SYSTEM, "sys")
    assert pool.sent(PublicDepth, pool.engine_id) == [PublicDepth(3)]
    pool.add(OTHER, "sy")
    assert pool.sent(PublicDepth) == []
    pool.handle(PublicationRemoved(SYSTEM))
    assert pool.sent(PublicDepth) == [PublicDepth(2)]
    pool.say(pool.engine_id, NamespaceChanged(OTHER_ROOT))
    assert pool.sent(PublicDepth) == [PublicDepth(0)]


@pytest.mark.parametrize("seed", range(40))
def test_pins_pages_and_owners_agree_whatever_happens(seed: int) -> None:
    random = Random(seed)
    pool = Pool(pages=random.choice((6, 10, 16)), public_pages=4)
    prompts = ("s", "sy", "sys", "syst", "sysab", "sysac", "syxab", "sysabcd", "other")
    held: list[int] = []
    writing: list[int] = []
    for _ in range(300):
        user, prompt = random.choice((ALICE, BOB, CAROL)), random.choice(prompts)
        match random.randrange(7):
            case 0 | 1:
                start = min(random.randrange(4), len(prompt))
                answer = pool.find(user, prompt, start, release=False)
                held += [answer.lease] if answer.lease else []
                owner = pool.cache.default_tenant.user_by_id.get(user)
                mine = {block.extent for block in owner.block_by_key.values()} if owner is not None else set()
                assert set(answer.extents[max(answer.public - start, 0) :]) <= mine, (
                    "another's block behind what is public"
                )
            case 2 | 3:
                pool.save(user, prompt)
            case 4:
                publication = random.choice((SYSTEM, OTHER))
                if publication in pool.cache.publication_by_id and random.random() < 0.5:
                    pool.handle(PublicationRemoved(publication))
                elif publication not in pool.cache.publication_by_id and len(prompt) <= 4:
                    pool.add(publication, prompt)
                    pool.fill(publication, prompt)
            case 6:
                answer_late = pool.reserve_only(user, prompt)
                writing += [answer_late.lease] if answer_late.lease else []
            case 5:
                for lease in writing[2:]:
                    pool.say(pool.engine_id, random.choice((Commit, Abort))(lease))
                del writing[2:]
                random.shuffle(held)
                for lease in held[3:]:
                    pool.say(pool.engine_id, Release(lease))
                del held[3:]
        agrees(pool)
    for lease in held:
        pool.say(pool.engine_id, Release(lease))
    for lease in writing:
        pool.say(pool.engine_id, Commit(lease))
    for publication in (SYSTEM, OTHER):
        pool.handle(PublicationRemoved(publication))
    agrees(pool)
    assert all(not tenant.held_pages for tenant in pool.cache.tenant_by_name.values())


def agrees(pool: Pool) -> None:
    """Compare what is counted with what is there."""
    for tenant in pool.cache.tenant_by_name.values():
        for user in tenant.user_by_id.values():
            for key, block in user.block_by_key.items():
                above = block.parent
                assert above is None or above.user.block_by_key.get(above.key) is above, f"{key!r} hangs on nothing"
                assert above is None or above.user in (user, *public_users(pool)), "a block hangs on another user's"
                assert above is None or above.touched_at >= block.touched_at, "used later than what it continues"
                assert not block.pins or above is None or above.pins, "pinned, and what it continues is not"
        pinned = [block for user in tenant.user_by_id.values() for block in user.block_by_key.values() if block.pins]
        doomed = [block for block in leased(pool) if block.state is BlockState.DOOMED and block.user.tenant is tenant]
        held = sum(block.pages for block in {*pinned, *doomed})
        assert tenant.name == PUBLIC_TENANT or tenant.held_pages == held, "what is pinned was miscounted"
    assert sum(tenant.used_pages for tenant in pool.cache.tenant_by_name.values()) == pool.used_pages


def leased(pool: Pool) -> set[Block]:
    return {
        block for session in pool.cache.sessions for lease in session.lease_by_id.values() for block in lease.blocks
    }


def public_users(pool: Pool) -> tuple[object, ...]:
    tenant = pool.cache.tenant_by_name.get(PUBLIC_TENANT)
    return tuple(tenant.user_by_id.values()) if tenant is not None else ()


class TestOnDisk:
    """What is published outlives the server, as long as it is published."""

    def after(self, *crowds: tuple[PublicationId, str], removed: PublicationId | None = None) -> "Restarted":
        """Publish, let the disk keep it, remove something, and start anew with what the disk has."""
        pool = Pool(disk_pages=16)
        for publication, prompt in crowds:
            pool.publish(publication, prompt)
        pool.do()
        if removed is not None:
            pool.handle(PublicationRemoved(removed))
            pool.do()
        return Restarted(pool, forgotten=removed)

    def test_a_restart_brings_it_back(self) -> None:
        pool = self.after((SYSTEM, "sys"))
        pool.do()
        assert pool.stats(SYSTEM).blocks_ready == 3
        answer = pool.find(BOB, "sysbob")
        assert (answer.ready, answer.public) == (3, 3)

    def test_what_users_have_behind_it_is_found_again(self) -> None:
        before = Pool(disk_pages=16)
        before.publish(SYSTEM, "sys")
        before.save(ALICE, "sysab")
        before.do()
        pool = Restarted(before)
        pool.do()
        pool.begin(ALICE, "sysab")
        pool.do()
        (answer,) = pool.sent(Acquired)
        assert (answer.ready, answer.public) == (5, 3)

    def test_two_with_one_beginning_share_it_again(self) -> None:
        pool = self.after((SYSTEM, "sys"), (OTHER, "syo"))
        pool.do()
        assert pool.used_pages == 4
        assert [pool.find(BOB, prompt).public for prompt in ("sys", "syo")] == [3, 3]
        pool.handle(PublicationRemoved(SYSTEM))
        assert [pool.find(BOB, prompt).public for prompt in ("sys", "syo")] == [2, 3]

    def test_what_was_removed_is_gone_from_the_disk(self) -> None:
        pool = self.after((SYSTEM, "sys"), (OTHER, "o"), removed=SYSTEM)
        pool.do()
        assert pool.on_disk == 1
        assert pool.find(BOB, "sys").ready == 0
        assert pool.find(BOB, "o").ready == 1

    def test_what_nobody_publishes_any_more_is_forgotten_at_a_start(self) -> None:
        before = Pool(disk_pages=16)
        before.publish(SYSTEM, "sys")
        before.do()
        pool = Restarted(before, forgotten=SYSTEM)  # which the records outlived
        pool.do()
        assert (pool.on_disk, pool.used_pages) == (0, 0)
        assert pool.find(BOB, "sys").ready == 0

    def test_a_mark_of_what_was_removed_still_publishes_nothing(self) -> None:
        pool = self.after((SYSTEM, "sys"), removed=SYSTEM)
        assert pool.fill(SYSTEM, "sys").refusal is Refusal.NOT_PUBLISHED

    def test_less_room_brings_back_the_first_blocks_and_says_why(self) -> None:
        before = Pool(disk_pages=16)
        before.publish(SYSTEM, "sys")
        before.do()
        pool = Restarted(before, public_pages=2)
        pool.do()
        assert (pool.stats(SYSTEM).blocks_ready, pool.stats(SYSTEM).refusal) == (2, Refusal.ALL_PINNED.value)
        assert pool.find(BOB, "sys").ready == 2

    def test_a_record_that_is_lost_makes_it_shorter_until_it_is_published_again(self) -> None:
        pool = self.after((SYSTEM, "sys"))
        pool.do(wrong=lambda work: RecordLost(work.op, Loss.NOT_AUTHENTIC) if isinstance(work, ReadRecord) else None)
        assert pool.stats(SYSTEM).blocks_ready == 0
        assert pool.fill(SYSTEM, "sys").refusal is None
        pool.do()
        assert pool.stats(SYSTEM).blocks_ready == pool.on_disk == 3

    def test_users_records_push_it_off_the_disk_and_not_out_of_the_pool(self) -> None:
        pool = Pool(pages=16, disk_pages=3)
        pool.publish(SYSTEM, "sys")
        pool.do()
        pool.save(ALICE, "alice")
        pool.do()
        assert pool.on_disk == 3
        assert pool.stats(SYSTEM).blocks_ready == 3

    def test_an_engine_that_can_not_load_it_lets_it_go_from_the_disk(self) -> None:
        pool = Pool(disk_pages=16)
        pool.publish(SYSTEM, "sys")
        pool.do()
        pool.say(pool.engine_id, Discard(ALICE, public("s")[0], PUBLIC_TENANT))
        pool.do()
        assert pool.on_disk == 0


class Restarted(Pool):
    """A pool with an engine, after a restart with what the disk of another has, but for a publication."""

    def __init__(self, before: Pool, *, forgotten: PublicationId | None = None, public_pages: int = 4) -> None:
        super().__init__(public_pages=public_pages, disk_pages=16)
        self.index = before.index
        self.kept = {id_: each for id_, each in before.kept.items() if id_ != forgotten}
        records = [StoredRecord(name, each.slot, each.length, each.depth, 0.0) for name, each in self.index.items()]
        effects = self.cache.restore(records, (), self.now, self.kept.values())
        self.work += [effect for effect in effects if isinstance(effect, Work)]

    def begin(self, user: UserId, prompt: str) -> None:
        """Ask, and leave the answer to come."""
        self.say(self.engine_id, Acquire(next(self.numbers), user, keys(prompt), 0, public=public(prompt)))
