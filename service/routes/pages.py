"""GET / and /docs: the playground, the OpenAPI page, and the files they load. They never need a key."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)
ROOT = Path(__file__).parents[1]
FOLDERS = {name: StaticFiles(directory=ROOT / name) for name in ("playground", "swagger")}
KINDS = frozenset((".html", ".css", ".js", ".svg", ".png", ".jpg", ".txt"))
"""The only files of these folders that are served: no Python."""
HEADERS = {
    # Asked for again each time, and answered 304: a new version shows at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # A page that this one opens, or that opened it, can't reach into it.
    "Cross-Origin-Opener-Policy": "same-origin",
}


@router.get("/")
async def playground(request: Request) -> Response:
    """The page to try the models with."""
    return await _file(request, "playground", "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The OpenAPI page."""
    return await _file(request, "swagger", "index.html")


@router.get("/playground/{path:path}")
async def playground_file(request: Request, path: str) -> Response:
    """A file of the playground."""
    return await _file(request, "playground", path)


@router.get("/swagger/{path:path}")
async def swagger_file(request: Request, path: str) -> Response:
    """A file of Swagger UI."""
    return await _file(request, "swagger", path)


async def _file(request: Request, folder: str, path: str) -> Response:
    if Path(path).suffix not in KINDS:
        raise HTTPException(404)
    response = await FOLDERS[folder].get_response(path, request.scope)
    response.headers.update(HEADERS)
    return response
