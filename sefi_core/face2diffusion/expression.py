"""Expressions as numbers, from a model that the user supplies (section 3.3 of Face2Diffusion).

The paper's numbers come from a 3-D face reconstructor, which is in no file that its authors have
published. Whoever has one exports it to ONNX with

- one input (1, 3, S, S), float32, S fixed: RGB in [0, 1]. With S = 112 it is the aligned face (see
  :mod:`faces.alignment`), with any other S the square around the head, upright or not;
- one output with the numbers that the mapping was trained with, 64 in the paper, in any shape.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SeFiError
from ..faces.crop import crop, head_square
from ..faces.face import Face
from ..onnx_sessions import import_onnxruntime, open_session
from .crops import aligned_face
from .networks import SIDE

logger = logging.getLogger(__name__)

LARGEST = 1024
"""Pixels of a model's input, at most."""


class ExpressionModel:
    """An ONNX model as described above.

    Raises :class:`SeFiError` if onnxruntime cannot be imported or the file is no such model.
    ``use_gpu`` False keeps onnxruntime on the CPU.
    """

    def __init__(self, path: Path, use_gpu: bool = True) -> None:
        self.path = path
        self._session = _open(path, use_gpu)
        (taken,) = self._session.get_inputs()
        self._input, self.side = taken.name, taken.shape[-1]

    def numbers(self, picture: torch.Tensor, face: Face) -> torch.Tensor:
        """The expression (numbers,) of a face in a picture (H, W, 3) in [0, 1].

        Raises :class:`SeFiError` when the model fails or gives what is no number.
        """
        if self.side == SIDE:
            seen = aligned_face(picture, face)
        else:
            square = head_square(face, 0, (picture.shape[0], picture.shape[1]))
            seen = crop(picture, square, self.side)
        planes = np.ascontiguousarray(seen.movedim(-1, 0)[None].numpy(), np.float32)
        try:
            (found,) = self._session.run(None, {self._input: planes})
            numbers = torch.from_numpy(np.array(found, np.float32).reshape(-1))
        except Exception as error:  # onnxruntime raises of many kinds
            raise _broken(self.path, error) from error
        if not torch.isfinite(numbers).all():
            raise _broken(self.path, "what it gives are no numbers")
        return numbers


def _open(path: Path, use_gpu: bool) -> Any:
    lacking = "expression cannot be read"
    onnxruntime = import_onnxruntime(lacking, ", or disconnect expression")
    try:
        session = open_session(onnxruntime, str(path), use_gpu)
    except Exception as error:
        raise _broken(path, error) from error
    shapes = [list(one.shape) for one in session.get_inputs()]
    side = shapes[0][-1] if shapes and shapes[0] else 0
    whole = isinstance(side, int) and 16 <= side <= LARGEST
    if len(shapes) != 1 or not whole or shapes[0][1:] != [3, side, side]:
        raise _broken(path, f"it takes {shapes} and not one picture (1, 3, S, S)")
    if len(session.get_outputs()) != 1:
        raise _broken(path, f"it has {len(session.get_outputs())} outputs and not one")
    logger.info("%s runs on onnxruntime's %s.", path.name, session.get_providers()[0])
    return session


def _broken(path: Path, error: object) -> SeFiError:
    return SeFiError(
        f"{path} cannot be used to read expressions ({str(error)[:200]}): put another file there, "
        "or disconnect expression"
    )
