"""From a request to what it asks: JSON with base64, a multipart upload, or the bytes of one image as they are."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from medclip_lab.serving.batcher import past_deadline
from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.problems import Problem, invalid
from medclip_lab.serving.schemas import ImageIn
from medclip_lab.serving.settings import Scope

M = TypeVar("M", bound=BaseModel)
RAW = ("application/dicom", "application/octet-stream", "image/png", "image/jpeg", "image/tiff", "image/webp")
LISTS = ("candidate_labels", "templates", "negative_templates", "texts", "positive", "negative", "where")
INLINE = 2**21
"""Bytes of JSON that are parsed at once, in a millisecond; more would hold up the other requests."""
MAX_OPTIONS = 200
MOST_VALUES = 2**17
"""Commas of a body of JSON, and so its values; base64 has none. A value takes many times the bytes it was sent in."""
MOST_ERRORS = 100
"""Beyond these a refusal does not say which: to write a million of them down takes gigabytes."""


@dataclass(frozen=True)
class Sent:
    """An image as it came."""

    item: ImageIn
    data: bytes | None = None
    """Of an upload; what came as JSON is still in `item`."""


@dataclass(frozen=True)
class Asked(Generic[M]):
    """A request, read."""

    body: M
    images: list[Sent]


class _InMemory(MultiPartParser):
    """Starlette's parser writes uploads above a megabyte to the disk; here nothing is, the body being bounded."""

    spool_max_size = 2**62


@asynccontextmanager
async def admitted(request: Request, scope: Scope) -> AsyncIterator[tuple[House, Visit]]:
    """A place in the house for a caller with a scope, until the deadline.

    Raises:
        Problem: 403, 408 for a body that came too slowly, 429, 503 past the deadline.
    """
    house: House = request.app.state.house
    visit: Visit = request.state.visit
    visit.need(scope)
    if not house.ready:
        raise Problem(503, "not-ready", "the service is starting or stopping: send it again", {"Retry-After": "2"})
    told = None if "transfer-encoding" in request.headers else request.headers.get("content-length")
    size = int(told or house.settings.max_body)  # beside chunks a length means nothing (RFC 9112, 6.3)
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.ensure_future(_watch(request, visit, task))
    try:
        with house.gate.enter(size):
            house.metrics.now()
            async with asyncio.timeout(visit.deadline - time.monotonic()):
                yield house, visit
            house.gate.took(time.monotonic() - visit.started)
    except asyncio.CancelledError:
        if not gone.done() or gone.cancelled():
            raise
        task.uncancel()
        house.metrics.refused.labels("disconnected").inc()
        raise _disconnected() from None
    except TimeoutError:
        house.metrics.refused.labels("deadline").inc()
        if visit.whole.is_set():
            raise past_deadline() from None
        raise Problem(
            408, "slow", "the body did not arrive in time: send it faster or smaller", {"Connection": "close"}
        ) from None
    except Problem as problem:
        house.metrics.refused.labels(problem.kind).inc()
        raise
    finally:
        gone.cancel()


async def _watch(request: Request, visit: Visit, task: "asyncio.Task[Any]") -> None:
    """Cancel the work for a client that leaves: its place is another's, and what waits is not computed."""
    await visit.whole.wait()  # until then it is the body that is received
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _disconnected() -> Problem:
    return Problem(400, "disconnected", "the connection closed before the answer")


async def read(request: Request, kind: type[M], visit: Visit) -> Asked[M]:
    """A request of any content type, as `kind` says what may be asked.

    Raises:
        Problem: 400, 408, 413, 415 or 422.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = content_type == "application/json" or content_type.endswith("+json")
    takes_images = "images" in kind.model_fields or "image" in kind.model_fields
    if not is_json and not (takes_images and content_type in (*RAW, "multipart/form-data")):
        known = ", ".join(("application/json", *(("multipart/form-data", *RAW) if takes_images else ())))
        raise Problem(415, "content-type", f"the content type must be one of {known}")
    start = time.monotonic()
    try:
        if is_json:
            data = await request.body()
            visit.whole.set()
            visit.stages["receive"] = time.monotonic() - start
            if len(data) > INLINE:
                body = await asyncio.to_thread(_parse, kind, data)
            else:
                body = _parse(kind, data)
            return Asked(body, _images(body, []))
        if content_type == "multipart/form-data":
            options, files = await _form(request)
        else:
            data = await request.body()
            options, files = _gather(request.query_params.multi_items()), [data]
        visit.whole.set()
        visit.stages["receive"] = time.monotonic() - start
        body = _from_options(kind, options, files)
        return Asked(body, _images(body, files))
    except ClientDisconnect:
        raise _disconnected() from None


def _parse(kind: type[M], data: bytes) -> M:
    if data.count(b",") > MOST_VALUES:
        raise Problem(413, "too-many-values", f"a body of JSON may have {MOST_VALUES} commas: send several requests")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refused(error) from None
    except UnicodeDecodeError:
        raise Problem(422, "invalid-request", "the body is no UTF-8") from None


async def _form(request: Request) -> tuple[dict[str, Any], list[bytes]]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk

    house: House = request.app.state.house
    parser = _InMemory(request.headers, chunks(), max_files=house.settings.max_images, max_fields=MAX_OPTIONS)
    try:
        form = await parser.parse()
    except MultiPartException:
        raise Problem(
            400,
            "multipart",
            "the multipart body is broken or has no boundary, or it has more than "
            f"{house.settings.max_images} files or {MAX_OPTIONS} fields",
        ) from None
    except (KeyError, ValueError, AssertionError):  # no boundary, a charset nobody knows
        raise Problem(400, "multipart", "the multipart body is broken: send it with a boundary, in UTF-8") from None
    files, options = [], []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in ("image", "images"):
                raise Problem(422, "invalid-request", "files go into the field `image`")
            files.append(await value.read())
        else:
            options.append((name, value))
    await form.close()
    if not files:
        raise Problem(422, "invalid-request", "the upload has no file: put it into the field `image`")
    return _gather(options), files


def _gather(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in LISTS:
            options.setdefault(name, []).append(value)
        elif name in ("images", "image", "vector"):
            raise Problem(422, "invalid-request", "images and vectors go into JSON, or images into files")
        else:
            options[name] = value
    return options


def _from_options(kind: type[M], options: dict[str, Any], files: list[bytes]) -> M:
    """The body that JSON would have had; the files themselves stay bytes."""
    frame = options.pop("frame", None)
    # The pictures are checked as if each were an empty base64 text: what they hold is for the decoder.
    items = [{"data": "", "frame": frame} for _ in files]
    if "images" in kind.model_fields:
        options["images"] = items
    elif len(items) == 1:
        options["image"] = items[0]
    else:
        raise Problem(422, "invalid-request", "send one image, not several")
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> Problem:
    if error.error_count() > MOST_ERRORS:
        return Problem(422, "invalid-request", f"more than {MOST_ERRORS} values are not as /openapi.json says")
    return invalid(error.errors(include_url=False, include_context=False, include_input=False))


def _images(body: BaseModel, files: list[bytes]) -> list[Sent]:
    items: list[ImageIn] = list(getattr(body, "images", []))
    single = cast(ImageIn | None, getattr(body, "image", None))
    items += [single] if single is not None else []
    if files:
        return [Sent(item, data) for item, data in zip(items, files, strict=True)]
    return [Sent(item) for item in items]
