"""What holds for the audit log: it only grows, whoever changed it is told, and a receipt outlives it."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from binascii import unhexlify
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saltern.audit import AuditError, AuditLog, Line, parse_receipt, read_public_key, verify_log, verify_receipt
from tests.support import PATIENCE_SECONDS


def log_of(folder: Path, lines: int) -> AuditLog:
    """Return a log in which tenants were set, one a line."""
    log = AuditLog(folder, clock=lambda: 1_795_000_000.0)
    for number in range(1, lines + 1):
        log.append("tenant-set", {"tenant": f"t{number}", "limit": number}, by="uid 7")
    return log


def damage_of(log: AuditLog, receipt: Line | None = None) -> str:
    """Return what `verify_log` complains about."""
    with pytest.raises(AuditError) as found:
        verify_log(log.path, read_public_key(log.public_key_path), receipt)
    return str(found.value)


def test_lines_are_chained_signed_and_for_their_owner_alone(tmp_path: Path) -> None:
    log = log_of(tmp_path, 3)
    first, second, third = map(json.loads, log.path.read_text(encoding="utf-8").splitlines())
    assert (first["serial"], third["serial"]) == (1, 3)
    assert first["details"] == {"tenant": "t1", "limit": 1}
    assert (first["previous"], third["previous"]) == ("0" * 64, second["hash"])
    assert first["time"].startswith("2026-11-18T")
    verified = verify_log(log.path, read_public_key(log.public_key_path))
    assert verified == (3, third["hash"])
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_changed_line_is_told(tmp_path: Path, line: int) -> None:
    log = log_of(tmp_path, 3)
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"limit":', b'"limit":1')
    log.path.write_bytes(b"".join(lines))
    assert f"line {line + 1} was changed" in damage_of(log)


def test_a_line_written_otherwise_but_with_the_same_meaning_is_told(tmp_path: Path) -> None:
    log = log_of(tmp_path, 1)
    log.path.write_bytes(log.path.read_bytes().replace(b'"what":', b'"what": '))
    assert "line 1 was changed" in damage_of(log)


def test_a_removed_line_is_told(tmp_path: Path) -> None:
    log = log_of(tmp_path, 4)
    lines = log.path.read_bytes().splitlines(keepends=True)
    for removed in (0, 1, 2):
        log.path.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
        assert f"line {removed + 1} is line {removed + 2}, and it does not follow" in damage_of(log)


def test_swapped_and_doubled_lines_are_told(tmp_path: Path) -> None:
    log = log_of(tmp_path, 3)
    first, second, third = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + third + second)
    assert "line 2 is line 3, and it does not follow" in damage_of(log)
    log.path.write_bytes(first + second + second + third)
    assert "line 3 is line 2, and it does not follow" in damage_of(log)


def test_a_cut_tail_is_told_by_a_receipt(tmp_path: Path) -> None:
    log = log_of(tmp_path, 2)
    receipt = log.append("erased", {"tenant": "t1"}, by="uid 7")
    log.append("tenant-set", {"tenant": "t4"}, by="uid 7")
    key = read_public_key(log.public_key_path)
    verify_log(log.path, key, receipt)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:3]))
    verify_log(log.path, key, receipt)  # which can't tell of what came after it
    log.path.write_bytes(b"".join(lines[:2]))
    verify_log(log.path, key)
    assert "ends after line 2, and the receipt is of line 3: at least 1 lines were cut" in damage_of(log, receipt)
    log.path.write_bytes(b"")
    assert "at least 3 lines were cut" in damage_of(log, receipt)


def test_a_log_written_anew_with_the_key_is_told_by_a_receipt_alone(tmp_path: Path) -> None:
    log = log_of(tmp_path, 2)
    receipt = log.append("erased", {"tenant": "t1"}, by="uid 7")
    log.path.unlink()
    log_of(tmp_path, 0).append("tenant-set", {"tenant": "another"}, by="uid 7")
    log_of(tmp_path, 3)
    verify_log(log.path, read_public_key(log.public_key_path))
    assert "line 3 is not what the receipt says of it" in damage_of(log, receipt)


def test_a_log_written_anew_with_another_key_is_told(tmp_path: Path) -> None:
    log = log_of(tmp_path / make(tmp_path, "ours"), 2)
    forger = log_of(tmp_path / make(tmp_path, "theirs"), 2)
    shutil.copy(forger.path, log.path)
    assert "line 1 was not written by the holder of this public key" in damage_of(log)


def make(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def test_a_forged_receipt_is_told(tmp_path: Path) -> None:
    log = log_of(tmp_path / make(tmp_path, "ours"), 1)
    key = read_public_key(log.public_key_path)
    receipt = log.append("erased", {"tenant": "t1", "disk-bytes": 4096}, by="uid 7")
    verify_receipt(parse_receipt(receipt.text.encode()), key)
    for name, value in (("details", {"tenant": "t2"}), ("time", "2020-01-01"), ("what", "kept"), ("serial", 1)):
        changed = msgspec.structs.replace(receipt, **{name: value})
        with pytest.raises(AuditError, match="the receipt was changed"):
            verify_receipt(changed, key)
    others = log_of(tmp_path / make(tmp_path, "theirs"), 1).append("erased", {"tenant": "t1"}, by="uid 7")
    assert "the receipt is forged, or of another server" in damage_of(log, others)
    with pytest.raises(AuditError, match="this is no receipt"):
        parse_receipt(b"{}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(min_value=0, max_value=1, exclude_max=True), bit=st.integers(min_value=0, max_value=7))
def test_any_flipped_bit_is_told(tmp_path: Path, position: float, bit: int) -> None:
    if not (tmp_path / "audit.log").exists():
        log_of(tmp_path, 3)
    log = AuditLog(tmp_path)
    whole = log.path.read_bytes()
    changed = bytearray(whole)
    changed[int(position * len(whole))] ^= 1 << bit
    log.path.write_bytes(changed)
    try:
        assert damage_of(log)
    finally:
        log.path.write_bytes(whole)


def test_lines_of_two_histories_are_not_taken_for_one(tmp_path: Path) -> None:
    log = log_of(tmp_path, 3)
    ours = log.path.read_bytes().splitlines(keepends=True)
    log.path.unlink()
    log.append("tenant-removed", {"tenant": "t1"}, by="uid 7")
    log_of(tmp_path, 2)
    theirs = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*ours[:2], theirs[2]]))
    assert "line 3 is line 3, and it does not follow the line before it" in damage_of(log)


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_line_that_was_never_finished_is_told_and_dropped_by_the_next(tmp_path: Path, kept: int) -> None:
    log = log_of(tmp_path, 3)
    lines = log.path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:kept]
    log.path.write_bytes(lines[0] + lines[1] + torn)
    assert "line 3 ends in the middle" in damage_of(log)
    line = log.append("tenant-set", {"tenant": "t9"}, by="uid 7")
    assert line.serial == 4
    verify_log(log.path, read_public_key(log.public_key_path), line)
    dropped = json.loads(log.path.read_bytes().splitlines()[2])
    assert (dropped["what"], dropped["details"]) == ("torn-line-dropped", {"bytes": len(torn)})


def test_nothing_is_added_behind_a_damaged_end(tmp_path: Path) -> None:
    log = log_of(tmp_path, 2)
    log.path.write_bytes(log.path.read_bytes().replace(b'"limit":2', b'"limit":3'))
    before = log.path.read_bytes()
    for attempt in (log.prepare, lambda: log.append("tenant-set", {}, by="uid 7")):
        with pytest.raises(AuditError, match="the last line was changed"):
            attempt()
    assert log.path.read_bytes() == before


def test_a_lost_key_ends_the_log_and_does_not_begin_another(tmp_path: Path) -> None:
    log = log_of(tmp_path, 1)
    kept = log.key_path.read_bytes()
    log.key_path.unlink()
    with pytest.raises(AuditError, match=r"no .*receipt\.key, with which .*audit\.log was signed: put it back"):
        log.append("tenant-set", {}, by="uid 7")
    os.close(os.open(log.key_path, os.O_CREAT | os.O_WRONLY, 0o600))
    with pytest.raises(AuditError, match=r"receipt\.key is no private key"):
        log.append("tenant-set", {}, by="uid 7")
    log.key_path.write_bytes(kept)
    log.key_path.chmod(0o644)
    with pytest.raises(AuditError, match=r"others may read .*receipt\.key"):
        log.append("tenant-set", {}, by="uid 7")
    log.key_path.chmod(0o600)
    assert log.append("tenant-set", {}, by="uid 7").serial == 2


def test_another_key_is_not_taken_for_the_log_s(tmp_path: Path) -> None:
    log = log_of(tmp_path, 1)
    log.key_path.unlink()
    shutil.copy(log_of(tmp_path / make(tmp_path, "theirs"), 1).key_path, log.key_path)
    with pytest.raises(AuditError, match=r"signed with another key than receipt\.key beside it"):
        log.append("tenant-set", {}, by="uid 7")


def test_a_log_that_others_may_change_is_not_written(tmp_path: Path) -> None:
    log = log_of(tmp_path, 1)
    log.path.chmod(0o660)
    with pytest.raises(AuditError, match=r"others may change .*: chmod 600 it"):
        log.append("tenant-set", {}, by="uid 7")


def full_after(written: int) -> Callable[[int], None]:
    """Return an `os.fsync` that fails as a full disk does once `written` calls were fine."""
    calls = iter(range(written))

    def sync(fd: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return sync


def test_what_is_not_on_the_disk_is_not_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path, 2)
    before = log.path.read_bytes()
    monkeypatch.setattr("saltern.audit.os.fsync", full_after(0))
    with pytest.raises(AuditError, match=r"can't be written: .*: No space left on device"):
        log.append("tenant-set", {}, by="uid 7")
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    assert log.append("tenant-set", {}, by="uid 7").serial == 3


def test_threads_and_processes_append_side_by_side(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from saltern.audit import AuditLog; log = AuditLog(Path(sys.argv[1]));"
        "[log.append('tenant-set', {'number': number}, by=sys.argv[2]) for number in range(20)]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"process {n}"]) for n in range(2)]
    log = AuditLog(tmp_path)

    def append_some() -> None:
        for number in range(20):
            log.append("tenant-set", {"number": number}, by=threading.current_thread().name)

    threads = [threading.Thread(target=append_some, name=f"thread {number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert [process.wait(PATIENCE_SECONDS) for process in processes] == [0, 0]
    assert verify_log(log.path, read_public_key(log.public_key_path)).lines == 80
    said = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    for who in {line["by"] for line in said}:
        assert [line["details"]["number"] for line in said if line["by"] == who] == list(range(20))


def test_a_line_of_any_length_is_found_again(tmp_path: Path) -> None:
    log = log_of(tmp_path, 1)
    log.append("erased", {"keys": ["é" * 100] * 2000}, by="uid 7")
    log.append("tenant-set", {"label": 'quoted " and\nbroken\x00'}, by="uid 7")
    assert verify_log(log.path, read_public_key(log.public_key_path)).lines == 3


def test_a_receipt_is_verified_by_openssl_alone(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    log = log_of(tmp_path, 1)
    receipt = log.append("erased", {"tenant": "t1"}, by="uid 7")
    (tmp_path / "signed").write_bytes(b"saltern.audit" + unhexlify(receipt.hash))
    (tmp_path / "signature").write_bytes(unhexlify(receipt.signature))
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(log.public_key_path), "-rawin"]
    command += ["-in", str(tmp_path / "signed"), "-sigfile", str(tmp_path / "signature")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    if re.search("unknown option|not supported", run.stderr, flags=re.IGNORECASE):
        pytest.skip("an openssl without Ed25519 here")
    assert run.returncode == 0, run


def test_what_is_no_public_key_is_said(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="nowhere: No such file"):
        read_public_key(tmp_path / "nowhere")
    (tmp_path / "text").write_text("text", encoding="ascii")
    with pytest.raises(AuditError, match="text is no public key"):
        read_public_key(tmp_path / "text")
