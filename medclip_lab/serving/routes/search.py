"""POST /v1/search: what of an index is nearest to an image, a text or a vector."""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.errors import UserError
from medclip_lab.serving.answers import SearchOut
from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import Asked, admitted, read
from medclip_lab.serving.routes.about import index_facts
from medclip_lab.serving.schemas import SearchIn
from medclip_lab.serving.work import decode_one, encode_images, encode_texts

router = APIRouter()
OWN = ("id", "study_id", "text")
"""Columns that have a place of their own in a hit."""
LARGE = 1e100
"""Beyond this a square is no finite number."""


@router.post("/v1/search", responses={200: {"model": SearchOut}, **refusals()}, openapi_extra=body(SearchIn))
async def search(request: Request) -> JSONResponse:
    """The k nearest by cosine, best first. Report text needs the scope `text` and an index that holds it."""
    async with admitted(request, "search") as (house, visit):
        asked = await read(request, SearchIn, visit)
        wanted = asked.body
        if wanted.include_text:
            visit.need("text")
        name, index = house.model.index(wanted.index)
        if wanted.include_text and not index.manifest.get("text_included"):
            raise Problem(
                422, "no-text", "this index holds no report text: leave include_text out, or build one with it"
            )
        if wanted.k > house.settings.max_k:
            raise Problem(422, "k", f"k may be {house.settings.max_k} at most")
        if wanted.filters:
            raise Problem(501, "no-filters", "this version of the service does not filter: leave filters out")
        query, facts = await _query(house, visit, asked)
        start = time.monotonic()
        try:
            hits = (await asyncio.to_thread(house.model.search, name, query[None], wanted.k))[0]
        except UserError as error:
            raise Problem(422, "search", str(error)) from None
        visit.stages["search"] = time.monotonic() - start
        found = [
            {
                "rank": hit.rank,
                "score": hit.score,
                "id": hit.id,
                "study_id": hit.study_id,
                "fields": {name: value for name, value in hit.row.items() if name not in OWN},
                **({"text": hit.row.get("text")} if wanted.include_text else {}),
            }
            for hit in hits
        ]
        answer: dict[str, Any] = {"request_id": visit.request_id, "model": house.model.hashes}
        answer |= {"index": index_facts(house, name), "hits": found, "image": facts, "timings_ms": visit.timings()}
        return JSONResponse(answer)


async def _query(house: House, visit: Visit, asked: Asked[SearchIn]) -> tuple[NDArray[np.float32], Any]:
    """[D], unit norm, and what was done to the pixels of an image."""
    if asked.images:
        image = await decode_one(house, visit, asked.images)
        return (await encode_images(house, visit, [image]))[0][0], image.facts
    if asked.body.text is not None:
        return (await encode_texts(house, visit, [asked.body.text]))[0], None
    vector = np.asarray(asked.body.vector, dtype=np.float64)
    norm = float(np.linalg.norm(vector)) if np.abs(vector).max() < LARGE else 0.0
    if len(vector) != house.dim or norm < 1e-6:
        raise Problem(422, "vector", f"a vector must have {house.dim} numbers below {LARGE:g} that are not all 0")
    return (vector / norm).astype(np.float32), None
