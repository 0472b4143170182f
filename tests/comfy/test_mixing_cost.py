"""What mixed attention costs at Stable Diffusion's true shape: operations of one step, counted.

Nothing is computed, the U-Net is on the meta device; so the figures are the same on every machine.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from sefi_ide.sefi_core.comfyui.base_model import representative_layers
from sefi_ide.sefi_core.comfyui.unet.capture import looking
from sefi_ide.sefi_core.comfyui.unet.mixing_step import MixSettings, Step
from sefi_ide.sefi_core.comfyui.unet.places import Place
from sefi_ide.tests.comfy.full_shape import UNET_CONFIGS
from torch.utils.flop_counter import FlopCounterMode

TOKENS = 77
CELLS = {"sd1": 64, "sdxl": 128}
MOST = {"same": 1.7, "own": 2.2}
MEMORY = {"sd1": 23e6, "sdxl": 210e6}
"""Bytes of what is kept for one row, at two for a number."""


@pytest.fixture(scope="module", params=CELLS)
def shape(request):
    """A family's U-Net without weights, and the side of its latents."""
    config = UNET_CONFIGS[request.param]
    with torch.device("meta"):
        unet = UNetModel(**config, device="meta", operations=disable_weight_init)
    return SimpleNamespace(
        unet=unet, config=config, cells=CELLS[request.param], family=request.param
    )


def operations(shape, rows: int, step: Step | None = None) -> int:
    """Of a call with so many rows, the first of which is recorded or mixed."""
    width, cells = shape.config["context_dim"], shape.cells
    options = {
        "optimized_attention_override": lambda _, *args, **kw: attention_pytorch(*args, **kw)
    }
    if step is not None:
        found = [(0, Place(0, 0, cells, cells, 0, 0))]
        options["patches"] = {"attn1_patch": [step.patch(found, rows, {})]}
        if step.recording:
            look = step.looking(found, rows, lambda place: [4])
            of_layers = {block: looking(look, cells) for block in representative_layers(shape.unet)}
            options["patches_replace"] = {"attn2": of_layers}
    vectors = shape.config.get("adm_in_channels")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shape.unet(
            torch.empty(rows, 4, cells, cells, device="meta"),
            torch.empty(rows, device="meta"),
            context=torch.empty(rows, TOKENS, width, device="meta"),
            y=torch.empty(rows, vectors, device="meta") if vectors else None,
            control=None,
            transformer_options=options,
        )
    return counter.get_total_flops()


@pytest.mark.parametrize("trajectory", MOST)
def test_a_step_with_guidance(shape, trajectory):
    """The text's picture with its negative, the identity's, and with ``own`` its negative."""
    size = shape.cells, shape.cells
    settings = MixSettings(adain_keys=True, adain_values=True)
    nothing = torch.empty(1, 4, *size, device="meta")
    step = Step(settings, size, frozenset([0]), nothing, torch.ones(1))
    total = operations(shape, 2, step)
    kept = {id(one): one for pair in step._tokens.values() for one in pair}
    assert sum(2 * one.numel() for one in kept.values()) == pytest.approx(
        MEMORY[shape.family], rel=0.03
    )
    step.recording = False
    total += operations(shape, 1, step)
    if trajectory == "own":
        total += operations(shape, 1)
    ratio = total / operations(shape, 2)
    assert 1.5 < ratio <= MOST[trajectory]
