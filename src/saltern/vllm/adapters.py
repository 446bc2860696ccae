"""Adapters: a LoRA's identity is a digest of its files, since names, ids and paths are used again.

The files are read by a thread, never by the scheduler's; until the digest is known, requests of that adapter are
not cached. An adapter that is loaded in place of another, or whose id comes with another path, has no
identity any more: nothing says which of the two the engine computed with.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from saltern.core.keys import digest

logger = logging.getLogger(__name__)

ADAPTERS_MAX = 4096
"""Most adapters remembered; those beyond are not cached."""

_READ_BYTES = 1024 * 1024


class LoraRequest(Protocol):
    """What is read of vLLM's `LoRARequest`."""

    lora_int_id: int
    lora_path: str
    load_inplace: bool
    is_3d_lora_weight: bool


class Adapters:
    """The identities of the adapters that an engine has been asked for."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="saltern-adapters")
        self._path_by_id: dict[int, str] = {}
        self._digest_by_id: dict[int, Future[bytes]] = {}
        self._ambiguous_ids: set[int] = set()

    def identity(self, lora: LoraRequest) -> bytes | None:
        """Return what stands for an adapter in keys, None while it isn't known. Never waits."""
        adapter_id = lora.lora_int_id
        if lora.load_inplace or self._path_by_id.get(adapter_id, lora.lora_path) != lora.lora_path:
            self._ambiguous_ids.add(adapter_id)
        if adapter_id in self._ambiguous_ids:
            return None
        known = self._digest_by_id.get(adapter_id)
        if known is None and len(self._digest_by_id) < ADAPTERS_MAX:
            self._path_by_id[adapter_id] = lora.lora_path
            self._digest_by_id[adapter_id] = self._reader.submit(_digest_of_files, Path(lora.lora_path))
        if known is None or not known.done() or known.exception() is not None:
            return None
        return digest(b"saltern.lora", [known.result(), bytes([lora.is_3d_lora_weight])])

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def _digest_of_files(folder: Path) -> bytes:
    """Digest every file of an adapter with its name; raises OSError for what isn't a folder."""
    summary = blake2b(digest_size=32)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if not files:
        raise FileNotFoundError(f"no files in {folder}")
    for file in files:
        content = blake2b(digest_size=32)
        with file.open("rb") as stream:
            while part := stream.read(_READ_BYTES):
                content.update(part)
        summary.update(digest(b"saltern.file", [file.name.encode(), content.digest()]))
    return summary.digest()
