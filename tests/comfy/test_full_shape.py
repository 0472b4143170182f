"""Stable Diffusion 1.5 in its true shape, in a process of its own to measure its memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("full_shape.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_full_size_checkpoint_trains_without_a_second_unet():
    """The figures are printed as one JSON object; pytest -s shows them."""
    # Large blocks go back to the system when they are freed, so that only what is used counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=1200
    )
    assert run.returncode == 0, run.stderr[-4000:]
    figures = json.loads(run.stdout.splitlines()[-1])
    sys.stdout.write(json.dumps(figures) + "\n")

    assert figures["unet_parameters"] == 859_520_964
    assert figures["checkpoint_bytes"] > 2e9
    assert figures["widths"] == {"l": 768}
    assert len(figures["losses"]) == 2 and all(math.isfinite(loss) for loss in figures["losses"])
    assert figures["same_after_file"] and figures["finite"] and figures["difference"] > 0
    # The smallest second U-Net, one byte a parameter, would be 860 MB.
    assert figures["training_extra_bytes"] < 0.6 * figures["unet_parameters"]
