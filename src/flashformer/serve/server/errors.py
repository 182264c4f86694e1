"""Every refusal in the form that its client expects.

exception | `Problem` -> status, headers, JSON
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashformer.errors import FlashFormerError, ParameterError, UsageError
from flashformer.serve.server.endpoint import RequestError
from flashformer.serve.server.exchange import Exchange
from flashformer.serve.server.messages import RejectedError, ServerError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request is not served."""

    status: int
    message: str  # one sentence
    param: str | None = None
    code: str | None = None
    headers: Sequence[tuple[bytes, bytes]] = ()

    @property
    def kind(self) -> str:
        """The `type` that clients switch on."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, fallback)

    def body(self, path: str) -> dict[str, Any]:
        """As the API of this path writes errors."""
        if path.startswith("/v1/messages"):
            detail = {"type": self.kind, "message": self.message, "param": self.param}
            return {"type": "error", "error": detail}
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def problem_of(error: FlashFormerError | RequestError) -> Problem:
    """The problem that an exception means."""
    if isinstance(error, RequestError):
        return Problem(error.status, error.message, error.param, error.code)
    if isinstance(error, ServerError):
        headers: list[tuple[bytes, bytes]] = []
        if error.retry_after is not None:
            headers.append((b"retry-after", str(error.retry_after).encode()))
        elif error.status in (408, 500):  # the same again would fail again
            headers.append((b"x-should-retry", b"false"))
        return Problem(error.status, str(error), code=error.code, headers=headers)
    if isinstance(error, RejectedError):
        return Problem(400, str(error), error.parameter, error.code)
    if isinstance(error, ParameterError):
        return Problem(400, str(error), error.parameter, "invalid_value")
    if isinstance(error, UsageError):
        return Problem(400, str(error), code="invalid_value")
    return Problem(500, str(error), code="internal_error", headers=[(b"x-should-retry", b"false")])


async def send_problem(exchange: Exchange, problem: Problem) -> None:
    """Answer with a problem; the connection ends with it if a body may still be on its way."""
    headers = list(problem.headers)
    if problem.status in (408, 413, 415):
        headers.append((b"connection", b"close"))
    body = problem.body(exchange.scope["path"])
    await exchange.send_json(problem.status, body, headers)
