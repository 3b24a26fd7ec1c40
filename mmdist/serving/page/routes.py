"""The chat page's files, and what it has to know of this server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from mmdist.media import CONTAINERS, FORMATS
from mmdist.serving.errors import ServeError
from mmdist.serving.health import ServiceOf
from mmdist.shipped import SHIPPED

FOLDER = Path(__file__).parent
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name: TYPES[path.suffix] for path in FOLDER.iterdir() if path.suffix in TYPES}
# Nothing from elsewhere, no script or style within a text, and none that is made of a model's words.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    return FileResponse(FOLDER / "index.html", headers=HEADERS, media_type="text/html")


@router.get("/page/config")
async def config(service: ServiceOf) -> dict[str, Any]:
    """What the page shows and checks before it sends anything; known without a key, as the page is."""
    config, server = service.config, service.config.server
    is_demo = config.checkpoint is None
    return {
        "model": service.model_name,
        "takes_video": service.processor.takes_video,
        "single_turn": service.processor.single_turn,
        "formats": FORMATS,
        "containers": list(CONTAINERS),
        "max_pictures": server.max_pictures,
        "max_image_pixels": server.max_image_pixels,
        "max_media_bytes": int(server.max_media_mb * 1e6),
        "max_body_bytes": int(server.max_body_mb * 1e6),
        "example": is_demo and config.model.demo_image is not None,
        "example_prompt": config.model.demo_prompt if is_demo else None,
    }


@router.get("/page/example")
async def example(service: ServiceOf) -> Response:
    """The picture that the shipped checkpoint knows."""
    model = service.config.model
    if service.config.checkpoint is not None or model.demo_image is None:
        raise ServeError(404, "only a shipped checkpoint has an example")
    return FileResponse(SHIPPED / model.demo_image, headers=HEADERS)


@router.get("/page/{name}")
async def file(name: str) -> Response:
    if name not in FILES:
        raise ServeError(404, f"{name}: no such file of the page")
    return FileResponse(FOLDER / name, headers=HEADERS, media_type=FILES[name])
