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
from medclip_lab.retrieval.filters import conditions
from medclip_lab.retrieval.index import Hit, Index
from medclip_lab.retrieval.policies import Ratio
from medclip_lab.serving.answers import SearchOut
from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import Asked, admitted, read
from medclip_lab.serving.routes.about import index_facts
from medclip_lab.serving.schemas import SearchIn
from medclip_lab.serving.work import decode_one, encode_images, encode_texts

router = APIRouter()
TEXT = ("text", "text_key")
"""Columns that hold a report, or tell by a hash whether it is one that was guessed."""
OWN = ("id", "study_id", *TEXT)
"""Columns that have a place of their own in a hit, or none."""
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
        query, facts = await _query(house, visit, asked)
        start = time.monotonic()
        hits = await asyncio.to_thread(_hits, index, query, wanted, visit)
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


def _hits(index: Index, query: NDArray[np.float32], wanted: SearchIn, visit: Visit) -> list[Hit]:
    """Best first.

    Raises:
        Problem: 403 for a condition on report text without its scope, which would tell by its answers what it says;
            422 for one that cannot be.
    """
    try:
        where = conditions(wanted.where)
    except UserError:
        raise Problem(
            422,
            "filter",
            "where: a condition cannot be read: write column=value, with !=, or <, <=, > or >= and a number or a date, "
            "or as column in a,b",
        ) from None
    if any(condition.column in TEXT for condition in where):
        visit.need("text")
    try:
        return index.search(
            query,
            wanted.k,
            where=where,
            not_patients=None if wanted.not_patient is None else [wanted.not_patient],
            policy=None if wanted.ratio is None else Ratio(wanted.ratio),
            with_text=wanted.include_text,
        )[0]
    except UserError:
        columns = [field.name for field in index.table.schema if not field.type.num_fields]
        raise Problem(
            422,
            "filter",
            "where: no such column or label, or a value that its column cannot have; there are "
            f"{', '.join(columns)} and labels.NAME",
        ) from None


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
