"""Models in ONNX files, which onnxruntime computes where it is installed."""

from __future__ import annotations

from typing import Any

from .errors import SeFiError

PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider")


def import_onnxruntime(lacking: str, otherwise: str = "") -> Any:
    """The module onnxruntime.

    Raises :class:`SeFiError` where it cannot be imported: ``lacking`` is what cannot be done
    without it, ``otherwise`` what there is to do but to install it.
    """
    try:
        import onnxruntime
    except Exception as error:  # a broken onnxruntime raises more than ImportError
        raise SeFiError(
            f"{lacking} without onnxruntime ({error}): run 'pip install onnxruntime' in ComfyUI's "
            f"Python{otherwise}"
        ) from error
    return onnxruntime


def providers(onnxruntime: Any, use_gpu: bool) -> list[str]:
    """The execution providers to try, the best first."""
    available = onnxruntime.get_available_providers() if use_gpu else []
    return [one for one in PROVIDERS if one in available] + ["CPUExecutionProvider"]


def open_session(onnxruntime: Any, model: str | bytes, use_gpu: bool) -> Any:
    """A session of a model, of a file's path or its content; raises what onnxruntime raises."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what it warns of is nothing that the user could mend
    return onnxruntime.InferenceSession(model, options, providers=providers(onnxruntime, use_gpu))
