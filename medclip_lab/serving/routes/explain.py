"""POST /v1/explain: where in an image a score comes from."""

import base64
import io
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.serving.answers import ExplainOut
from medclip_lab.serving.house import House
from medclip_lab.serving.images import png_of
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import admitted, read
from medclip_lab.serving.schemas import ExplainIn
from medclip_lab.serving.work import call, decode_one, named_labelset

router = APIRouter()


@router.post("/v1/explain", responses={200: {"model": ExplainOut}, **refusals()}, openapi_extra=body(ExplainIn))
async def explain(request: Request) -> JSONResponse:
    """A map over what the tower saw, for one label or for prompts: what moved the score, not what is ill."""
    async with admitted(request, "classify") as (house, visit):
        asked = await read(request, ExplainIn, visit)
        if not house.model.can_explain:
            raise Problem(501, "no-explanation", "the image tower of this model has no explanation maps")
        positive, negative = _prompts(house, asked.body)
        image = await decode_one(house, visit, asked.images)
        found = await call(house, visit, lambda: house.model.explain(image.picture, positive, negative))
        relevance = found.enlarged()
        low, high = float(relevance.min()), float(relevance.max())
        return JSONResponse(
            {
                "request_id": visit.request_id,
                "model": house.model.hashes,
                "similarity": found.similarity,
                "method": found.method,
                "map": _grey(relevance, low, high),
                "seen": png_of(image.pixels),
                "lowest": low,
                "highest": high,
                "image": image.facts,
                "timings_ms": visit.timings(),
            }
        )


def _prompts(house: House, asked: ExplainIn) -> tuple[list[str], list[str]]:
    if max(len(asked.positive), len(asked.negative)) > house.settings.max_prompts:
        raise Problem(
            422, "too-many-prompts", f"a request may have {house.settings.max_prompts} prompts of either kind"
        )
    if asked.label is None:
        return asked.positive, asked.negative
    labelset = named_labelset(house, asked.labelset)
    for label in labelset.labels:
        if label.name == asked.label:
            if label.none_of:
                told = ", ".join(label.none_of)
                raise Problem(422, "no-prompts", f"this label has no prompts of its own: ask for one of {told}")
            return label.positive, label.negative
    raise Problem(404, "unknown-label", f"the label set has no such label; it has {', '.join(labelset.names)}")


def _grey(values: NDArray[Any], low: float, high: float) -> str:
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * scaled).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
