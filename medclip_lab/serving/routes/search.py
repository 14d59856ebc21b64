"""POST /v1/search: what of an index is nearest to an image, a text, a vector or one of its own rows."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.serving.answers import SearchOut
from medclip_lab.serving.indexes import TEXT
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import admitted, read
from medclip_lab.serving.schemas import SearchIn
from medclip_lab.serving.searching import query_of
from medclip_lab.serving.searching import search as searched

router = APIRouter()
OWN = ("id", "study_id", *TEXT)
"""Columns that have a place of their own in a hit, or none."""


@router.post("/v1/search", responses={200: {"model": SearchOut}, **refusals()}, openapi_extra=body(SearchIn))
async def search(request: Request) -> JSONResponse:
    """The k nearest by cosine, best first. Report text needs the scope `text` and an index that holds it."""
    async with admitted(request, "search") as (house, visit):
        asked = await read(request, SearchIn, visit)
        wanted = asked.body
        if wanted.include_text:
            visit.need("text")
        served = house.model.index(wanted.index)
        if wanted.k > house.settings.max_k:
            raise Problem(422, "k", f"k may be {house.settings.max_k} at most")
        query = await query_of(house, visit, asked)
        found = await searched(served, query, wanted, visit)
        return JSONResponse(
            {
                "request_id": visit.request_id,
                "model": house.model.hashes,
                "index": found.index,
                "hits": [
                    {
                        "rank": hit.rank,
                        "score": hit.score,
                        "id": hit.id,
                        "study_id": hit.study_id,
                        "fields": {name: value for name, value in hit.row.items() if name not in OWN},
                        **({"text": hit.row.get("text")} if wanted.include_text else {}),
                    }
                    for hit in found.hits
                ],
                "image": query.facts,
                "timings_ms": visit.timings(),
            }
        )
