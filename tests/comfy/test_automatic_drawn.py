"""Who is where, read from the attention of a model that draws people."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.unet import automatic
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy import composition
from sefi_ide.tests.mini_sd import world
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_two_people_of_the_drawn_world_get_their_sides(mini, caplog, monkeypatch):
    """People whom the text encoder knows by name, as identities; the caption says the places."""
    caplog.set_level("INFO")
    found = []
    divided = automatic.divided
    monkeypatch.setattr(
        automatic, "divided", lambda maps: (found.append(divided(maps)), found[-1])[1]
    )
    model, clip = mini.model, mini.clip
    for name, word in zip(("anna", "ben"), world.named_looks(), strict=False):
        rows = {key: one[None] for key, one in class_word_embedding(mini.clip, word).items()}
        one = Identity(name, "person", "sd1", rows, rows)
        model, clip = SeFiApplyIdentity.execute(model, clip, one, regions="automatic").result
    text = "a photo of <anna> on the left and <ben> on the right"
    latents = torch.randn(3, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(5))
    composition.World(model, clip, {}).sample(
        *(nodes.CLIPTextEncode().encode(clip, one)[0] for one in (text, "")), latents
    )
    assert len(found) == 3
    for shares in found:
        anna = shares[0]
        assert anna[:, :4].min() > 0.9 and anna[:, -4:].max() < 0.1
        assert 0.3 < anna.mean() < 0.7
    assert sum("<anna> and <ben> share the picture" in line for line in caplog.messages) == 1
