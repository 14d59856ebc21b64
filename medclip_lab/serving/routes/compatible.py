"""What clients of others speak: the Open Inference Protocol (KServe, version 2) and Hugging Face's task."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from medclip_lab.serving.answers import HuggingFaceLabel, InferOut
from medclip_lab.serving.house import House
from medclip_lab.serving.images import Prepared
from medclip_lab.serving.openapi import body, refusals
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import Sent, admitted, read
from medclip_lab.serving.routes.about import KEY, check_ready
from medclip_lab.serving.schemas import HuggingFaceIn, ImageIn, InferIn, Labels
from medclip_lab.serving.work import decode, decode_one, encode_images, named_labelset, scorer_for
from medclip_lab.version import __version__

router = APIRouter()
HUGGING_FACE = "/v1/zero-shot-image-classification"


@router.post(
    HUGGING_FACE,
    responses={200: {"model": list[HuggingFaceLabel]}, **refusals()},
    openapi_extra=body(HuggingFaceIn, files=False),
)
async def hugging_face(request: Request) -> JSONResponse:
    """Hugging Face's request and answer: labels, best first; softmax over them unless multi_label."""
    async with admitted(request, "classify") as (house, visit):
        asked = (await read(request, HuggingFaceIn, visit)).body
        given = asked.parameters
        templates = None if given.hypothesis_template is None else [given.hypothesis_template]
        labels = Labels(candidate_labels=[*given.candidate_labels], templates=templates, multi_label=given.multi_label)
        scorer = await scorer_for(house, visit, labels)
        image = await decode_one(house, visit, [Sent(ImageIn(data=asked.inputs))])
        ((_, found),) = await encode_images(house, visit, [image], scorer)
        ranked = sorted(found["labels"].items(), key=lambda pair: -pair[1]["score"])
        return JSONResponse([{"label": name, "score": values["score"]} for name, values in ranked])


@router.get("/v2", responses=KEY)
async def server() -> dict[str, Any]:
    """Who serves."""
    return {"name": "medclip-lab", "version": __version__, "extensions": []}


@router.get("/v2/health/live", responses=refusals(421))
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/v2/health/ready", responses=refusals(421, 503))
async def ready(request: Request) -> dict[str, bool]:
    """The model answers."""
    check_ready(request.app.state.house)
    return {"ready": True}


def _check_model(house: House, name: str, version: str | None) -> None:
    if name != house.model.name or version not in (None, house.model.encoder.fingerprint[:12]):
        known = f"{house.model.name}, version {house.model.encoder.fingerprint[:12]}"
        raise Problem(404, "unknown-model", f"no such model is served here; there is {known}")


@router.get("/v2/models/{name}/versions/{version}/ready", responses={**KEY, **refusals(404, 422, 503)})
@router.get("/v2/models/{name}/ready", responses={**KEY, **refusals(404, 422, 503)})
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """The model answers."""
    house: House = request.app.state.house
    _check_model(house, name, version)
    check_ready(house)
    return {"name": name, "ready": True}


@router.get("/v2/models/{name}/versions/{version}", responses={**KEY, **refusals(404, 422)})
@router.get("/v2/models/{name}", responses={**KEY, **refusals(404, 422)})
async def model(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Inputs and outputs of the model."""
    house: House = request.app.state.house
    _check_model(house, name, version)
    return {
        "name": name,
        "versions": [house.model.encoder.fingerprint[:12]],
        "platform": "medclip-lab",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1]},
            {"name": "features", "datatype": "FP32", "shape": [-1, house.dim]},
        ],
    }


@router.post(
    "/v2/models/{name}/versions/{version}/infer",
    responses={200: {"model": InferOut}, **refusals()},
    openapi_extra=body(InferIn, files=False),
)
@router.post(
    "/v2/models/{name}/infer",
    responses={200: {"model": InferOut}, **refusals()},
    openapi_extra=body(InferIn, files=False),
)
async def infer(request: Request, name: str, version: str | None = None) -> JSONResponse:
    """Scores [images, labels] of the default label set, or of `parameters.labelset`; features if they are asked for."""
    async with admitted(request, "classify") as (house, visit):
        _check_model(house, name, version)
        asked = (await read(request, InferIn, visit)).body
        wanted = [output.name for output in asked.outputs] or ["scores", "labels"]
        labelset = named_labelset(house, asked.parameters.labelset)
        scorer = await scorer_for(house, visit, Labels(labelset=labelset.name))
        prepared = []
        for place, image in enumerate(
            await decode(house, visit, [Sent(ImageIn(data=text)) for text in asked.inputs[0].data])
        ):
            if not isinstance(image, Prepared):
                raise Problem(image.status, image.kind, f"inputs.0.data.{place}: {image.detail}")
            prepared.append(image)
        found = await encode_images(house, visit, prepared, scorer)
        scores = [values["score"] for _, answer in found for values in answer["labels"].values()]
        features = [float(value) for row, _ in found for value in row]
        shaped: dict[str, Any] = {
            "scores": {"datatype": "FP32", "shape": [len(found), len(scorer.names)], "data": scores},
            "labels": {"datatype": "BYTES", "shape": [len(scorer.names)], "data": scorer.names},
            "features": {"datatype": "FP32", "shape": [len(found), house.dim], "data": features},
        }
        return JSONResponse(
            {
                "model_name": house.model.name,
                "model_version": house.model.encoder.fingerprint[:12],
                "id": asked.id or visit.request_id,
                "parameters": {
                    "score_type": scorer.score_type,
                    "labelset": scorer.labelset,
                    "labelset_hash": scorer.labelset_hash,
                    "calibration": scorer.calibration_hash or "",
                },
                "outputs": [{"name": output, **shaped[output]} for output in wanted],
            }
        )
