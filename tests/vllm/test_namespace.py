"""Tests of the namespace: every fact that decides bytes is in it, and a path is none."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saltern.vllm.namespace import SAMPLE_BYTES, SAMPLES, namespace_digest

WEIGHTS = bytes(range(256)) * 256


class HfConfig:
    """What is called of transformers' configuration."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def write_model(folder: Path) -> Path:
    """Write a model's files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(WEIGHTS)
    (folder / "model-2.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1", "b": "model-2"}}))
    return folder


def make_config(model: Path | str) -> Any:
    """Return as much of vLLM's configuration as the namespace reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            code_revision=None,
            hf_config=HfConfig(_name_or_path=str(model), hidden_size=64, rope_parameters={"rope_theta": 1e4}),
            hf_overrides={},
            dtype="torch.bfloat16",
            quantization=None,
            quantization_config=None,
            model_impl="auto",
            trust_remote_code=False,
            model_class_overrides={},
            max_model_len=8192,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", kv_cache_dtype_skip_layers=[], sliding_window=None, block_size=16
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config={}),
        speculative_config=None,
    )


FACTS = {"layout": "LBHNC", "specs": ["FullAttentionSpec(block_size=16)"], "isa": ["x86_64", "amx"], "device": "cpu"}


def namespace(config: Any, **changes: Any) -> bytes:
    """Return the digest of a configuration, of one rank that tells `FACTS` unless told otherwise."""
    return namespace_digest(config, **{"vllm_version": "0.32.0", "worker_facts": [FACTS]} | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a model's folder."""
    return write_model(tmp_path / "model")


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Return what sets one field of a configuration."""

    def apply(config: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        setattr(config, name, value)

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_config.revision", "abc"),
        ("model_config.code_revision", "abc"),
        ("model_config.hf_overrides", {"rope_theta": 1e6}),
        ("model_config.dtype", "torch.float16"),
        ("model_config.quantization", "fp8"),
        ("model_config.quantization_config", {"linear": {"weight": "fp8"}}),
        ("model_config.model_impl", "transformers"),
        ("model_config.model_class_overrides", {"LlamaForCausalLM": "elsewhere:Llama"}),
        ("model_config.max_model_len", 131072),  # LongRoPE takes other factors beyond the original length
        ("model_config.hf_config", HfConfig(hidden_size=64, rope_parameters={"rope_theta": 1e6})),
        ("model_config.hf_config", HfConfig(hidden_size=64)),
        ("cache_config.cache_dtype", "fp8"),
        ("cache_config.kv_cache_dtype_skip_layers", ["0"]),
        ("cache_config.sliding_window", 64),
        ("cache_config.block_size", 32),
        ("parallel_config.tensor_parallel_size", 2),
        ("parallel_config.pipeline_parallel_size", 2),
        ("parallel_config.decode_context_parallel_size", 2),
        ("parallel_config.prefill_context_parallel_size", 2),
        ("load_config.load_format", "dummy"),  # weights that aren't those of the files
        ("load_config.model_loader_extra_config", {"tensorizer_uri": "elsewhere"}),
        ("speculative_config", SimpleNamespace(method="ngram")),
    ],
)
def test_a_changed_fact_is_another_namespace(model: Path, path: str, value: Any) -> None:
    config, changed = make_config(model), make_config(model)
    change(path, value)(changed)
    assert namespace(config) != namespace(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_version": "0.32.1"},
        {"worker_facts": [FACTS, FACTS]},
        {"worker_facts": []},
        *({"worker_facts": [FACTS | {name: "other"}]} for name in FACTS),
    ],
)
def test_a_changed_fact_of_the_engine_is_another_namespace(model: Path, changes: dict[str, Any]) -> None:
    config = make_config(model)
    assert namespace(config) != namespace(config, **changes)


def test_ranks_that_tell_different_facts_are_not_the_same_in_another_order(model: Path) -> None:
    config, other = make_config(model), FACTS | {"isa": ["x86_64", "vec"]}
    assert namespace(config, worker_facts=[FACTS, other]) != namespace(config, worker_facts=[other, FACTS])


def test_the_same_engine_again_is_the_same_namespace(model: Path) -> None:
    assert namespace(make_config(model)) == namespace(copy.deepcopy(make_config(model)))


def test_a_path_is_no_identity(model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "other-name")
    assert namespace(make_config(model)) == namespace(make_config(moved))


def test_other_weights_under_the_same_path_are_another_namespace(model: Path) -> None:
    before = namespace(make_config(model))
    with (model / "model-2.safetensors").open("r+b") as weights:
        weights.seek(len(WEIGHTS) // 2)
        weights.write(b"?")
    assert namespace(make_config(model)) != before


@given(position=st.integers(0, len(WEIGHTS) - 1))
@settings(max_examples=30)
def test_any_byte_of_a_small_file_counts(tmp_path_factory: pytest.TempPathFactory, position: int) -> None:
    assert len(WEIGHTS) <= SAMPLES * SAMPLE_BYTES
    model = write_model(tmp_path_factory.mktemp("any") / "model")
    before = namespace(make_config(model))
    changed = bytearray(WEIGHTS)
    changed[position] ^= 1
    (model / "model-1.safetensors").write_bytes(changed)
    assert namespace(make_config(model)) != before


def test_a_large_file_is_sampled_from_end_to_end(model: Path) -> None:
    size = 100 * SAMPLES * SAMPLE_BYTES
    large = model / "model-1.safetensors"
    with large.open("wb") as weights:
        weights.truncate(size)
    seen = {namespace(make_config(model))}
    steps = [(size - SAMPLE_BYTES) * sample // (SAMPLES - 1) for sample in (0, 1, SAMPLES // 2, SAMPLES - 1)]
    for position in [*steps, size - 1]:
        with large.open("r+b") as weights:
            weights.seek(position)
            weights.write(b"\1")
        seen.add(namespace(make_config(model)))
    assert len(seen) == 6


def test_a_retrained_file_is_another_namespace_wherever_samples_lie(model: Path) -> None:
    size = 3 * SAMPLES * SAMPLE_BYTES + 12345
    large = model / "model-1.safetensors"
    large.write_bytes(b"\0" * size)
    before = namespace(make_config(model))
    large.write_bytes(b"\0" * 20_000 + b"\1" * (size - 40_000) + b"\0" * 20_000)
    assert namespace(make_config(model)) != before


@pytest.mark.parametrize("name", ["modeling_own.py", "layers/attention.py"])
def test_other_code_that_runs_the_model_is_another_namespace(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    trusting, wary = make_config(model), make_config(model)
    trusting.model_config.trust_remote_code = True
    seen = {namespace(trusting)}
    for code in ("scale = 1", "scale = 2"):
        (model / name).write_text(code)
        seen |= {namespace(trusting), namespace(wary)}
    assert len(seen) == 3, "code that isn't run changes nothing"


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors.index.json"])
def test_a_renamed_file_is_another_namespace(model: Path, name: str) -> None:
    before = namespace(make_config(model))
    (model / name).rename(model / f"a-{name}")
    assert namespace(make_config(model)) != before


def test_a_file_more_or_longer_is_another_namespace(model: Path) -> None:
    before = namespace(make_config(model))
    (model / "model-3.safetensors").write_bytes(b"")
    more = namespace(make_config(model))
    (model / "model-3.safetensors").write_bytes(b"\0")
    assert len({before, more, namespace(make_config(model))}) == 3


def test_the_files_beside_one_file_of_weights_count(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.gguf").write_bytes(WEIGHTS)
    before = namespace(make_config(model / "model.gguf"))
    assert before == namespace(make_config(model / "model.gguf"))
    (model / "model.gguf").write_bytes(WEIGHTS[1:])
    assert namespace(make_config(model / "model.gguf")) != before


@pytest.mark.parametrize(
    "name",
    ["no-such-organisation/no-such-model", "s3://bucket/model", "/no/such/folder", "a/b/c", "-" * 200, ""],
)
def test_weights_that_are_not_found_are_shared_with_nobody(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(name)
    assert namespace(config) != namespace(config)
    assert "shares its KV with no other engine" in caplog.text


def test_a_folder_without_weights_is_shared_with_nobody(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert namespace(config) != namespace(config)


def test_weights_in_the_hubs_cache_are_found_by_their_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def find(repo: str, file: str, revision: str | None = None) -> str | None:
        return str(model / file) if (repo, revision) == ("org/name", "main") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", find)
    config = make_config("org/name")
    config.model_config.revision = "main"
    assert namespace(config) == namespace(config)


def test_facts_that_are_no_json_count(model: Path) -> None:
    config, changed = make_config(model), make_config(model)
    config.model_config.hf_config = HfConfig(kind=SimpleNamespace(a=1))
    changed.model_config.hf_config = HfConfig(kind=SimpleNamespace(a=2))
    assert namespace(config) != namespace(changed)
