"""Adapters are known by their files, not by their names."""

from pathlib import Path

import msgspec
import pytest

from saltern.vllm.adapters import Adapters


class Lora(msgspec.Struct):
    """What the connector reads of vLLM's request for an adapter."""

    lora_int_id: int
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


def make_adapter(folder: Path, weights: bytes) -> str:
    """Write an adapter's files and return where."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def settled(adapters: Adapters, lora: Lora) -> bytes | None:
    """Return the identity once the reading thread is through."""
    adapters.identity(lora)
    for reading in adapters._digest_by_id.values():
        reading.exception(timeout=30)
    return adapters.identity(lora)


def test_nothing_is_cached_until_the_files_are_read(tmp_path: Path) -> None:
    lora = Lora(1, make_adapter(tmp_path / "a", b"weights"))
    adapters = Adapters()
    assert adapters.identity(lora) is None
    assert settled(adapters, lora) is not None


def test_the_same_files_under_another_path_and_id_are_the_same_adapter(tmp_path: Path) -> None:
    first = settled(Adapters(), Lora(1, make_adapter(tmp_path / "a", b"weights")))
    second = settled(Adapters(), Lora(7, make_adapter(tmp_path / "b", b"weights")))
    assert first is not None
    assert first == second


@pytest.mark.parametrize("change", ["weights", "file name", "format"])
def test_other_files_are_another_adapter(tmp_path: Path, change: str) -> None:
    first = settled(Adapters(), Lora(1, make_adapter(tmp_path / "a", b"weights")))
    other = make_adapter(tmp_path / "b", b"weightS" if change == "weights" else b"weights")
    if change == "file name":
        Path(other, "adapter_model.safetensors").rename(Path(other, "adapter_model.bin"))
    second = settled(Adapters(), Lora(1, other, is_3d_lora_weight=change == "format"))
    assert first is not None
    assert second is not None
    assert first != second


def test_an_id_with_two_paths_is_not_cached_any_more(tmp_path: Path) -> None:
    adapters = Adapters()
    first = Lora(1, make_adapter(tmp_path / "a", b"one"))
    assert settled(adapters, first) is not None
    assert settled(adapters, Lora(1, make_adapter(tmp_path / "b", b"two"))) is None
    assert adapters.identity(first) is None


def test_an_adapter_loaded_in_place_is_not_cached_any_more(tmp_path: Path) -> None:
    adapters = Adapters()
    path = make_adapter(tmp_path / "a", b"one")
    assert settled(adapters, Lora(1, path)) is not None
    assert adapters.identity(Lora(1, path, load_inplace=True)) is None
    assert adapters.identity(Lora(1, path)) is None


def test_what_is_no_folder_is_not_cached() -> None:
    assert settled(Adapters(), Lora(1, "somebody/an-adapter-on-a-hub")) is None
