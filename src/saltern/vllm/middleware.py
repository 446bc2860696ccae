"""The middleware: in front of all of vLLM's routes, it knows the caller by an API key and says whose cache that is.

    vllm serve … --middleware saltern.vllm.TenantMiddleware          settings: `saltern/vllm/callers.py`

    request ─► route listed? ─► key valid? ─► body whole, small enough, an object? ─► marks out, salt in ─► vLLM
                  │ 404, 405       │ 401, 403       │ 400, 413, 415
                  ▼                ▼                ▼
               refused: nothing of the request has reached vLLM

What the client says of the cache is taken out wherever vLLM would read it: `cache_salt`, `kv_transfer_params`,
`ec_transfer_params`, the last two also inside `vllm_xargs` and `sampling_params.extra_args`. All else of a body is
passed on as the bytes that it came as. The body is taken apart once, here, and written anew: where two parsers could
see two things in it (a field twice, bytes that aren't UTF-8), vLLM gets what was checked. The answer is not touched.

This is an ASGI application around another and needs no framework: a base class that buffered would end streaming.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec
from msgspec import Raw

from saltern.apikeys import KEY_PREFIX, NAME_CHARACTERS_MAX, ApiKey, Role, digest_of
from saltern.signing import Signed, sign, user_tag
from saltern.sizes import format_size
from saltern.vllm.callers import Callers, TenantsSettings, load_callers
from saltern.vllm.routes import Kind, kind_by_route, known_path, methods_of, route_path
from saltern.vllm.versions import scoring_has_salt

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

PUBLISH_PREFIX = "/saltern/publish"
"""Before a route of vLLM's, the operator's: there `kv_transfer_params` are left in what computes."""

_ASKED_TO_PUBLISH = {("GET", "/v1/models"), ("POST", "/tokenize")}
"""What `saltern publish` asks by that route before it has anything computed."""

MARKS = ("cache_salt", "kv_transfer_params", "ec_transfer_params")
"""Fields by which a request speaks of caches."""

_WITHIN = (("vllm_xargs",), ("sampling_params", "extra_args"))
"""Objects in the body of which vLLM makes the same as of the body's own marks."""

_OF_THE_BODY = {b"authorization", b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"}
"""Headers that don't reach vLLM as they came: it needs no key, and the body is another."""

_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
}

Body = dict[str, Raw]


class RefusedError(Exception):
    """A request goes no further. The text is for whoever sent it."""

    def __init__(self, status: int, text: str, *, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status = status
        self.headers = tuple(headers)


class _GoneError(Exception):
    """The client left before its request was whole: there is nobody to answer."""


class TenantMiddleware:
    """Lets in who has a key, and sets the salt of its user. Raises `TenantsError` where it can't know either."""

    def __init__(self, app: App, callers: Callers | None = None) -> None:
        self._app = app
        self._callers = callers or load_callers()
        self._kind_by_route = kind_by_route(scoring_has_salt=scoring_has_salt())
        logger.info("Saltern lets in %d API keys", len(self._callers.key_by_digest))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on that vLLM starts and stops."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no salt can be set here"})
        elif scope["type"] == "http":
            try:
                scope, receive = await self._admit(scope, receive)
            except RefusedError as refusal:
                logger.debug("refused %s %r: %s", scope["method"], scope["path"], refusal)
                await _answer(send, refusal)
            except _GoneError:
                pass
            else:
                await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return what vLLM shall see of a request. Raises `RefusedError`."""
        path = route_path(scope["path"], scope.get("root_path", ""))
        is_publish = path.startswith(PUBLISH_PREFIX + "/")
        path = path.removeprefix(PUBLISH_PREFIX) if is_publish else path
        kind = self._kind(scope["method"], path, is_publish=is_publish)
        settings = self._callers.settings
        if kind is Kind.PROBE or path in settings.open:
            return _with_body(scope, b"", None), _replay(b"", receive)
        key = _authenticate(scope["headers"], self._callers)
        if key.role is not Role.OPERATOR and (is_publish or kind in (Kind.OPERATOR, Kind.METRICS)):
            raise RefusedError(403, f"{path} is for operators: this key is a user's")
        if kind is Kind.UNSALTED and not settings.allow_unsalted:
            raise RefusedError(
                403, f"{path} is closed here: its requests have no field for the salt that keeps users apart"
            )
        scope = _with_path(scope, path) if is_publish else scope
        if kind is Kind.PLAIN:
            return _with_body(scope, b"", None), _replay(b"", receive)
        content_type = _one(scope["headers"], b"content-type")
        body = await _read(receive, scope["headers"], self._callers.body_bytes_max)
        if kind in (Kind.SALTED, Kind.STRIPPED) or (kind is Kind.UNSALTED and _is_json(content_type)):
            _check_json(content_type)
            fields = _strip(body, kept="kv_transfer_params" if is_publish and kind is Kind.SALTED else None)
            if kind is Kind.SALTED:
                user = _user(key, settings, scope["headers"], fields)
                fields["cache_salt"] = Raw(msgspec.json.encode(self._salt(key.tenant, user)))
            body, content_type = msgspec.json.encode(fields), b"application/json"
        return _with_body(scope, body, content_type), _replay(body, receive)

    def _salt(self, tenant: str, user: str) -> str:
        tag = user_tag(tenant, user)
        return sign(Signed(tenant, tag, self._callers.epochs.of(tenant, tag)), self._callers.signing_secret)

    def _kind(self, method: str, path: str, *, is_publish: bool) -> Kind:
        """Return what a request of a route needs. Raises `RefusedError`."""
        listed = known_path(path)
        if listed is None:
            raise RefusedError(404, "there is no such route")
        if method == "OPTIONS" and not is_publish:
            return Kind.PROBE  # a browser's question beforehand, which has no key and which vLLM itself answers
        kind = self._kind_by_route.get((method, listed))
        if kind is None:
            allowed = ", ".join(sorted(methods_of(listed)))
            raise RefusedError(405, f"{listed} takes {allowed}", headers=[(b"allow", allowed.encode())])
        if is_publish and kind is not Kind.SALTED and (method, listed) not in _ASKED_TO_PUBLISH:
            raise RefusedError(404, "there is nothing to publish by this route")
        return kind


# Who calls


def _authenticate(headers: Headers, callers: Callers) -> ApiKey:
    challenge = [(b"www-authenticate", b"Bearer")]
    value = _one(headers, b"authorization")
    if value is None:
        raise RefusedError(401, "an API key is needed: send it as `Authorization: Bearer KEY`", headers=challenge)
    scheme, _, token = value.partition(b" ")
    key = callers.key_by_digest.get(digest_of(token.strip().decode("latin-1")))
    if scheme.lower() != b"bearer" or key is None:
        raise RefusedError(401, f"the API key is not valid: keys begin with {KEY_PREFIX}", headers=challenge)
    return key


def _user(key: ApiKey, settings: TenantsSettings, headers: Headers, fields: Body) -> str:
    """Return the name of the user whose request this is, as far as its tenant tells its users apart."""
    if key.user is not None or key.role is Role.OPERATOR:
        return key.user or ""
    if settings.user_header:
        return _name(_text(_one(headers, settings.user_header.lower().encode())), f"the header {settings.user_header}")
    if settings.user_field:
        return _name(_text_of_json(fields.get(settings.user_field)), f"the field {settings.user_field!r}")
    return ""


def _name(text: str | None, where: str) -> str:
    if text is None or not 1 <= len(text.strip()) <= NAME_CHARACTERS_MAX:
        raise RefusedError(
            400, f"{where} must name the user of this request, with 1 to {NAME_CHARACTERS_MAX} characters"
        )
    return text.strip()


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _text_of_json(raw: Raw | None) -> str | None:
    try:
        return None if raw is None else _string.decode(raw)
    except msgspec.MsgspecError:
        return None


# The body


async def _read(receive: Receive, headers: Headers, bytes_max: int) -> bytes:
    """Return a request's body. Raises `RefusedError` before more than `bytes_max` are kept of it."""
    encoding = _one(headers, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        raise RefusedError(415, "the body must be sent as it is, without a content-encoding")
    too_large = RefusedError(413, f"the body is larger than {format_size(bytes_max)}")
    length = _one(headers, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > bytes_max:
        raise too_large  # before any of it is sent
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _GoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > bytes_max:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _is_json(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == b"application/json"


def _check_json(content_type: bytes | None) -> None:
    if not _is_json(content_type):
        raise RefusedError(415, "the body must be JSON, sent with `Content-Type: application/json`")
    assert content_type is not None, "no type is JSON's"
    for parameter in content_type.lower().split(b";")[1:]:
        name, _, value = parameter.strip().partition(b"=")
        if name.strip() == b"charset" and value.strip(b" \"'") not in (b"utf-8", b"utf8"):
            raise RefusedError(415, "the body must be UTF-8")


def _strip(body: bytes, *, kept: str | None) -> Body:
    """Return a body's fields as the bytes that they came as, without the marks, but for the one that is `kept`."""
    try:
        body.decode()
        fields = _object.decode(body)
        for mark in MARKS:
            if mark != kept:
                fields.pop(mark, None)
        for path in _WITHIN:
            _strip_within(fields, path)
    except UnicodeDecodeError:
        raise RefusedError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise RefusedError(400, f"the body is not a JSON object: {error}") from None
    return fields


def _strip_within(fields: Body, path: tuple[str, ...]) -> None:
    """Take the marks out of the object at `path`; what is none there is left to vLLM, which refuses it."""
    name, *deeper = path
    raw = bytes(fields.get(name, b""))
    if not raw.startswith(b"{"):
        return
    inner = _object.decode(raw)
    if deeper:
        _strip_within(inner, tuple(deeper))
    else:
        for mark in MARKS:
            inner.pop(mark, None)
    fields[name] = Raw(msgspec.json.encode(inner))


# The request that vLLM gets, and the answer of one that it doesn't


def _one(headers: Headers, name: bytes) -> bytes | None:
    """Return a header's value. Raises `RefusedError` where it is there twice: vLLM might believe the other one."""
    values = [value for key, value in headers if key.lower() == name]
    if len(values) > 1:
        raise RefusedError(400, f"the header {name.decode('latin-1')} is there {len(values)} times")
    return values[0] if values else None


def _with_body(scope: Scope, body: bytes, content_type: bytes | None) -> Scope:
    """Return a scope whose headers fit the body."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _OF_THE_BODY]
    if content_type is not None:
        headers.append((b"content-type", content_type))
    headers.append((b"content-length", str(len(body)).encode()))
    return {**scope, "headers": headers}


def _with_path(scope: Scope, path: str) -> Scope:
    whole: str = scope.get("root_path", "") + path
    return {**scope, "path": whole, "raw_path": whole.encode()}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives vLLM the body at once, and then whether the client is still there."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        message = await receive()
        while message["type"] == "http.request":  # a body that was not wanted
            message = await receive()
        return message

    return replay


async def _answer(send: Send, refusal: RefusedError) -> None:
    error = {
        "message": str(refusal),
        "type": _TYPE_BY_STATUS[refusal.status],
        "param": None,
        "code": refusal.status,
    }
    body = msgspec.json.encode({"error": error})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *refusal.headers,
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_object = msgspec.json.Decoder(Body)
_string = msgspec.json.Decoder(str)
