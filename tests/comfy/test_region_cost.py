"""What regions cost at Stable Diffusion's true shape: operations of one step, counted.

Nothing is computed, the U-Net is on the meta device; so the figures are the same on every machine.
Times are for ``make bench-cost``.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from sefi_ide.sefi_core.attention.maps import attention_probabilities
from sefi_ide.sefi_core.comfyui.base_model import cross_attention_layers, representative_layers
from sefi_ide.sefi_core.comfyui.unet.automatic import Reader
from sefi_ide.sefi_core.comfyui.unet.blending import Blend, Blending
from sefi_ide.tests.comfy.full_shape import UNET_CONFIGS
from torch.utils.flop_counter import FlopCounterMode

TOKENS = 77
CELLS = {"sd1": 64, "sdxl": 128}
MOST = 1.05
READ = 0.1
"""Of the steps, in which it is read who is where."""


@pytest.fixture(scope="module", params=CELLS)
def shape(request):
    """A family's U-Net without weights, and the side of its latents."""
    config = UNET_CONFIGS[request.param]
    with torch.device("meta"):
        unet = UNetModel(**config, device="meta", operations=disable_weight_init)
    return SimpleNamespace(unet=unet, config=config, cells=CELLS[request.param])


def operations(shape, shares: torch.Tensor | None = None, reader: Reader | None = None) -> int:
    """Of one step with guidance; ``shares`` (parts, cells, cells) are of the positive row."""
    width, cells = shape.config["context_dim"], shape.cells
    options = {
        "optimized_attention_override": lambda _, *args, **kw: attention_pytorch(*args, **kw)
    }
    contexts = torch.empty(2, TOKENS, width, device="meta")
    if shares is not None or reader is not None:
        blending = Blending(reader, cells)
        blending.own, given = True, contexts
        if shares is not None:
            parts = len(shares)
            of_rows = torch.zeros(parts, 2, cells, cells)
            of_rows[:, 0], of_rows[0, 1] = shares, 1.0
            indices = torch.zeros(parts, 2, dtype=torch.long)
            indices[:, 0], indices[:, 1] = torch.arange(parts), parts
            blending.blend = Blend(of_rows, indices, parts + 1)
            given = torch.empty(1, TOKENS * (parts + 1), width, device="meta")
        read = representative_layers(shape.unet)
        options["patches"] = {"attn2_patch": [lambda q, k, v, _: (q, given, given)]}
        options["patches_replace"] = {
            "attn2": {
                block: blending.attend(None, block in read)
                for block in cross_attention_layers(shape.unet)
            }
        }
    vectors = shape.config.get("adm_in_channels")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shape.unet(
            torch.empty(2, 4, cells, cells, device="meta"),
            torch.empty(2, device="meta"),
            context=contexts,
            y=torch.empty(2, vectors, device="meta") if vectors else None,
            control=None,
            transformer_options=options,
        )
    return counter.get_total_flops()


def halves(cells: int) -> torch.Tensor:
    left = torch.linspace(8, -8, cells).sigmoid()
    left = torch.where(left < 0.01, 0.0, torch.where(left > 0.99, 1.0, left)).expand(cells, cells)
    return torch.stack([left, 1 - left])


def two_and_the_outside(cells: int) -> torch.Tensor:
    parts = torch.zeros(3, cells, cells)
    parts[0, :, : cells * 3 // 8] = parts[1, :, cells * 9 // 16 :] = 1
    parts[2] = 1 - parts.sum(0)
    return parts


def test_regions_of_two_people_cost_next_to_nothing(shape):
    plain = operations(shape)
    for shares in (halves(shape.cells), two_and_the_outside(shape.cells)):
        assert 1.0 < operations(shape, shares) / plain < 1.01 < MOST
    # Where all meet everywhere each query asks twice, and still.
    assert operations(shape, torch.full((2, shape.cells, shape.cells), 0.5)) / plain < MOST


def test_reading_who_is_where_costs_next_to_nothing(shape, monkeypatch):
    """A step that reads against one that does not, and a whole sampling."""
    read = []
    monkeypatch.setattr(
        "sefi_ide.sefi_core.comfyui.unet.automatic.attention_probabilities",
        lambda *args: (read.append(1), attention_probabilities(*args))[1],
    )
    wanted = SimpleNamespace(
        row=0,
        columns=[[4], [6]],
        place=SimpleNamespace(height=shape.cells, width=shape.cells, top=0, left=0),
        reading=SimpleNamespace(sum=torch.zeros(2, shape.cells, shape.cells, device="meta")),
    )
    reader = Reader([wanted], 2, (shape.cells, shape.cells))
    plain = operations(shape)
    reading = operations(shape, reader=reader) / plain
    assert len(read) >= 7
    assert 1.0 < reading < MOST
    assert READ * reading + (1 - READ) * operations(shape, halves(shape.cells)) / plain < 1.01
