"""What every request must pass before a route sees it: name, key, type; and what every answer gets.

ASGI app -> ASGI app
"""

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address

from starlette.exceptions import HTTPException
from starlette.routing import Route

from flashformer.serve.server.errors import Problem, send_problem
from flashformer.serve.server.exchange import (
    Event,
    Exchange,
    GoneError,
    Receive,
    Scope,
    Send,
    headers_of,
)
from flashformer.serve.server.settings import ServeOptions

App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page holds nothing of the server; it asks for the key and sends it along.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_log = logging.getLogger("flashformer.server")


class Guard:
    """The outermost application."""

    def __init__(self, app: App, options: ServeOptions, routes: Sequence[Route]) -> None:
        self._app = app
        self.routes = routes
        self._limits = options.limits
        self._digests = [_digest(key.encode()) for key in options.api_keys]
        self._hosts = _allowed_hosts(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = headers_of(scope)
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_marked(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [
                    *event["headers"],
                    *_SAFE_HEADERS,
                    (b"x-request-id", request_id.encode()),
                ]
            await send(event)

        exchange = Exchange(scope, receive, send_marked, self._limits)
        try:
            problem = self._problem(scope, headers)
            if problem is not None:
                await send_problem(exchange, problem)
            else:
                await self._app(scope, receive, send_marked)
        except GoneError:
            pass
        except HTTPException as error:
            await send_problem(exchange, _no_route(scope, error))
        except Exception as error:
            _log.exception("request %s failed", request_id)
            if status == 0:
                await send_problem(exchange, _internal(error))
            else:
                exchange.abort()
        _log.info(
            "%s %s %s %d ms %s",
            scope["method"],
            _shown(scope),
            status or "gone",
            round(1e3 * (time.monotonic() - began)),
            request_id,
        )

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
        """Why this request is not let in."""
        if self._hosts is not None and _host_name(headers.get(b"host", b"")) not in self._hosts:
            return Problem(
                403,
                "the Host header names a server that this is not; start it with --allowed-host "
                "if the name is right.",
                code="host_not_allowed",
            )
        if self._digests and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            return Problem(
                401,
                "a valid API key is needed: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers=[(b"www-authenticate", _challenge(headers))],
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return Problem(
                    415, "the Content-Type must be application/json.", code="unsupported_media_type"
                )
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        given = _digest(_given_key(headers))
        # Every key is compared, and digests of equal length, so the time tells nothing.
        return any([hmac.compare_digest(given, digest) for digest in self._digests])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _allowed_hosts(options: ServeOptions) -> frozenset[str] | None:
    """Names of this server; None: every name. A page elsewhere cannot pose as this machine."""
    own = {name.lower() for name in (*options.allowed_hosts, options.host)}
    if is_loopback(options.host):
        return frozenset(own | {"localhost", "127.0.0.1", "::1"})
    return frozenset(own | {"localhost", "127.0.0.1", "::1"}) if options.allowed_hosts else None


def _host_name(host: bytes) -> str:
    """The name in a Host header, without port and brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _given_key(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request: a bearer token, Anthropic's header, or a password of a browser."""
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip()).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return headers.get(b"x-api-key", b"")


def _challenge(headers: dict[bytes, bytes]) -> bytes:
    """A browser's password dialog is for addresses that a person opens, not for a page's calls."""
    opened = headers.get(b"sec-fetch-mode", b"navigate") == b"navigate"
    return b'Basic realm="FlashFormer", Bearer' if opened else b"Bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(given: bytes) -> str:
    """The client's own, if it is short and plain; else a new one."""
    return given.decode() if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _no_route(scope: Scope, error: HTTPException) -> Problem:
    headers = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
    message = "there is nothing here; the API is under /v1."
    if error.status_code == 405:
        message = f"{scope['method']} is not possible here."
    return Problem(error.status_code, message, code="not_found", headers=headers)


def _internal(error: Exception) -> Problem:
    return Problem(
        500,
        f"the server failed ({type(error).__name__}); its log has the details under this "
        "request's X-Request-Id.",
        code="internal_error",
    )


def _shown(scope: Scope) -> str:
    """The path as it is safe in a log."""
    raw = bytes(scope.get("raw_path") or b"")[:200]
    return raw.decode("ascii", "replace").encode("unicode_escape").decode()
