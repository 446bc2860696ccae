"""The middleware in front of a real vLLM and a real server: who gets through, as whom, and with what."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from demo.engine import Engine
from demo.model import BLOCK_TOKENS, room_for
from demo.server import Server, connector_config
from saltern.apikeys import Role, add_key, read_keys, revoke_key
from saltern.secret import read_signing_secrets
from saltern.signing import Signed, sign, user_tag, verify
from saltern.vllm.callers import SETTINGS_VARIABLE
from saltern.vllm.routes import KIND_BY_ROUTE, Kind
from tests.e2e.conftest import PATIENCE_MS, Story
from tests.e2e.recorder import RECORD_VARIABLE

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).resolve().parents[2]
ALICE, BOB = Signed("acme", user_tag("acme", "alice")), Signed("acme", user_tag("acme", "bob"))
STRANGER = Signed("umbrella", user_tag("umbrella", ""))
WAIT_SECONDS_MAX = 60.0
BODY_BYTES_MAX = 4 * 1024 * 1024

# Request bodies that the model of the demo answers. Those of other models' routes are refused by vLLM itself.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "A cat", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "A cat"}], "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "A cat"}]] * 2, "max_tokens": 2},
    "/v1/responses": {"input": "A cat", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "A cat"}], "max_tokens": 2},
    "/invocations": {"prompt": "A cat", "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2}},
}


@dataclass(frozen=True)
class Front:
    """A server, an engine behind the middleware, and the keys to it."""

    server: Server
    engine: Engine
    folder: Path
    alice: str
    bob: str
    stranger: str
    operator: str

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """The signing secrets of now."""
        return read_signing_secrets(self.folder / "state" / "signing.keys")

    @property
    def arrived(self) -> list[dict[str, Any]]:
        """What has come through the middleware, but for probes."""
        lines = (self.folder / "arrived").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["path"] not in ("/health", "/metrics")]

    @property
    def last_body(self) -> dict[str, Any]:
        """The body that vLLM got last."""
        body = json.loads(self.arrived[-1]["body"].encode("latin-1"))
        assert isinstance(body, dict)
        return body

    def metric(self, name: str) -> float:
        """Return a counter of vLLM's, summed over its labels."""
        lines = self.engine.get("/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Send a request and return its status and answer."""
        connection = self.engine.connect()
        try:
            authorization = {} if key is None else {"Authorization": f"Bearer {key}"}
            sent = {"Content-Type": "application/json", **authorization, **(headers or {})}
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, path: str, fields: dict[str, Any], *, key: str | None = None) -> dict[str, Any]:
        """Send JSON that must be answered, and return the answer."""
        status, answer = self.send("POST", path, self.body(fields), key=key)
        assert status == 200, answer
        return dict(json.loads(answer))

    def body(self, fields: dict[str, Any]) -> bytes:
        """Return fields as a body for the engine's model."""
        return json.dumps({"model": self.engine._model.name, **fields}).encode()

    def complete(self, prompt: list[int], *, key: str, **fields: Any) -> int:
        """Complete a prompt and return how many of its tokens came from a cache."""
        usage = self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}, key=key)[
            "usage"
        ]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def blocks(self, tenant: str) -> int:
        """Return how many blocks a tenant has, with none being written."""
        stats = self.server.stats()
        return (
            sum(each.blocks for each in stats.tenants if each.tenant == tenant)
            if not stats.arena.writing_blocks
            else -1
        )


@pytest.fixture(scope="module")
def front(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    server = Server(folder, arena=room_for(180), log_level="debug")
    (folder / "arrived").touch()
    keys = folder / "keys.json"

    def add(tenant: str, user: str | None, role: Role = Role.USER) -> str:
        return add_key(keys, tenant=tenant, user=user, role=role, added="")[0]

    tokens = (add("acme", "alice"), add("acme", "bob"), add("umbrella", None), add("ops", None, Role.OPERATOR))
    settings = folder / "tenants.toml"
    settings.write_text(
        'signing_file = "state/signing.keys"\nepochs_file = "state/epochs.json"\nopen = ["/metrics"]\n'
        f"body_max = {BODY_BYTES_MAX}\n"
    )
    engine = Engine(
        model,
        log_path=folder / "vllm.log",
        kv_transfer_config=connector_config(server.socket_path, patience_ms=PATIENCE_MS, strict=True),
        prefix_caching=False,
        extra_args=(
            *("--middleware", "tests.e2e.recorder.Recorder", "--middleware", "saltern.vllm.TenantMiddleware"),
            "--enable-scale-out",
        ),
        env={
            SETTINGS_VARIABLE: str(settings),
            RECORD_VARIABLE: str(folder / "arrived"),
            "PYTHONPATH": str(REPOSITORY),
            "VLLM_SERVER_DEV_MODE": "1",
        },
    )
    try:
        server.start()
        engine.start()
        yield Front(server, engine, folder, *tokens)
    finally:
        engine.stop()
        server.stop()


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


ATTACKS: dict[str, dict[str, str]] = {
    "no key": {},
    "unknown key": {"Authorization": "Bearer sk-saltern-" + "A" * 43},
    "empty key": {"Authorization": "Bearer "},
    "its digest": {"Authorization": "Bearer {digest}"},
    "basic": {"Authorization": "Basic {alice}"},
    "two keys": {"Authorization": "Bearer x, Bearer {alice}"},
    "another header": {"X-Api-Key": "{alice}", "Api-Key": "{alice}"},
    "rewritten by headers": {
        "X-Original-URL": "/health",
        "X-Forwarded-Prefix": "/health",
        "X-HTTP-Method-Override": "GET",
    },
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_request_without_a_valid_key_reaches_vllm_on_any_route(front: Front, attack: str) -> None:
    digest = next(iter(read_keys(front.folder / "keys.json")))
    headers = {name: value.format(alice=front.alice, digest=digest) for name, value in ATTACKS[attack].items()}
    served = json.loads(front.send("GET", "/openapi.json", key=front.operator)[1])["paths"]
    routes = {(method.upper(), path) for path, methods in served.items() for method in methods} | set(KIND_BY_ROUTE)
    assert len(served) > 30, "vLLM has told nothing of its routes"
    before = len(front.arrived), front.metric("vllm:prompt_tokens_total"), front.metric("vllm:generation_tokens_total")
    for method, path in sorted(routes):
        if KIND_BY_ROUTE.get((method, path)) is Kind.PROBE or path == "/metrics":
            continue
        concrete = path.replace("{", "").replace("}", "")
        body = front.body(BODIES.get(path, {}))
        for target in (concrete, concrete + "?api_key=" + front.alice, concrete.replace("/v1", "/%76%31")):
            status, answer = front.send(method, target, body, headers=headers)
            assert status == 401, (method, target, answer)
    assert before == (
        len(front.arrived), front.metric("vllm:prompt_tokens_total"), front.metric("vllm:generation_tokens_total"),
    )  # fmt: skip


SPELLINGS = (
    "//v1/completions",
    "/v1//completions",
    "/v1/completions/",
    "/V1/completions",
    "/v1/./completions",
    "/v1/../v1/completions",
    "/health/../v1/completions",
    "/v1/completions;a=b",
    "/v1/completions%2f",
    "/v1/completions%00",
    "/v1/completions%20",
    "/v1%2fcompletions",
    "/%2fv1/completions",
    "/metrics/../v1/completions",
    "/metrics/v1/completions",
    "http://127.0.0.1/v1/completions",
    "/static/../v1/completions",
    "/invocations/",
    "/Invocations",
    "/ping/../invocations",
)


def test_no_spelling_of_a_path_leads_around_the_key(front: Front) -> None:
    before = len(front.arrived)
    for path in SPELLINGS:
        status, answer = raw(front, f"POST {path} HTTP/1.1", key=None)
        assert status in (400, 401, 404, 405), (path, answer)
    assert len(front.arrived) == before
    for path in SPELLINGS:
        status, answer = raw(front, f"POST {path} HTTP/1.1", key=front.alice)
        assert status in (200, 400, 404, 405), (path, answer)  # percent signs are resolved before anybody looks
    for line in front.arrived[before:]:
        assert line["path"] in BODIES
        assert verify(json.loads(line["body"])["cache_salt"], front.secrets) == ALICE


def raw(front: Front, request_line: str, *, key: str | None, headers: tuple[str, ...] = ()) -> tuple[int, bytes]:
    """Send a request as it stands here, which no client library would."""
    body = front.body(BODIES["/v1/completions"])
    lines = [
        request_line,
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    with socket.create_connection(("127.0.0.1", front.engine.port), timeout=WAIT_SECONDS_MAX) as connection:
        connection.sendall("\r\n".join([*lines, *headers, "", ""]).encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split(b" ", 2)[1]), answer


def test_headers_that_are_there_twice_are_refused(front: Front) -> None:
    before = len(front.arrived)
    for extra in (f"Authorization: Bearer {front.bob}", "authorization: Bearer x", "Content-Type: text/plain"):
        assert raw(front, "POST /v1/completions HTTP/1.1", key=front.alice, headers=(extra,))[0] == 400
    for extra in ("Content-Length: 5", "Transfer-Encoding: chunked"):
        assert raw(front, "POST /v1/completions HTTP/1.1", key=front.alice, headers=(extra,))[0] in (200, 400)
    assert all(json.loads(line["body"])["cache_salt"] for line in front.arrived[before:])


def test_a_websocket_is_refused(front: Front) -> None:
    handshake = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    before = len(front.arrived)
    status, _ = raw_upgrade(front, "/v1/realtime", handshake)
    assert status in (403, 404)
    assert len(front.arrived) == before


def raw_upgrade(front: Front, path: str, handshake: tuple[str, ...]) -> tuple[int, bytes]:
    """Ask for a websocket with a valid key."""
    lines = (
        f"GET {path} HTTP/1.1",
        "Host: x",
        "Connection: Upgrade",
        f"Authorization: Bearer {front.alice}",
        *handshake,
    )
    with socket.create_connection(("127.0.0.1", front.engine.port), timeout=WAIT_SECONDS_MAX) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = connection.recv(65536)
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize("path", BODIES)
def test_every_route_that_generates_answers_whom_it_knows_and_as_whom_it_knows_him(front: Front, path: str) -> None:
    marks = {"do_remote_prefill": True, "remote_block_ids": "x"}
    for forged in (sign(ALICE, front.secrets[0]), "alice", None):
        fields = {**BODIES[path], "cache_salt": forged, "kv_transfer_params": marks, "ec_transfer_params": marks}
        front.ask(path, fields, key=front.bob)
        body = front.last_body
        assert front.arrived[-1]["path"] == path
        assert verify(body["cache_salt"], front.secrets) == BOB
        assert "kv_transfer_params" not in body
        assert "ec_transfer_params" not in body
        assert "authorization" not in front.arrived[-1]["headers"]


@pytest.mark.parametrize(
    "path", sorted(path for (_, path), kind in KIND_BY_ROUTE.items() if kind is Kind.SALTED and path not in BODIES)
)
def test_a_route_of_another_model_gets_a_signed_salt_too(front: Front, path: str) -> None:
    status, _ = front.send("POST", path, front.body({"cache_salt": "alice", "input": "x"}), key=front.bob)
    assert status not in (401, 403)  # vLLM's own refusal
    if front.arrived[-1]["path"] == path:  # a route that isn't there reads no body
        assert verify(front.last_body["cache_salt"], front.secrets) == BOB


def test_what_vllm_would_refuse_of_a_clients_marks_does_not_reach_it(front: Front) -> None:
    assert front.ask(
        "/v1/completions", {**BODIES["/v1/completions"], "kv_transfer_params": "no object"}, key=front.alice
    )
    assert front.ask("/v1/completions", {**BODIES["/v1/completions"], "cache_salt": "a/b" * 99}, key=front.alice)
    xargs = {"kv_transfer_params": "x", "kept": 1}
    front.ask("/v1/completions", {**BODIES["/v1/completions"], "vllm_xargs": xargs}, key=front.alice)
    assert front.last_body["vllm_xargs"] == {"kept": 1}
    fields = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 1, "extra_args": {"kv_transfer_params": {"a": 1}}}}
    front.ask("/inference/v1/generate", fields, key=front.alice)
    assert front.last_body["sampling_params"]["extra_args"] == {}


def test_nobody_hits_what_another_user_has_whatever_salt_he_sends(front: Front, story: Story) -> None:
    wait_until("what was asked before is stored", lambda: min(front.blocks("acme"), front.blocks("umbrella")) >= 0)
    acme, umbrella = front.blocks("acme"), front.blocks("umbrella")
    prompts = [story.told(BLOCK_TOKENS + 9, chapter=chapter) for chapter in range(10, 16)]
    for prompt in prompts:
        assert front.complete(prompt, key=front.alice) == 0
    wait_until("Alice's blocks", lambda: front.blocks("acme") == acme + 6)
    salts = (sign(ALICE, front.secrets[0]), front.last_body["cache_salt"], "alice")
    # Each asks for a prompt that only Alice has: whatever he found would be hers.
    for prompt, (key, salt) in zip(prompts, product((front.bob, front.stranger), salts), strict=True):
        assert front.complete(prompt, key=key, cache_salt=salt) == 0
    wait_until("Bob's blocks", lambda: front.blocks("acme") == acme + 6 + 3)
    wait_until("the stranger's blocks", lambda: front.blocks("umbrella") == umbrella + 3)
    for prompt in prompts:
        assert front.complete(prompt, key=front.alice) == BLOCK_TOKENS


def test_tenants_are_charged_for_what_their_users_store(front: Front, story: Story) -> None:
    wait_until("what was asked before is stored", lambda: front.blocks("umbrella") >= 0)
    before = front.blocks("umbrella")
    assert front.complete(story.told(2 * BLOCK_TOKENS + 9, chapter=3), key=front.stranger) == 0
    wait_until("the blocks of a tenant", lambda: front.blocks("umbrella") == before + 2)
    assert front.blocks("default") <= 0, "somebody's salt was not believed"


def test_a_stream_comes_as_it_is_made_and_ends_with_its_reader(front: Front) -> None:
    wait_until("an idle engine", lambda: front.metric("vllm:num_requests_running") == 0)
    generated = front.metric("vllm:generation_tokens_total")
    fields = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    connection = stream(front, fields)
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    lines = [response.readline() for _ in range(6)]
    assert [line[:6] for line in lines if line.strip()] == [b"data: "] * 3
    connection.close()
    wait_until("the end of a request that nobody reads", lambda: front.metric("vllm:num_requests_running") == 0)
    assert 3 <= front.metric("vllm:generation_tokens_total") - generated < 4000


def stream(front: Front, fields: dict[str, Any]) -> HTTPConnection:
    """Send a request whose answer is read as it comes."""
    connection = front.engine.connect()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {front.alice}"}
    connection.request("POST", "/v1/completions", front.body(fields), headers)
    return connection


REFUSED: dict[str, tuple[bytes, dict[str, str], int]] = {
    "no JSON": (b"prompt=x", {}, 400),
    "a list": (b"[]", {}, 400),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt": "x"}', {}, 400),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), {}, 400),
    "nested": (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", {}, 400),
    "huge": (b'{"prompt": "' + b"x" * BODY_BYTES_MAX + b'"}', {}, 413),
    "compressed": (b"\x1f\x8b\x08\0", {"Content-Encoding": "gzip"}, 415),
    "a form": (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "multipart": (b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_body_that_is_no_object_is_refused_with_a_reason(front: Front, what: str) -> None:
    body, headers, expected = REFUSED[what]
    before = len(front.arrived)
    status, answer = front.send("POST", "/v1/chat/completions", body, key=front.alice, headers=headers)
    assert status == expected
    error = json.loads(answer)["error"]
    assert error["message"]
    assert error["code"] == expected
    assert len(front.arrived) == before


def test_a_chunked_body_is_signed(front: Front) -> None:
    connection = front.engine.connect()
    body = front.body({**BODIES["/v1/completions"], "cache_salt": "bob"})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {front.alice}"}
    connection.request("POST", "/v1/completions", iter([body[:7], body[7:]]), headers, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert verify(front.last_body["cache_salt"], front.secrets) == ALICE


def test_users_get_neither_the_engines_administration_nor_audio(front: Front) -> None:
    before = len(front.arrived)
    for method, path in (
        ("POST", "/reset_prefix_cache"),
        ("POST", "/sleep"),
        ("GET", "/server_info"),
        ("POST", "/abort_requests"),
    ):
        assert front.send(method, path, b"{}", key=front.alice)[0] == 403
    assert front.send("POST", "/v1/audio/transcriptions", b"x", key=front.alice)[0] == 403
    assert (
        front.send("POST", "/saltern/publish/v1/completions", front.body(BODIES["/v1/completions"]), key=front.alice)[0]
        == 403
    )
    assert len(front.arrived) == before
    assert front.send("GET", "/server_info", key=front.operator)[0] == 200


def test_an_operator_publishes_by_a_route_of_its_own(front: Front) -> None:
    fields = {**BODIES["/v1/completions"], "kv_transfer_params": {"publish": "x"}, "cache_salt": "alice"}
    front.ask("/saltern/publish/v1/completions", fields, key=front.operator)
    assert front.arrived[-1]["path"] == "/v1/completions"
    assert front.last_body["kv_transfer_params"] == {"publish": "x"}
    assert verify(front.last_body["cache_salt"], front.secrets) == Signed("ops", user_tag("ops", ""))


def test_a_revoked_key_is_refused_without_a_restart(front: Front) -> None:
    keys = front.folder / "keys.json"
    token, key = add_key(keys, tenant="acme", user="carol", role=Role.USER, added="")
    wait_until("a new key", lambda: front.send("GET", "/v1/models", key=token)[0] == 200)
    revoke_key(keys, key.name)
    wait_until("a revoked key's end", lambda: front.send("GET", "/v1/models", key=token)[0] == 401)
    assert front.send("GET", "/v1/models", key=front.alice)[0] == 200


def test_a_rotation_loses_no_hit(front: Front, story: Story) -> None:
    prompt, before = story.told(2 * BLOCK_TOKENS + 9, chapter=4), front.blocks("acme")
    assert front.complete(prompt, key=front.alice) == 0
    wait_until("Alice's blocks", lambda: front.blocks("acme") == before + 2)
    old = front.secrets
    rotated = subprocess.run(
        [sys.executable, "-m", "saltern.cli", "rotate-signing", "--socket", str(front.folder / "admin.sock")],
        capture_output=True, text=True, check=False, timeout=WAIT_SECONDS_MAX,
    )  # fmt: skip
    assert rotated.returncode == 0, rotated.stderr
    newest = front.secrets[0]
    assert newest not in old

    def is_signed_anew() -> bool:
        assert front.complete(prompt, key=front.alice) == 2 * BLOCK_TOKENS  # by the old secret as well
        return verify(front.last_body["cache_salt"], [newest]) == ALICE

    wait_until("a salt that is signed anew", is_signed_anew)
    assert front.blocks("acme") == before + 2, "the same prompt was stored again"
    assert front.blocks("default") <= 0


def test_what_salts_were_is_counted(front: Front) -> None:
    front.complete([5, 6, 7], key=front.alice)
    wait_until("the count", lambda: front.metric("vllm:saltern_requests_total") > 0)
    lines = [
        line for line in front.engine.get("/metrics").splitlines() if line.startswith("vllm:saltern_requests_total")
    ]
    count_by_salt = {line.partition('salt="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert count_by_salt["signed"] > 0
    assert count_by_salt["unsigned"] == count_by_salt["bad_signature"] == 0
