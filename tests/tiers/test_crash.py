"""A process that is killed in the middle of its writes leaves an index that names whole records, and nothing else."""

import random
import subprocess
import sys
from pathlib import Path

from saltern.core.effects import RecordRead
from tests.tiers.rig import LENGTH, Rig, content_of

ROOT = Path(__file__).parents[2]
KILLS = 12


class Promises:
    """What a process said before it died. A block that was about to be forgotten may be there or not."""

    def __init__(self) -> None:
        self.stored: set[int] = set()
        self.doubtful: set[int] = set()

    def read(self, line: str) -> None:
        """Take note of a line of `victim.busy`."""
        sign, number = line[0], int(line[1:])
        self.stored.discard(number)
        self.doubtful.discard(number)
        if sign == "+":
            self.stored.add(number)
        elif sign == "?":
            self.doubtful.add(number)


def test_killed_at_any_moment_it_keeps_what_it_promised(tmp_path: Path) -> None:
    promises, chance = Promises(), random.Random(3)
    rig = Rig(tmp_path)
    recovered = 0
    for seed in range(1, KILLS + 1):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.tiers.victim", "busy", str(tmp_path), str(seed)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as victim:  # fmt: skip
            assert victim.stdout is not None and victim.stderr is not None
            for _ in range(chance.randrange(1, 200)):
                line = victim.stdout.readline()
                assert line, victim.stderr.read()
                promises.read(line)
            victim.kill()
            for line in victim.stdout:
                promises.read(line)
            assert "Traceback" not in victim.stderr.read()
        restored = rig.start()
        assert (restored.torn, restored.dropped) == (0, 0)
        found = {int.from_bytes(record.name.key[3:], "little"): record for record in restored.records}
        assert promises.stored <= found.keys(), "a block that was told to be written is not there"
        # One that was written, but not yet told so, is there as well.
        more = found.keys() - promises.stored - promises.doubtful
        assert len(more) <= 1 and all(number > max(promises.stored | promises.doubtful, default=0) for number in more)
        pages: set[int] = set()
        for record in restored.records:
            ours = {page for run in record.slot for page in range(run.start, run.start + run.count)}
            assert not ours & pages, "two records have the same pages"
            pages |= ours
            assert isinstance(rig.read(record.name, record.slot), RecordRead)
            assert rig.was_read == content_of(record.name, LENGTH)
        recovered += len(found)
        promises.stored, promises.doubtful = set(found), set()
        rig.tier.close()
    assert recovered > KILLS, "it was killed before it had stored anything"
