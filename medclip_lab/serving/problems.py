"""Refusals as `application/problem+json` (RFC 9457): what is wrong and what to change, never what was sent."""

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

TITLES = {
    400: "The request cannot be read",
    401: "A valid key is needed",
    403: "The key does not allow this",
    404: "There is no such thing",
    405: "Another method is needed",
    408: "The request came too slowly",
    413: "The request is too large",
    415: "The content type is not known",
    421: "This host is not served",
    422: "The request cannot be answered",
    429: "Too many requests are waiting",
    500: "The service failed",
    501: "The model cannot do this",
    502: "The archive did not deliver",
    503: "The service is not ready",
}


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A refusal.

    Args:
        status: HTTP status.
        kind: a short name that programs may rely on.
        detail: one sentence that says what to change; it quotes nothing of the request.
        headers: to send along.
    """

    def __init__(self, status: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(kind)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = headers or {}

    def record(self, request_id: str | None = None) -> dict[str, Any]:
        """The body of the answer."""
        title = TITLES.get(self.status, "The request was refused")
        record = {"type": f"urn:medclip-lab:{self.kind}", "title": title, "status": self.status, "detail": self.detail}
        return record | ({} if request_id is None else {"request_id": request_id})

    def response(self, request_id: str | None = None) -> JSONResponse:
        """The answer itself."""
        return JSONResponse(
            self.record(request_id), self.status, headers=self.headers, media_type="application/problem+json"
        )


def busy(retry_after: int) -> Problem:
    """Too much is waiting already."""
    return Problem(
        429,
        "busy",
        f"as many requests wait as may: send it again in {retry_after} s",
        {"Retry-After": str(retry_after)},
    )


def too_large(limit: int) -> Problem:
    """A body above the limit; the rest of it is not read."""
    return Problem(
        413,
        "body-too-large",
        f"a request may have {limit} bytes: send fewer or smaller images",
        {"Connection": "close"},
    )


def invalid(errors: Sequence[Any]) -> Problem:
    """From the errors of pydantic: places and rules, but neither values nor names that the request made up."""
    told = []
    for error in errors[:5]:
        place = error["loc"]
        if error["type"] == "extra_forbidden":
            place = place[:-1]
            message = "an unknown field: leave it out"
        elif error["type"] in ("json_invalid", "value_error.jsondecode"):
            message = "no valid JSON"
        else:
            message = str(error["msg"]).removeprefix("Value error, ").lower()
        where = ".".join(str(part) for part in place) or "request"
        told.append(f"{where}: {message}")
    return Problem(422, "invalid-request", "; ".join(told))
