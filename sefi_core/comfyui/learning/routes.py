"""What the panel on SeFi Train Identity asks the server for; see :mod:`.live`."""

from __future__ import annotations

from typing import Any

from ..notices import prompt_server
from .live import PICTURES, LiveTraining, newest, of_workflow

STATE, PICTURE, STOP = "/sefi/training", "/sefi/training/picture", "/sefi/training/stop"


def register_routes() -> None:
    """Add the routes to ComfyUI's server, where there is one that does not have them yet."""
    server = prompt_server()
    if server is None or any(getattr(route, "path", "") == STATE for route in server.routes):
        return
    from aiohttp import web

    def refused(status: int, why: str) -> web.Response:
        return web.json_response({"error": why}, status=status)

    def asked_for(fields: Any) -> LiveTraining | None:
        return newest(str(fields.get("workflow", "")), str(fields.get("node", "")))

    @server.routes.get(STATE)
    async def state(request: web.Request) -> web.Response:
        """The training of a node; without ``node`` a list of all those of the workflow."""
        if "node" not in request.query:
            found = of_workflow(request.query.get("workflow", ""))
            return web.json_response([training.as_json() for training in found])
        training = asked_for(request.query)
        if training is None:
            return refused(404, "this node has not trained since ComfyUI was started")
        return web.json_response(training.as_json())

    @server.routes.get(PICTURE)
    async def picture(request: web.Request) -> web.Response:
        """The newest picture of that name; ``version`` only keeps browsers from showing an old."""
        training, name = asked_for(request.query), request.query.get("name", "")
        found = training.pictures.get(name) if training is not None else None
        if found is None:
            return refused(404, f"there is no such picture: name is one of {', '.join(PICTURES)}")
        headers = {"Cache-Control": "no-store"}
        return web.Response(body=found[1], content_type="image/jpeg", headers=headers)

    @server.routes.post(STOP)
    async def stop(request: web.Request) -> web.Response:
        try:
            fields = await request.json()
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            return refused(400, "send workflow, node and prompt_id as JSON")
        training = asked_for(fields)
        if training is None:
            return refused(409, "this node has not trained since ComfyUI was started")
        why_not = training.stop(str(fields.get("prompt_id", "")))
        return refused(409, why_not) if why_not else web.json_response({"stopping": True})
