"""The application: every route, around them the guard, and every refusal in one form."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from medclip_lab.serving.guard import Guard
from medclip_lab.serving.house import House
from medclip_lab.serving.leaving import leaving
from medclip_lab.serving.openapi import document
from medclip_lab.serving.problems import Problem, invalid
from medclip_lab.serving.routes import about, classify, compatible, embed, explain, indexes, page, search
from medclip_lab.serving.settings import Settings

SENTENCES = {404: "there is no such address: see /openapi.json", 405: "the address takes another method"}


def create_app(settings: Settings) -> FastAPI:
    """The service of one bundle; the model is loaded now, its threads start with the application.

    Raises:
        UserError: a bundle, an index or a file of keys that cannot be used.
    """
    house = House(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.open()
        with leaving(house):
            yield
        house.close()

    app = FastAPI(title="medclip-lab", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.house = house
    routers = [routes.router for routes in (about, classify, embed, search, indexes, explain, compatible, page)]
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    paths = {str(getattr(route, "path", "")) for router in routers for route in router.routes}
    app.add_middleware(Guard, house=house, paths=frozenset(path for path in paths if "{" not in path))
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def _id(request: Request) -> str:
    return str(request.state.visit.request_id)


async def _problem(request: Request, error: Any) -> Response:
    response: Response = error.response(_id(request))
    return response


async def _http(request: Request, error: Any) -> Response:
    detail = SENTENCES.get(error.status_code, "the request cannot be read: send it as /openapi.json says")
    return Problem(error.status_code, "http", detail, dict(error.headers or {})).response(_id(request))


async def _invalid(request: Request, error: Any) -> Response:
    return invalid(error.errors()).response(_id(request))
