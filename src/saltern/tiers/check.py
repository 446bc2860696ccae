"""The check: whether a data folder holds what its index says, and what to do where it doesn't.

Nothing else may use the folder meanwhile. Without `repair` nothing is changed but what opening a database does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import Loss
from saltern.core.extents import Run, extent_pages
from saltern.tiers.damage import Misplaced, Verifier, misplaced, sound_keys
from saltern.tiers.datakeys import DataKey, Owner, read_deployment_keys
from saltern.tiers.errors import DiskDamagedError, DiskError
from saltern.tiers.index import INDEX_ERRORS, Index, Row, disk_error
from saltern.tiers.record import Header
from saltern.tiers.rotation import current_key, finish_rotation, open_index
from saltern.tiers.slab import PageBuffer, Slab

EXAMPLES_MAX = 3
"""Records that a finding names."""

_READ_PAGES = 2048  # at a time, looking for what nobody names


class Finding(Struct, frozen=True):
    """Something that isn't as it should be, or, where `is_damage` is false, that could be tidier."""

    kind: str
    count: int
    what: str
    remedy: str
    is_damage: bool = True


class Usage(Struct, frozen=True):
    """What is stored for one user, by the opaque id in hexadecimal: in whole pages, as it is charged."""

    tenant: str
    user: str
    records: int
    used_bytes: int


class Report(Struct, frozen=True):
    """What was found, and done if `repaired`. `usage` is of what is whole."""

    findings: tuple[Finding, ...]
    usage: tuple[Usage, ...]
    repaired: bool

    @property
    def is_sound(self) -> bool:
        """Return whether nothing was damaged."""
        return not any(finding.is_damage for finding in self.findings)

    @property
    def used_bytes(self) -> int:
        """Return what is stored for all users."""
        return sum(usage.used_bytes for usage in self.usage)


def check(
    folder: Path, key_path: Path, repair: bool, begin: Callable[[Sequence[Finding]], None] = lambda findings: None
) -> Report:
    """Check the data folder; with `repair`, mend it as the findings say, if there are any. Raises `DiskError`.

    `begin` is told of them before anything is changed; what it raises prevents that.
    """
    if not (folder / "index.db").exists():
        raise DiskError(f"{folder} has no index.db: nothing is stored there")
    try:
        index = open_index(folder, key_path)
    except DiskDamagedError as error:
        return _start_anew(folder, str(error), begin if repair else None)
    try:
        slab = Slab(folder / "slab")
        try:
            return _Check(index, slab, key_path).report(begin if repair else None)
        finally:
            slab.close()
    except (OSError, *INDEX_ERRORS) as error:
        raise disk_error(folder, error) from None
    finally:
        index.close()


class _Check:
    """One check of an index that can be read."""

    def __init__(self, index: Index, slab: Slab, key_path: Path) -> None:
        self._index, self._slab, self._key_path = index, slab, key_path
        self._findings: list[Finding] = []
        self._deployment_key = current_key(index, key_path)

    def report(self, begin: Callable[[Sequence[Finding]], None] | None) -> Report:
        self._check_keys_file()
        key_by_owner, bad_keys = self._check_keys()
        rows = list(self._index.rows())
        wrong = self._check_rows(rows, key_by_owner)
        whole = [row for row in rows if row.serial not in wrong]
        unnamed = list(self._check_slab(whole))
        if begin is not None and self._findings:
            begin(self._findings)
            # First, since all that follows needs room. What else names these pages is dropped.
            for run in unnamed:
                self._slab.give_back(run)
            with self._index.transaction():
                self._index.drop_damaged(bad_keys)
                self._index.forget(row.name for row in rows if row.serial in wrong)
                self._index.drop_unused_keys()
            finish_rotation(self._index, self._key_path)
        return Report(tuple(self._findings), _usage(whole), repaired=begin is not None)

    def _check_keys_file(self) -> None:
        if len(read_deployment_keys(self._key_path)) > 1:
            self._find("rotation", 1, "the deployment key is being replaced", "finish that", is_damage=False)
        elif self._index.must_purge:
            self._find(
                "purge", 1, "bytes of keys that were destroyed may be in the index", "remove them", is_damage=False
            )

    def _check_keys(self) -> tuple[dict[Owner, DataKey], list[int]]:
        key_by_owner, bad = sound_keys(self._index, self._deployment_key)
        self._find("key", len(bad), "data keys of users are not authentic", "drop them with their users' records")
        self._find("row", self._index.count_unsound(), "rows of the index can be no record and no key", "drop them")
        unused = self._index.count_unused_keys()
        self._find("unused-key", unused, "users have a key and nothing stored", "drop the keys", is_damage=False)
        return key_by_owner, bad

    def _check_rows(self, rows: list[Row], key_by_owner: dict[Owner, DataKey]) -> set[int]:
        """Return the serials of the rows that name no whole record."""
        wrong: dict[int, Misplaced | Loss | None] = {**misplaced(rows, self._slab.pages)}
        verifier = Verifier(self._slab)
        for row in rows:
            if row.serial not in wrong:
                key = key_by_owner.get(row.owner)
                loss = verifier.loss(row, key) if key is not None else None
                if key is None or loss is not None:
                    wrong[row.serial] = loss  # without a key, which is another finding: None
        for kind, what in _WHAT.items():
            found = [row for row in rows if wrong.get(row.serial) is kind]
            self._find(kind.value, len(found), f"records {what}{_examples(found)}", "forget them")
        return set(wrong)

    def _check_slab(self, rows: list[Row]) -> Iterator[Run]:
        """Find what lies in the slab and belongs to none of these rows, and yield its pages."""
        headers = pages = 0
        buffer = PageBuffer()
        for run in self._slab.unnamed(row.slot for row in rows):
            pages += run.count
            for start in range(run.start, run.start + run.count, _READ_PAGES):
                part = Run(start=start, count=min(_READ_PAGES, run.start + run.count - start))
                headers += _count_headers(self._slab, part, buffer.view(part.count * DISK_PAGE_BYTES))
            yield run
        what = (
            f"pages of the slab belong to no block: {headers} records in them of blocks that were evicted or erased, or"
            " whose store was interrupted"
        )
        self._find("unnamed", pages, what, "give the pages back to the filesystem", is_damage=False)

    def _find(self, kind: str, count: int, what: str, remedy: str, *, is_damage: bool = True) -> None:
        if count:
            self._findings.append(Finding(kind, count, what, remedy, is_damage))


_WHAT: dict[Misplaced | Loss, str] = {
    Misplaced.NO_SLOT: "have a slot that can't be one",
    Misplaced.BEYOND: "lie beyond the end of the slab",
    Misplaced.OVERLAPS: "lie in pages that another one claims",
    Loss.UNREADABLE: "can't be read",
    Loss.NOT_AUTHENTIC: "are not authentic",
}


def _start_anew(folder: Path, damage: str, begin: Callable[[Sequence[Finding]], None] | None) -> Report:
    findings = (Finding("index", 1, damage, "delete it and the slab: all that is stored is lost"),)
    if begin is not None:
        begin(findings)
        try:
            for name in ("index.db", "index.db-wal", "index.db-shm", "slab"):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from None
    return Report(findings, (), repaired=begin is not None)


def _examples(rows: list[Row]) -> str:
    names = [f"{row.name.key.hex()[:16]} of {row.name.user.hex()} in {row.name.tenant}" for row in rows[:EXAMPLES_MAX]]
    return f": {', '.join(names)}{', …' if len(rows) > EXAMPLES_MAX else ''}" if names else ""


def _usage(rows: Iterable[Row]) -> tuple[Usage, ...]:
    records: Counter[Owner] = Counter()
    pages: Counter[Owner] = Counter()
    for row in rows:
        records[row.owner] += 1
        pages[row.owner] += extent_pages(row.slot)
    return tuple(
        Usage(tenant, user.hex(), records[tenant, user], count * DISK_PAGE_BYTES)
        for (tenant, user), count in sorted(pages.items())
    )


def _count_headers(slab: Slab, run: Run, buffer: memoryview) -> int:
    """Return how many pages of a run begin a record."""
    slab.read((run,), buffer)
    headers = 0
    for place in range(0, len(buffer), DISK_PAGE_BYTES):
        try:
            Header(buffer[place:])
        except ValueError:
            continue
        headers += 1
    return headers
