"""The real frontend in headless Chromium; skipped where there is no Chromium or Chrome."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from sefi_ide.tools.comfyui import REPOSITORY

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chromium as root, without a graphics card, and quiet: it asks the network for nothing.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
SCREENSHOTS = REPOSITORY / "output" / "screenshots"


# Of a module, not of the session: as long as it runs, so does an event loop in this thread, and
# tests that follow in the same process could not run one of their own.
@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(params=["classic", "vue"])
def page(request, browser, server):
    """The frontend, with nodes drawn in either way; no script of it may fail."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.RightSidePanel.IsOpen": False,  # of a test before; it covers nodes
        "Comfy.VueNodes.Enabled": request.param == "vue",
    }
    server.post("/settings", settings)
    with browser.new_context(viewport={"width": 1800, "height": 1100}) as context:
        page = context.new_page()
        failures = []
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(server.url)
        yield page
    assert not failures


@pytest.fixture
def screenshot(request, page):
    """``screenshot(name)`` keeps a picture of the page in output/screenshots, to be looked at."""

    def take(name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        file = SCREENSHOTS / f"{name}-{request.node.callspec.params['page']}.png"
        page.screenshot(path=file)
        return file

    return take
