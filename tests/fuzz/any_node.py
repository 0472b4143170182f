"""Custom nodes of the server: one gives anything to any input, as switch nodes can; one gives a
CLIP vision model with a CLIP that understands it, which the miniature's does not."""

import importlib
import sys

import torch

MODES = (
    "none", "text", "number", "nan", "huge", "list", "dict", "tensor", "tensor of five", "empty",
    "latent without samples", "object", "broken text", "tuple",
)  # fmt: skip


class FuzzAnything:
    CATEGORY = "testing"
    RETURN_TYPES = ("*",)
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"what": (list(MODES),)}}

    def give(self, what):
        values = (
            None, "a text", 7, float("nan"), 2**70, [1, None], {"a": 1}, torch.zeros(3, 4),
            torch.zeros(1, 1, 8, 8, 3), torch.zeros(0, 64, 64, 3), {"samples": None}, object(),
            "\ud800\0\n", (0.5, None),
        )  # fmt: skip
        return (dict(zip(MODES, values, strict=True))[what],)


class FuzzVision:
    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP", "CLIP_VISION")
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def give(self, clip):
        pack = next(name for name in sys.modules if name.endswith("comfyui-sefi-ide"))
        vision = importlib.import_module(f"{pack}.tests.comfy.vision")
        model = vision.vision_model()
        return vision.taught(clip, model), model


NODE_CLASS_MAPPINGS = {"FuzzAnything": FuzzAnything, "FuzzVision": FuzzVision}
