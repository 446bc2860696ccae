"""The lives of a server: it starts, works, is killed at a moment of chance, and its files are looked at.

start ─► books ─► engines work, users are erased, keys rotated ─► SIGKILL ─► files ─► start …
           │                                                                   │
           │ nobody asks: what the server says it holds is what the index     │ nobody writes: keys of erased users
           │ names, and what the slab's pages are taken for                   │ are gone, what was stored is there
"""

from __future__ import annotations

import random
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from enum import Enum
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread

from demo.server import ServerError
from faults.processes import arena_of
from faults.torture.books import Balance, Books, Vault, balance, read_books, settled
from faults.torture.engine import work
from faults.torture.ledger import CONTEXT, Count, Finding, Ledger
from faults.torture.operator import Erasure, Operator, OperatorError
from faults.torture.population import PLAIN, STEADY_TENANT, USERS, User, generation_mark, marks_in
from faults.torture.report import Result
from faults.torture.server import LOWERED_BYTES, LOWERED_TENANT, TorturedServer
from saltern.audit import LOG_NAME, AuditError
from saltern.client.sockets import ConnectionLost
from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.extents import extent_pages
from saltern.core.snapshot import Snapshot
from saltern.tiers.check import check
from saltern.tiers.datakeys import Owner
from saltern.tiers.errors import DiskError
from saltern.tiers.slab import Slab

RANKS = (1, 2, 1)
"""How many workers each engine has; an engine is a process."""

LOAD_BLOCKS, LOAD_SECONDS_MAX = 500, 60.0
"""Before the first kill."""

WORK_SECONDS = (0.1, 1.2)
ERASE_SHARE, ROTATE_SHARE, LOWER_SHARE, QUIET_SHARE, CHECK_SHARE = 0.5, 0.1, 0.1, 0.2, 0.1
TENANT_SHARE = 0.08
"""Of the erasures, those of a whole tenant."""

FIRST_GUESS_SECONDS = {"start": 1.0, "erase": 0.05, "rotate": 0.05, "stop": 0.2}


class Kill(Enum):
    """When a server is killed."""

    WORKING = "working"
    STARTING = "starting"
    ERASING = "erasing a user"
    ROTATING = "rotating the deployment key"
    STOPPING = "stopping"


WEIGHT_BY_KILL = {Kill.WORKING: 11, Kill.STARTING: 3, Kill.ERASING: 4, Kill.ROTATING: 2, Kill.STOPPING: 1}


class Torture:
    """One run: `kills` of them, on files in `folder`."""

    def __init__(self, folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> None:
        self._folder, self._kills_wanted, self._say = folder, kills, say
        self._chance = random.Random(seed)
        self._seed = seed
        self.server = TorturedServer(folder / "server")
        self.server.folder.mkdir()
        self._scratch = folder / "scratch"
        self._scratch.mkdir()
        self._ledger = Ledger(len(RANKS))
        self._operator = Operator(self.server, self._ledger)
        self._engines: list[SpawnProcess] = []
        self._vault = Vault()
        self._findings: list[Finding] = []
        self._kills: Counter[Kill] = Counter()
        self._recovered: list[int] = []
        self._start_seconds: list[float] = []
        self._seconds = {what: [seconds] for what, seconds in FIRST_GUESS_SECONDS.items()}
        self._before: Books | None = None  # when the server was last killed
        self._is_explained = True  # if blocks are missing since
        self._leaked_bytes = self._lost = self._loaded = self._written = self._quiet = self._key_findings = 0
        self._dead_marks: set[bytes] = set()
        self._without_receipt: tuple[User, bool] | None = None  # whose erasure a kill cut short, or their tenant's

    def run(self) -> Result:
        """Kill as often as is wanted, and say what was seen."""
        began = time.monotonic()
        self._start()
        for number, ranks in enumerate(RANKS):
            engine = CONTEXT.Process(
                target=work,
                args=(
                    str(self.server.socket_path),
                    self.server.epochs_path,
                    number,
                    ranks,
                    self._ledger,
                    self._seed * 1000 + number,
                ),
                daemon=True,
            )
            engine.start()
            self._engines.append(engine)
        self._await_load()
        kinds, weights = list(WEIGHT_BY_KILL), list(WEIGHT_BY_KILL.values())
        while self._kills.total() < self._kills_wanted and all(engine.is_alive() for engine in self._engines):
            self._live(self._chance.choices(kinds, weights)[0])
            self._say(self._progress())
        self._find_dead_engines()
        self._ledger.end()
        for engine in self._engines:
            engine.join(30)
        self._end()
        return self._result(time.monotonic() - began)

    def close(self) -> None:
        """End every process."""
        for engine in self._engines:
            engine.kill()
        self.server.kill()

    # A life

    def _live(self, kill: Kill) -> None:
        """Have the engines work, kill the server, look at its files, and start the next."""
        chance = self._chance
        self._ledger.resume()
        self._work()
        if chance.random() < ERASE_SHARE:
            self._timed("erase", self._erase)
        if chance.random() < ROTATE_SHARE:
            self._timed("rotate", self._operator.rotate)
        if chance.random() < LOWER_SHARE:
            self._try(lambda: self._operator.limit(LOWERED_TENANT, chance.choice(LOWERED_BYTES)))
        if chance.random() < QUIET_SHARE:
            self._be_quiet()
        self._work()
        self._count_work()
        match kill:
            case Kill.ERASING:
                self._kill_while("erase", self._erase)
                self._is_explained = False
            case Kill.ROTATING:
                self._kill_while("rotate", self._operator.rotate)
            case Kill.STOPPING:
                self._kill_while("stop", self.server.begin_to_stop)
            case _:
                self._kill()
        self._kills[Kill.WORKING if kill is Kill.STARTING else kill] += 1
        self._ledger.pause()
        self._look_at_files()
        if kill is Kill.STARTING and self._kills.total() < self._kills_wanted:
            self.server.spawn()
            time.sleep(chance.uniform(0, statistics.median(self._seconds["start"])))
            self._kill()
            self._kills[kill] += 1
            self._look_at_files()
        self._start()

    def _await_load(self) -> None:
        """Let the engines work until there is something to recover, which a busy machine may take a while for."""
        self._ledger.resume()
        deadline = time.monotonic() + LOAD_SECONDS_MAX
        while self._ledger.counted(Count.STORED_BLOCKS) < LOAD_BLOCKS and time.monotonic() < deadline:
            time.sleep(0.01)
        self._ledger.pause()

    def _work(self) -> None:
        time.sleep(self._chance.uniform(*WORK_SECONDS) / 2)

    def _start(self) -> None:
        """Start the server, and compare what it has with its files while nobody asks it anything."""
        began = time.monotonic()
        self.server.start()
        self._seconds["start"].append(time.monotonic() - began)
        snapshot = self._balance()
        assert snapshot.disk is not None, "a server without a disk tier is not tortured"
        restored = self.server.restored()
        if restored.damaged or restored.torn:  # which the death of a process, not of the machine, can't do
            self._lost += restored.damaged + restored.torn
            self._find(f"{restored.damaged} records were damaged at a start, and {restored.torn} torn")
        if self._before is None:
            return
        self._recovered.append(snapshot.disk.blocks)
        missing = self._before.names - self._books().names
        steady = sum(name.tenant == STEADY_TENANT for name in missing)
        # Those of whoever was being erased, and what a limit takes that was lowered meanwhile, are missed by nobody.
        if steady or (missing and self._is_explained and not snapshot.disk.evicted):
            self._lost += len(missing)
            self._find(
                f"{len(missing)} blocks were on the disk and are not after the start, {steady} of {STEADY_TENANT}"
            )
        self._is_explained = True

    def _kill(self) -> None:
        self.server.kill()

    def _kill_while(self, what: str, action: Callable[[], object]) -> None:
        """Kill the server while it does something, or right before or after."""
        thread = Thread(target=self._try, args=(action,))
        thread.start()
        time.sleep(self._chance.uniform(0, 1.2 * statistics.median(self._seconds[what])))
        self._kill()
        thread.join()

    def _timed(self, what: str, action: Callable[[], object]) -> None:
        began = time.monotonic()
        self._try(action)
        self._seconds[what].append(time.monotonic() - began)

    def _try(self, action: Callable[[], object]) -> None:
        """Do something that may fail for no other reason than that the server is killed."""
        try:
            action()
        except (OperatorError, ConnectionLost, ServerError) as error:
            self._find(f"{type(error).__name__}: {error}")

    # What an operator does

    def _erase(self) -> None:
        """Erase somebody, and know what may not be found from then on. Who gets no receipt asks again, next time."""
        erasable = [user for user in USERS if user.tenant != STEADY_TENANT]
        user, whole = self._without_receipt or (self._chance.choice(erasable), self._chance.random() < TENANT_SHARE)
        users = [other for other in erasable if other.tenant == user.tenant] if whole else [user]
        with suppress(DiskError, sqlite3.Error, OSError):  # a copy of what is being written may be no index
            self._vault.see(read_books(self.server.disk_path, self._scratch).keys)
        erasure = self._operator.erase(user.tenant, None if whole else user, users)
        self._without_receipt = None if erasure is not None else (user, whole)
        if erasure is not None:
            self._confirm(erasure)

    def _confirm(self, erasure: Erasure) -> None:
        naming = self.server.naming_secret
        self._vault.destroy(erasure.key_ids)
        for user, generation in erasure.generations.items():
            before = self._ledger.dead_below(user)
            self._ledger.confirm_erased(user, generation)
            self._dead_marks |= {
                generation_mark(user.identity(naming, old).id, old) for old in range(before, generation)
            }

    # What is looked at

    def _be_quiet(self) -> None:
        """Have nobody ask anything for a moment: then the books must balance, and nothing erased be in memory.

        Somebody is erased meanwhile, so that nobody else writes over what was not wiped.
        """
        self._ledger.pause()
        self._balance()
        self._timed("erase", self._erase)
        arena = arena_of(self.server.pid)

        def balance_now() -> Balance:
            dead = Counter(mark for mark in marks_in(arena.read_bytes()) if mark in self._dead_marks)
            return Balance([f"{dead.total()} parts of erased blocks are in the arena"] if dead else [], 0)

        for problem in settled(balance_now).problems:
            self._find(problem)
        self._quiet += 1
        self._ledger.resume()

    def _balance(self) -> Snapshot:
        """Compare the index with what the server says, and return that."""
        snapshot = self.server.stats()

        def balance_now() -> Balance:
            nonlocal snapshot
            snapshot = self.server.stats()
            try:
                return balance(self._books(), snapshot)
            except (DiskError, sqlite3.Error) as error:
                return Balance([f"a copy of the index can't be read: {error}"], 0)

        found = settled(balance_now)
        self._leaked_bytes += found.leaked_bytes
        for problem in found.problems:
            self._find(problem)
        return snapshot

    def _books(self) -> Books:
        return read_books(self.server.disk_path, self._scratch)

    def _look_at_files(self) -> None:
        """Look at what a dead server has left."""
        while not self._ledger.findings.empty():
            self._findings.append(self._ledger.findings.get())
        if not (self.server.disk_path / "index.db").exists():
            return
        books = self._books()
        if self._before is not None:
            gone = {name for name in self._before.names - books.names if name.tenant == STEADY_TENANT}
            if gone:
                self._lost += len(gone)
                self._find(f"{len(gone)} blocks of {STEADY_TENANT} are gone, though it is below its guarantee")
        self._before = books
        self._look_for_keys(books)
        if self._chance.random() < CHECK_SHARE:
            self._check(repair=False)

    def _look_for_keys(self, books: Books) -> None:
        self._vault.see(books.keys)
        for problem in self._vault.left(books, self._erased_owners()):
            self._key_findings += 1
            self._find(problem)

    def _erased_owners(self) -> set[Owner]:
        """Return the identities of signed users that will never be used again."""
        naming = self.server.naming_secret
        return {
            (user.tenant, user.identity(naming, generation).id)
            for user in USERS
            if user.is_signed
            for generation in range(self._ledger.dead_below(user))
        }

    def _check(self, *, repair: bool) -> None:
        report = check(self.server.disk_path, self.server.key_path, repair)
        for found in report.findings:
            if found.is_damage:
                self._find(f"saltern check: {found.count} {found.what}")

    def _end(self) -> None:
        """Stop the last server as an operator does, and go through all that is left."""
        unauthentic = self.server.log.count("detail=not-authentic")
        if unauthentic:
            self._lost += unauthentic
            self._find(f"{unauthentic} records were not authentic when they were read")
        if self.server.is_running:
            self._balance()
            self.server.stop()
        books = self._books()
        self._look_for_keys(books)
        for command in (
            ("check", "--config", str(self.server.config_path)),
            ("check", "--repair", "--config", str(self.server.config_path)),
            ("audit-log", "verify", "--log", str(self.server.state_path / LOG_NAME)),
        ):
            try:
                self.server.command_line(*command)
            except ServerError as error:
                self._find(str(error))
        self._check(repair=False)
        with closing(Slab(self.server.disk_path / "slab")) as slab:
            taken = extent_pages(tuple(slab.written())) * DISK_PAGE_BYTES
        if taken != books.used_bytes:
            self._leaked_bytes += abs(taken - books.used_bytes)
            self._find(f"the slab takes {taken} bytes after a repair, and the index names {books.used_bytes}")
        for path in self.server.folder.rglob("*"):
            if path.is_file() and PLAIN in path.read_bytes():
                self._find(f"{path.name} holds bytes of blocks unencrypted")
        try:
            self._operator.verify_receipts()
        except AuditError as error:
            self._find(f"the audit log: {error}")

    def _find(self, what: str) -> None:
        self._findings.append(Finding(-1, what))
        self._say(f"FOUND after {self._kills.total()} kills: {what}")

    def _find_dead_engines(self) -> None:
        for number, engine in enumerate(self._engines):
            if not engine.is_alive():
                self._find(f"engine {number} ended with status {engine.exitcode}")

    def _count_work(self) -> None:
        """Take note of what the server has counted, which goes with it."""
        with suppress(ConnectionLost):
            disk = self.server.stats().disk
            assert disk is not None, "a server without a disk tier is not tortured"
            self._loaded += disk.loaded
            self._written += disk.written

    def _progress(self) -> str:
        counted = self._ledger.counted
        return (
            f"{self._kills.total():4} kills, {self._recovered[-1]:4} blocks recovered, {self._loaded:6} loaded,"
            f" {counted(Count.CHECKED_BLOCKS):7} checked, {len(self._operator.receipts):3} erasures,"
            f" {len(self._findings)} findings"
        )

    def _result(self, seconds: float) -> Result:
        counted = self._ledger.counted
        return Result(
            seed=self._seed,
            seconds=seconds,
            kills={kill.value: count for kill, count in sorted(self._kills.items(), key=lambda item: item[0].value)},
            engines=len(RANKS),
            users=len(USERS),
            requests=counted(Count.REQUESTS),
            cut_short=counted(Count.CUT_SHORT),
            checked_blocks=counted(Count.CHECKED_BLOCKS),
            stored_blocks=counted(Count.STORED_BLOCKS),
            written_records=self._written,
            loaded_records=self._loaded,
            waits_for_disk=counted(Count.WAITS_FOR_DISK),
            erasures=len(self._operator.receipts),
            erasures_cut_short=self._operator.cut_short,
            rotations=self._operator.rotations,
            late_refused=counted(Count.LATE_REFUSED),
            destroyed_keys_known=self._vault.known,
            quiet_moments=self._quiet,
            recovered_min=min(self._recovered, default=0),
            recovered_median=int(statistics.median(self._recovered or [0])),
            recovered_total=sum(self._recovered),
            start_seconds=statistics.median(self._seconds["start"][1:]),
            wrong_bytes=counted(Count.WRONG_BYTES),
            resurrected=counted(Count.RESURRECTED) + self._key_findings,
            leaked_bytes=self._leaked_bytes,
            lost_blocks=self._lost,
            findings=tuple(dict.fromkeys(finding.what for finding in self._findings)),
        )
