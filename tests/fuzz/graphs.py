"""Random graphs of identities, conditioning nodes, LoRAs, guiders, samplers and schedulers.

None fails that does not fail without the pack; run again, a graph gives the same picture; and
identities of the class word give the picture without any.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced, nodes_perpneg
from sefi_ide.tests.comfy import random_checkpoint
from sefi_ide.tests.comfy.composition import (
    SIDE,
    World,
    apply,
    identity,
    random_latents,
    random_lora,
)

from ...sefi_core.identity.identity import Identity
from .campaign import NotTried

NAME = "graphs"
SECONDS = 120.0

TOLERANCE = 1e-4
"""Of the latents' standard deviation."""

CLASS_WORDS = {"anna": "person", "bob": "old man"}

TEXTS = (
    "", "a hat", "<anna>", "a photo of <anna>, smiling", "<anna> and <bob>", "(<anna>:1.3) in rain",
    "<anna> <anna>", "many words " * 40 + "<bob> at night", "<bob>, <anna>, a dog, <bob>",
    "portrait of <bob>", "((<bob>)), [x] <anna>.", "<nobody> beside <anna>",
)  # fmt: skip

SAMPLERS = tuple(
    name
    for name in comfy.samplers.KSampler.SAMPLERS
    if name != "dpm_adaptive"  # it takes as many steps as it likes
)
SCHEDULERS = tuple(comfy.samplers.SCHEDULER_NAMES)


@dataclass
class Base:
    """A checkpoint in this process; nothing changes it."""

    model: Any
    clip: Any
    lora: dict

    def identity(self, name: str, chance: random.Random | None) -> Identity:
        """A random one, or that of the class word."""
        if chance is None:
            return identity(self.clip, name, 3, 0, CLASS_WORDS[name], size=0.0)
        stages = chance.choice([1, 2, 5])
        return identity(self.clip, name, stages, chance.getrandbits(30), CLASS_WORDS[name])


class Graph:
    """One graph, built from ``chance`` alone: the same each time for the same seed."""

    def __init__(self, base: Base, seed: int, identities: str):
        """``identities`` is "random", "class word" or "none"."""
        self.chance = random.Random(seed)
        self.base, self.identities = base, identities

    def picture(self) -> torch.Tensor:
        model, clip = self.models()
        noise = random_latents(self.chance.choice([1, 1, 2]), self.chance.getrandbits(30))
        guider = self.guider(model, lambda: self.conditioning(clip))
        sampler = comfy.samplers.sampler_object(self.chance.choice(SAMPLERS))
        scheduler, steps = self.chance.choice(SCHEDULERS), self.chance.choice([2, 3])
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        return guider.sample(
            noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5
        )

    def models(self) -> tuple[Any, Any]:
        """MODEL and CLIP behind a few nodes in any order."""
        model, clip = self.base.model, self.base.clip
        nodes_in_a_row = [self.apply_node("anna"), self.apply_node("bob")]
        if self.chance.random() < 0.3:
            nodes_in_a_row.append(self.apply_node("anna"))
        for more in (self.lora, self.last_layer, self.discrete, self.rescaled):
            if self.chance.random() < 0.3:
                nodes_in_a_row.append(more())
        self.chance.shuffle(nodes_in_a_row)
        for node in nodes_in_a_row:
            model, clip = node(model, clip)
        return model, clip

    def apply_node(self, name: str) -> Callable:
        seed, strengths = self.chance.getrandbits(30), [self.chance.choice([0, 0.5, 1, 1, 1.5, -1])
                                                        for _ in "kv"]  # fmt: skip
        start, end = self.chance.choice(
            [(0.0, 1.0), (0.0, 1.0), (0.2, 1.0), (0.0, 0.6), (0.4, 0.41)]
        )
        if self.identities == "none":
            return lambda model, clip: (model, clip)
        chance = random.Random(seed) if self.identities == "random" else None
        one = self.base.identity(name, chance)
        return lambda model, clip: apply(model, clip, one, *strengths, start, end)

    def lora(self) -> Callable:
        strength = self.chance.choice([0.3, 1.0])
        lora = self.base.lora
        return lambda model, clip: comfy.sd.load_lora_for_models(
            model, clip, lora, strength, strength
        )

    def last_layer(self) -> Callable:
        layer = self.chance.choice([-1, -2])
        return lambda model, clip: (model, core().CLIPSetLastLayer().set_last_layer(clip, layer)[0])

    def discrete(self) -> Callable:
        kind, zsnr = self.chance.choice(["eps", "v_prediction", "lcm"]), self.chance.random() < 0.3
        node = nodes_model_advanced.ModelSamplingDiscrete()
        return lambda model, clip: (node.patch(model, kind, zsnr)[0], clip)

    def rescaled(self) -> Callable:
        node = nodes_model_advanced.RescaleCFG()
        return lambda model, clip: (node.patch(model, 0.7)[0], clip)

    def conditioning(self, clip: Any, depth: int = 0) -> list:
        if depth > 2 or self.chance.random() < 0.3:
            text = self.chance.choice(TEXTS)
            if self.identities == "none":
                for name, word in CLASS_WORDS.items():
                    text = text.replace(f"<{name}>", word)
            return core().CLIPTextEncode().encode(clip, text)[0]
        kind = self.chance.choice(("concat", "average", "combine", "combine", "area", "share",
                                   "strength", "mask", "range", "zero"))  # fmt: skip
        one = self.conditioning(clip, depth + 1)
        if kind in ("concat", "average", "combine"):
            other = self.conditioning(clip, depth + 1)
            if kind == "concat":
                return core().ConditioningConcat().concat(one, other)[0]
            if kind == "combine":
                return core().ConditioningCombine().combine(one, other)[0]
            share = self.chance.choice([0.0, 0.3, 1.0])
            return core().ConditioningAverage().addWeighted(one, other, share)[0]
        if kind == "area":
            x, y = (8 * self.chance.choice([0, 2, 4]) for _ in "xy")
            return core().ConditioningSetArea().append(one, 32, 32, x, y, 0.8)[0]
        if kind == "share":
            return core().ConditioningSetAreaPercentage().append(one, 0.5, 1.0, 0.5, 0.0, 1.0)[0]
        if kind == "strength":
            return core().ConditioningSetAreaStrength().append(one, 0.5)[0]
        if kind == "mask":
            mask = torch.zeros(1, 8 * SIDE, 8 * SIDE)
            mask[:, :, : 8 * self.chance.choice([2, 4, 8])] = 1
            area = self.chance.choice(["default", "mask bounds"])
            return core().ConditioningSetMask().append(one, mask, area, 1.0)[0]
        if kind == "range":
            start, end = self.chance.choice([(0.0, 1.0), (0.0, 0.5), (0.3, 1.0)])
            return core().ConditioningSetTimestepRange().set_range(one, start, end)[0]
        return core().ConditioningZeroOut().zero_out(one)[0]

    def guider(self, model: Any, conditioning: Callable[[], list]) -> Any:
        kind = self.chance.choice(["basic", "cfg", "cfg", "dual", "perpneg"])
        scale = self.chance.choice([1.0, 3.0])
        if kind == "basic":
            return nodes_custom_sampler.BasicGuider.execute(model, conditioning()).result[0]
        one, other = conditioning(), conditioning()
        if kind == "cfg":
            return nodes_custom_sampler.CFGGuider.execute(model, one, other, scale).result[0]
        if kind == "perpneg":
            return nodes_perpneg.PerpNegGuider.execute(
                model, one, other, conditioning(), scale, 0.8
            ).result[0]
        style = self.chance.choice(["regular", "nested"])
        return nodes_custom_sampler.DualCFGGuider.execute(
            model, one, other, conditioning(), scale, 2.0, style
        ).result[0]


def core() -> Any:
    """ComfyUI's own nodes."""
    import nodes

    return nodes


def load(folder: Path, family: str) -> Base:
    path = folder / f"{family}.safetensors"
    random_checkpoint.save(path, torch.float32, family=random_checkpoint.FAMILIES[family])
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)
    # In double precision a batch of two gives the numbers of two batches of one.
    model.model.diffusion_model.to(torch.float64).dtype = torch.float64
    return Base(model, clip, random_lora(World(model, clip)))


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    torch.set_num_threads(1)
    bases: dict[str, Base] = {}
    with tempfile.TemporaryDirectory(prefix="sefi-fuzz-") as folder, torch.inference_mode():

        def one_case(chance: random.Random) -> None:
            family = chance.choice(list(random_checkpoint.FAMILIES))
            if family not in bases:
                bases[family] = load(Path(folder), family)
            case(bases[family], chance)
            # Solvers of dpm_fast hold their MODEL in a circle, and ComfyUI keeps an entry of it for
            # good when its parents are gone with it, over which every loading collects garbage.
            loaded = comfy.model_management.current_loaded_models
            loaded[:] = [one for one in loaded if not one.is_dead()]

        yield one_case


def case(base: Base, chance: random.Random) -> None:
    seed = chance.getrandbits(60)
    try:
        plain = Graph(base, seed, "none").picture()
    except Exception as error:
        raise NotTried(str(error)) from error
    if not torch.isfinite(plain).all():
        raise NotTried("no picture without the pack either")
    found = Graph(base, seed, "random").picture()
    assert found.shape == plain.shape and torch.isfinite(found).all(), "no picture"
    again = Graph(base, seed, "random").picture()
    assert torch.equal(found, again), f"another picture: {float((found - again).abs().max())}"
    class_word = Graph(base, seed, "class word").picture()
    away = float((class_word - plain).abs().max()) / float(plain.std().clamp(min=1e-6))
    assert away < TOLERANCE, f"the class word's identity is {away:.2g} away from none"
