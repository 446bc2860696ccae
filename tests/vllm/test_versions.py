"""A vLLM that Saltern wasn't tested with is refused, before anything that it lacks is missed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

import saltern
from saltern.vllm import register
from saltern.vllm.versions import VersionError, check_version, disk_hit_source, memory_hit_source

ASK_FOR_THE_CONNECTOR = "import saltern.vllm; saltern.vllm.SalternConnector"
LOAD_THE_PLUGIN = "import saltern.vllm; saltern.vllm.register(); print('registered')"


@pytest.fixture
def empty_vllm(tmp_path: Path) -> Path:
    """Return a folder with a vLLM that has a version, and nothing that Saltern imports of it."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text('__version__ = "0.29.1+cpu"\n')
    return tmp_path


def run(code: str, vllm_folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run code where this vLLM is found before the one that is installed."""
    places = [str(vllm_folder), str(Path(saltern.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", ["0.31.0", "0.31.9", "0.32.0", "0.32.7", "0.32.1rc1", "0.32.0+cpu", "0.31.1.dev3"])
def test_releases_and_builds_inside_the_range_are_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.30.9", "0.31.0rc1", "0.33.0", "0.33.0rc1", "0.33.0+cpu", "1.0.0", "dev", ""])
def test_others_are_refused_with_the_range_and_what_to_do(version: str) -> None:
    with pytest.raises(VersionError) as refused:
        check_version(version)
    assert f"supports vLLM >=0.31 and <0.33, this is {version}. Install" in str(refused.value)


def test_the_vllm_of_these_tests_is_inside_the_range() -> None:
    check_version(vllm.__version__)


def test_asking_an_unsupported_vllm_for_the_connector_says_so_instead_of_what_is_missing(empty_vllm: Path) -> None:
    asked = run(ASK_FOR_THE_CONNECTOR, empty_vllm)
    assert asked.returncode == 1
    last_line = asked.stderr.strip().splitlines()[-1]
    assert last_line.startswith("saltern.vllm.versions.VersionError: Saltern supports vLLM >=0.31 and <0.33")
    assert "this is 0.29.1+cpu" in last_line


def test_the_plugin_disturbs_no_vllm_that_knows_no_connectors(empty_vllm: Path) -> None:
    loaded = run(LOAD_THE_PLUGIN, empty_vllm)
    assert (loaded.returncode, loaded.stdout) == (0, "registered\n"), loaded.stderr


def test_vllm_finds_the_connector_by_its_name_and_not_past_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    register()
    assert KVConnectorFactory.get_connector_class_by_name("SalternConnector").__name__ == "SalternConnector"
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(VersionError, match=r"this is 0\.33\.0"):
        KVConnectorFactory.get_connector_class_by_name("SalternConnector")


def test_hits_are_named_where_vllm_names_them() -> None:
    has_sources = (Path(vllm.__file__).parent / "v1" / "metrics" / "cache_hit_source.py").exists()
    for source, name in ((memory_hit_source(), "host"), (disk_hit_source(), "disk")):
        assert (source is not None) == has_sources
        assert source is None or source.value == name
