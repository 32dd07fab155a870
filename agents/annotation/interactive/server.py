"""The web server of the app."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from nicegui import ui

from agents.annotation.interactive.guard import Guard
from agents.annotation.interactive.page import add_page
from agents.annotation.interactive.workspaces import Workspaces
from sam_gym.backbones.zoom import Window

#: Seconds for which the server waits for a browser that is slow, or asleep.
_PATIENCE = 60.0


def make_app(workspaces: Workspaces, token: str | None, hosts: frozenset[str] | None) -> FastAPI:
    """Return the ASGI application; arguments as for `run_server`."""
    app = FastAPI(openapi_url=None)

    @app.get("/shown/{key}")
    def shown(key: str, window: str = "") -> Response:
        return _picture(lambda: workspaces.shown(key, _window(window)))

    @app.get("/frame/{key}/{number}")
    def frame(key: str, number: int, window: str = "") -> Response:
        return _picture(lambda: workspaces.frame(key, number, _window(window)))

    add_page(workspaces)
    ui.run_with(
        app,
        title="sam-gym",
        dark=True,
        tailwind=False,
        reconnect_timeout=_PATIENCE,
        show_welcome_message=False,
    )
    # A request has a few bytes around the file.
    bound = workspaces.max_upload + 2**16
    app.add_middleware(Guard, token=token, hosts=hosts, max_body=bound)
    return app


def _window(text: str) -> Window | None:
    """Return the window x0,y0,x1,y1; raises `ValueError` if it is none."""
    if not text:
        return None
    x0, y0, x1, y1 = map(int, text.split(","))
    return Window(x0, y0, x1, y1)


def _picture(read: Callable[[], bytes | None]) -> Response:
    """Answer with a JPEG, or that there is none."""
    try:
        data = read()
    except (ValueError, OSError):
        data = None
    if data is None:
        raise HTTPException(404)
    return Response(data, media_type="image/jpeg", headers={"cache-control": "private"})


def run_server(
    workspaces: Workspaces,
    listener: socket.socket,
    token: str | None,
    hosts: frozenset[str] | None,
) -> None:
    """Serve until the process is interrupted.

    Args:
        workspaces: of all tabs.
        listener: listening socket.
        token: see `Guard`.
        hosts: see `Guard`.
    """
    app = make_app(workspaces, token, hosts)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
    with warnings.catch_warnings():
        # NiceGUI looks for the server among all objects of the process. One of torch warns of that.
        warnings.filterwarnings("ignore", ".*torch.distributed.reduce_op", FutureWarning)
        uvicorn.Server(config).run(sockets=[listener])
