"""What holds for epochs: they only grow, on the disk before anybody hears of it, and no change is lost."""

import os
import stat
from pathlib import Path

import pytest

from saltern.epochs import Epochs, TenantEpochs, begin_anew, make_epochs, read_epochs
from saltern.signing import EPOCH_MAX


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "epochs.json"
    make_epochs(made)
    return made


def test_a_user_s_epoch_is_the_tenant_s_and_its_own(path: Path) -> None:
    begin_anew(path, "acme", "alice")
    begin_anew(path, "acme", None)
    said = begin_anew(path, "acme", "alice")
    assert said == read_epochs(path) == Epochs({"acme": TenantEpochs(1, {"alice": 2})})
    assert (said.of("acme", "alice"), said.of("acme", "bob"), said.of("beta", "alice")) == (3, 1, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert make_epochs(path) == said, "what is there is not made anew"


def test_what_is_no_file_of_epochs_is_said(path: Path) -> None:
    for content in ("", "[]", '{"tenants": {"acme": {"epoch": -1}}}', '{"tenants": {}, "q": 1}'):
        path.write_text(content, encoding="ascii")
        with pytest.raises(ValueError, match=str(path)):
            read_epochs(path)
        with pytest.raises(ValueError, match=str(path)):
            begin_anew(path, "acme", "alice")
        assert path.read_text(encoding="ascii") == content
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_epochs(path)


def test_an_epoch_fits_a_salt(path: Path) -> None:
    full = Epochs({"acme": TenantEpochs(EPOCH_MAX - 1, {"alice": 1})})
    path.write_bytes(b'{"tenants": {"acme": {"epoch": %d, "users": {"alice": 1}}}}' % (EPOCH_MAX - 1))
    assert read_epochs(path) == full
    for tag in ("alice", None):
        with pytest.raises(ValueError, match="too often"):
            begin_anew(path, "acme", tag)
    assert read_epochs(path) == full


def test_of_many_who_change_it_none_is_lost(path: Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(10):
                    begin_anew(path, "acme", f"user {number}")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert read_epochs(path).tenants["acme"].users == {f"user {number}": 10 for number in range(4)}
