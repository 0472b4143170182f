"""Where in a picture the words of a prompt look: cross-attention maps of one denoising step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..attention.heat_maps import added_up
from ..attention.maps import attention_probabilities
from ..checks import check_whole
from ..errors import SeFiError, quoted
from ..stages import TRAINING_TIMESTEPS
from .base_model import (
    Block,
    cross_attention_layers,
    latent_format_of,
    model_sampling_of,
    training_sigmas,
    uncompiled,
)
from .clip.tokens import Tokens, check_clip, placeholders_in
from .clip.words import word_columns
from .unet.capture import PATCH, Layer, looking, previous_patch
from .unet.mixing import without_mixing
from .unet.sampling import uses_identities

Tensor = torch.Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Where words look, as :func:`attention_maps` found it."""

    layers: list[Tensor]
    """Of each layer the maps (words * latents, height, width), at the layer's own size."""
    size: tuple[int, int]
    """Height and width in pixels of the latents' pictures."""

    def together(self, size: tuple[int, int] | None = None) -> Tensor:
        """The sum of the layers, (words * latents, height, width), each map's highest value 1.

        ``size`` is another height and width than that of the latents' pictures.
        """
        return added_up(self.layers, size or self.size)


def attention_maps(
    model: ModelPatcher,
    clip: CLIP,
    latent: Mapping[str, Any],
    prompt: str,
    words: list[str],
    timestep: int,
    seed: int,
) -> AttentionMaps:
    """How much each place of the latents' pictures looks at each word of the prompt.

    The layers are those at half and a quarter of the latent's side. The latents are noised to
    ``timestep`` (0 to 999) with noise of ``seed``, and denoised by one step. A word's map is the
    probability of its tokens, added up, averaged over the heads. All maps of the first word come
    first. Raises :class:`SeFiError` if a word is not in the prompt, or the model, the CLIP or the
    latent cannot be used.
    """
    check_clip(clip)
    check_whole("timestep", timestep, 0, TRAINING_TIMESTEPS - 1)
    check_whole("seed", seed, 0, 2**64 - 1)
    tokens = clip.tokenize(prompt)
    if not uses_identities(model) and (names := sorted(placeholders_in(tokens))):
        raise SeFiError(
            f"model does not know <{names[0]}>, which is in the prompt: connect the MODEL of SeFi "
            "Apply Identity, as you did with its CLIP"
        )
    columns = {word: _columns(clip, tokens, word) for word in words}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    if samples.ndim != 4:
        raise SeFiError(
            f"latent has {samples.ndim} dimensions: connect the latent of a picture, not of a video"
        )
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise SeFiError(
            f"latent has {samples.shape[1]} channels and this model needs {channels}: connect the "
            "latent of a picture that was made with this model"
        )
    if 0 in samples.shape:
        raise SeFiError("latent is empty: connect a node that gives at least one latent")
    if not torch.isfinite(samples).all():
        raise SeFiError(
            "latent holds values that are not numbers (NaN): check the node that made it"
        )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    columns = _within(columns, conditioning[0][0].shape[1])
    recorder = Recorder(columns, len(samples))
    guider = comfy.samplers.CFGGuider(_recording(model, recorder, samples.shape[2]))
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    sigmas = torch.tensor([float(model_sampling_of(model).sigma_max), 0.0])
    noise = comfy.sample.prepare_noise(samples, seed)
    with uncompiled():
        guider.sample(noise, samples, OneStep(timestep), sigmas, seed=seed)
    if not recorder.maps:
        raise SeFiError(
            "model has no cross-attention at half or a quarter of the latent's size: use a "
            "Stable Diffusion 1.x, 2.x or SDXL model"
        )
    scale = latent_format_of(model).spacial_downscale_ratio
    height, width = samples.shape[-2:]
    return AttentionMaps(list(recorder.maps.values()), (scale * height, scale * width))


class Recorder:
    """Keeps where words look, in every layer that it is shown.

    ``columns`` maps a word to its tokens of the context; ``latents`` is their number.
    """

    def __init__(self, columns: dict[str, list[int]], latents: int) -> None:
        self.columns = columns
        self.latents = latents
        self.maps: dict[Block, Tensor] = {}
        """Block -> the maps of its layer, (words * latents, height, width)."""
        self.seen: dict[Block, int] = {}
        """Block -> parts of its attention that its maps have, -1 for all."""

    def look(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep the maps of a layer that has none; see :data:`capture.Look`.

        Guidance such as PAG and SAG asks the model again, for something it then leads away from.
        """
        seen = self.seen.setdefault(layer.block, 0)
        share = layer.share
        if seen != share.number:
            return
        self.seen[layer.block] = -1 if share.number + 1 == share.parts else seen + 1
        attention = attention_probabilities(q, k, layer.heads).mean(1) * share.of_queries
        # More rows than latents are the same prompt again, as the negative.
        attention = attention[: self.latents].unflatten(1, layer.size)
        maps = [attention[..., columns].sum(-1) for columns in self.columns.values()]
        found = torch.stack(maps).flatten(0, 1).float().cpu()
        self.maps[layer.block] = self.maps.get(layer.block, 0) + found


class OneStep(comfy.samplers.Sampler):
    """A sampler that denoises once, at a training timestep, and leaves the latent as it is."""

    def __init__(self, timestep: int) -> None:
        self.timestep = timestep

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        base = model_wrap.inner_model
        sigma = training_sigmas(base.model_sampling, base.model_config)[self.timestep].to(noise)
        noised = base.model_sampling.noise_scaling(sigma, noise, latent_image)
        model_wrap(noised, sigma.expand(len(noised)), **extra_args)
        return latent_image


def _recording(model: ModelPatcher, recorder: Recorder, height: int) -> ModelPatcher:
    """A clone of the MODEL whose cross-attention is recorded and otherwise what it was.

    Mixed attention computes the text's picture first, in which there is no identity.
    """
    clone = without_mixing(model)
    options = clone.model_options["transformer_options"]
    replaced = options.get("patches_replace", {}).get(PATCH, {})
    for block in cross_attention_layers(clone.model.diffusion_model):
        patch = looking(recorder.look, height, previous_patch(replaced, block))
        clone.set_model_attn2_replace(patch, *block)
    return clone


def _within(columns: Mapping[str, list[int]], length: int) -> dict[str, list[int]]:
    """The tokens that a context has: of SDXL's two texts it may end with the shorter one."""
    kept = {word: [one for one in places if one < length] for word, places in columns.items()}
    for word, places in kept.items():
        if not places:
            raise SeFiError(
                f"{quoted(word)} is cut off: it stands behind what both text encoders take; make "
                "the prompt shorter"
            )
    return kept


def _columns(clip: CLIP, tokens: Tokens, word: str) -> list[int]:
    is_placeholder = word.startswith("<") and word.endswith(">")
    if is_placeholder and not placeholders_in(clip.tokenize(word)):
        raise SeFiError(
            f"words: the CLIP does not know {word}: connect the MODEL and CLIP of SeFi Apply "
            "Identity"
        )
    return word_columns(clip, tokens, word)
