"""Sampling with identities, written a second time and as plainly as possible.

The oracle knows nothing of the code under test: it encodes every prompt of every stage by itself,
calls the plain U-Net once per latent and conditioning with batch size one, sets what the
cross-attention layers project to K and V by forward hooks on the two projections, weighs areas and
masks itself, and takes its own Euler steps. Everything is on the CPU in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import comfy.model_management
import numpy as np
import torch

LATENT_SCALE = 0.18215  # Stable Diffusion 1.x

Encoded = tuple[torch.Tensor, torch.Tensor]


def training_sigmas(zero_terminal_snr: bool = False) -> np.ndarray:
    """Sigmas (1000,) of Stable Diffusion's scaled-linear schedule, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    if zero_terminal_snr:
        roots = np.sqrt(alphas)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = roots**2
        alphas[-1] = 4.8973451890853435e-08  # ComfyUI's stand-in for infinite noise
    return np.sqrt((1 - alphas) / alphas)


def timestep_of(sigma: float, sigmas: np.ndarray | None = None) -> int:
    """The training timestep whose sigma is nearest."""
    sigmas = training_sigmas() if sigmas is None else sigmas
    return int(np.abs(np.log(sigmas) - math.log(sigma)).argmin())


class Texts(NamedTuple):
    """What K and V are projected from, (1, tokens, width) each, and the pooled output."""

    key: torch.Tensor
    value: torch.Tensor
    pooled: torch.Tensor


@dataclass
class Person:
    """The oracle's idea of an identity: token embeddings (stages, vectors, width) by encoder."""

    class_word: str
    keys: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    strength_k: float = 1.0
    strength_v: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def stage(self, timestep: int) -> int | None:
        """The stage at a training timestep, None where the person is not used."""
        if not (1 - self.end) * 999 <= timestep <= (1 - self.start) * 999:
            return None
        return len(next(iter(self.keys.values()))) * timestep // 1000


class Prompt:
    """A prompt such as ``"a photo of <anna>"``, encoded on demand for each stage."""

    def __init__(
        self, clip, text: str, people: dict[str, Person] | None = None, text_l: str | None = None
    ) -> None:
        self.people = people or {}
        self.clip = clip
        self.tokens = clip.tokenize(self._plain(text))
        self.names = dict.fromkeys(self.tokens, self._names(text))
        if text_l is not None:  # as SDXL's own text node does
            self.tokens["l"] = clip.tokenize(self._plain(text_l))["l"]
            self.names["l"] = self._names(text_l)
        self.words = {}
        for name, person in self.people.items():
            chunks = next(iter(clip.tokenize(person.class_word).values()))
            ids = [token for token, _ in chunks[0][1:]]
            self.words[name] = ids[: ids.index(49407)]  # up to the end token
        mean = {
            name: self._moved(
                name, {e: rows.mean(0) for e, rows in person.values.items()}, person.strength_v
            )
            for name, person in self.people.items()
        }
        self.base, self.pooled = self._encode(mean)
        """What leaves the CLIP: a textual inversion with the V vectors' mean over the stages."""
        self.cache: dict = {}

    def _names(self, text: str) -> list[str]:
        return [name for name in re.findall(r"<(\w+)>", text) if name in self.people]

    def _plain(self, text: str) -> str:
        for name, person in self.people.items():
            text = text.replace(f"<{name}>", person.class_word)
        return text

    def contexts(self, timestep: int, acting: Collection[str] | None = None) -> Texts:
        """What the U-Net gets at a training timestep, if only these people act."""
        stages = {
            name: person.stage(timestep) if acting is None or name in acting else None
            for name, person in self.people.items()
        }
        key = tuple(stages.values())
        if key not in self.cache:
            chosen: list[dict[str, dict[str, torch.Tensor]]] = [{}, {}]
            for name, stage in stages.items():
                person = self.people[name]
                if stage is None:
                    continue
                for vectors, rows, strength in (
                    (chosen[0], person.keys, person.strength_k),
                    (chosen[1], person.values, person.strength_v),
                ):
                    of_stage = {encoder: all_rows[stage] for encoder, all_rows in rows.items()}
                    vectors[name] = self._moved(name, of_stage, strength)
            value, pooled = self._encode(chosen[1])
            self.cache[key] = Texts(self._encode(chosen[0])[0], value, pooled)
        return self.cache[key]

    def _moved(
        self, name: str, rows: dict[str, torch.Tensor], strength: float
    ) -> dict[str, torch.Tensor]:
        """Token embeddings on the line from the class word's to a person's."""
        ids = torch.tensor(self.words[name])
        moved = {}
        for encoder, of_encoder in rows.items():
            model = getattr(self.clip.cond_stage_model, f"clip_{encoder}")
            word = model.transformer.get_input_embeddings()(ids)
            moved[encoder] = torch.lerp(word.float(), of_encoder, strength)
        return moved

    def _encode(self, vectors: dict[str, dict[str, torch.Tensor]]) -> Encoded:
        """Encode with the n-th class word of the prompt replaced by its person's vectors."""
        tokens = {encoder: self._put(encoder, vectors) for encoder in self.tokens}
        return self.clip.encode_from_tokens(tokens, return_pooled=True)

    def _put(self, encoder: str, vectors: dict[str, dict[str, torch.Tensor]]) -> list:
        """The tokens of one encoder with the vectors in the place of class words."""
        chunks = [[list(pair) for pair in chunk] for chunk in self.tokens[encoder]]
        flat = [pair for chunk in chunks for pair in chunk]
        names = list(self.names[encoder])
        position = 0
        while names and vectors:
            ids = self.words[names[0]]
            while [pair[0] for pair in flat[position : position + len(ids)]] != ids:
                position += 1
                assert position < len(flat), f"the class word of {names[0]} is not in the prompt"
            if names[0] in vectors:
                for offset in range(len(ids)):
                    flat[position + offset][0] = vectors[names[0]][encoder][offset]
            position += len(ids)
            names.pop(0)
        return [[tuple(pair) for pair in chunk] for chunk in chunks]


class Fixed:
    """A conditioning without a person: one context and pooled output for all timesteps."""

    def __init__(self, base: torch.Tensor, pooled: torch.Tensor) -> None:
        self.base, self.pooled = base, pooled

    def contexts(self, timestep: int) -> Texts:
        return Texts(self.base, self.base, self.pooled)


class Concatenated:
    """The prompts of ``parts`` behind one another, with the pooled output of the first."""

    def __init__(self, *parts) -> None:
        self.parts = parts
        self.base = torch.cat([part.base for part in parts], dim=1)
        self.pooled = parts[0].pooled

    def contexts(self, timestep: int) -> Texts:
        keys, values, pooled = zip(*(part.contexts(timestep) for part in self.parts), strict=True)
        return Texts(torch.cat(keys, dim=1), torch.cat(values, dim=1), pooled[0])


@dataclass
class Region:
    """A conditioning and where and when it holds. Area: (height, width, y, x) in latent cells."""

    prompt: Prompt | Fixed | Concatenated
    area: tuple[int, int, int, int] | None = None
    mask: torch.Tensor | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    control: object = None

    def weight(self, shape: torch.Size) -> torch.Tensor:
        """Its weight in every latent cell (height, width), feathered as ComfyUI's areas are."""
        height, width = shape[-2:]
        weight = torch.full((height, width), self.strength)
        if self.mask is not None:
            weight = weight * self.mask
        if self.area is None:
            return weight
        rows, columns, y, x = self.area
        inside = weight[y : y + rows, x : x + columns].clone()
        if self.mask is None:
            for size, start, limit, axis in ((rows, y, height, 0), (columns, x, width, 1)):
                feather = min(8, size // 4)
                ramp = torch.ones(size)
                for step in range(feather):
                    if start > 0:
                        ramp[step] *= (step + 1) / feather
                    if start + size < limit:
                        ramp[size - 1 - step] *= (step + 1) / feather
                inside = inside * (ramp[:, None] if axis == 0 else ramp[None, :])
        weight = torch.zeros(height, width)
        weight[y : y + rows, x : x + columns] = inside
        return weight


@dataclass
class Oracle:
    """A plain MODEL's U-Net. ``patcher`` has no identity; it may have LoRAs or other patches."""

    patcher: object
    tiles: int = 1
    """Columns that the U-Net is called on one by one."""

    def __post_init__(self) -> None:
        self.model = self.patcher.model
        self.sigmas = training_sigmas()

    def unet(
        self, x: torch.Tensor, sigma: float, region: Region, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Denoised latent for one latent (1, 4, height, width) and one conditioning.

        ``size`` is (height, width) of the whole picture in latent cells.
        """
        timestep = timestep_of(sigma, self.sigmas)
        pooled, attending = self.attention(region.prompt, timestep, x)
        height, width = size or x.shape[-2:]
        vectors = {}
        if self.model.adm_channels:
            vectors["y"] = vector_of(pooled, 8 * height, 8 * width).to(x)
        sigma = torch.tensor([sigma])
        options = {
            "patches_replace": self.patcher.model_options["transformer_options"].get(
                "patches_replace", {}
            ),
        }
        control = None
        if region.control is not None:
            conditioning = {"c_crossattn": region.prompt.base}
            if vectors:
                conditioning["y"] = vector_of(region.prompt.pooled, 8 * height, 8 * width).to(x)
            control = region.control.get_control(x, sigma, conditioning, 1, {})
        with attending:
            return self.model.apply_model(
                x,
                sigma,
                c_crossattn=region.prompt.base,
                control=control,
                transformer_options=options,
                **vectors,
            )

    def attention(
        self, prompt, timestep: int, x: torch.Tensor
    ) -> tuple[torch.Tensor, AbstractContextManager[None]]:
        """The pooled output, and what has the layers attend to the prompt."""
        key, value, pooled = prompt.contexts(timestep)
        return pooled, _projected_from(self.model.diffusion_model, key, value)

    def predict(self, x: torch.Tensor, sigma: float, regions: Sequence[Region]) -> torch.Tensor:
        """Denoised latents (batch, 4, height, width): the weighted mean of the regions."""
        percent = 1 - timestep_of(sigma, self.sigmas) / 999
        active = [region for region in regions if region.start <= percent <= region.end]
        outputs = []
        for latent in x.split(1):
            total, weights = torch.zeros_like(latent), torch.zeros_like(latent)
            for region in active:
                rows, columns, top, left = region.area or (*x.shape[2:], 0, 0)
                crop = latent[:, :, top : top + rows, left : left + columns]
                parts = [
                    self.unet(part, sigma, region, x.shape[-2:])
                    for part in crop.chunk(self.tiles, dim=3)
                ]
                output = torch.zeros_like(latent)
                output[:, :, top : top + rows, left : left + columns] = torch.cat(parts, dim=3)
                weight = region.weight(latent.shape)
                total += output * weight
                weights += weight
            outputs.append(total / weights)
        return torch.cat(outputs)

    def sample(
        self,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: Callable[[Callable[[Sequence[Region]], torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """Euler from pure noise. ``guidance`` combines the predictions of lists of regions."""
        comfy.model_management.load_models_gpu([self.patcher])
        steps = [float(sigma) for sigma in sigmas]
        x = noise * math.sqrt(1 + steps[0] ** 2)
        with torch.inference_mode():
            for sigma, following in zip(steps, steps[1:], strict=False):
                denoised = guidance(
                    lambda regions, x=x, sigma=sigma: self.predict(x, sigma, regions)
                )
                x = x + (x - denoised) / sigma * (following - sigma)
        return x / self.model.latent_format.scale_factor


def vector_of(
    pooled: torch.Tensor, height: int, width: int, target: tuple[int, int] | None = None
) -> torch.Tensor:
    """What SDXL gets beside the context: pooled output, size, cut and target size, (1, width)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    sizes = []
    for number in (height, width, 0, 0, *(target or (height, width))):
        angles = number * frequencies
        sizes += [angles.cos(), angles.sin()]
    return torch.cat([pooled, torch.cat(sizes)[None]], dim=1)


def cfg(
    positive: Sequence[Region], negative: Sequence[Region], scale: float
) -> Callable[[Callable[[Sequence[Region]], torch.Tensor]], torch.Tensor]:
    """Classifier-free guidance."""

    def guidance(predict):
        conditional, unconditional = predict(positive), predict(negative)
        return unconditional + scale * (conditional - unconditional)

    return guidance


@contextmanager
def _projected_from(unet: torch.nn.Module, key: torch.Tensor, value: torch.Tensor):
    """Feed ``key`` and ``value`` to the K and V projections of every cross-attention."""
    handles = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for projection, context in ((module.to_k, key), (module.to_v, value)):
                hook = partial(_replace_input, context)
                handles.append(projection.register_forward_pre_hook(hook))
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace_input(context: torch.Tensor, _: torch.nn.Module, arguments: tuple[torch.Tensor]):
    return (context.to(arguments[0].dtype),)
