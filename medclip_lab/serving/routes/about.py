"""What is served, and whether it can be: models, label sets, health, figures."""

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medclip_lab.serving.answers import LabelsOf, ModelsOut
from medclip_lab.serving.house import House
from medclip_lab.serving.openapi import refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.scoring import PerLabel
from medclip_lab.version import __version__

router = APIRouter()
KEY = refusals(401, 403, 421, 503)
LIMITS = ("max_body", "max_pixels", "max_aspect", "max_images", "max_labels", "max_prompts", "max_k", "max_waiting")


@router.get("/v1/models", responses={200: {"model": ModelsOut}, **KEY})
async def models(request: Request) -> JSONResponse:
    """The model, its card, its indexes, the limits, and what this key may do."""
    house: House = request.app.state.house
    settings = house.settings
    return JSONResponse(
        {
            "model": house.model.hashes,
            "dim": house.dim,
            "image_size": house.model.preprocess.config.size,
            "precision": settings.precision,
            "labelsets": list(house.model.labelsets),
            "indexes": [await asyncio.to_thread(served.facts) for served in house.model.indexes.values()],
            "can_explain": house.model.can_explain,
            "scopes": sorted(request.state.visit.caller.scopes),
            "limits": {name: getattr(settings, name) for name in LIMITS} | {"deadline": settings.deadline},
            "dicomweb": house.archives.names,
            "card": house.model.card,
            "version": __version__,
        }
    )


@router.get("/v1/labelsets", responses={200: {"model": list[LabelsOf]}, **KEY})
async def labelsets(request: Request) -> JSONResponse:
    """The bundle's label sets with their prompts: what to start from for labels of one's own."""
    house: House = request.app.state.house
    scorers = {name: PerLabel(classifier) for name, classifier in house.model.classifiers.items()}
    return JSONResponse(
        [
            {
                "name": labelset.name,
                "hash": labelset.hash,
                "description": labelset.description,
                "default": labelset.name == house.model.labelset,
                "calibration": scorers[labelset.name].calibration_hash,
                "score_type": scorers[labelset.name].score_type,
                "rule": scorers[labelset.name].rule,
                "labels": [
                    {"name": label.name, "positive": label.positive, "negative": label.negative}
                    for label in labelset.labels
                ],
            }
            for labelset in house.model.labelsets.values()
        ]
    )


@router.get("/healthz", responses=refusals(421))
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses=refusals(421, 503))
async def readyz(request: Request) -> dict[str, str]:
    """The model answers, in every process."""
    check_ready(request.app.state.house)
    return {"status": "ready"}


def check_ready(house: House) -> None:
    """Refuse while a model's thread does not run, here or in a process that has still to start, and while stopping.

    Raises:
        Problem: 503.
    """
    if not house.ready or house.leaving or not house.batcher.alive or not house.workers.complete:
        raise Problem(503, "not-ready", "the model does not answer: wait, or start the service again")


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **KEY}, response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    house: House = request.app.state.house
    return Response(house.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
