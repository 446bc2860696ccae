"""Adapters: a LoRA's identity is a digest of the files that it was loaded from: names, ids and paths are used again.

vLLM reads an adapter's files when it is told to or when a request first needs them, keeps them under the adapter's id,
and reads them anew when it had to make room or is told to. Only its workers know when. So a worker notes the state
of the files just before they are read, and tells its scheduler, where a thread digests them. A request of the adapter
is cached as long as three states are one: that which every rank has loaded, that which was digested, and that of now.

    state  =  of each file its name, inode, size, and the times of its last changes, which no writer can set back
"""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from hashlib import blake2b
from pathlib import Path
from typing import Any, NewType, Protocol

from saltern.core.keys import digest

logger = logging.getLogger(__name__)

ADAPTERS_MAX = 4096
"""Most adapters, and most states of their files, remembered; the oldest is forgotten, and not cached any more."""

_READ_BYTES = 1024 * 1024

_STATE_OF_FILE = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")

FilesState = NewType("FilesState", bytes)
NO_FILES = FilesState(b"")
"""Of what isn't a folder with files, or can't be read. Such adapters are not cached."""


class LoraRequest(Protocol):
    """What is read of vLLM's `LoRARequest`."""

    lora_int_id: int
    lora_path: str
    is_3d_lora_weight: bool


class Loads:
    """The worker's side: what was loaded since the scheduler was last told."""

    def __init__(self) -> None:
        self._state_by_id: dict[int, FilesState] = {}

    def watch(self) -> None:
        """Have vLLM's manager of adapters, in this process, tell us first what it reads. The last to ask is told."""
        from vllm.lora.worker_manager import WorkerLoRAManager

        load = getattr(WorkerLoRAManager._load_adapter, "__wrapped__", WorkerLoRAManager._load_adapter)

        @wraps(load)
        def noted_load(manager: Any, lora: LoraRequest) -> Any:
            self.note(lora)
            return load(manager, lora)

        WorkerLoRAManager._load_adapter = noted_load

    def note(self, lora: LoraRequest) -> None:
        """Remember the state of an adapter's files, which are read next."""
        self._state_by_id[lora.lora_int_id] = files_state(lora.lora_path)

    def take(self) -> dict[int, FilesState]:
        """Return what was loaded since the last call."""
        state_by_id, self._state_by_id = self._state_by_id, {}
        return state_by_id


class Adapters:
    """The scheduler's side: the identities of the adapters that an engine has loaded on its `ranks`.

    `dtype` is what it keeps their weights as.
    """

    def __init__(self, *, ranks: int, dtype: str = "") -> None:
        self._ranks = ranks
        self._dtype = dtype
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="saltern-adapters")
        self._digest_by_state: dict[FilesState, Future[bytes]] = {}
        self._loaded: dict[int, dict[int, FilesState]] = {}  # by adapter id, by rank

    def load(self, rank: int, state_by_id: Mapping[int, FilesState]) -> bool:
        """Take in what a rank has loaded; return whether an adapter is another one than it was to that rank."""
        is_changed = False
        for adapter_id, state in state_by_id.items():
            states = self._loaded.setdefault(adapter_id, {})
            is_changed |= states.get(rank, state) != state
            states[rank] = state
        _forget_oldest(self._loaded)
        return is_changed

    def identity(self, lora: LoraRequest) -> bytes | None:
        """Return what stands for an adapter in keys, None while it isn't known.

        Never waits for the files to be read. To look at their state takes some 10 µs for each.
        """
        state = files_state(lora.lora_path)
        if state == NO_FILES:
            return None
        known = self._digest_by_state.get(state)
        if known is None:
            self._digest_by_state[state] = self._reader.submit(_digest_of_files, Path(lora.lora_path), state)
            _forget_oldest(self._digest_by_state)
        loaded = self._loaded.get(lora.lora_int_id, {})
        if len(loaded) < self._ranks or set(loaded.values()) != {state}:
            return None
        if known is None or not known.done() or known.exception() is not None:
            return None
        return digest(b"saltern.lora", [known.result(), bytes([lora.is_3d_lora_weight]), self._dtype.encode()])

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def files_state(folder: str) -> FilesState:
    """Return what changes with every change of a folder's files, without reading them."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return NO_FILES
    facts = [
        fact
        for name, status in found
        for fact in (os.fsencode(name), *(_eight_bytes(getattr(status, number)) for number in _STATE_OF_FILE))
    ]
    return FilesState(digest(b"saltern.files", facts)) if facts else NO_FILES


def _digest_of_files(folder: Path, state: FilesState) -> bytes:
    """Digest every file of an adapter with its name; raises OSError if their state is, or becomes, another one."""
    summary = blake2b(digest_size=32)
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        content = blake2b(digest_size=32)
        with file.open("rb") as stream:
            while part := stream.read(_READ_BYTES):
                content.update(part)
        summary.update(digest(b"saltern.file", [os.fsencode(file.name), content.digest()]))
    if files_state(str(folder)) != state:
        raise OSError(f"the files in {folder} changed while they were read")
    return summary.digest()


def _eight_bytes(number: int) -> bytes:
    return (number & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little")


def _forget_oldest(remembered: dict[Any, Any]) -> None:
    while len(remembered) > ADAPTERS_MAX:
        del remembered[next(iter(remembered))]
