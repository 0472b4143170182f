"""A custom node of the server that gives anything to any input, as switch nodes can."""

import torch

MODES = (
    "none", "text", "number", "nan", "huge", "list", "dict", "tensor", "tensor of five", "empty",
    "latent without samples", "object", "broken text",
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
            "\ud800\0\n",
        )  # fmt: skip
        return (dict(zip(MODES, values, strict=True))[what],)


NODE_CLASS_MAPPINGS = {"FuzzAnything": FuzzAnything}
