"""Apply an identity to a MODEL and a CLIP, as a LoRA loader applies a LoRA."""

from __future__ import annotations

import logging

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..errors import SeFiError
from .base_model import family_of, is_refiner
from .clip.encoder import Applied, apply_to_clip
from .clip.tokens import check_clip, token_widths, with_placeholders
from .unet.sampling import apply_to_model

logger = logging.getLogger(__name__)


def apply_identity(
    model: ModelPatcher, clip: CLIP | None, applied: Applied
) -> tuple[ModelPatcher, CLIP]:
    """Clones of MODEL and CLIP that know the identity's placeholder.

    To SDXL's refiner, which sees half of the text only, an identity of SDXL is its class word.
    Raises :class:`SeFiError` if the identity is for another kind of model, its range is empty or
    there is no CLIP.
    """
    clip = check_clip(clip)
    if is_refiner(model) and applied.identity.family == "sdxl":
        logger.info(
            "SeFi Apply Identity: %s is its class word to SDXL's refiner.",
            applied.identity.placeholder,
        )
        return model, with_placeholders(clip, [applied.identity])
    applied.identity.check_fits(family_of(model), token_widths(clip))
    if applied.start_percent >= applied.end_percent:
        raise SeFiError(
            f"the range of {applied.identity.placeholder} is empty, start_percent "
            f"{applied.start_percent:g} to end_percent {applied.end_percent:g}: set end_percent "
            "above start_percent"
        )
    return apply_to_model(model), apply_to_clip(clip, applied)
