"""What holds for the listening socket and its path."""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from saltern.server.listener import Listener, ListenError


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="saltern-"))
    yield made
    shutil.rmtree(made)


def test_the_socket_and_a_folder_made_for_it_are_private(folder: Path) -> None:
    listener = Listener(folder / "new/s.sock")
    assert stat.S_IMODE((folder / "new/s.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o700
    assert not os.get_inheritable(listener.socket.fileno())
    listener.close()
    assert not list((folder / "new").iterdir())


def test_nobody_may_open_the_socket_before_its_mode_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    chmod = Path.chmod

    def spy(path: Path, mode: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", spy)
    Listener(folder / "s.sock").close()
    assert modes == [0]


def test_the_socket_is_as_open_as_was_asked(folder: Path) -> None:
    listener = Listener(folder / "s.sock", mode=0o660)
    assert stat.S_IMODE((folder / "s.sock").stat().st_mode) == 0o660
    listener.close()


def test_who_connects_is_known(folder: Path) -> None:
    listener = Listener(folder / "s.sock")
    assert listener.accept() is None
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(folder / "s.sock"))
    accepted = listener.accept()
    assert accepted is not None
    connection, peer = accepted
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert not connection.getblocking()
    assert not os.get_inheritable(connection.fileno())
    connection.close()
    client.close()
    listener.close()


def test_a_dead_servers_socket_is_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s.sock"))
    listener = Listener(folder / "s.sock")
    listener.close()


def test_a_living_servers_socket_is_left_alone(folder: Path) -> None:
    first = Listener(folder / "s.sock")
    with pytest.raises(ListenError, match=r"a server listens on .* already"):
        Listener(folder / "s.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "s.sock"))
    first.close()


def test_what_is_no_socket_is_not_replaced(folder: Path) -> None:
    (folder / "s.sock").write_text("precious", encoding="ascii")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        Listener(folder / "s.sock")
    assert (folder / "s.sock").read_text(encoding="ascii") == "precious"


def test_the_socket_of_a_successor_is_not_removed(folder: Path) -> None:
    first = Listener(folder / "s.sock")
    (folder / "s.sock").unlink()
    second = Listener(folder / "s.sock")
    first.close()
    assert (folder / "s.sock").exists()
    second.close()
    second_again = Listener(folder / "s.sock")
    (folder / "s.sock").unlink()
    second_again.close()  # somebody tidied up before


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_change_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(ListenError, match="others may change"):
        Listener(folder / "s.sock")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_and_link_are_refused(folder: Path) -> None:
    (folder / "theirs").mkdir()
    os.chown(folder / "theirs", 12345, 12345)
    with pytest.raises(ListenError, match="belongs to another user"):
        Listener(folder / "theirs/s.sock")
    (folder / "ours").mkdir()
    (folder / "link").symlink_to(folder / "ours")
    os.chown(folder / "link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(ListenError, match="belongs to another user"):
        Listener(folder / "link/s.sock")


def test_a_path_that_no_socket_can_have_is_named(folder: Path) -> None:
    with pytest.raises(ListenError, match="too long"):
        Listener(folder / ("x" * 120) / "s.sock")
