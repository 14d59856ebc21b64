"""The OpenAPI document: bodies of several content types, problems, examples, the key."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from medclip_lab.serving import schemas
from medclip_lab.serving.answers import ProblemOut
from medclip_lab.serving.problems import TITLES
from medclip_lab.serving.reading import LISTS, RAW
from medclip_lab.version import __version__

BODIES: tuple[type[BaseModel], ...] = (
    schemas.ClassifyIn,
    schemas.EmbedIn,
    schemas.SearchIn,
    schemas.ThumbnailsIn,
    schemas.ExplainIn,
    schemas.HuggingFaceIn,
    schemas.InferIn,
)
REFERENCE = "#/components/schemas/{model}"
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 501, 502, 503)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` for problems; all that a request with a body may meet if none is named."""
    content = {"application/problem+json": {"schema": {"$ref": REFERENCE.format(model="ProblemOut")}}}
    return {status: {"description": TITLES[status], "content": content} for status in statuses or REFUSALS}


def body(kind: type[BaseModel], files: bool = True) -> dict[str, Any]:
    """`openapi_extra` for a body that may come as JSON, and where it has images as an upload or as bytes."""
    extras: Any = kind.model_config.get("json_schema_extra", {})
    given = extras.get("examples", [])
    shown = {str(number): {"value": value} for number, value in enumerate(given, 1)}
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": REFERENCE.format(model=kind.__name__)}, "examples": shown}
    }
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if not files:
        return extra
    options = _options(kind)
    file = {"type": "string", "format": "binary"}
    image = {"type": "array", "items": file, "minItems": 1} if "images" in kind.model_fields else file
    form = {"type": "object", "properties": {"image": image, **options}, "required": ["image"]}
    content["multipart/form-data"] = {"schema": form | {"additionalProperties": False}}
    content |= {name: {"schema": file} for name in RAW}
    extra["parameters"] = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": "for a body that is an image"}
        for name, schema in options.items()
    ]
    return extra


def _options(kind: type[BaseModel]) -> dict[str, Any]:
    """What of a body can be said beside a file."""
    simple: dict[str, Any] = {"frame": {"type": "integer", "minimum": 0, "maximum": 100_000}}
    for name, schema in kind.model_json_schema()["properties"].items():
        if name in LISTS:
            simple[name] = {"type": "array", "items": {"type": "string"}}
        elif schema.get("type") in ("boolean", "integer", "string"):
            simple[name] = {key: value for key, value in schema.items() if key not in ("title", "description")}
        elif name not in ("data", "text"):
            # Of what may be left out: null is said by leaving it out.
            kinds = [one["type"] for one in schema.get("anyOf", ()) if one.get("type") in ("string", "number")]
            simple |= {name: {"type": kinds[0]}} if kinds else {}
    return simple


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document; made once."""
    if app.openapi_schema:
        return app.openapi_schema
    made = get_openapi(
        title="medclip-lab",
        version=__version__,
        description="Zero-shot findings, similar cases and embeddings of medical images. Not a medical device.",
        routes=app.routes,
    )
    made["components"]["schemas"] |= _definitions((*BODIES, ProblemOut))
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    made["security"] = [{"key": []}]
    app.openapi_schema = made
    return made


def _definitions(kinds: Iterable[type[BaseModel]]) -> dict[str, Any]:
    _, schema = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REFERENCE)
    definitions: dict[str, Any] = schema["$defs"]
    return definitions
