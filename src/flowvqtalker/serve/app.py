"""The web application: routes, errors, documentation and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline

from flowvqtalker import __version__
from flowvqtalker.serve import problems, routes_assets, routes_info, routes_live, routes_talks, routes_videos
from flowvqtalker.serve.access import Guard
from flowvqtalker.serve.server import WEBRTC, Server
from flowvqtalker.serve.settings import Settings

__all__ = ["create_app"]

#: Files of the web page.
PAGE = Path(__file__).parent / "page"


def create_app(settings: Settings) -> FastAPI:
    """The application of a server; its workers start and end with it.

    Arguments:
        settings: see :class:`~flowvqtalker.serve.settings.Settings`.

    Raises:
        UserError: if the data folder cannot be used.
    """
    server = Server(settings)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        for call in list(server.calls):
            await call.end()
        server.close()

    app = FastAPIOffline(  # documentation that loads nothing from elsewhere
        title="flowvqtalker",
        version=__version__,
        summary="Portrait, speech and emotion in; emotional talking-face video out.",
        lifespan=running,
        redoc_url=None,
    )
    app.state.server = server
    problems.install(app)
    for routes in (routes_videos, routes_assets, routes_live, routes_talks, routes_info):
        app.include_router(routes.router)
    if WEBRTC and settings.max_live:
        from flowvqtalker.serve import routes_webrtc

        app.include_router(routes_webrtc.router)
    app.add_middleware(Guard, settings=settings, meter=server.meter)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/example.ogg", include_in_schema=False)
    def example() -> FileResponse:
        return FileResponse(PAGE.parents[1] / "assets" / "sample_speech.ogg")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app
