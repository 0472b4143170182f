"""The pack under the name ``sefi_ide``, without running its root ``__init__.py``, and the markers.

Tests write ``from sefi_ide.sefi_core.identity.identity import Identity``. The repository root
never goes on ``sys.path``: the pack's ``nodes`` package would hide ComfyUI's ``nodes.py``.
"""

import runpy
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

runpy.run_path(str(TESTS.parent / "tools" / "comfyui.py"))["name_the_pack"]()

SLOW = {
    "test_unseen_people_are_learned_and_drawn_as_prompted",
}
"""Tests of more than ten seconds of one core, beside those that drive a browser."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, and by what it takes.

    Tests of the server stay together, file by file, because they share what a server has learned;
    all others go to whichever worker is free. The longest come first, so that no worker ends long
    after the others.
    """
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        if item.name in SLOW or "browser" in item.fixturenames:
            item.add_marker("slow")
        if item.path.parent.name == "server":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.parent.name != "server")
