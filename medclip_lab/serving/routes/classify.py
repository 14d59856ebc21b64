"""POST /v1/classify: findings of images by a set of labels, the bundle's or the request's own."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.serving.answers import ClassifyOut
from medclip_lab.serving.images import Prepared, png_of
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import admitted, read
from medclip_lab.serving.schemas import ClassifyIn
from medclip_lab.serving.work import decode, encode_images, scorer_for

router = APIRouter()


@router.post("/v1/classify", responses={200: {"model": ClassifyOut}, **refusals()}, openapi_extra=body(ClassifyIn))
async def classify(request: Request) -> JSONResponse:
    """Scores for every label and image; probability, threshold, decision are null unless the bundle is calibrated."""
    async with admitted(request, "classify") as (house, visit):
        asked = await read(request, ClassifyIn, visit)
        scorer = await scorer_for(house, visit, asked.body)
        images = await decode(house, visit, asked.images)
        usable = [image for image in images if isinstance(image, Prepared)]
        answers = iter(await encode_images(house, visit, usable, scorer))
        results: list[dict[str, Any]] = []
        for image in images:
            if isinstance(image, Problem):
                results.append({"error": image.record()})
                continue
            found = next(answers)[1]
            labels = [{"label": name, **values} for name, values in found["labels"].items()]
            result = {"labels": labels, "out_of_domain": found["out_of_domain"], "image": image.facts}
            results.append(result | ({"preview": png_of(image.pixels)} if asked.body.preview else {}))
        return JSONResponse(
            {
                "request_id": visit.request_id,
                "score_type": scorer.score_type,
                "rule": scorer.rule,
                "model": house.model.hashes,
                "labelset": {"name": scorer.labelset, "hash": scorer.labelset_hash},
                "calibration": scorer.calibration_hash,
                "results": results,
                "timings_ms": visit.timings(),
            }
        )
