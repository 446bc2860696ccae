"""A run's mounts are its own, and its small disk can be filled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import socket, sys
from pathlib import Path
from faults.private import full, hide_mounts, small_disk

def listen(path):
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            return error.strerror
    return "bound"

if not hide_mounts():
    sys.exit(77)
assert not list(Path("/dev/shm").iterdir()), "a /dev/shm of others"
folder = Path(sys.argv[1], "disk")
with small_disk(folder) as is_mounted:
    assert is_mounted
    (folder / "old").write_text("kept")
    with full(folder):
        print(listen(folder / "socket"))
    print(listen(folder / "socket"), (folder / "old").read_text()[:4])
    print("mounted", flush=True)
    sys.stdin.readline()
print(folder.is_dir(), list(folder.iterdir()))
"""


def test_a_full_disk_takes_no_socket_and_an_emptied_one_does(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        said = [line.strip() for _, line in zip(range(3), run.stdout, strict=False)]
        seen_by_others = list(tmp_path.glob("disk/*"))
        said.append(run.communicate("\n", timeout=60)[0].strip())
    if run.returncode == 77:
        pytest.skip("mounts are not allowed here")
    assert said == ["No space left on device", "bound kept", "mounted", "True []"]
    assert not seen_by_others
