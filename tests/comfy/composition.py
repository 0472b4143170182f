"""What the tests of composition share: two worlds, the oracle, and how one case is judged.

Every case is sampled three times: by ComfyUI with the identity, by ComfyUI with the class word and
neither patched MODEL nor CLIP, and by the oracle. The first must equal the last and be visibly
different from the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.families import FAMILIES
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.comfy.oracle import Oracle, Person, Prompt, Region, cfg
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

import nodes

STEPS = 3
SIDE = 8  # latent cells
SCALE = 3.0
TEXT = "a photo of <anna>, smiling"
CHUNKS = "many words " * 45 + "and then <anna> " + "and more words " * 20
"""Three chunks; ComfyUI's pooled output is of the first, which is without the placeholder."""
NEGATIVE = "blurry, dark"
TOLERANCE = 1e-4
VISIBLE = 0.01  # of the latents' standard deviation, in the mean


@dataclass(eq=False)
class World:
    """A MODEL and a CLIP. Without people the class word is written instead of a placeholder."""

    model: object
    clip: object
    people: dict[str, Person] | None = None

    def encode(self, text: str):
        if self.people is None:
            text = text.replace("<anna>", "person").replace("<bob>", "person")
        return nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def sample(self, positive, negative, noise, scale=SCALE):
        return comfy.sample.sample(
            self.model, noise, STEPS, scale, "euler", "normal", positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip

    def sigmas(self):
        sampling = self.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)

    def guide(self, guider, noise):
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            self.sigmas(),
            disable_pbar=True,
            seed=0,
        )


def identity(
    clip, name: str, stages: int, seed: int, class_word: str = "person", size: float = 0.1
) -> Identity:
    """Random vectors about the class word's, ``size`` away, another pair for each stage."""
    generator = torch.Generator().manual_seed(seed)
    word = class_word_embedding(clip, class_word)
    keys, values = (
        {
            encoder: rows + size * torch.randn(stages, *rows.shape, generator=generator)
            for encoder, rows in word.items()
        }
        for _ in "kv"
    )
    return Identity(name, class_word, family_of_encoders(tuple(word)), keys, values)


def family_of_encoders(encoders: tuple[str, ...]) -> str:
    """The id of the family that has these text encoders."""
    return next(family.id for family in FAMILIES.values() if family.encoders == encoders)


def random_latents(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, LATENT_CHANNELS, SIDE, SIDE, generator=generator)


def apply(model, clip, identity, strength_k=1.0, strength_v=1.0, start=0.0, end=1.0):
    return SeFiApplyIdentity.execute(
        model, clip, identity, strength_k, strength_v, start, end
    ).result


def person(identity: Identity, **settings) -> Person:
    return Person(identity.class_word, identity.key_vectors, identity.value_vectors, **settings)


def setting(checkpoint: str) -> SimpleNamespace:
    """The plain world, the world in which anna (5 stages) and bob (3) are applied, the oracle."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(checkpoint, embedding_directory=None)
    # In double precision a batch of two gives the numbers of two batches of one.
    model.model.diffusion_model.to(torch.float64).dtype = torch.float64
    anna, bob = identity(clip, "anna", 5, seed=1), identity(clip, "bob", 3, seed=2)
    people = {"anna": person(anna), "bob": person(bob)}
    applied = World(*apply(*apply(model, clip, anna), bob), people)
    cache: dict[str, Prompt] = {}

    def prompt(text: str) -> Prompt:
        used = {name: one for name, one in people.items() if f"<{name}>" in text}
        return cache.setdefault(text, Prompt(clip, text, used))

    return SimpleNamespace(
        plain=World(model, clip),
        applied=applied,
        oracle=Oracle(model),
        prompt=prompt,
        anna=anna,
        bob=bob,
        noise=torch.randn(
            1, LATENT_CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3)
        ),
    )


def check(setting, case, guidance, *, noise=None, applied=None, plain=None, oracle=None):
    """Sample ``case`` with the identity and with the class word, ``guidance`` with the oracle."""
    noise = setting.noise if noise is None else noise
    applied, plain = applied or setting.applied, plain or setting.plain
    oracle = oracle or setting.oracle
    result = case(applied, noise)
    class_word = case(plain, noise)
    expected = oracle.sample(noise, plain.sigmas(), guidance)
    unit = float(expected.std())
    assert float((result - expected).abs().max()) / unit < TOLERANCE
    assert float((result - class_word).abs().mean()) / unit > VISIBLE
    return result


def text_case(text=TEXT, negative=NEGATIVE):
    def case(world, noise):
        return world.sample(world.encode(text), world.encode(negative), noise)

    return case


def text_guidance(setting, text=TEXT, negative=NEGATIVE):
    return cfg([Region(setting.prompt(text))], [Region(setting.prompt(negative))], SCALE)


def random_controlnet(unet_config):
    """A small random ControlNet of ComfyUI's own class, for a U-Net of this configuration."""
    config = dict(unet_config)
    del config["out_channels"], config["transformer_depth_output"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))


def random_lora(world: World, seed=5):
    """A random LoRA on the text encoders and one on the U-Net."""
    generator = torch.Generator().manual_seed(seed)
    names = comfy.lora.model_lora_keys_unet(world.model.model, {})
    names = comfy.lora.model_lora_keys_clip(world.clip.cond_stage_model, names)
    weights = {**world.model.model.state_dict(), **world.clip.cond_stage_model.state_dict()}
    changed = (
        "encoder.layers.1.mlp.fc1.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_v.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    )
    lora = {}
    for key in dict.fromkeys(names.values()):
        if isinstance(key, str) and key.endswith(changed):
            name = next(name for name, of in names.items() if of == key)
            size_out, size_in = weights[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator)
            lora[f"{name}.lora_down.weight"] = 0.1 * torch.randn(4, size_in, generator=generator)
    assert len(lora) >= 6
    return lora
