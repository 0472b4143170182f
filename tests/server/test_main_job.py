"""The command that measures the main job, on one person and two prompts.

The bars hold for eight people and twelve prompts and belong to ``make main-job``; here the command
has to measure, to say truly whether they are met, and to show that the training did something.
"""

import json
import os
import subprocess
import sys

from sefi_ide.tools.comfyui import REPOSITORY


def test_one_person_is_learned_and_measured_through_the_server():
    environment = {**os.environ, "SEED": "3", "IDENTITIES": "1", "PROMPTS": "2"}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.main_job"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ended.returncode in (0, 1), ended.stderr[-2000:]
    figures = json.loads(ended.stdout.splitlines()[-1])
    met = (
        figures["id"] >= figures["id_bar"]
        and figures["prompt_share"] >= figures["prompt_share_class"] - 0.10
    )
    assert met == (ended.returncode == 0)
    for name in ("id", "id_class", "id_renders"):
        assert -1 <= figures[name] <= 1
    assert figures["id_renders"] > figures["id_class"]
    assert figures["id"] != figures["id_class"]
