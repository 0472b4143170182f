"""The pack under the name ``sefi_ide``, without running its root ``__init__.py``, and the markers.

Tests write ``from sefi_ide.sefi_core.identity.identity import Identity``. The repository root
never goes on ``sys.path``: the pack's ``nodes`` package would hide ComfyUI's ``nodes.py``.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent

runpy.run_path(str(TESTS.parent / "tools" / "comfyui.py"))["name_the_pack"]()

SLOW = {
    "test_a_full_size_checkpoint_trains_without_a_second_unet",
    "test_a_minute_of_every_campaign",
    "test_another_prompt_draws_another_picture_without_training_again",
    "test_every_prompt_is_drawn_as_without_compilation",
    "test_known_prompts_cost_nothing",
    "test_settings_and_back_and_a_server_that_is_killed",
    "test_the_model_sees_a_smile_and_surprise_and_nothing_in_a_neutral_face",
    "test_unseen_people_are_learned_and_drawn_as_prompted",
}
"""Tests of more than ten seconds of one core, beside those that drive a browser."""


VARIANTS = ("family", "page")
"""Parameters of many tests: the model family, and how the frontend draws nodes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--variants=all``, as ``.ci/run`` has it."""
    parser.addoption(
        "--variants", choices=("turn", "all"), default="turn",
        help="whether each case has all families and renderers, or one of them, in turn (default)",
    )  # fmt: skip


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of cases that differ in their variants alone, the first, of the next ones the second, ..."""
    cases: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        variant = [parameters.pop(name, None) for name in VARIANTS]
        plain = item.nodeid if variant == [None, None] else item.nodeid.split("[")[0]
        key = plain, *(f"{name}={id(value)}" for name, value in sorted(parameters.items()))
        cases.setdefault(key, []).append(item)
    several = [same for same in cases.values() if len(same) > 1]
    left_out = {
        id(item)
        for turn, same in enumerate(several)
        for number, item in enumerate(same)
        if number != turn % len(same)
    }
    return [item for item in items if id(item) not in left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by its folder, and by what it takes; variants in turn unless all are asked."""
    asked_by_name = any("::" in argument for argument in config.args)
    if config.getoption("--variants") == "turn" and not asked_by_name:
        every = list(items)
        items[:] = in_turn(every)
        kept = set(items)
        config.hook.pytest_deselected(items=[item for item in every if item not in kept])
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        name = getattr(item, "originalname", item.name)  # without parameters
        if name in SLOW or "browser" in item.fixturenames:
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests one worker gets together.

    Those of the server, because they share what it has learned, and those of real photos, because
    they share what was found; the main job has a server of its own. All others go to whichever
    worker is free, one by one. xdist begins with the largest group, so that no worker ends long
    after the others. (Its own ``--dist loadgroup`` does nothing in pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if "photos/" in file:
                return "photos"
            if "server/" not in file:
                return nodeid
            return file if file.endswith("test_main_job.py") else "server"

    return Scheduling(config, log)
