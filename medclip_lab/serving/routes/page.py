"""GET /: the page, files of this package that hold nothing of the model; it asks the same routes as anyone."""

from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from medclip_lab.serving.problems import Problem

router = APIRouter(include_in_schema=False)
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
FILES = (
    *("index.html", "page.css", "cases.css", "api.js", "labels.js", "page.js", "view.js"),
    *("card.js", "cases.js", "filters.js"),
)


@cache
def _content(name: str) -> bytes:
    return (resources.files("medclip_lab.serving") / "page" / name).read_bytes()


def _file(name: str) -> Response:
    return Response(_content(name), media_type=KINDS[name.rpartition(".")[2]])


@router.get("/")
async def index() -> Response:
    """The page itself."""
    return _file("index.html")


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """A file the page asks for."""
    if name not in FILES:
        raise Problem(404, "http", "there is no such address: see /openapi.json")
    return _file(name)
