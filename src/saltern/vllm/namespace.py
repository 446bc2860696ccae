"""The namespace: everything that decides what bytes a block of some tokens has, as one digest.

Two engines share KV only if every fact here is equal, so a fact too many costs hits and a fact too few
serves wrong bytes. A path is no identity, so the weights are known by what their files hold: the index, and of
each file its size, samples, the time of its last change, and the name that a hub's cache gave its content. A model that
is run by its own code is known by that as well.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from saltern.core.keys import digest

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES = 64
SAMPLE_BYTES = 4096


def namespace_digest(vllm_config: Any, *, vllm_version: str, worker_facts: list[Mapping[str, Any]]) -> bytes:
    """Return the digest of an engine's facts. `worker_facts` come from each rank, in rank order."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    load, speculative = vllm_config.load_config, vllm_config.speculative_config
    facts = {
        "weights": _weights_identity(model.model, model.revision, has_code=model.trust_remote_code),
        "revision": str(model.revision),
        "code_revision": str(model.code_revision),
        "hf_config": {  # after overrides
            name: value for name, value in model.hf_config.to_dict().items() if name != "_name_or_path"
        },
        "hf_overrides": repr(model.hf_overrides),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "quantization_config": repr(model.quantization_config),
        "implementation": [str(model.model_impl), repr(model.model_class_overrides)],
        "load_format": str(load.load_format),  # "dummy" reads none of the files
        "load_config": repr(load.model_loader_extra_config),  # may name other files
        "max_model_len": model.max_model_len,  # LongRoPE takes other factors for long contexts
        "kv_dtype": str(cache.cache_dtype),
        "kv_skipped_layers": repr(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "sliding_window": repr(getattr(cache, "sliding_window", None)),
        "block_size": cache.block_size,
        "parallel": [
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.decode_context_parallel_size,
            getattr(parallel, "prefill_context_parallel_size", 1),
        ],
        "speculative": None if speculative is None else repr(getattr(speculative, "method", speculative)),
        "vllm": vllm_version,
        "workers": worker_facts,
    }
    return digest(b"saltern.nspace", [json.dumps(facts, sort_keys=True, default=repr).encode()])


def _weights_identity(model: str, revision: str | None, *, has_code: bool) -> str:
    folder = _model_folder(model, revision)
    files = [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if folder is None or not files:
        logger.warning(
            "no weight files of %s are found here: Saltern shares its KV with no other engine or start", model
        )
        return os.urandom(16).hex()
    summary = blake2b(digest_size=32)
    code = folder.rglob("*.py") if has_code else ()
    for text in sorted([*folder.glob("*.index.json"), *code]):
        summary.update(digest(b"saltern.index", [str(text.relative_to(folder)).encode(), text.read_bytes()]))
    for file in files:
        content_name = file.resolve().name.encode()  # in a hub's cache a digest of all of it
        summary.update(digest(b"saltern.weights", [file.name.encode(), content_name, *_samples(file)]))
    return summary.hexdigest()


def _model_folder(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no name that the hub could know, such as s3://…
        return None
    return Path(config).parent if isinstance(config, str) else None


def _samples(file: Path) -> Iterator[bytes]:
    """Yield a file's size, its time of change, and samples at even distances: an edit in between has a new time."""
    status = file.stat()
    size = status.st_size
    yield size.to_bytes(8, "little")
    yield status.st_mtime_ns.to_bytes(16, "little", signed=True)
    with file.open("rb") as stream:
        for sample in range(SAMPLES):
            stream.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
            yield stream.read(SAMPLE_BYTES)
