"""At the door, before anything is read: host, key, size; and on the way out: headers, figures, a line in the log."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.keys import Caller
from medclip_lab.serving.logs import LOGGER
from medclip_lab.serving.problems import Problem, too_large
from medclip_lab.serving.settings import LOOPBACK

OPEN = ("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/favicon.ico")
"""What needs no key: health, as probes have none, and what is the same for every service of this version."""
PAGE = "/page/"
LINGER = 2.0
"""Seconds that the rest of a body above the limit is read, and thrown away."""
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = POLICY.replace(
    "default-src 'none'",
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'",
)
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}

RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Guard:
    """ASGI middleware around the whole application.

    Args:
        paths: of routes that have but one; a request for any other that was refused here has no name in a log.
    """

    def __init__(self, app: ASGIApp, house: House, paths: frozenset[str]) -> None:
        self.app, self.house, self.paths = app, house, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        now = time.monotonic()
        visit = Visit(uuid.uuid4().hex, Caller("none", frozenset()), now, now + self.house.settings.deadline)
        scope.setdefault("state", {})["visit"] = visit
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                _add_headers(sent, scope["path"], visit.request_id)
                if self.house.leaving:
                    sent["Connection"] = "close"
            elif status == 413 and not message.get("more_body"):
                # Who closes on unread bytes resets the connection, and the refusal is lost on its way.
                await send({**message, "more_body": True})
                await _read_off(receive)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            visit.caller = await self._caller(scope["path"], headers)
            await self.app(scope, self._counted(receive, headers), answer)
        except Problem as problem:
            if not status:
                await problem.response(visit.request_id)(scope, receive, answer)
        except Exception as error:
            LOGGER.error("failure", exc_info=error, extra={"facts": {"request_id": visit.request_id}})
            if not status:
                failure = Problem(500, "failure", "the service failed: tell its keeper the request id")
                await failure.response(visit.request_id)(scope, receive, answer)
        finally:
            self._note(scope, visit, status)

    def _check_host(self, headers: Headers) -> None:
        """Without keys only this machine is served, and no page of another site that a browser here has open."""
        if not self.house.settings.local:
            return
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in LOOPBACK:
            raise Problem(421, "host", "without keys the service answers at 127.0.0.1 and localhost only")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Problem(403, "cross-site", "pages of other sites may not use this service")

    async def _caller(self, path: str, headers: Headers) -> Caller:
        """Who asks.

        Raises:
            Problem: 401; of a token also 403 and 503.
        """
        if self.house.settings.local:
            return Caller("local", frozenset(self.house.settings.local_scopes))
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        caller = self.house.keys.caller(key) if key and self.house.keys is not None else None
        if caller is not None:
            return caller
        if path in OPEN or path.startswith(PAGE):
            return Caller("none", frozenset())
        if key and self.house.tokens is not None and key.count(".") == 2:
            return await self.house.tokens.caller(key)
        what = "the key is wrong or was withdrawn" if key else "no key was sent"
        raise Problem(401, "key", f"{what}: send a key as `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})

    def _counted(self, receive: Receive, headers: Headers) -> Receive:
        """`receive`, which refuses a body above the limit: by its announced length, or as soon as it grows beyond.

        Raises:
            Problem: 400, 413, 415.
        """
        limit = self.house.settings.max_body
        announced = headers.get("content-length")
        if announced is not None:
            if not announced.isascii() or not announced.isdigit():
                raise Problem(400, "content-length", "Content-Length must be a number of bytes")
            if int(announced) > limit:
                raise too_large(limit)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "content-encoding", "compressed bodies are not read: send it plain")
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise too_large(limit)
            return message

        return counted

    def _note(self, scope: Scope, visit: Visit, status: int) -> None:
        path = scope["path"]
        refused = path if path in self.paths else "/page" if path.startswith(PAGE) else "unknown"
        route = getattr(scope.get("route"), "path", None) or refused
        seconds = time.monotonic() - visit.started
        metrics = self.house.metrics
        metrics.requests.labels(route, str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        metrics.now()
        for stage in _used(visit):
            metrics.stages.labels(stage).observe(visit.stages[stage])
        facts = {"request_id": visit.request_id, "method": scope["method"], "route": route, "status": status}
        facts |= {"key": visit.caller.id, "images": visit.images, "ms": visit.timings()}
        LOGGER.info("request", extra={"facts": facts})
        if self.house.audit is not None and scope["method"] == "POST":
            told = {name: facts[name] for name in ("request_id", "key", "route", "status", "images")}
            told |= {"subject": visit.caller.subject, "index": visit.index}
            try:
                self.house.audit.add(told | {"model": self.house.model.encoder.fingerprint})
            except OSError as error:
                self.house.ready = False  # who cannot be accounted for is not served
                LOGGER.error("audit log failed", exc_info=error)


async def _read_off(receive: Receive) -> None:
    """Read what a client still sends, so that it gets to reading; for LINGER, and no longer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _used(visit: Visit) -> Iterable[str]:
    return (stage for stage, seconds in visit.stages.items() if seconds)


def _add_headers(headers: MutableHeaders, path: str, request_id: str) -> None:
    headers.raw.extend(RAW_HEADERS)
    headers["Content-Security-Policy"] = PAGE_POLICY if path == "/" or path.startswith(PAGE) else POLICY
    headers["X-Request-ID"] = request_id
