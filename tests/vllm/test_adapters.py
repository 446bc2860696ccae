"""Adapters are known by the files that they were loaded from, not by their names."""

import os
import time
from pathlib import Path

import msgspec
import pytest

from saltern.vllm import adapters as module
from saltern.vllm.adapters import NO_FILES, Adapters, Loads, files_state


class Lora(msgspec.Struct):
    """What the connector reads of vLLM's request for an adapter."""

    lora_int_id: int
    lora_path: str
    is_3d_lora_weight: bool = False


def make_adapter(folder: Path, weights: bytes) -> str:
    """Write an adapter's files and return where."""
    folder.mkdir(exist_ok=True)
    let_time_pass(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def let_time_pass(folder: Path) -> None:
    """Wait until what is written gets a later time than the files of a folder have.

    Most kernels stamp files by a clock that moves every few milliseconds, and these tests are quicker than that.
    """
    latest = max((file.stat().st_ctime_ns for file in folder.iterdir()), default=0)
    clock = folder.with_name("clock")
    clock.touch()
    while clock.stat().st_ctime_ns <= latest:
        time.sleep(0.001)
        clock.touch()


def load(adapters: Adapters, lora: Lora, *ranks: int) -> bool:
    """Have ranks, by default the only one, load an adapter; return whether any of them had another."""
    loads = Loads()
    loads.note(lora)
    loaded = loads.take()
    assert loads.take() == {}
    changed = [adapters.load(rank, loaded) for rank in ranks or (0,)]
    return any(changed)


def settled(adapters: Adapters, lora: Lora) -> bytes | None:
    """Return the identity once the reading thread is through."""
    adapters.identity(lora)
    for reading in adapters._digest_by_state.values():
        reading.exception(timeout=30)
    return adapters.identity(lora)


def identity(lora: Lora, *, dtype: str = "") -> bytes | None:
    """Return the identity that an engine of one rank gives to an adapter that it has loaded."""
    adapters = Adapters(ranks=1, dtype=dtype)
    load(adapters, lora)
    return settled(adapters, lora)


def test_nothing_is_cached_until_the_files_are_read(tmp_path: Path) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"weights"))
    adapters = Adapters(ranks=1)
    load(adapters, lora)
    assert adapters.identity(lora) is None
    assert settled(adapters, lora) is not None


def test_nothing_is_cached_until_every_rank_has_loaded_the_same(tmp_path: Path) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"weights"))
    adapters = Adapters(ranks=2)
    assert settled(adapters, lora) is None
    load(adapters, lora, 1)
    assert settled(adapters, lora) is None
    assert adapters.load(0, {1: files_state(make_adapter(tmp_path / "b", b"weights"))}) is False
    assert settled(adapters, lora) is None
    assert load(adapters, lora, 0)
    assert settled(adapters, lora) is not None


def test_the_same_files_under_another_path_and_id_are_the_same_adapter(tmp_path: Path) -> None:
    first = identity(Lora(1, make_adapter(tmp_path / "a", b"weights")))
    second = identity(Lora(7, make_adapter(tmp_path / "b", b"weights")))
    assert first is not None
    assert first == second


@pytest.mark.parametrize("change", ["weights", "file name", "format", "dtype"])
def test_other_files_are_another_adapter(tmp_path: Path, change: str) -> None:
    first = identity(Lora(1, make_adapter(tmp_path / "a", b"weights")))
    other = make_adapter(tmp_path / "b", b"weightS" if change == "weights" else b"weights")
    if change == "file name":
        Path(other, "adapter_model.safetensors").rename(Path(other, "adapter_model.bin"))
    second = identity(Lora(1, other, is_3d_lora_weight=change == "format"), dtype="half" if change == "dtype" else "")
    assert first is not None
    assert second is not None
    assert first != second


def test_an_id_that_comes_with_another_path_is_still_what_was_loaded(tmp_path: Path) -> None:
    adapters = Adapters(ranks=1)
    first, second = (Lora(1, make_adapter(tmp_path / name, name.encode())) for name in "ab")
    load(adapters, first)
    known = settled(adapters, first)
    assert settled(adapters, second) is None
    assert settled(adapters, first) == known


def test_files_that_changed_after_they_were_loaded_are_not_cached(tmp_path: Path) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"one"))
    adapters = Adapters(ranks=1)
    load(adapters, lora)  # as vLLM does when it is told to, long before the first request
    make_adapter(tmp_path / "a", b"two")
    assert settled(adapters, lora) is None


def test_an_adapter_loaded_anew_is_another_one(tmp_path: Path) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"one"))
    adapters = Adapters(ranks=1)
    assert not load(adapters, lora)
    first = settled(adapters, lora)
    assert not load(adapters, lora), "nothing has changed"
    make_adapter(tmp_path / "a", b"two")
    assert load(adapters, lora)
    second = settled(adapters, lora)
    assert None not in (first, second)
    assert first != second


def test_files_that_change_while_they_are_read_have_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"one"))
    adapters = Adapters(ranks=1)
    load(adapters, lora)
    states = iter([files_state(lora.lora_path)])
    make_adapter(tmp_path / "a", b"two")
    monkeypatch.setattr(module, "files_state", lambda folder: next(states, None) or files_state(folder))
    adapters.identity(lora)  # still takes the files for what they were
    for reading in adapters._digest_by_state.values():
        assert isinstance(reading.exception(timeout=30), OSError)


def test_no_writer_can_hide_a_change(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a", b"one")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    before, times = files_state(path), weights.stat()
    let_time_pass(weights.parent)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files_state(path) != before


@pytest.mark.parametrize("path", ["somebody/an-adapter-on-a-hub", "a\0b", ""])
def test_what_is_no_folder_is_not_cached(path: str) -> None:
    assert identity(Lora(1, path)) is None


def test_a_folder_without_files_is_not_cached(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert files_state(str(tmp_path)) == NO_FILES
    assert identity(Lora(1, str(tmp_path))) is None


def test_only_so_many_adapters_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADAPTERS_MAX", 2)
    adapters = Adapters(ranks=1)
    loras = [Lora(number, make_adapter(tmp_path / str(number), bytes([number]))) for number in range(1, 4)]
    for lora in loras:
        load(adapters, lora)
        settled(adapters, lora)
    assert settled(adapters, loras[0]) is None
    assert settled(adapters, loras[2]) is not None
    assert max(len(adapters._loaded), len(adapters._digest_by_state)) == 2


def test_vllm_tells_what_it_loads_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("vllm.lora.worker_manager").WorkerLoRAManager
    lora = Lora(3, make_adapter(tmp_path / "a", b"one"))
    before = files_state(lora.lora_path)
    monkeypatch.setattr(
        manager, "_load_adapter", lambda manager, lora: make_adapter(Path(lora.lora_path), b"two") and "loaded"
    )
    forgotten, loads = Loads(), Loads()
    forgotten.watch()
    loads.watch()  # of the next engine in this process
    assert manager._load_adapter(None, lora) == "loaded"
    assert loads.take() == {3: before}
    assert forgotten.take() == {}
