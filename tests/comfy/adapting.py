"""What the tests of face adapters share; each module says which fixtures it takes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from sefi_ide.nodes.face_adapter import SeFiApplyFaceAdapter
from sefi_ide.sefi_core.comfyui.base_model import cross_attention_layers
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder, write_face_encoder
from sefi_ide.sefi_core.face_adapter.files import FACEID, Embedder
from sefi_ide.tests.comfy.adapter_oracle import Adapted, AdapterOracle, attentions
from sefi_ide.tests.comfy.composition import NEGATIVE, SCALE, SIDE, TOLERANCE, VISIBLE
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.vision import vision_model
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tests.unit.face_adapter_files import adapter_for

PLAIN = "a photo of a person, smiling"
PIXELS = 8 * SIDE
LEFT = torch.zeros(1, PIXELS, PIXELS)
LEFT[..., : PIXELS // 2] = 1
FEATHER = torch.linspace(1, 0, PIXELS).expand(1, PIXELS, PIXELS).clone()
STATES = 64
"""Of the random CLIP vision model."""


@pytest.fixture(scope="module")
def photos():
    """Three photos whose every place is another colour, and masks of a square in them."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(3, 40, 40, 3, generator=generator)
    masks = torch.zeros(3, 40, 40)
    masks[:, 4:36, 4:36] = 1
    return pictures, masks


@pytest.fixture
def embedder(encoder_folder):
    """A face recogniser of the pack's own in its folder, which looks at heads."""
    path = encoder_folder / "faces.safetensors"
    write_face_encoder(encoder_for("sd1", {"l": 8}, crop="head"), path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Embedder("sefi", path.name, 10, False, sha)


@pytest.fixture(scope="module")
def vision():
    return vision_model()


@pytest.fixture
def made(setting, family, embedder):
    """Makes a random adapter for the setting's model."""

    def make(variant=FACEID, **settings):
        layers = cross_attention_layers(setting.plain.model.model.diffusion_model).values()
        order = attentions(setting.plain.model.model.diffusion_model)
        assert len(order) == len(layers)
        context = order[0].to_k.weight.shape[1]
        channels = [layer.to_k.weight.shape[0] for layer in order]
        adapter = adapter_for(
            variant, family, channels, context, settings.pop("embedder", embedder),
            states=STATES, **settings,
        )  # fmt: skip
        return OpenedAdapter(adapter, "made.safetensors")

    return make


def apply(model, opened, both, count=1, **settings):
    pictures, masks = both
    given = {
        "model": model,
        "face_adapter": opened,
        "photos": pictures[:count],
        "masks": masks[:count],
        **settings,
    }
    return SeFiApplyFaceAdapter.execute(**{key: [value] for key, value in given.items()}).result[0]


def features(opened, photos, folder):
    """What the recogniser says of photos, computed apart."""
    encoder = read_face_encoder(folder / "faces.safetensors").encoder
    pictures, _ = photos
    squares = pictures[:, 4:36, 4:36].movedim(-1, 1)
    seen = torch.nn.functional.interpolate(
        squares, (112, 112), mode="bicubic", antialias=True, align_corners=False
    )
    return encoder(seen.clamp(0, 1) * 2 - 1)


@pytest.fixture
def oracle(setting, photos, encoder_folder, embedder):
    """Makes the oracle's view of adapters: (opened, faces or None, settings) each."""

    def make(*given, negative=NEGATIVE):
        adapted = []
        for opened, faces, states, settings in given:
            adapter = opened.adapter
            rows = features(opened, photos, encoder_folder)
            faces = rows[:1] if faces is None else faces(rows)
            two = torch.stack([faces, torch.zeros_like(faces)])
            with torch.inference_mode(False), torch.no_grad():
                tokens = adapter.projection(two.clone(), None if states is None else states.clone())
            adapted.append(
                Adapted(
                    tokens[0],
                    tokens[1],
                    [(one.to_k, one.to_v) for one in adapter.layers],
                    **settings,
                )  # fmt: skip
            )
        plain = setting.plain.model
        return AdapterOracle(plain, adapted=adapted, negative=[setting.prompt(negative)])

    return make


def draw(model, world, noise, text=PLAIN, negative=NEGATIVE, scale=SCALE):
    world = replace(world, model=model)
    return world.sample(world.encode(text), world.encode(negative), noise, scale)


def guidance(setting, text=PLAIN, negative=NEGATIVE):
    return cfg([Region(setting.prompt(text))], [Region(setting.prompt(negative))], SCALE)


def close(one, other, tolerance=TOLERANCE):
    assert float((one - other).abs().max() / other.std()) < tolerance


def differs(one, other, least=VISIBLE):
    assert float((one - other).abs().mean() / other.std()) > least
