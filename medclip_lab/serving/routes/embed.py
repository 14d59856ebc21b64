"""POST /v1/embed: embeddings of images and texts, as private as what they were made of."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.serving.answers import EmbedOut
from medclip_lab.serving.images import Prepared
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import admitted, read
from medclip_lab.serving.schemas import EmbedIn
from medclip_lab.serving.work import decode, encode_images, encode_texts

router = APIRouter()


@router.post("/v1/embed", responses={200: {"model": EmbedOut}, **refusals()}, openapi_extra=body(EmbedIn))
async def embed(request: Request) -> JSONResponse:
    """Embeddings of unit norm. One image that cannot be used refuses the request: rows must stay what they are of."""
    async with admitted(request, "classify") as (house, visit):
        asked = await read(request, EmbedIn, visit)
        if len(asked.body.texts) > house.settings.max_labels:
            raise Problem(
                413, "too-many-texts", f"a request may have {house.settings.max_labels} texts: send several requests"
            )
        prepared = []
        for place, image in enumerate(await decode(house, visit, asked.images)):
            if not isinstance(image, Prepared):
                raise Problem(image.status, image.kind, f"images.{place}: {image.detail}")
            prepared.append(image)
        images = [features for features, _ in await encode_images(house, visit, prepared)]
        texts = await encode_texts(house, visit, asked.body.texts)
        return JSONResponse(
            {
                "request_id": visit.request_id,
                "model": house.model.hashes,
                "dim": house.dim,
                "images": _written(images, asked.body.encoding),
                "texts": _written(texts, asked.body.encoding),
                "image_facts": [image.facts for image in prepared],
                "timings_ms": visit.timings(),
            }
        )


def _written(rows: list[Any], encoding: str) -> list[list[float]] | str:
    if encoding == "base64":
        return base64.b64encode(b"".join(np.asarray(row, dtype="<f4").tobytes() for row in rows)).decode()
    return [row.tolist() for row in rows]
