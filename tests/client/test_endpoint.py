"""Tests of the engine's HTTP API as `saltern publish` sees it, over real sockets."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from saltern.client.endpoint import Endpoint, EndpointError, common_prefix

Answer = Callable[[str, Any], tuple[int, Any]]


class Api:
    """An API that answers as `answer` says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = tokenize
        self.asked: list[tuple[str, Any, str | None]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _reply(self, body: Any) -> None:
                api.asked.append((self.path, body, self.headers["Authorization"]))
                status, answer = api.answer(self.path, body)
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    thread = Thread(target=api.server.serve_forever)
    thread.start()
    yield api
    api.server.shutdown()
    thread.join()
    api.server.server_close()


def tokenize(_path: str, body: Any) -> tuple[int, Any]:
    """Turn every character of a chat into a token."""
    text = "".join(f"<{message['role']}>{message['content']}" for message in body["messages"])
    return 200, {"tokens": [ord(character) for character in text]}


def test_a_chats_prefix_ends_where_the_user_begins_to_speak(api: Api) -> None:
    tokens = Endpoint(api.url).chat_prefix("m", "Be brief.")
    assert "".join(map(chr, tokens)) == "<system>Be brief.<user>"


def test_the_key_goes_along(api: Api) -> None:
    api.answer = lambda *_: (200, {})
    Endpoint(api.url + "/v1/", "secret").compute("m", [1, 2], {"a": "b"})
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 1, "kv_transfer_params": {"a": "b"}}
    assert api.asked == [("/v1/completions", body, "Bearer secret")]


def test_the_only_model_is_taken_and_adapters_are_none(api: Api) -> None:
    api.answer = lambda *_: (200, {"data": [{"id": "base"}, {"id": "adapter", "parent": "base"}]})
    assert Endpoint(api.url).model() == "base"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {"error": "who are you"}), "401"),
        ((200, b"<html>"), "tokenize"),
        ((200, []), "something else than an object"),
        ((200, {"tokens": "none"}), "without tokens"),
    ],
    ids=["refused", "no json", "no object", "no tokens"],
)
def test_what_is_no_answer_is_said(api: Api, answer: tuple[int, Any], said: str) -> None:
    api.answer = lambda *_: answer
    with pytest.raises(EndpointError, match=said):
        Endpoint(api.url).chat_prefix("m", "Be brief.")


def test_several_models_must_be_told_apart(api: Api) -> None:
    api.answer = lambda *_: (200, {"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(EndpointError, match="--model"):
        Endpoint(api.url).model()


def test_nobody_there_is_said() -> None:
    with pytest.raises(EndpointError, match="refused"):
        Endpoint("http://127.0.0.1:9").model()
    with pytest.raises(EndpointError, match="no URL"):
        Endpoint("file:///etc/passwd")


def test_the_common_prefix_of_tokens() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == []
