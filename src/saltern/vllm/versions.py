"""The versions of vLLM that Saltern runs with: the range, its refusal, and what differs inside it."""

from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

VLLM_SUPPORTED = SpecifierSet(">=0.31,<0.33")
"""Both ends are tested, and nothing beyond them: vLLM's hooks change with every minor release."""


class VersionError(RuntimeError):
    """This vLLM isn't supported. The text says which are and what to do."""


def check_version(version: str) -> None:
    """Raise `VersionError` for a vLLM outside the range, or of no version that could be compared."""
    try:
        is_supported = VLLM_SUPPORTED.contains(Version(version), prereleases=True)
    except InvalidVersion:  # "dev", as vLLM calls itself when it was built from a checkout without tags
        is_supported = False
    if not is_supported:
        supported = " and ".join(sorted(map(str, VLLM_SUPPORTED), reverse=True))
        raise VersionError(
            f"Saltern supports vLLM {supported}, this is {version}. Install a vLLM of that range or a Saltern for"
            " this one, or start vLLM without Saltern in --kv-transfer-config"
        )


def memory_hit_source() -> Any:
    """Return vLLM's name for hits from the host's memory; None on 0.31, which doesn't tell sources apart."""
    return _hit_source("HOST")


def disk_hit_source() -> Any:
    """Return vLLM's name for hits from a disk; None on 0.31."""
    return _hit_source("DISK")


def scoring_has_salt() -> bool:
    """Return whether vLLM reads a salt at `/generative_scoring`; on 0.31 it computes without."""
    try:
        from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
    except ModuleNotFoundError:
        return False
    return "cache_salt" in GenerativeScoringRequest.model_fields


def _hit_source(name: str) -> Any:
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ModuleNotFoundError:
        return None
    return CacheHitSource[name]
