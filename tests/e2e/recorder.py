"""A middleware behind Saltern's that writes down what comes through; `vllm serve --middleware` names both."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

RECORD_VARIABLE = "SALTERN_TESTS_RECORD"


class Recorder:
    """Appends a line of JSON for each request, with its path, the names of its headers and its body."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._path = os.environ[RECORD_VARIABLE]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the request down once its body is there; it goes on as it came."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def recording() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "http.request":
                self._write(scope, message.get("body", b""))
            return message

        if scope["type"] != "http":
            self._write(scope, b"")
        await self._app(scope, recording, send)

    def _write(self, scope: Scope, body: bytes) -> None:
        names = [name.decode("latin-1") for name, _ in scope["headers"]]
        line = json.dumps({"path": scope["path"], "headers": names, "body": body.decode("latin-1")})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
