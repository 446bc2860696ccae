"""An engine's HTTP API, as `saltern publish` uses it: what do chats begin with, and compute this."""

import json
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ANSWER_BYTES_MAX = 64 * 1024 * 1024
ASK_SECONDS = 60.0
COMPUTE_SECONDS = 600.0

FIRST_WORDS = ("a", "Hello", "Z", "7", " x", "\n", "\n\n# y", "é", "语", "🙂", "<", "'", '"', "-", "...", "system")
"""How chats may begin: a tokenizer merges across the border between a prompt and what follows it."""


class EndpointError(Exception):
    """The endpoint did not do what was asked. The text says which, and what it answered."""


class Endpoint:
    """An OpenAI-compatible API of vLLM at `url`; `key` goes along as the bearer's token."""

    def __init__(self, url: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise EndpointError(f"{url} is no URL of an API: it begins with neither http:// nor https://")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key

    def model(self) -> str:
        """Return the only model's name. Raises `EndpointError` where there are several."""
        models = self._ask("GET", "/v1/models", None, ASK_SECONDS).get("data", [])
        names = [model["id"] for model in models if not model.get("parent")]  # an adapter has one
        if len(names) != 1:
            raise EndpointError(f"{self.url} serves {len(names)} models: name one with --model")
        return str(names[0])

    def chat_prefix(self, model: str, system_prompt: str) -> list[int]:
        """Return the tokens with which every chat under this system prompt begins, template included."""
        system = {"role": "system", "content": system_prompt}
        chats = [[system, {"role": "user", "content": words}] for words in FIRST_WORDS]
        chats.append([*chats[0], {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])
        return common_prefix([self._tokens(model, chat) for chat in chats])

    def compute(self, model: str, tokens: Sequence[int], kv_transfer_params: dict[str, Any]) -> None:
        """Have the engine compute a prompt, and one token that nobody reads."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "kv_transfer_params": kv_transfer_params}
        self._ask("POST", "/v1/completions", body, COMPUTE_SECONDS)

    def _tokens(self, model: str, chat: list[dict[str, str]]) -> list[int]:
        answer = self._ask("POST", "/tokenize", {"model": model, "messages": chat}, ASK_SECONDS)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise EndpointError(f"{self.url}/tokenize answered without tokens")
        return tokens

    def _ask(self, method: str, path: str, body: Any, seconds: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urlopen(request, timeout=seconds) as answer:
                read = json.loads(answer.read(ANSWER_BYTES_MAX))
        except HTTPError as error:
            said = error.read(1000).decode(errors="replace").strip()
            raise EndpointError(f"{method} {self.url}{path}: {error.code} {error.reason}: {said}") from None
        except (OSError, HTTPException, ValueError) as error:  # refused, cut off, or no JSON
            raise EndpointError(f"{method} {self.url}{path}: {getattr(error, 'reason', error)}") from None
        if not isinstance(read, dict):
            raise EndpointError(f"{method} {self.url}{path} answered something else than an object")
        return read


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return what all begin with."""
    shortest = min(sequences, key=len)
    for place, token in enumerate(shortest):
        if any(sequence[place] != token for sequence in sequences):
            return list(shortest[:place])
    return list(shortest)
