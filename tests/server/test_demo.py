"""``make demo FAMILY=sdxl``: a person is learned from one portrait and drawn as prompted."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.demo import OUTPUTS, WISHES


@pytest.mark.slow
def test_the_demo_of_sdxl():
    environment = {**os.environ, "FAMILY": "sdxl", "SEED": "1", "PHOTO": "", "CKPT": ""}
    ended = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    *lines, last = ended.stdout.splitlines()
    figures = json.loads(last)
    assert figures["images"] == len(WISHES) == 8
    assert figures["id_mean"] > 0.6 and figures["prompt_share"] > 0.7
    assert 0 < figures["id_p"] <= figures["id_mean"]
    assert figures["likeness"] is None and figures["prompt_score"] is None
    assert any(line.startswith("By the miniature's judges: ID 0.") for line in lines)
    folder = OUTPUTS["sdxl"]
    drawn = sorted(folder.glob("[0-9]_*.png"))
    assert len(drawn) == 8
    assert {Image.open(file).size for file in drawn} == {(128, 128)}
    assert (folder / "anna.safetensors").stat().st_size == figures["identity_bytes"]
    assert b"sdxl" in (folder / "anna.safetensors").read_bytes()
