"""Short texts on the node that is running, where ComfyUI's own progress texts stand."""

from __future__ import annotations

import html
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ..errors import printable

REMEMBERED_NODES = 256

_BLANK = " "
"""What takes a text away: the frontend does not listen to an empty one."""


class _Place(NamedTuple):
    """A node of the workflow that somebody has queued."""

    client: str
    workflow: str
    node: str


class _Told(NamedTuple):
    prompt: str
    sentences: tuple[str, ...]


_told: OrderedDict[_Place, _Told] = OrderedDict()


def prompt_server() -> Any:
    """ComfyUI's server, or None in a program that has not started it."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def say(text: str) -> None:
    """Show a text, of one or more lines, on the node that is running.

    Only to who has queued it; nothing happens outside of a node, or without a server. The frontend
    draws it as HTML: ``text`` is plain, and is escaped here.
    """
    if place := _running():
        _send(place, text)


def warn(sentences: Sequence[str]) -> None:
    """Show what is wrong on the node that is running, beside what it has been warned of before.

    A node warns several times in one run, as it may encode several texts. A warning of a run before
    is taken away when there are no ``sentences`` any more.
    """
    place, context = _running(), get_executing_context()
    if place is None or context is None:
        return
    last = _told.pop(place, _Told("", ()))
    if last.prompt == context.prompt_id:
        sentences = list(dict.fromkeys([*last.sentences, *sentences]))
    if tuple(sentences) != last.sentences:
        _send(place, "\n".join(sentences) or _BLANK)
    if sentences:
        _told[place] = _Told(context.prompt_id, tuple(sentences))
        while len(_told) > REMEMBERED_NODES:
            _told.popitem(last=False)


def _running() -> _Place | None:
    context, server = get_executing_context(), prompt_server()
    client = getattr(server, "client_id", None)
    if context is None or not client:
        return None
    # A node that another one has put into the graph is not in the workflow.
    node = get_progress_state().dynprompt.get_display_node_id(context.node_id)
    return _Place(client, _workflow(server, context.prompt_id), node)


def _workflow(server: Any, prompt_id: str) -> str:
    """The id of the workflow that is running; nodes of different workflows have the same ids.

    "" for what is queued without one, and whatever a program has put into its place.
    """
    for _, running, _, found, *_ in server.prompt_queue.get_current_queue_volatile()[0]:
        if running == prompt_id:
            for key in ("extra_pnginfo", "workflow", "id"):
                found = found.get(key) if isinstance(found, dict) else None
            return str(found or "")
    return ""


def _send(place: _Place, text: str) -> None:
    lines = map(printable, text.split("\n"))
    prompt_server().send_progress_text(html.escape("\n".join(lines)), place.node, place.client)
