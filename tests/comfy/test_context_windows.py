"""A prompt for each frame, sampled in windows of frames."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from sefi_ide.sefi_core.comfyui.unet.conditioning import REGISTRY
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    TOLERANCE,
    World,
    apply,
    identity,
    random_latents,
    text_guidance,
)

pytestmark = pytest.mark.usefixtures("inference_mode")

TEXTS = ("a photo of <anna>, frame {}", "a photo of person, frame {}", "<bob> at the sea, frame {}")


def windowed(world, length, overlap):
    model = ContextWindowsManualNode.execute(
        world.model, length, overlap, "standard_static", 1, False, "flat", 0, False
    ).result[0]
    return replace(world, model=model)


def frames(world, texts):
    """One conditioning with a row for each text; the parts are gone afterwards."""
    contexts = [world.encode(text)[0][0] for text in texts]
    return [[torch.cat(contexts), {"pooled_output": torch.zeros(len(texts), 128)}]]


def test_every_frame_is_its_own_prompts(setting):
    noise = random_latents(10, seed=31)
    texts = [TEXTS[number % 3].format(number) for number in range(len(noise))]
    world = windowed(setting.applied, 4, 1)
    drawn = world.sample(frames(world, texts), world.encode(NEGATIVE), noise)
    for row in (0, 3, 4, 5, 9):
        one = noise[row : row + 1]
        guidance = text_guidance(setting, texts[row])
        expected = setting.oracle.sample(one, setting.plain.sigmas(), guidance)
        assert float((drawn[row : row + 1] - expected).abs().max() / expected.std()) < TOLERANCE


def test_known_prompts_cost_nothing(mini_sd):
    """64 frames in windows, 400 prompts known: at most 1.05 of the time with none."""
    model, clip, _ = mini_sd
    applied = World(*apply(model, clip, identity(clip, "anna", 1, seed=1)), people={})
    plain = World(model, clip)
    noise = random_latents(64, seed=32)
    texts = [f"a photo of <anna>, frame {number}" for number in range(64)]
    cases = {world: (frames(world, texts), world.encode(NEGATIVE)) for world in (applied, plain)}
    others = [torch.randn(1, 77, 128) for _ in range(400 - len(texts))]
    for base in others:
        REGISTRY.add(base, {"names": "anna", "base": base.clone(), "phases": []})

    def seconds(world):
        begin = time.process_time()
        windowed(world, 16, 4).sample(*cases[world], noise)
        return time.process_time() - begin

    seconds(applied)
    pairs = [(seconds(applied), seconds(plain)) for _ in range(4)]
    ratio = min(one for one, _ in pairs) / min(other for _, other in pairs)
    assert len(REGISTRY) >= 400 and ratio <= 1.05
