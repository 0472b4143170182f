"""SeFi Load and Apply Face Adapter, against an attention that is computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter
from sefi_ide.sefi_core.comfyui.unet.adapter import BESIDE_KEY
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    INFINITE_ID,
    PORTRAIT,
    UNNORM,
    VARIANTS,
    Layer,
)
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.tests.comfy import adapting
from sefi_ide.tests.comfy.adapting import FEATHER, LEFT, apply, close, differs, draw, guidance
from sefi_ide.tests.comfy.composition import VISIBLE
from sefi_ide.tests.comfy.random_checkpoint import of_all_families, of_families
from sefi_ide.tests.unit.face_drawing import drawn

pytestmark = pytest.mark.usefixtures("inference_mode")

photos, embedder, vision = adapting.photos, adapting.embedder, adapting.vision
made, oracle = adapting.made, adapting.oracle


def states_of(opened, vision, photos, detected=None):
    """What the random CLIP gives of no picture and of a face, computed apart."""
    mean = torch.tensor(vision.image_mean).expand(1, 224, 224, 3)
    faces = torch.cat([mean, detected])
    output = vision.encode_image(faces)
    last = opened.adapter.variant == INFINITE_ID
    states = output["last_hidden_state" if last else "penultimate_hidden_states"]
    return states[[1, 0]].float()


@of_all_families
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(setting, made, oracle, photos, vision, variant, encoder_folder):
    """Drawn as the oracle draws it, and not as without it."""
    opened = made(variant)
    extra, states = {}, None
    if opened.adapter.looks_at_pictures:  # which needs a face to align
        picture = torch.from_numpy(drawn(96))[None].float() / 255
        mask = torch.zeros(1, 96, 96)
        mask[:, 10:90, 10:90] = 1
        (face,) = YuNetDetector().detect(drawn(96))
        seen = torch.from_numpy(aligned(drawn(96), face.points, 224)).float()[None] / 255
        states = states_of(opened, vision, photos, seen)
        extra = {"clip_vision": vision, "photos": picture, "masks": mask}
        square = picture[:, 10:90, 10:90].movedim(-1, 1)
        encoder = read_face_encoder(encoder_folder / "faces.safetensors").encoder
        shown = torch.nn.functional.interpolate(
            square, (112, 112), mode="bicubic", antialias=True, align_corners=False
        )
        own = encoder(shown.clamp(0, 1) * 2 - 1)
    model = apply(setting.plain.model, opened, photos, **extra)
    knowing = oracle((opened, (lambda _: own) if states is not None else None, states, {}))
    expected = knowing.sample(setting.noise, setting.plain.sigmas(), guidance(setting))
    result = draw(model, setting.plain, setting.noise)
    close(result, expected)
    differs(result, draw(setting.plain.model, setting.plain, setting.noise))


@of_all_families
def test_each_weight_lands_on_its_block(setting, made, oracle, photos):
    """Adapters that act in one layer each, the middle's too."""
    whole = made().adapter
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    drawn_by = []
    for number in range(len(whole.layers)):
        layers = [
            layer if n == number else Layer(*(torch.zeros_like(one) for one in layer))
            for n, layer in enumerate(whole.layers)
        ]
        opened = OpenedAdapter(replace(whole, layers=layers), "one.safetensors")
        model = apply(setting.plain.model, opened, photos)
        result = draw(model, setting.plain, setting.noise)
        expected = oracle((opened, None, None, {})).sample(
            setting.noise, setting.plain.sigmas(), guidance(setting)
        )
        close(result, expected)
        differs(result, plain, 1e-5)
        drawn_by.append(result)
    assert len(drawn_by) == len(whole.layers) >= 5


@of_all_families
@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.4},
        {"strength": -1.0},
        {"text": False},
        {"start_percent": 0.3},
        {"end_percent": 0.5},
        {"region": FEATHER},
        {"region": LEFT[:, :, :50]},
        {"region": LEFT, "text": False, "strength": 0.7},
    ],
    ids=str,
)
def test_settings(setting, made, oracle, photos, settings):
    opened = made()
    model = apply(setting.plain.model, opened, photos, **settings)
    told = {key.removesuffix("_percent"): value for key, value in settings.items()}
    expected = oracle((opened, None, None, told)).sample(
        setting.noise, setting.plain.sigmas(), guidance(setting)
    )
    result = draw(model, setting.plain, setting.noise)
    close(result, expected)
    differs(result, draw(setting.plain.model, setting.plain, setting.noise))
    always = draw(apply(setting.plain.model, opened, photos), setting.plain, setting.noise)
    differs(result, always, VISIBLE / 10)


@of_families("sd1", "sdxl")
def test_nothing_is_drawn_bit_by_bit_at_strength_0_and_outside_the_range(setting, made, photos):
    opened = made(rank=2)
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    off = apply(setting.plain.model, opened, photos, strength=0.0)
    assert torch.equal(draw(off, setting.plain, setting.noise), plain)
    assert not off.patches and BESIDE_KEY not in off.model_options["transformer_options"]
    between = apply(setting.plain.model, made(), photos, start_percent=0.1, end_percent=0.3)
    assert torch.equal(draw(between, setting.plain, setting.noise), plain)  # no step is in it


@of_families("sd1")
@pytest.mark.parametrize(
    ("variant", "weights", "mean"),
    [
        (FACEID, "", lambda rows: rows.mean(0, keepdim=True)),
        (FACEID, "1, 0, 3", lambda rows: (rows[:1] + 3 * rows[2:]) / 4),
        (PORTRAIT, "", lambda rows: rows),
        (PORTRAIT, "1 1 2", lambda rows: (rows[:1] + rows[1:2] + 2 * rows[2:]) / 4),
        (UNNORM, "", lambda rows: rows),
    ],
)
def test_several_photos(setting, made, oracle, photos, variant, weights, mean):
    opened = made(variant)
    model = apply(setting.plain.model, opened, photos, 3, weights=weights)
    expected = oracle((opened, mean, None, {})).sample(
        setting.noise, setting.plain.sigmas(), guidance(setting)
    )
    close(draw(model, setting.plain, setting.noise), expected)


@of_families("sd1", "sdxl")
def test_upstream_is_untouched_and_runs_are_equal(setting, made, photos):
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    options = {**setting.plain.model.model_options["transformer_options"]}
    model = apply(setting.plain.model, made(rank=2), photos, region=FEATHER)
    kept = {**model.model_options["transformer_options"]}
    first = draw(model, setting.plain, setting.noise)
    assert torch.equal(draw(setting.plain.model, setting.plain, setting.noise), plain)
    assert torch.equal(draw(model, setting.plain, setting.noise), first)
    assert setting.plain.model.model_options["transformer_options"] == options
    assert model.model_options["transformer_options"] == kept
    assert not setting.plain.model.patches
