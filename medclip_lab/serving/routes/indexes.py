"""GET /v1/indexes: what each index can be asked; POST /v1/thumbnails: small pictures of some of its rows."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.errors import UserError
from medclip_lab.retrieval.milvus_client import AwayError
from medclip_lab.retrieval.search import Store
from medclip_lab.serving.answers import OffersOut, ThumbnailsOut
from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import admitted, read
from medclip_lab.serving.schemas import ThumbnailsIn
from medclip_lab.serving.thumbnails import Pictures, thumbnail

A = TypeVar("A")
R = TypeVar("R")
router = APIRouter()


@router.get(
    "/v1/indexes", responses={200: {"model": list[OffersOut]}, **refusals(401, 403, 408, 421, 429, 503)}
)  # fmt: skip
async def indexes(request: Request) -> JSONResponse:
    """Fields for conditions with their values, policies and calibrations, domains of routers."""
    async with admitted(request, "search") as (house, visit):
        text = "text" in visit.caller.scopes
        return JSONResponse([await _asked(served.offers, text) for served in house.model.indexes.values()])


@router.post(
    "/v1/thumbnails",
    responses={200: {"model": ThumbnailsOut}, **refusals()},
    openapi_extra=body(ThumbnailsIn, files=False),
)
async def thumbnails(request: Request) -> JSONResponse:
    """Pictures of 192 pixels of rows that a search found, from the images the operator named; null where there is none.

    Ids come in the body: addresses stand in the logs of proxies.
    """
    async with admitted(request, "search") as (house, visit):
        visit.need("thumbnails")
        wanted = (await read(request, ThumbnailsIn, visit)).body
        if len(wanted.ids) > house.settings.max_images:
            raise Problem(413, "too-many-images", f"a request may have {house.settings.max_images} ids: send several")
        served = house.model.index(wanted.index)
        domain = served.domain(wanted.domain)
        visit.index = await _asked(served.hash, domain)
        if domain not in served.pictures:
            raise Problem(
                422, "no-thumbnails", "nobody said where the images of this index lie: start with --thumbnails"
            )
        found = await _made(house, visit, served.stores[domain], served.pictures[domain], wanted.ids)
        return JSONResponse(
            {
                "request_id": visit.request_id,
                "thumbnails": [{"id": number, "image": image} for number, image in zip(wanted.ids, found, strict=True)],
                "timings_ms": visit.timings(),
            }
        )


async def _made(house: House, visit: Visit, store: Store, pictures: Pictures, ids: list[int]) -> list[str | None]:
    try:
        rows = await _asked(store.rows, ids)
    except UserError:
        raise Problem(404, "unknown-id", "the index holds no such id: take ids from the hits of a search") from None
    start, loop, settings = time.monotonic(), asyncio.get_running_loop(), house.settings

    def work(row: dict[str, object]) -> str | None:
        return thumbnail(
            pictures,
            str(row["study_id"]),
            int(str(row.get("image") or 0)),
            house.model.preprocess,
            settings.max_pixels,
            settings.max_body,
        )

    found = await asyncio.gather(*(loop.run_in_executor(house.pool, work, row) for row in rows))
    visit.stages["decode"] += time.monotonic() - start
    return list(found)


async def _asked(function: Callable[[A], R], argument: A) -> R:
    """What a store answers, on a thread.

    Raises:
        Problem: 503, its server does not answer.
    """
    try:
        return await asyncio.to_thread(function, argument)
    except AwayError:
        raise Problem(503, "index-away", "the server of this index does not answer: send it again later") from None
