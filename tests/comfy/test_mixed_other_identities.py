"""Mixed attention with the identities of other nodes."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from sefi_ide.sefi_core.comfyui.unet.adapter import BESIDE_KEY
from sefi_ide.sefi_core.comfyui.unet.text_version import Texts
from sefi_ide.tests.comfy.composition import SIDE, STEPS, TOLERANCE, VISIBLE, text_case
from sefi_ide.tests.comfy.mixing import (
    TRAJECTORIES,
    WORD,
    adapted,
    batches,
    difference,
    halves,
    mixed,
)
from sefi_ide.tests.comfy.random_checkpoint import of_all_families

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_all_families]

MASK = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(41))


@TRAJECTORIES
def test_the_identity_of_another_node(setting, trajectory):
    settings = {"identity": "other nodes", "face_mask": MASK}
    nothing = adapted(setting.plain, 0.0)
    drawn, calls = batches(
        nothing, lambda: text_case(WORD)(mixed(nothing, trajectory, **settings), setting.noise)
    )
    assert difference(drawn, text_case(WORD)(nothing, setting.noise)) < TOLERANCE
    assert calls == STEPS * {"own": [2, 1, 1], "same": [1, 1, 1]}[trajectory]
    world = adapted(setting.plain, 1.0)
    expected = text_case(WORD)(world, setting.noise)
    assert (
        difference(text_case(WORD)(mixed(world, trajectory, **settings), setting.noise), expected)
        > VISIBLE
    )
    assert difference(text_case(WORD)(mixed(world, trajectory), setting.noise), expected) == 0


def test_the_text_is_without_another_nodes_identity(setting):
    world = mixed(adapted(setting.plain, 1.0), identity="other nodes", face_hidden="off")
    _, both = halves(world, WORD, setting.noise, "euler")
    _, expected = halves(setting.plain, WORD, setting.noise, "euler")
    assert difference(both[1:], expected) < TOLERANCE


def test_what_is_taken_away_from_the_text(setting):
    """Attention beside the text's and to other contexts, of packs and of SeFi's face adapters."""
    guider = comfy.samplers.CFGGuider(setting.plain.model)
    guider.conds = {"positive": [], "negative": []}
    given = {
        BESIDE_KEY: ("an adapter",),
        "patches": {"attn1_patch": [1], "attn2_patch": [2], "attn2_output_patch": [3]},
        "patches_replace": {"attn1": {("middle", 0): 4}, "attn2": {("middle", 0): 5}},
        "sigmas": 6,
    }
    kept = {
        "patches": {"attn1_patch": [1]},
        "patches_replace": {"attn1": {("middle", 0): 4}},
        "sigmas": 6,
    }
    before = {name: dict(one) if isinstance(one, dict) else one for name, one in given.items()}
    assert Texts(guider, of_others=True).options(given) == kept
    assert Texts(guider, of_others=False).options(given) == given == before
