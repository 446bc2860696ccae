"""The middleware alone, in front of an application that writes down what reaches it."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saltern.apikeys import KeysError, Role, add_key, read_keys, revoke_key
from saltern.epochs import begin_anew, make_epochs
from saltern.secret import make_signing_secrets, read_signing_secrets
from saltern.signing import Signed, sign, user_tag, verify
from saltern.vllm import middleware
from saltern.vllm.callers import LOOK_SECONDS, Callers, TenantsError, TenantsSettings, Watched, load_callers
from saltern.vllm.middleware import MARKS, PUBLISH_PREFIX, Message, Receive, Scope, Send, TenantMiddleware
from saltern.vllm.routes import KIND_BY_ROUTE, Kind, known_path, route_path
from tests.support import rotate_signing_secrets

ALICE, BOB = Signed("acme", user_tag("acme", "alice")), Signed("acme", user_tag("acme", "bob"))
ENTERED = "entered"

SALTED = sorted(path for (_, path), kind in KIND_BY_ROUTE.items() if kind is Kind.SALTED)
ROUTES = sorted((*route, kind) for route, kind in KIND_BY_ROUTE.items())


@dataclass
class Recorder:
    """An application that writes down what reaches it, and answers in two parts with a wait between them."""

    scopes: list[Scope] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    waits: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if self.waits:
            await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    @property
    def fields(self) -> dict[str, Any]:
        """The last body, as vLLM would read it."""
        fields = json.loads(self.bodies[-1])
        assert isinstance(fields, dict)
        return fields

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The last request's headers; each is there once."""
        headers = self.scopes[-1]["headers"]
        assert len(dict(headers)) == len(headers)
        return dict(headers)


@dataclass
class Answer:
    """What came back."""

    status: int
    body: bytes
    headers: dict[bytes, bytes]

    @property
    def error(self) -> dict[str, Any]:
        """The error, in OpenAI's shape."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        assert error["type"]
        return dict(error)


class Front:
    """A middleware with keys, and the application behind it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.keys_path, self.signing_path = folder / "keys.json", folder / "signing.keys"
        self.epochs_path = folder / "epochs.json"
        make_signing_secrets(self.signing_path)
        make_epochs(self.epochs_path)
        self.alice = self.add("alice")
        self.shared = self.add(None)
        self.operator, _ = add_key(self.keys_path, tenant="ops", user=None, role=Role.OPERATOR, added="")
        self.inner = Recorder()
        self.callers = Callers(msgspec.convert(settings, TenantsSettings), folder)
        self.app = TenantMiddleware(self.inner, self.callers)

    def add(self, user: str | None) -> str:
        """Add a key of the tenant acme."""
        return add_key(self.keys_path, tenant="acme", user=user, role=Role.USER, added="2026-11-24")[0]

    @property
    def usual_headers(self) -> list[tuple[bytes, bytes]]:
        """What a client of Alice's sends with JSON."""
        return [(b"authorization", b"Bearer " + self.alice.encode()), (b"content-type", b"application/json")]

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """The signing secrets."""
        return read_signing_secrets(self.signing_path)

    def ask(
        self,
        path: str,
        body: bytes | Iterable[bytes] = b'{"prompt": "x"}',
        *,
        key: str | None = None,
        method: str = "POST",
        headers: Sequence[tuple[bytes, bytes]] = (),
        content_type: bytes | None = b"application/json",
        root_path: str = "",
    ) -> Answer:
        """Send a request through the middleware, in as many chunks as `body` has."""
        chunks = [body] if isinstance(body, bytes) else list(body)
        sent = [*headers]
        if key is not None:
            sent.append((b"authorization", b"Bearer " + key.encode()))
        if content_type is not None:
            sent.append((b"content-type", content_type))
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": root_path,
            "query_string": b"", "headers": sent,
        }  # fmt: skip
        return asyncio.run(exchange(self.app, scope, chunks))


async def exchange(app: TenantMiddleware, scope: Scope, chunks: Sequence[bytes]) -> Answer:
    """Run one request to its end."""
    messages = incoming(chunks)
    sent: list[Message] = []

    async def receive() -> Message:
        return await anext(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent, "no answer at all"
    return Answer(sent[0]["status"], b"".join(message["body"] for message in sent[1:]), dict(sent[0]["headers"]))


async def incoming(chunks: Sequence[bytes]) -> AsyncIterator[Message]:
    """What a server says of a client that sends a body and leaves."""
    for index, chunk in enumerate(chunks):
        yield {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
    while True:
        yield {"type": "http.disconnect"}


@pytest.fixture(autouse=True)
def newest_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the middleware take the vLLM that is here for the newest."""
    monkeypatch.setattr(middleware, "scoring_has_salt", lambda: True)


@pytest.fixture
def front(tmp_path: Path) -> Front:
    return Front(tmp_path)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """One for all examples of a property."""
    return Front(tmp_path_factory.mktemp("front"))


# Routes × attacks

KEYLESS: dict[str, list[tuple[bytes, bytes]]] = {
    "no key": [],
    "empty": [(b"authorization", b"")],
    "bearer alone": [(b"authorization", b"Bearer")],
    "bearer of nothing": [(b"authorization", b"Bearer ")],
    "unknown key": [(b"authorization", b"Bearer sk-saltern-" + b"A" * 43)],
    "another scheme": [(b"authorization", b"Basic {key}")],
    "no scheme": [(b"authorization", b"{key}")],
    "two keys in one header": [(b"authorization", b"Bearer {key}, Bearer {key}")],
    "two headers, a good one first": [(b"authorization", b"Bearer {key}"), (b"authorization", b"Bearer x")],
    "two headers, a good one last": [(b"authorization", b"Bearer x"), (b"Authorization", b"Bearer {key}")],
    "the same twice": [(b"authorization", b"Bearer {key}"), (b"authorization", b"Bearer {key}")],
    "its digest": [(b"authorization", b"Bearer {digest}")],
    "upper case": [(b"authorization", b"Bearer {KEY}")],
    "no UTF-8": [(b"authorization", b"Bearer \xff\xfe")],
    "another header": [(b"x-api-key", b"{key}"), (b"proxy-authorization", b"Bearer {key}")],
    "a cookie": [(b"cookie", b"authorization=Bearer {key}")],
}


@pytest.mark.parametrize("attack", KEYLESS)
@pytest.mark.parametrize(("method", "path", "kind"), ROUTES)
def test_without_a_valid_key_nothing_but_a_probe_gets_in(
    lasting: Front, method: str, path: str, kind: Kind, attack: str
) -> None:
    key = lasting.alice
    digest = next(iter(read_keys(lasting.keys_path)))
    headers = KEYLESS[attack]
    for placeholder, text in ((b"{key}", key), (b"{KEY}", key.upper()), (b"{digest}", digest)):
        headers = [(name, value.replace(placeholder, text.encode())) for name, value in headers]
    lasting.inner.bodies.clear()
    answer = lasting.ask(path.replace("{id}", "x1"), method=method, headers=headers)
    if kind is Kind.PROBE:
        assert answer.status == 200
        return
    assert answer.status in (400, 401)
    assert answer.error["message"]
    assert lasting.inner.bodies == []


@pytest.mark.parametrize(("method", "path", "kind"), ROUTES)
def test_a_users_key_opens_what_users_need(lasting: Front, method: str, path: str, kind: Kind) -> None:
    answer = lasting.ask(path.replace("{id}", "x1"), method=method, key=lasting.alice)
    opens = kind not in (Kind.OPERATOR, Kind.METRICS, Kind.UNSALTED)
    assert answer.status == (200 if opens else 403)


@pytest.mark.parametrize(("method", "path", "kind"), ROUTES)
def test_an_operators_key_opens_all_but_what_has_no_salt(lasting: Front, method: str, path: str, kind: Kind) -> None:
    answer = lasting.ask(path.replace("{id}", "x1"), method=method, key=lasting.operator)
    assert answer.status == (403 if kind is Kind.UNSALTED else 200)


PATHS = [
    "//v1/completions",
    "/v1//completions",
    "/v1/completions/",
    "/V1/completions",
    "/v1/Completions",
    "/v1/./completions",
    "/v1/x/../completions",
    "/v1/completions;x",
    "/v1/completions%2f",
    "/v1/completions\0",
    "/v1/completions ",
    "v1/completions",
    "/v1/completions\n",
    "/v2/completions",
    "/",
    "",
    "*",
    "/v1",
    "/v1/new_route",
    "/metrics/",
    "/metrics/x",
    "/health/",
    "/static/../v1/completions",
    "http://x/v1/completions",
    "/saltern/publish",
    "/v1/responses//cancel",
    "/v1/responses/a/b",
    "/v1/chat/completions/",
    "/v1/messages/batches",
    "/v1/files",
    "/v1/batches",
    "/v1/\uff43ompletions",
    "/v1/completions%00",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_spelled_in_another_way_is_no_route(lasting: Front, path: str) -> None:
    lasting.inner.bodies.clear()
    for key in (None, lasting.alice, lasting.operator):
        assert lasting.ask(path, key=key).error["code"] == 404
    assert lasting.inner.bodies == []


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "TRACE", "post", "POST ", ""])
def test_a_method_that_a_route_has_not_is_refused(lasting: Front, method: str) -> None:
    lasting.inner.bodies.clear()
    answer = lasting.ask("/v1/completions", method=method, key=lasting.alice)
    assert (answer.error["code"], answer.headers[b"allow"]) == (405, b"POST")
    assert lasting.inner.bodies == []


@pytest.mark.parametrize(("path", "root_path"), [("/api/v1/completions", "/api"), ("/v1/completions", "/api")])
def test_a_root_path_hides_no_route(front: Front, path: str, root_path: str) -> None:
    assert front.ask(path, root_path=root_path).status == 401
    assert front.ask(path, root_path=root_path, key=front.alice).status == 200
    assert verify(front.inner.fields["cache_salt"], front.secrets) == ALICE


@given(path=st.text("/ab.%", max_size=8), root_path=st.sampled_from(["", "/", "/a", "/a/b", "/ab", "a"]))
def test_paths_are_read_as_vllms_router_does(path: str, root_path: str) -> None:
    routing = pytest.importorskip("starlette._utils")
    assert route_path(path, root_path) == routing.get_route_path({"path": path, "root_path": root_path})


def test_a_websocket_is_closed_before_it_is_open(front: Front) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    headers = [(b"authorization", b"Bearer " + front.alice.encode())]
    asyncio.run(front.app({"type": "websocket", "path": "/v1/realtime", "headers": headers}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert front.inner.scopes == []


def test_a_scope_that_nobody_knows_reaches_nothing(front: Front) -> None:
    async def nothing(*_: Any) -> Any:
        raise AssertionError("neither read nor answered")

    asyncio.run(front.app({"type": "webtransport", "path": "/v1/completions", "headers": []}, nothing, nothing))
    assert front.inner.scopes == []


def test_a_browsers_question_beforehand_carries_no_body(front: Front) -> None:
    assert front.ask("/v1/completions", method="OPTIONS", body=b'{"prompt": "x"}').status == 200
    assert front.inner.bodies == [b""]


# What reaches vLLM

FORGED: dict[str, Callable[[Front], object]] = {
    "of another user": lambda front: sign(BOB, front.secrets[0]),
    "of the user, in a chosen epoch": lambda front: sign(Signed("acme", ALICE.user, 7), front.secrets[0]),
    "of another tenant": lambda front: sign(Signed("umbrella", ALICE.user), front.secrets[0]),
    "that nobody signed": lambda _: "st1.acme." + "A" * 22 + ".0." + "A" * 43,
    "plain": lambda _: "bob",
    "empty": lambda _: "",
    "null": lambda _: None,
    "a number": lambda _: 7,
    "an object": lambda _: {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGED)
@pytest.mark.parametrize("path", SALTED)
def test_a_salt_that_the_client_chose_is_overwritten(lasting: Front, path: str, forgery: str) -> None:
    body = json.dumps({"prompt": "x", "cache_salt": FORGED[forgery](lasting)}).encode()
    assert lasting.ask(path, body, key=lasting.alice).status == 200
    assert verify(lasting.inner.fields["cache_salt"], lasting.secrets) == ALICE
    assert lasting.inner.bodies[-1].count(b"cache_salt") == 1


@pytest.mark.parametrize("path", SALTED)
def test_no_mark_of_the_clients_arrives(lasting: Front, path: str) -> None:
    mark = {"do_remote_prefill": True, "publish": "x"}
    within = dict.fromkeys(MARKS, mark) | {"kept": 1}
    body = {
        **within,
        "vllm_xargs": within,
        "sampling_params": {"n": 1, "extra_args": within},
        "messages": [{"content": "say kv_transfer_params"}],
    }
    assert lasting.ask(path, json.dumps(body).encode(), key=lasting.alice).status == 200
    fields = lasting.inner.fields
    assert fields.pop("cache_salt")
    assert fields == {
        "kept": 1,
        "vllm_xargs": {"kept": 1},
        "sampling_params": {"n": 1, "extra_args": {"kept": 1}},
        "messages": [{"content": "say kv_transfer_params"}],
    }


DUPLICATES = {
    "salt twice": b'{"cache_salt": "a", "prompt": "x", "cache_salt": "b"}',
    "salt escaped": b'{"cache\\u005fsalt": "a", "\\u0063ache_salt": "b", "prompt": "x"}',
    "mark twice": b'{"kv_transfer_params": {}, "kv_transfer_params": {"a": 1}, "prompt": "x"}',
    "xargs twice": b'{"vllm_xargs": {"a": 1}, "vllm_xargs": {"kv_transfer_params": "x"}}',
    "mark twice in xargs": b'{"vllm_xargs": {"kv_transfer_params": "x", "kv_transfer_params": "y"}}',
    "mark escaped in xargs": b'{"vllm_xargs":\n {"kv\\u005ftransfer_params": "x"}}',
    "extra args twice": b'{"sampling_params": {"extra_args": {"cache_salt": 1}, "extra_args": {"cache_salt": 2}}}',
}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_field_that_is_there_twice_hides_nothing(lasting: Front, duplicate: str) -> None:
    assert lasting.ask("/v1/completions", DUPLICATES[duplicate], key=lasting.alice).status == 200
    seen: list[str] = []

    def count(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen.extend(name for name, _ in pairs)
        return dict(pairs)

    json.loads(lasting.inner.bodies[-1], object_pairs_hook=count)
    assert [name for name in seen if name in MARKS] == ["cache_salt"]


def test_all_else_arrives_as_it_was_sent(front: Front) -> None:
    values = (b"123456789012345678901234567890", b"1e-400", b'"\\u00e9\\ud83d\\ude00"', b'[ 1.0 , {"x":1,"x":2}]')
    body = b'{"seed": %s, "t": %s, "p": %s, "a": %s}' % values
    assert front.ask("/v1/completions", body, key=front.alice).status == 200
    passed = front.inner.bodies[-1]
    for value in values:
        assert value in passed
    assert front.inner.headers[b"content-length"] == str(len(passed)).encode()
    assert front.inner.headers[b"content-type"] == b"application/json"


def test_the_key_stays_outside(front: Front) -> None:
    for method, path, kind in ROUTES:
        if kind is not Kind.UNSALTED:
            front.ask(path.replace("{id}", "x1"), method=method, key=front.operator)
            assert b"authorization" not in front.inner.headers


def test_what_computes_nothing_gets_no_salt_to_show(front: Front) -> None:
    body = b'{"prompt": "x", "cache_salt": "bob", "kv_transfer_params": {}}'
    for path in (path for (_, path), kind in KIND_BY_ROUTE.items() if kind is Kind.STRIPPED):
        assert front.ask(path, body, key=front.alice).status == 200
        assert front.inner.fields == {"prompt": "x"}


# Publishing


def test_an_operator_publishes_by_a_route_of_its_own(front: Front) -> None:
    mark = b'"kv_transfer_params": {"publish": 1}'
    body = b'{"prompt": "x", "cache_salt": "bob", %s, "vllm_xargs": {%s}}' % (mark, mark)
    answer = front.ask(PUBLISH_PREFIX + "/v1/completions", body, key=front.operator)
    assert answer.status == 200
    assert front.inner.scopes[-1]["path"] == "/v1/completions"
    assert front.inner.scopes[-1]["raw_path"] == b"/v1/completions"
    fields = front.inner.fields
    assert verify(fields.pop("cache_salt"), front.secrets) == Signed("ops", user_tag("ops", ""))
    assert fields == {"prompt": "x", "kv_transfer_params": {"publish": 1}, "vllm_xargs": {}}


def test_an_operator_asks_for_model_and_tokens_by_the_same_route(front: Front) -> None:
    assert front.ask(PUBLISH_PREFIX + "/v1/models", b"", key=front.operator, method="GET").status == 200
    body = b'{"messages": [], "cache_salt": "bob", "kv_transfer_params": {"publish": 1}}'
    assert front.ask(PUBLISH_PREFIX + "/tokenize", body, key=front.operator).status == 200
    assert [scope["path"] for scope in front.inner.scopes] == ["/v1/models", "/tokenize"]
    assert front.inner.fields == {"messages": []}


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")]
)
def test_a_user_does_not_publish(front: Front, method: str, path: str) -> None:
    for key, status in ((None, 401), (front.alice, 403)):
        assert front.ask(PUBLISH_PREFIX + path, key=key, method=method).error["code"] == status
    assert front.inner.bodies == []


@pytest.mark.parametrize(
    "path",
    [
        "/detokenize",
        "/reset_prefix_cache",
        "/tokenizer_info",
        "/health",
        "/saltern/publish/v1/completions",
        "//v1/completions",
    ],
)
def test_only_what_computes_can_be_published(front: Front, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        assert front.ask(PUBLISH_PREFIX + path, key=front.operator, method=method).error["code"] in (404, 405)
    assert front.inner.bodies == []


def test_an_operators_marks_are_stripped_where_users_send_theirs(front: Front) -> None:
    front.ask("/v1/completions", b'{"kv_transfer_params": {"publish": 1}}', key=front.operator)
    assert set(front.inner.fields) == {"cache_salt"}


# Bodies

MALFORMED: dict[str, tuple[bytes, bytes | None, int]] = {
    "empty": (b"", b"application/json", 400),
    "no JSON": (b"hello", b"application/json", 400),
    "cut off": (b'{"prompt": "x', b"application/json", 400),
    "more behind it": (b'{"prompt": "x"}{}', b"application/json", 400),
    "a list": (b"[]", b"application/json", 400),
    "null": (b"null", b"application/json", 400),
    "a string": (b'"x"', b"application/json", 400),
    "NaN": (b'{"temperature": NaN}', b"application/json", 400),
    "a BOM": (b'\xef\xbb\xbf{"prompt": "x"}', b"application/json", 400),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), b"application/json", 400),
    "UTF-16 without a BOM": ('{"prompt": "x"}'.encode("utf-16-le"), b"application/json", 400),
    "latin-1": (b'{"prompt": "\xe9"}', b"application/json", 400),
    "a key that is no UTF-8": (b'{"\xff": 1}', b"application/json", 400),
    "a surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', b"application/json", 400),
    "nested": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"application/json", 400),
    "objects nested": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"application/json", 400),
    "xargs nested": (b'{"vllm_xargs": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001, b"application/json", 400),
    "no type": (b'{"prompt": "x"}', None, 415),
    "a form": (b"prompt=x", b"application/x-www-form-urlencoded", 415),
    "multipart": (b'--x\r\n\r\n{"prompt": "x"}\r\n--x--', b"multipart/form-data; boundary=x", 415),
    "text": (b'{"prompt": "x"}', b"text/plain", 415),
    "JSON of a kind": (b'{"prompt": "x"}', b"application/vnd.x+json", 415),
    "two types in one": (b'{"prompt": "x"}', b"application/json, text/plain", 415),
    "a wrong charset": (b'{"prompt": "x"}', b"application/json; charset=utf-16", 415),
    "another wrong charset": (b'{"prompt": "x"}', b"application/json;a=b; charset='latin-1'", 415),
}


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/tokenize", PUBLISH_PREFIX + "/v1/completions"])
def test_a_malformed_body_is_refused_with_a_reason(lasting: Front, path: str, malformed: str) -> None:
    body, content_type, status = MALFORMED[malformed]
    lasting.inner.bodies.clear()
    assert lasting.ask(path, body, key=lasting.operator, content_type=content_type).error["code"] == status
    assert lasting.inner.bodies == []


@pytest.mark.parametrize(
    "content_type", [b"application/json; charset=UTF-8", b"Application/JSON", b' application/json ;charset="utf-8"']
)
def test_json_under_its_other_names_is_json(lasting: Front, content_type: bytes) -> None:
    assert lasting.ask("/v1/completions", key=lasting.alice, content_type=content_type).status == 200


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"deflate", b"identity, gzip", b"x"])
def test_a_compressed_body_is_refused(lasting: Front, encoding: bytes) -> None:
    headers = [(b"content-encoding", encoding)]
    assert lasting.ask("/v1/completions", key=lasting.alice, headers=headers).error["code"] == 415


@pytest.mark.parametrize("name", [b"content-type", b"content-length", b"content-encoding"])
def test_a_header_that_is_there_twice_is_refused(lasting: Front, name: bytes) -> None:
    headers = [(name, b"15"), (name.title(), b"16")]
    assert lasting.ask("/v1/completions", key=lasting.alice, headers=headers).error["code"] == 400


@pytest.mark.parametrize("declared", [None, b"10", b"nonsense", b"-1", b"2000", b"9" * 5000])
def test_a_huge_body_is_refused_before_it_is_kept(tmp_path: Path, declared: bytes | None) -> None:
    front = Front(tmp_path, body_max=1000)
    headers = [] if declared is None else [(b"content-length", declared)]
    taken = 0

    def endless() -> Iterable[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b"x" * 400

    chunks = endless()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "",
        "headers": [*headers, *front.usual_headers],
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": next(iter(chunks)), "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    chunks = iter(chunks)
    asyncio.run(front.app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert taken <= 3, "it was read beyond its limit"
    assert front.inner.bodies == []


def test_a_body_at_the_limit_is_let_in(tmp_path: Path) -> None:
    front = Front(tmp_path, body_max="1 KiB")
    body = b'{"prompt": "%s"}' % (b"x" * (1024 - 14))
    assert len(body) == 1024
    assert front.ask("/v1/completions", body, key=front.alice).status == 200
    assert front.ask("/v1/completions", body + b" ", key=front.alice).status == 413


@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_a_body_in_chunks_is_one_body(lasting: Front, cuts: list[int]) -> None:
    body, places = b'{"prompt": "caf\xc3\xa9", "cache_salt": "bob"}', [0, *sorted(cuts), 60]
    chunks = [body[start:end] for start, end in itertools.pairwise(places)]
    assert lasting.ask("/v1/completions", chunks, key=lasting.alice).status == 200
    assert lasting.inner.fields["prompt"] == "café"
    assert verify(lasting.inner.fields["cache_salt"], lasting.secrets) == ALICE


def test_who_leaves_before_his_body_is_whole_reaches_nothing(front: Front) -> None:
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "",
        "headers": front.usual_headers,
    }  # fmt: skip
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        raise AssertionError("there is nobody to answer")

    asyncio.run(front.app(scope, receive, send))
    assert front.inner.bodies == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(MARKS), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*MARKS, "vllm_xargs", "sampling_params", "extra_args", "prompt", "messages"]) | st.text()


@given(st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON, max_size=4), max_size=6), st.booleans())
@example({"sampling_params": {"extra_args": {"cache_salt": 1}}, "vllm_xargs": {"vllm_xargs": {"cache_salt": 1}}}, True)
def test_whatever_an_object_holds_no_mark_of_it_arrives(lasting: Front, body: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only)
    try:
        encoded = text.encode()
        text.encode("utf-16")
    except UnicodeEncodeError:
        return  # half a character: refused, as the next test sees
    answer = lasting.ask("/v1/completions", encoded, key=lasting.alice)
    if answer.status == 400:
        return  # surrogates again, in escapes
    fields = lasting.inner.fields
    assert verify(fields["cache_salt"], lasting.secrets) == ALICE
    assert not set(fields) & set(MARKS[1:])
    assert {name: value for name, value in fields.items() if name not in {*MARKS, "vllm_xargs", "sampling_params"}} == {
        name: value for name, value in body.items() if name not in {*MARKS, "vllm_xargs", "sampling_params"}
    }
    for inner in (fields.get("vllm_xargs"), fields.get("sampling_params")):
        extra = inner.get("extra_args") if inner is fields.get("sampling_params") and isinstance(inner, dict) else inner
        assert not (isinstance(extra, dict) and set(extra) & set(MARKS))


@given(st.binary(max_size=80) | st.text('{}[]":,\\ua1 \n', max_size=40).map(str.encode))
@example(b'{"a": "\\ud800"}')
@example(b"{}")
@example(b'{"cache_salt" :"x"}')
def test_whatever_bytes_come_the_answer_is_a_signed_request_or_an_error(lasting: Front, body: bytes) -> None:
    lasting.inner.bodies.clear()
    answer = lasting.ask("/v1/completions", body, key=lasting.alice)
    if answer.status == 200:
        assert verify(lasting.inner.fields["cache_salt"], lasting.secrets) == ALICE
    else:
        assert answer.error["code"] == 400
        assert lasting.inner.bodies == []


NAMES = st.sampled_from([b"authorization", b"content-type", b"content-encoding", b"content-length"])
VALUES = st.sampled_from([b"Bearer", b"application/json", b"0", b"gzip"])
LISTED = st.sampled_from(sorted(path for _, path in KIND_BY_ROUTE))


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "OPTIONS"]) | st.text(max_size=6),
    path=LISTED | st.text("/v1competins%.", max_size=16) | st.text(max_size=12),
    headers=st.lists(st.tuples(NAMES | st.binary(max_size=8), VALUES | st.binary(max_size=20)), max_size=5),
    root_path=st.sampled_from(["", "/", "/v1"]),
)
def test_whatever_a_stranger_sends_reaches_at_most_a_probe(
    lasting: Front, method: str, path: str, headers: list[tuple[bytes, bytes]], root_path: str
) -> None:
    lasting.inner.bodies.clear()
    answer = lasting.ask(path, method=method, headers=headers, root_path=root_path)
    listed = known_path(route_path(path, root_path))
    is_probe = listed is not None and (method == "OPTIONS" or KIND_BY_ROUTE.get((method, listed)) is Kind.PROBE)
    assert is_probe == (answer.status == 200)
    assert lasting.inner.bodies == ([b""] if is_probe else [])


# Answers


def test_a_stream_is_passed_on_as_it_comes(front: Front) -> None:
    async def stream() -> None:
        front.inner.waits = True
        front.inner.may_end = asyncio.Event()
        parts: asyncio.Queue[Message] = asyncio.Queue()
        messages = incoming([b'{"stream": true}'])

        async def receive() -> Message:
            return await anext(messages)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "",
            "headers": front.usual_headers,
        }  # fmt: skip
        task = asyncio.create_task(front.app(scope, receive, parts.put))
        assert (await parts.get())["headers"] == [(b"content-type", b"text/event-stream")]
        assert (await parts.get())["body"] == b"data: 1\n\n"  # before the application has ended
        assert not task.done()
        front.inner.may_end.set()
        await task
        assert (await parts.get())["body"] == b"data: [DONE]\n\n"

    asyncio.run(asyncio.wait_for(stream(), 60))


def test_vllm_still_hears_that_a_client_has_left(front: Front) -> None:
    heard: list[Message] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive(), await receive()])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = TenantMiddleware(inner, front.callers)
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "", "headers": front.usual_headers,
    }  # fmt: skip
    asyncio.run(exchange(app, scope, [b'{"prompt": "x"}']))
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect"]


def test_what_starts_and_stops_vllm_is_passed_on(front: Front) -> None:
    async def nothing(*_: Any) -> Any:
        raise AssertionError

    asyncio.run(front.app({"type": "lifespan"}, nothing, nothing))
    assert [scope["type"] for scope in front.inner.scopes] == ["lifespan"]


# Who the user is


def test_a_key_without_a_user_is_its_tenants_only_one(front: Front) -> None:
    front.ask("/v1/completions", key=front.shared, headers=[(b"x-user", b"bob")])
    assert verify(front.inner.fields["cache_salt"], front.secrets) == Signed("acme", user_tag("acme", ""))


def test_a_header_names_the_user_of_a_key_that_has_none(tmp_path: Path) -> None:
    front = Front(tmp_path, user_header="X-User")
    headers = [(b"x-user", " bøb ".encode())]
    assert front.ask("/v1/completions", key=front.shared, headers=headers).status == 200
    assert verify(front.inner.fields["cache_salt"], front.secrets) == Signed("acme", user_tag("acme", "bøb"))
    assert front.ask("/v1/completions", key=front.alice, headers=headers).status == 200
    assert verify(front.inner.fields["cache_salt"], front.secrets) == ALICE, "a key's own user comes first"
    front.inner.bodies.clear()
    for bad in (
        [],
        [(b"x-user", b"")],
        [(b"x-user", b" ")],
        [(b"x-user", b"x" * 257)],
        [(b"x-user", b"\xff")],
        headers * 2,
    ):
        assert front.ask("/v1/completions", key=front.shared, headers=bad).error["code"] == 400
    assert front.inner.bodies == []


def test_a_field_names_the_user_of_a_key_that_has_none(tmp_path: Path) -> None:
    front = Front(tmp_path, user_field="user")
    assert front.ask("/v1/completions", b'{"user": "b\\u00f8b"}', key=front.shared).status == 200
    assert verify(front.inner.fields["cache_salt"], front.secrets) == Signed("acme", user_tag("acme", "bøb"))
    assert front.inner.fields["user"] == "bøb"
    front.inner.bodies.clear()
    for bad in (
        b"{}",
        b'{"user": ""}',
        b'{"user": 7}',
        b'{"user": null}',
        b'{"user": ["bob"]}',
        b'{"user": "%s"}' % (b"x" * 257),
    ):
        assert front.ask("/v1/completions", bad, key=front.shared).error["code"] == 400
    assert front.inner.bodies == []


# Routes without a salt


@pytest.mark.parametrize("allowed", [False, True])
def test_scoring_is_closed_like_other_routes_without_a_salt_where_vllm_reads_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setattr(middleware, "scoring_has_salt", lambda: False)
    front = Front(tmp_path, allow_unsalted=allowed)
    answer = front.ask("/generative_scoring", key=front.alice)
    assert answer.status == (200 if allowed else 403)
    assert [json.loads(body) for body in front.inner.bodies] == [{"prompt": "x"}] * allowed


def test_audio_is_let_in_without_a_salt_where_the_operator_allows_it(tmp_path: Path) -> None:
    front = Front(tmp_path, allow_unsalted=True)
    form, content_type = b"--x\r\n\r\nsound\r\n--x--", b"multipart/form-data; boundary=x"
    assert front.ask("/v1/audio/transcriptions", form, content_type=content_type).status == 401
    assert front.ask("/v1/audio/transcriptions", form, content_type=content_type, key=front.alice).status == 200
    assert (front.inner.bodies[-1], front.inner.headers[b"content-type"]) == (form, content_type)
    body = b'{"cache_salt": "bob", "kv_transfer_params": {}, "message": "x"}'
    assert front.ask("/cohere/v2/chat", body, key=front.alice).status == 200
    assert front.inner.fields == {"message": "x"}


def test_metrics_are_open_where_the_operator_says_so(tmp_path: Path) -> None:
    front = Front(tmp_path, open=["/metrics"])
    assert front.ask("/metrics", method="GET").status == 200
    assert front.ask("/load", method="GET").status == 401
    assert front.ask("/metrics", method="POST").status == 405


# Files that change


class Clock:
    """A clock that stands."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_is_read_anew_after_it_changed_and_looked_at_once_a_second(tmp_path: Path) -> None:
    path, clock, read = tmp_path / "f", Clock(), []
    path.write_text("1")

    def parse(path: Path) -> int:
        read.append(path)
        return int(path.read_text())

    watched = Watched(path, parse, clock=clock)
    (tmp_path / "new").write_text("2")
    os.rename(tmp_path / "new", path)
    assert watched.value == 1
    clock.now += LOOK_SECONDS
    assert watched.value == 2
    clock.now += LOOK_SECONDS
    assert (watched.value, len(read)) == (2, 2)


def test_a_file_that_breaks_counts_as_before_and_is_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "f", Clock()
    path.write_text("1")
    watched = Watched(path, lambda path: int(path.read_text()), clock=clock)
    path.write_text("broken")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            clock.now += LOOK_SECONDS
            assert watched.value == 1
        assert len(caplog.records) == 1
        path.unlink()
        for _ in range(3):
            clock.now += LOOK_SECONDS
            assert watched.value == 1
        assert len(caplog.records) == 2
    path.write_text("3")
    clock.now += LOOK_SECONDS
    assert watched.value == 3


def _look_again(front: Front) -> None:
    for watched in (front.callers._keys, front.callers._secrets, front.callers._epochs):
        watched._look_at = 0.0  # as if a second had passed


def test_a_key_is_valid_once_it_is_added_and_not_once_it_is_revoked(front: Front) -> None:
    bob = front.add("bob")
    assert front.ask("/v1/completions", key=bob).status == 401
    _look_again(front)
    assert front.ask("/v1/completions", key=bob).status == 200
    revoke_key(front.keys_path, read_keys(front.keys_path)[list(read_keys(front.keys_path))[-1]].name)
    _look_again(front)
    assert front.ask("/v1/completions", key=bob).status == 401
    assert front.ask("/v1/completions", key=front.alice).status == 200


def test_the_newest_secret_signs(front: Front) -> None:
    before = front.secrets
    rotate_signing_secrets(front.signing_path)
    _look_again(front)
    front.ask("/v1/completions", key=front.alice)
    salt = front.inner.fields["cache_salt"]
    assert verify(salt, front.secrets[:1]) == ALICE
    assert verify(salt, before) is None


def test_who_begins_anew_gets_another_salt(front: Front) -> None:
    def epoch(key: str) -> int:
        _look_again(front)
        assert front.ask("/v1/completions", key=key).status == 200
        signed = verify(front.inner.fields["cache_salt"], front.secrets)
        assert signed is not None
        return signed.epoch

    bob = front.add("bob")
    begin_anew(front.epochs_path, "acme", ALICE.user)
    begin_anew(front.epochs_path, "umbrella", ALICE.user)
    assert (epoch(front.alice), epoch(bob)) == (1, 0)
    begin_anew(front.epochs_path, "acme", None)
    assert (epoch(front.alice), epoch(bob)) == (2, 1)
    front.epochs_path.write_text("{", encoding="ascii")
    assert (epoch(front.alice), epoch(bob)) == (2, 1), "a broken file brings nobody back"
    front.epochs_path.unlink()
    assert (epoch(front.alice), epoch(bob)) == (2, 1)


def test_the_last_key_can_be_revoked(front: Front) -> None:
    for key in list(read_keys(front.keys_path).values()):
        revoke_key(front.keys_path, key.name)
    _look_again(front)
    assert front.ask("/v1/completions", key=front.alice).status == 401


def test_two_who_add_keys_lose_none(tmp_path: Path) -> None:
    path, children = tmp_path / "keys.json", []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(5):
                    add_key(path, tenant="acme", user=f"user {number}", role=Role.USER, added="")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert len(read_keys(path)) == 20


# Starting


def test_a_file_that_is_not_there_keeps_it_from_starting(front: Front) -> None:
    made = "the server makes it"
    for path, hint in ((front.keys_path, "saltern keys add"), (front.signing_path, made), (front.epochs_path, made)):
        hidden = path.with_name("hidden")
        path.rename(hidden)
        with pytest.raises(TenantsError, match=hint):
            Callers(TenantsSettings(), path.parent)
        hidden.rename(path)


@pytest.mark.parametrize("file", ["keys.json", "signing.keys", "epochs.json"])
def test_a_file_that_is_broken_or_open_to_others_keeps_it_from_starting(front: Front, file: str) -> None:
    path = front.keys_path.with_name(file)
    path.chmod(0o644)
    with pytest.raises(TenantsError, match="chmod 600"):
        Callers(TenantsSettings(), path.parent)
    path.chmod(0o600)
    for content in (b"", b"{", b'{"q": 0}', b"\xff", b"[]"):
        path.write_bytes(content)
        with pytest.raises(TenantsError, match=file):
            Callers(TenantsSettings(), path.parent)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keys_fil = 'x'", "keys_fil"),
        ("keys_file = 7", "keys_file"),
        ("open = ['/v1/completions']", "open"),
        ("body_max = 'much'", "much"),
        ("body_max = 0", "body_max"),
        ("user_header = 'x-user'\nuser_field = 'user'", "leave one"),
        ("user_header = 'Authorization'", "another meaning"),
        ("user_header = 'x user'", "no header"),
        ("user_field = 'cache_salt'", "another meaning"),
        ("= 1", "SALTERN_TENANTS"),
        ("allow_unsalted = 'no'", "allow_unsalted"),
    ],
)  # fmt: skip
def test_a_wrong_setting_keeps_it_from_starting(front: Front, text: str, reason: str) -> None:
    path = front.keys_path.with_name("tenants.toml")
    path.write_text(text)
    with pytest.raises(TenantsError, match=reason):
        load_callers({"SALTERN_TENANTS": str(path)})


def test_without_settings_the_files_are_in_the_state_folder(
    front: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(TenantsError, match="saltern keys add"):
        load_callers({})
    (tmp_path / "saltern").symlink_to(front.keys_path.parent)
    assert len(load_callers({}).key_by_digest) == 3


def test_a_settings_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(TenantsError, match="No such file"):
        load_callers({"SALTERN_TENANTS": str(tmp_path / "nowhere.toml")})


# The keys file


def test_no_file_holds_a_key(front: Front) -> None:
    content = front.keys_path.read_text()
    for key in (front.alice, front.shared, front.operator):
        assert key not in content
        assert key.removeprefix("sk-saltern-") not in content
    assert front.keys_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("tenant", ["", "Acme", "public", "a b", "a" * 41])
def test_no_key_is_made_for_what_is_no_tenant(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(KeysError, match="can't be a tenant"):
        add_key(tmp_path / "keys.json", tenant=tenant, user=None, role=Role.USER, added="")
    assert not list(tmp_path.iterdir())


def test_a_file_with_a_tenant_that_is_none_is_not_used(front: Front) -> None:
    front.keys_path.write_text(front.keys_path.read_text().replace("acme", "public"))
    with pytest.raises(KeysError, match="no tenant"):
        read_keys(front.keys_path)


def test_a_key_is_revoked_by_its_name_its_beginning_or_itself(front: Front) -> None:
    first, second, third = read_keys(front.keys_path).values()
    with pytest.raises(KeysError, match="there is no key"):
        revoke_key(front.keys_path, "zz")
    with pytest.raises(KeysError, match="there is no key"):
        revoke_key(front.keys_path, "")
    assert revoke_key(front.keys_path, first.name.upper()) == first
    assert revoke_key(front.keys_path, front.shared) == second
    assert list(read_keys(front.keys_path).values()) == [third]
