"""What must not be confused: KV that some fact makes different is never found, however alike all else is.

Each test also lets an engine forget the fact, and sees that its answers go wrong: a confusion would be noticed here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.server import Server
from tests.e2e.lab import Answer, Lab, Lora
from tests.e2e.models import CACHED, PROMPT, make_llama, make_lora

pytestmark = pytest.mark.e2e


ROUNDING = 0.1
"""How far apart log probabilities may be that only rounding makes different: a hit computes fewer tokens at once."""

WRONG = 0.5
"""How far apart they are at least when the KV of the prompt's blocks is another one."""

LONGER_WAVES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


Start = Callable[..., None]


@pytest.fixture
def start(lab: Lab, server: Server) -> Start:
    """Return what starts an engine on the server, in the place of the one before."""
    return lambda model, **arguments: lab.start(model, socket_path=server.socket_path, **arguments)


# Two configurations whose KV differs, and whether an engine that can't tell them apart finds that of the other. It does
# not where blocks have another size: the server refuses those to it.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "dtypes of one size": ({}, {"dtype": "float16"}, True),
    "dtypes of two sizes": ({}, {"dtype": "float32"}, False),
    "KV dtypes of one size": ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8_e5m2"}, True),
    "KV dtypes of two sizes": ({}, {"kv_cache_dtype": "fp8"}, False),
    "block sizes": ({"block_size": 32}, {"block_size": 64}, True),
    "rope": ({}, {"hf_overrides": LONGER_WAVES}, True),
    "TP sizes": ({}, {"tensor_parallel_size": 2}, True),
}

NEEDS_AVX512 = pytest.mark.skipif(
    "avx512f" not in Path("/proc/cpuinfo").read_text(), reason="vLLM has no KV in FP8 on a CPU without AVX-512"
)


@pytest.mark.parametrize(
    ("first", "second", "is_found_when_confused"),
    [
        pytest.param(*pair, id=name, marks=NEEDS_AVX512 if "kv_cache_dtype" in pair[1] else ())
        for name, pair in CONFIGURATIONS.items()
    ],
)
def test_an_engine_finds_what_its_own_configuration_computed(
    lab: Lab,
    start: Start,
    model: Path,
    new_salt: Callable[[], str],
    first: dict[str, Any],
    second: dict[str, Any],
    is_found_when_confused: bool,
) -> None:
    salt, confused_salt = new_salt(), new_salt()
    start(model, **first)
    stored = _store(lab, salt)
    lab.forget("namespace")
    _store(lab, confused_salt)

    start(model, **second)
    right = lab.ask(PROMPT, new_salt())
    assert lab.ask(PROMPT, salt) == right
    lab.forget("namespace")
    confused = lab.ask(PROMPT, confused_salt)

    start(model, **first)
    assert lab.ask(PROMPT, salt) == stored
    assert right.cached_tokens == 0
    if is_found_when_confused:
        assert confused.cached_tokens == CACHED
        assert confused.distance(right) > WRONG
    else:
        assert confused == right


def test_a_revision_under_the_path_of_another_is_another_model(
    lab: Lab, start: Start, tmp_path: Path, new_salt: Callable[[], str]
) -> None:
    first, second = make_llama(tmp_path / "first"), make_llama(tmp_path / "second", seed=1)
    model, salt, confused_salt = tmp_path / "model", new_salt(), new_salt()
    _replace(model, first)
    start(model)
    stored = _store(lab, salt)
    lab.forget("namespace")
    _store(lab, confused_salt)

    _replace(model, second)
    start(model)
    right = lab.ask(PROMPT, new_salt())
    assert lab.ask(PROMPT, salt) == right
    lab.forget("namespace")
    confused = lab.ask(PROMPT, confused_salt)

    _replace(model, first)
    start(model)
    assert lab.ask(PROMPT, salt) == stored
    assert right.cached_tokens == 0
    assert confused.cached_tokens == CACHED
    assert confused.distance(right) > WRONG


def test_weights_changed_in_place_leave_what_was_computed_before(
    lab: Lab, start: Start, tmp_path: Path, new_salt: Callable[[], str]
) -> None:
    first, second = make_llama(tmp_path / "first"), make_llama(tmp_path / "second", seed=1)
    model, salt = tmp_path / "model", new_salt()
    _replace(model, first)
    start(model)
    stored = _store(lab, salt)
    _replace(model, second)
    lab.rpc("reload_weights")
    lab.reset_caches()
    right = lab.ask(PROMPT, new_salt())
    assert lab.ask(PROMPT, salt) == right
    assert right.cached_tokens == 0
    assert right.distance(stored) > WRONG

    start(model)  # has these weights from the beginning, and yet finds nothing: what follows a change has no name
    _store(lab, salt)
    _replace(model, first)
    lab.rpc("reload_weights")
    lab.forget("change")
    lab.reset_caches()
    confused = lab.ask(PROMPT, salt)
    assert confused.cached_tokens == CACHED
    assert confused.distance(stored) > WRONG

    start(model)
    assert lab.ask(PROMPT, salt) == stored


def test_another_version_of_vllm_finds_nothing(
    lab: Lab, start: Start, model: Path, new_salt: Callable[[], str]
) -> None:
    salt, confused_salt = new_salt(), new_salt()
    start(model)
    stored = _store(lab, salt)
    lab.forget("version")
    _store(lab, confused_salt)

    start(model, vllm_version="0.32.1")
    answer = lab.ask(PROMPT, salt)
    lab.forget("version")
    confused = lab.ask(PROMPT, confused_salt)

    start(model)
    assert lab.ask(PROMPT, salt) == stored
    assert answer.cached_tokens == 0
    assert confused.cached_tokens == CACHED


def test_prompt_embeddings_of_equal_length_are_not_confused(
    lab: Lab, start: Start, model: Path, new_salt: Callable[[], str]
) -> None:
    salt = new_salt()
    start(model, enable_prompt_embeds=True)
    tokens = _store(lab, salt)
    right = [lab.ask(PROMPT, new_salt(), embeddings_seed=seed) for seed in (1, 2)]
    for seed in (1, 2):
        for _ in range(2):
            assert lab.ask(PROMPT, salt, embeddings_seed=seed) == right[seed - 1]
    zeros = [0] * len(PROMPT)  # what vLLM has in the place of ids where there are none
    assert lab.ask(zeros, salt) == lab.ask(zeros, new_salt())
    assert lab.ask(PROMPT, salt) == tokens
    assert [answer.cached_tokens for answer in right] == [0, 0]
    assert right[0].distance(right[1]) > WRONG

    lab.forget("embeddings")
    confused_salt = new_salt()
    lab.ask(PROMPT, confused_salt, embeddings_seed=1)
    confused = lab.ask(PROMPT, confused_salt, embeddings_seed=2)
    assert confused.cached_tokens == CACHED
    assert confused.distance(right[1]) > WRONG


LORA_ASKS_MAX = 100
LORA_ASKS = 3  # after which the identity of an adapter is known, if it ever is and the machine isn't busy
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 1}


def test_adapters_of_one_name_and_the_model_without_one_are_not_confused(
    lab: Lab, start: Start, model: Path, tmp_path: Path, new_salt: Callable[[], str]
) -> None:
    salt, confused_salt = new_salt(), new_salt()
    one, two = (Lora(str(make_lora(tmp_path / name, seed=seed))) for seed, name in enumerate(("one", "two")))
    start(model, **LORA)
    without = _store(lab, salt)
    first = _store(lab, salt, one)
    lab.forget("files")
    _store(lab, confused_salt, one)

    start(model, **LORA)  # another engine, in which the name and the number are another adapter's
    right = lab.ask(PROMPT, new_salt(), lora=two)  # and from here on its identity is known
    assert lab.ask(PROMPT, salt, lora=two) == right
    assert _settled(lab, salt, two).distance(right) < ROUNDING
    assert lab.ask(PROMPT, salt) == without
    assert right.cached_tokens == 0
    assert min(right.distance(first), right.distance(without), first.distance(without)) > WRONG
    lab.forget("files")
    confused = lab.ask(PROMPT, confused_salt, lora=two)  # finds what the other adapter computed
    assert confused.cached_tokens == CACHED
    assert confused.distance(right) > WRONG

    start(model, **LORA)
    lab.ask(PROMPT, new_salt(), lora=one)
    assert _settled(lab, salt, one) == first
    lab.forget("adapter")
    confused = lab.ask(PROMPT, salt, lora=one)  # finds what the model computed without
    assert confused.cached_tokens == CACHED
    assert confused.distance(first) > WRONG


def test_an_adapter_whose_files_change_is_what_vllm_has_loaded(
    lab: Lab, start: Start, model: Path, tmp_path: Path, new_salt: Callable[[], str]
) -> None:
    path = tmp_path / "adapter"
    adapter, in_place = Lora(str(path)), Lora(str(path), load_inplace=True)
    salts = [new_salt() for _ in range(4)]  # each has stored what one version of the adapter computed
    answers: list[Answer] = []

    make_lora(path, seed=0)
    start(model, **LORA)
    answers.append(_store(lab, salts[0], adapter))
    make_lora(path, seed=1)
    for salt in salts * LORA_ASKS:  # vLLM goes on with what it has, and nothing of that is stored as what the files are
        assert lab.ask(PROMPT, salt, lora=adapter).distance(answers[0]) < ROUNDING
    lab.remove_lora(adapter.lora_int_id)  # as it does itself to make room: when next asked, it reads the files again
    answers.append(_store(lab, salts[1], adapter))
    make_lora(path, seed=2)
    answers.append(_store(lab, salts[2], in_place))

    start(model, **LORA)
    lab.add_lora(adapter)  # it is loaded before any request comes
    make_lora(path, seed=3)
    for salt in salts * LORA_ASKS:
        assert lab.ask(PROMPT, salt, lora=adapter).distance(answers[2]) < ROUNDING
    lab.remove_lora(adapter.lora_int_id)
    answers.append(_store(lab, salts[3], adapter))

    for seed, right in enumerate(answers):
        assert [right.distance(other) > WRONG for other in answers] == [other is not right for other in answers]
        make_lora(path, seed=seed)
        start(model, **LORA)
        _settled(lab, salts[seed], adapter)
        for salt in salts:
            assert lab.ask(PROMPT, salt, lora=adapter).distance(right) < ROUNDING


def _store(lab: Lab, salt: str, lora: Lora | None = None) -> Answer:
    """Have the prompt stored for a user who has none of it, and return the answer from the cache."""
    computed = lab.ask(PROMPT, salt, lora=lora)
    found = _settled(lab, salt, lora)
    assert computed.cached_tokens == 0
    assert found.distance(computed) < ROUNDING
    return found


def _settled(lab: Lab, salt: str, lora: Lora | None = None) -> Answer:
    """Return the first answer that comes from the cache; an adapter is not cached before its identity is known."""
    answer = lab.ask(PROMPT, salt, lora=lora)
    asks_left = 0 if lora is None else LORA_ASKS_MAX
    while not answer.cached_tokens and asks_left:
        answer, asks_left = lab.ask(PROMPT, salt, lora=lora), asks_left - 1
    assert answer.cached_tokens == CACHED
    return answer


def _replace(folder: Path, other: Path) -> None:
    """Let a model's files be those of another, with one time of change for all: only their content tells them apart."""
    shutil.copytree(other, folder, dirs_exist_ok=True)
    for file in folder.iterdir():
        os.utime(file, ns=(0, 0))
