"""The damage: what can become of the disk tier's files, done on purpose to real ones, and what became of it.

Whatever was done, a block is the right one, or it is missing and that is counted.
"""

from __future__ import annotations

import inspect
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec

from demo.server import ServerError
from faults.private import small_disk
from faults.torture.client import NoAnswerError, ServerLostError
from faults.torture.population import BLOCK_BYTES, PROMPTS, USERS, User
from faults.torture.scene import PROMPT, Outcome, Scene
from saltern.client.admin import operate
from saltern.core.disk import DISK_PAGE_BYTES, RECORD_HEADER_BYTES, RECORD_TAG_BYTES
from saltern.operations import Erase, UserErased

Act = Callable[[Scene], None]

BLOCKS = 6
"""Of everybody's prompt."""

INDEX_PAGE_BYTES = 4096
SMALL_DISK = "size=64m"
FURTHER_PROMPT = PROMPTS - 1

REGIONS = {
    "magic": 0,
    "version": 8,
    "length of the tenant": 10,
    "length of the root": 11,
    "zeros": 12,
    "length": 16,
    "nonce": 24,
    "more zeros": 36,
    "id of the key": 40,
    "user": 56,
    "key": 72,
    "root": 104,
    "tenant": 136,
    "zeros behind the tenant": 255,
    "first byte": RECORD_HEADER_BYTES,
    "byte in the middle": RECORD_HEADER_BYTES + BLOCK_BYTES // 2,
    "tag": RECORD_HEADER_BYTES + BLOCK_BYTES,
}
"""Where in a record a bit is flipped, one region for each user; docs/disk-format.md names them all."""

UNSIGNED = [user for user in USERS if not user.is_signed]
SIGNED = [user for user in USERS if user.is_signed]


def bits_flipped(scene: Scene) -> None:
    """In each region of a record, header, block and tag, a bit is flipped: of 17 users, in the third block of each."""
    users = USERS[: len(REGIONS)]
    with scene.stopped():
        for user, place in zip(users, REGIONS.values(), strict=True):
            slot = scene.rows(user)[2].slot
            scene.put_record(slot, _flipped(scene.record(slot), place))
    found = scene.look(users)
    scene.expect(found == 2 * len(users), f"{found} blocks were right, and not the two before each that is damaged")
    scene.expect(scene.counted.get("lost") == len(users), "not every loss was counted")
    _store_again(scene, users)


def bit_flipped_behind_the_tag(scene: Scene) -> None:
    """A bit is flipped in the zeros behind a record, which belong to nobody."""
    user = USERS[0]
    with scene.stopped():
        slot = scene.rows(user)[2].slot
        scene.put_record(slot, _flipped(scene.record(slot), RECORD_HEADER_BYTES + BLOCK_BYTES + RECORD_TAG_BYTES))
    scene.expect(scene.look([user]) == BLOCKS, "a block was lost by what isn't part of it")


def records_swapped(scene: Scene) -> None:
    """The first records of two users change places in the slab: within a tenant, and between two tenants."""
    pairs = [(UNSIGNED[0], UNSIGNED[1]), (SIGNED[0], SIGNED[-1])]
    with scene.stopped():
        for pair in pairs:
            one, other = (scene.rows(user)[0].slot for user in pair)
            of_one, of_other = scene.record(one), scene.record(other)
            scene.put_record(one, of_other)
            scene.put_record(other, of_one)
    users = [user for pair in pairs for user in pair]
    scene.expect(scene.look(users) == 0, "something was found behind another user's record")
    scene.expect(scene.counted.get("lost") == len(users), "not every loss was counted")
    _store_again(scene, users)


def own_records_swapped(scene: Scene) -> None:
    """The first two records of one user change places in the slab."""
    user = UNSIGNED[0]
    with scene.stopped():
        one, other = (row.slot for row in scene.rows(user)[:2])
        of_one, of_other = scene.record(one), scene.record(other)
        scene.put_record(one, of_other)
        scene.put_record(other, of_one)
    scene.expect(scene.look([user]) == 0, "something was found behind another block's record")
    _store_again(scene, [user])


def rows_swapped(scene: Scene) -> None:
    """In the index the first records of two users change places."""
    users = (UNSIGNED[0], SIGNED[0])
    with scene.stopped():
        one, other = (scene.rows(user)[0] for user in users)
        change = "UPDATE record SET slot = ? WHERE key = ?"
        encode = msgspec.msgpack.encode
        scene.change_index((change, (encode(other.slot), one.name.key)), (change, (encode(one.slot), other.name.key)))
    scene.expect(scene.look(users) == 0, "something was found behind another user's record")
    _store_again(scene, users)


def keys_swapped(scene: Scene) -> None:
    """In the index two users change their wrapped data keys."""
    users = (UNSIGNED[0], UNSIGNED[1])
    with scene.stopped():
        wrapped = {key.owner: key for key in scene.books().keys}
        one, other = (wrapped[user.tenant, scene.prompt(user).user] for user in users)
        change = "UPDATE data_key SET id = ?, wrapped = ? WHERE user = ?"
        scene.change_index(
            (change, (other.id, other.wrapped, one.owner[1])), (change, (one.id, one.wrapped, other.owner[1]))
        )
    scene.expect(scene.look(users) == 0, "something was read with another user's key")
    _store_again(scene, users)


def older_record_put_back(scene: Scene) -> None:
    """A user is erased and stores the same prompt again; then a record from before the erasure is put in its place."""
    user = UNSIGNED[0]
    with scene.stopped():
        older = scene.record(scene.rows(user)[0].slot)
    answer = operate(str(scene.server.admin_socket_path), Erase(user.tenant, salt=user.name))
    scene.expect(isinstance(answer, UserErased), f"not erased: {answer}")
    scene.generation = 1  # the same keys, and other bytes
    scene.store(user)
    with scene.stopped():
        scene.put_record(scene.rows(user)[0].slot, older)
    scene.expect(scene.look([user]) == 0, "something was found behind a record from before the erasure")
    scene.expect(scene.counted.get("lost") == 1, "the loss was not counted")
    _store_again(scene, [user])


def older_record_of_the_same_block(scene: Scene) -> None:
    """A block is stored a second time, and its first record put in the place of the second: it is the same block."""
    user = UNSIGNED[0]
    with scene.stopped():
        older = scene.record(scene.rows(user)[0].slot)
    scene.discard(user, 0)
    _store_again(scene, [user])
    with scene.stopped():
        slot = scene.rows(user)[0].slot
        scene.expect(scene.record(slot) != older, "the block was not stored a second time")
        scene.put_record(slot, older)
    scene.expect(scene.look([user]) == BLOCKS, "a block's own record was not taken for it")


def slab_cut(scene: Scene) -> None:
    """The slab is truncated to half of what is used under the running server: what lay behind can't be read."""
    end = max(run.start + run.count for user in USERS for row in scene.rows(user) for run in row.slot)
    os.truncate(scene.slab, end // 2 * DISK_PAGE_BYTES)
    found = scene.look(USERS)
    scene.expect(0 < found < BLOCKS * len(USERS), f"{found} blocks were found in half a slab")
    scene.expect(scene.counted.get("lost", 0) > 0, "no loss was counted")
    _store_again(scene, USERS)


def slab_overwritten(scene: Scene) -> None:
    """All of the slab is overwritten with noise under the running server."""
    scene.slab.write_bytes(random.Random(1).randbytes(scene.slab.stat().st_size))
    scene.expect(scene.look(USERS) == 0, "noise was taken for blocks")
    scene.expect(scene.counted.get("lost", 0) >= len(USERS), "not every loss was counted")
    _store_again(scene, USERS)


def slab_deleted(scene: Scene) -> None:
    """The slab's file is deleted under the running server, which goes on with it; the next one finds it gone."""
    scene.slab.unlink()
    scene.expect(scene.look(USERS) == BLOCKS * len(USERS), "blocks were lost with the name of their file")
    scene.restart()
    scene.expect(scene.look(USERS) == 0, "blocks were found in a file that is gone")
    scene.expect(scene.counted.get("damaged at the start") == BLOCKS * len(USERS), "not every loss was counted")
    _store_again(scene, USERS)


def older_slab_put_back(scene: Scene) -> None:
    """A copy of the slab from before a tenant was erased and stored anew takes the place of the present one."""
    copy = scene.server.folder / "slab.copy"
    erased = UNSIGNED
    with scene.stopped():
        shutil.copyfile(scene.slab, copy)
    operate(str(scene.server.admin_socket_path), Erase("default"))
    scene.generation = 1
    for user in erased:
        scene.store(user)
    with scene.stopped():
        shutil.copyfile(copy, scene.slab)
    scene.expect(scene.look(erased) == 0, "records from before the erasure were taken for present ones")
    scene.generation = 0
    scene.expect(scene.look(SIGNED) == BLOCKS * len(SIGNED), "others have lost blocks that were in the copy")


def older_index_put_back(scene: Scene) -> None:
    """A copy of the index from before other users' blocks took the pages takes the place of the present one."""
    first, second = UNSIGNED[:3], SIGNED[:5]
    with scene.stopped():
        scene.copy_index(scene.server.folder / "copy")
    for user in (*first, *second):
        for index in range(BLOCKS):
            scene.discard(user, index)
    for user in (*second, *first):  # in another order, so that pages change hands
        scene.store(user)
    with scene.stopped():
        moved = sum(row.slot != old for user in first for row, old in zip(scene.rows(user), [()] * BLOCKS, strict=True))
        scene.expect(moved > 0, "nothing has moved")
        scene.put_index(scene.server.folder / "copy")
    scene.look(USERS)
    _store_again(scene, USERS)


def index_header_zeroed(scene: Scene) -> None:
    """The first page of the index is zeroed: the server refuses to start, and `saltern check --repair` starts anew."""
    scene.server.stop()
    _overwrite(scene.index, 0, bytes(INDEX_PAGE_BYTES))
    _refused_and_repaired(scene)


def index_pages_overwritten(scene: Scene) -> None:
    """Each page of the index in turn is overwritten with noise: the server refuses to start, or drops rows."""
    chance = random.Random(2)
    copy = scene.server.folder / "copy"
    scene.server.stop()
    scene.copy_index(copy)
    for page in range(1, scene.index.stat().st_size // INDEX_PAGE_BYTES):
        scene.put_index(copy)
        _overwrite(scene.index, page * INDEX_PAGE_BYTES, chance.randbytes(INDEX_PAGE_BYTES))
        _look_or_be_refused(scene)
    scene.put_index(copy)
    scene.start()
    scene.expect(scene.look(USERS) == BLOCKS * len(USERS), "blocks were lost though the index was put back")


def _look_or_be_refused(scene: Scene) -> None:
    """Start on a damaged index: the server refuses, and says what to do, or serves nothing that is wrong."""
    try:
        scene.start()
    except ServerError as error:
        scene.server.stop()
        scene.expect("check --repair" in str(error), f"it ended without saying why: {error}")
        scene.count("refusals to start")
    else:
        scene.look(USERS)
        scene.server.stop()


def index_bits_flipped(scene: Scene) -> None:
    """In four places of the index at a time, 25 times, a bit is flipped: a refusal, or rows are dropped, or neither."""
    chance = random.Random(3)
    copy = scene.server.folder / "copy"
    scene.server.stop()
    scene.copy_index(copy)
    for _ in range(25):
        scene.put_index(copy)
        content = scene.index.read_bytes()
        for _ in range(4):
            content = _flipped(content, chance.randrange(100, len(content)))
        scene.index.write_bytes(content)
        _look_or_be_refused(scene)
    scene.put_index(copy)
    scene.start()


def index_log_cut(scene: Scene) -> None:
    """The server is killed, and a quarter of the index's log is left: what it says last has never happened."""
    for index in range(BLOCKS):
        for user in UNSIGNED:
            scene.discard(user, index)
    for user in reversed(UNSIGNED):  # in another order, so that pages change hands
        scene.store(user)
    scene.server.kill()
    log = scene.index.with_name("index.db-wal")
    os.truncate(log, log.stat().st_size // 4)
    scene.start()
    found = scene.look(USERS)
    scene.expect(found < BLOCKS * len(USERS), "nothing was lost with most of a log")
    _store_again(scene, USERS)


def index_deleted(scene: Scene) -> None:
    """The index is deleted: the slab alone is nothing, and the server starts anew with an empty disk."""
    with scene.stopped():
        for path in scene.disk.glob("index.db*"):
            path.unlink()
    scene.expect(scene.look(USERS) == 0, "blocks were found that no index names")
    _store_again(scene, USERS)


def index_overwritten(scene: Scene) -> None:
    """The index is overwritten with noise under the running server: the next one refuses to start."""
    _overwrite(scene.index, 0, random.Random(4).randbytes(scene.index.stat().st_size))
    scene.look(USERS)
    for user in UNSIGNED:
        scene.store(user, to_disk=False)
    scene.look(USERS)
    scene.server.stop()
    _refused_and_repaired(scene)


def deployment_key_replaced(scene: Scene) -> None:
    """The deployment key is another: the server refuses to start, and finds all when it has the right one again."""
    key = scene.server.key_path
    right = key.read_bytes()
    scene.server.stop()
    key.write_bytes(b"00" * 32 + b"\n")
    said = scene.refusal()
    scene.expect(("key" in said and "index" in said) or "deployment" in said, f"it said {said!r}")
    scene.count("refusals to start")
    key.write_bytes(right)
    scene.start()
    scene.expect(scene.look(USERS) == BLOCKS * len(USERS), "blocks were lost with a key that was put back")


def disk_full(scene: Scene) -> None:
    """The disk, a tmpfs of 64 MiB, is full while blocks are stored; what was there stays, what wasn't is skipped."""
    ballast = scene.server.folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(DISK_PAGE_BYTES))
    scene.number = FURTHER_PROMPT
    for user in USERS:
        scene.store(user, to_disk=False)
    scene.until(lambda: bool(scene.stats().skipped) and not scene.stats().writing_blocks, "a block is skipped")
    scene.count("skipped", scene.stats().skipped)
    scene.look(USERS)
    ballast.unlink()
    scene.restart()
    scene.look(USERS)
    _store_again(scene, USERS)
    scene.number = PROMPT
    scene.expect(scene.look(USERS) == BLOCKS * len(USERS), "what was there before is not there any more")


_ACTS: tuple[Act, ...] = (
    bits_flipped,
    bit_flipped_behind_the_tag,
    records_swapped,
    own_records_swapped,
    rows_swapped,
    keys_swapped,
    older_record_put_back,
    older_record_of_the_same_block,
    slab_cut,
    slab_overwritten,
    slab_deleted,
    older_slab_put_back,
    older_index_put_back,
    index_header_zeroed,
    index_pages_overwritten,
    index_bits_flipped,
    index_log_cut,
    index_deleted,
    index_overwritten,
    deployment_key_replaced,
    disk_full,
)

DAMAGES: dict[str, Act] = {act.__name__.replace("_", "-"): act for act in _ACTS}
"""What is done to the files, by name."""


def what_happens(name: str) -> str:
    """Return in a line what is done."""
    return inspect.cleandoc(DAMAGES[name].__doc__ or "")


def take(name: str, folder: Path) -> Outcome:
    """Do one damage on files of its own, and return what became of it; what could not be done is a problem."""
    with _folder(folder, is_small=DAMAGES[name] is disk_full) as is_made, closing(Scene(folder)) as scene:
        try:
            if is_made:
                DAMAGES[name](scene)
            else:
                scene.expect(False, "no disk could be mounted: this needs root, or user namespaces")
        except (ServerError, ServerLostError, NoAnswerError) as error:
            scene.expect(False, f"{type(error).__name__}: {error}")
        scene.expect(not scene.wrong, f"{scene.wrong} blocks had wrong bytes")
        return scene.outcome(name, what_happens(name))


@contextmanager
def _folder(folder: Path, *, is_small: bool) -> Iterator[bool]:
    """Make the folder of a server, on a small disk of its own if that is wanted, and yield whether that could be."""
    if is_small:
        with small_disk(folder, SMALL_DISK) as is_mounted:
            yield is_mounted
    else:
        folder.mkdir()
        yield True


def _store_again(scene: Scene, users: Iterable[User]) -> None:
    """Have users store what they miss: from then on all of it is found again, after a restart too."""
    users = list(users)
    before = scene.asked, scene.right
    for user in users:
        scene.store(user)
    scene.restart()
    found = scene.look(users)
    scene.expect(found == BLOCKS * len(users), f"{found} blocks were found after all were stored again")
    scene.asked, scene.right = before  # what is in the report is of before


def _refused_and_repaired(scene: Scene) -> None:
    """See that a server refuses to start, and that one does after a repair, with nothing."""
    said = scene.refusal()
    scene.expect("check --repair" in said, f"it refused without saying what to do: {said!r}")
    scene.count("refusals to start")
    scene.repair()
    scene.start()
    scene.expect(scene.look(USERS) == 0, "blocks were found after all was started anew")
    _store_again(scene, USERS)


def _overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]
