"""ComfyUI's loaded Stable Diffusion as the training loop sees it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...attention.maps import attend, attention_probabilities, key_probabilities
from ...errors import SeFiError
from ...identity.identity import Identity
from ...learning.loop import Batch, Prediction, first_loss_scale
from ...learning.losses import MapPair
from ...learning.parametrisation import Vectors
from ...learning.settings import TORCH_DTYPES
from ...stages import stage_of_timestep
from ...text.captions import with_caption
from ...text.placeholders import expand_template
from ..base_model import Block, latent_format_of, representative_layers, training_sigmas
from ..clip.embeddings import position_embeddings
from ..clip.tokens import (
    Embeddings,
    PositionFree,
    Tokens,
    encoder_models,
    substitute,
    with_placeholders,
)
from ..unet.capture import PATCH, Layer, looking
from .encoded import Encoded, Rows, Texts, placeholder_tokens, rows_of, stacked, texts_of
from .memory import memory_of_a_step

logger = logging.getLogger(__name__)

REFERENCE_BYTES = 2**30
"""Of prompts with the class word that are kept, so that none is encoded twice."""


def private_clone(model: ModelPatcher) -> ModelPatcher:
    """A clone with the weights (LoRA included) and the sampling type of ``model``, and no patches.

    Attention, CFG and function patches of other nodes are for sampling; the identity would learn
    to make up for them.
    """
    clone = model.clone()
    options = clone.model_options.get("transformer_options", {})
    dropped = sorted(key for key in options if options[key])
    dropped += sorted(key for key in clone.model_options if key not in ("transformer_options",))
    dropped += sorted(key for key, value in clone.wrappers.items() if value)
    if dropped:
        logger.info("SeFi Train Identity leaves out patches of the MODEL: %s.", ", ".join(dropped))
    clone.model_options = {"transformer_options": {}}
    clone.wrappers, clone.callbacks = {}, {}
    return clone


class ComfyDenoiser:
    """Noised latents in, the U-Net's output and attention maps out.

    ``latents`` (N, C, h, w) are what the U-Net is trained on, ``masks`` (N, 1, H, W) the faces in
    them or None, ``captions`` (N) what else each of them shows, ``sides`` (N) how many pixels the
    side of each was in its photo, which SDXL is told; by default as many as now. ``identities`` say
    which placeholders stand for which class words, and ``people`` (N) who of them each latent
    shows; by default the first. ``checkpointing`` says how it will be used inside
    :func:`differentiable.differentiable`, and so how much memory to ask for. ``class_guided`` asks
    for :attr:`Prediction.background`. The reference of the attention maps is the class word's
    prompt, or that with the embeddings ``reference``, by text encoder (vectors, width).
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        identities: Sequence[Identity],
        templates: Sequence[str],
        latents: torch.Tensor,
        masks: torch.Tensor | None,
        captions: Sequence[str] | None = None,
        sides: Sequence[int] | None = None,
        dtype: str = "auto",
        checkpointing: bool = False,
        with_maps: bool = True,
        people: Sequence[int] | None = None,
        class_guided: bool = False,
        reference: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        for name, patcher in (("model", model), ("clip", clip.patcher)):
            if patcher.injections:
                raise SeFiError(
                    f"{name} has a LoRA in bypass mode, or something else that is injected into "
                    "its layers, whose gradients cannot be followed: load the LoRA with Load LoRA, "
                    "or leave that node out"
                )
        self.model = private_clone(model)
        self.clip = with_placeholders(clip, identities)
        # Each encoding asks for it; see load().
        self.clip.load_model = partial(_load_if_needed, self.clip.patcher)
        self.names = [identity.name for identity in identities]
        positions = {}
        if any(identity.position_free for identity in identities):
            positions = {
                name: position_embeddings(encoder) for name, encoder in encoder_models(clip).items()
            }
        self.positions = [positions if one.position_free else {} for one in identities]
        self.people = people or [0] * len(latents)
        self.class_guided, self.reference = class_guided, reference
        self.latents, self.masks = latents, masks
        scale = latent_format_of(model).spacial_downscale_ratio
        self.sides = sides or [latents.shape[-1] * scale] * len(latents)
        self.with_maps = with_maps
        self.checkpointing = checkpointing
        self.room, self.loaded = 0, []
        self.load(1)  # puts the clone's object patches in force, such as another sampling type
        captions = captions or [""] * len(latents)
        distinct = list(dict.fromkeys(captions))
        self.captions = [distinct.index(caption) for caption in captions]
        self.templates, self.distinct_captions = len(templates), len(distinct)
        self.prompts = [
            self.clip.tokenize(with_caption(expand_template(template, name), caption))
            for name in self.names
            for caption in distinct
            for template in templates
        ]
        base = self.model.model
        self.dtype = TORCH_DTYPES.get(dtype, base.get_dtype_inference())
        self.sampling = base.model_sampling
        self.sigmas = training_sigmas(self.sampling, base.model_config)
        self.layers = representative_layers(base.diffusion_model)
        self.references: dict[int, Encoded] = {}
        self.map_references: dict[int, torch.Tensor] = {}
        self.reference_keys: dict[tuple[int, Block], torch.Tensor] = {}

    @property
    def samples(self) -> int:
        """Number of training latents."""
        return len(self.latents)

    @property
    def loss_scale(self) -> float:
        """What keeps the gradients of the U-Net's precision above underflow."""
        return first_loss_scale(self.dtype)

    def load(self, samples: int) -> None:
        """Have ComfyUI load both models, with room for so many samples at once.

        Where nothing was loaded or unloaded since the last time, nothing is done: in dynamic VRAM
        every module would be prepared again, and ComfyUI keeps some objects of every call as long
        as the models that ours are clones of.
        """
        if samples == self.room and _loaded_now() == self.loaded:
            return
        patchers = [self.model, self.clip.patcher]
        shape = (samples, *self.latents.shape[1:])
        needed = memory_of_a_step(self.model, shape, self.checkpointing)
        with torch.inference_mode():  # as in any node, so that the weights stay what they were
            comfy.model_management.load_models_gpu(patchers, memory_required=needed)
        self.room, self.loaded = samples, _loaded_now()

    def __call__(self, keys: Vectors, values: Vectors, batch: Batch) -> Prediction:
        """See :class:`loop.Denoiser`: all samples with vectors of the same identity."""
        count = len(next(iter(keys.values())))
        stages = [stage_of_timestep(timestep, count) for timestep in batch.timesteps]
        of_stage = {stage: rows_of(keys, values, stage) for stage in set(stages)}
        return self.predict([of_stage[stage] for stage in stages], batch)

    def predict(self, rows: Sequence[Rows], *batches: Batch) -> Prediction:
        """What the U-Net makes of a batch, each sample with token embeddings of its own.

        Several batches are computed as one, each with the noise that it would have alone.
        """
        samples, prompts = self._rows_of(batches)
        # Before the U-Net is loaded: with --disable-smart-memory ComfyUI unloads it to encode.
        if self.with_maps or self.class_guided:
            self._encode_references(prompts)
        text = self._texts(rows, prompts)
        noised = self._noised(samples, batches)
        recorder = _Recorder(
            self, prompts, text.values.to(noised.latents.device, self.dtype), noised.height
        )
        output = self._output(text, noised, samples, recorder.options())
        background = None
        if self.class_guided:
            with torch.no_grad():
                plain = self._reference_texts(prompts)
                background = self._output(plain, noised, samples, PLAIN_OPTIONS)
        layers = recorder.pairs
        recorder.pairs = deque(maxlen=0)  # gradient checkpointing would record again
        return Prediction(
            output=output,
            target=self._target(noised),
            layers=list(layers),
            placeholder=self._placeholders(prompts, text.keys.shape[1]).to(output.device),
            face=None if self.masks is None else self.masks[samples].to(output.device),
            background=background,
        )

    def predict_class_word(
        self, options: dict[str, Any], *batches: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and target (B, C, h, w) with the class word in each prompt.

        ``options`` are more ``transformer_options`` for the U-Net.
        """
        samples, prompts = self._rows_of(batches)
        self._encode_references(prompts)
        text = self._reference_texts(prompts)
        noised = self._noised(samples, batches)
        output = self._output(text, noised, samples, {**PLAIN_OPTIONS, **options})
        return output, self._target(noised)

    def _rows_of(self, batches: Sequence[Batch]) -> tuple[list[int], list[int]]:
        """The samples of batches, and the numbers of their prompts."""
        samples = [sample for batch in batches for sample in batch.samples]
        templates = [template for batch in batches for template in batch.templates]
        return samples, list(map(self._prompt_of, samples, templates))

    def _noised(self, samples: Sequence[int], batches: Sequence[Batch]) -> _Noised:
        """The latents of batches with their noise, and the U-Net loaded."""
        self.load(len(samples))
        device = self.model.load_device
        latents = self.latents[samples].to(device, torch.float32)
        noise = torch.cat([self._noise(batch) for batch in batches]).to(device)
        timesteps = [timestep for batch in batches for timestep in batch.timesteps]
        sigma = self.sigmas[timesteps].to(device, torch.float32)
        return _Noised(latents, sigma, self.sampling.noise_scaling(sigma, noise, latents))

    def _target(self, noised: _Noised) -> torch.Tensor:
        """What the U-Net's output should be: that which would denoise to the latent.

        The denoised latent is linear in the output, whether that is noise or velocity.
        """
        latents, sigma, x = noised
        zeros = torch.zeros_like(x)
        gain = self.sampling.calculate_denoised(sigma, torch.ones_like(x), zeros)
        return (latents - self.sampling.calculate_denoised(sigma, zeros, x)) / gain

    def _output(
        self,
        text: Texts,
        noised: _Noised,
        samples: Sequence[int],
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The U-Net's output (B, C, h, w), float32."""
        return self.model.model.diffusion_model(
            self.sampling.calculate_input(noised.sigma, noised.x).to(self.dtype),
            self.sampling.timestep(noised.sigma).float(),
            control=None,
            transformer_options=dict(options),
            **self._conditions(text, noised.x, samples),
        ).float()

    def _noise(self, batch: Batch) -> torch.Tensor:
        """The noise (B, C, h, w) of a batch."""
        shape = len(batch.samples), *self.latents.shape[1:]
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch.noise_seed))

    def reference_key(self, prompt: int, block: Block) -> torch.Tensor:
        """A layer's keys (1, tokens, channels) of a prompt's reference, computed once."""
        if (prompt, block) not in self.reference_keys:
            with torch.no_grad():
                context = self.map_references[prompt].to(self.model.load_device, self.dtype)
                to_k = self.layers[block].get_submodule("to_k")
                self.reference_keys[prompt, block] = to_k(context)
        return self.reference_keys[prompt, block]

    def _prompt_of(self, sample: int, template: int) -> int:
        """The number of a sample's prompt: people, for each the captions, for each templates."""
        number = self.people[sample] * self.distinct_captions + self.captions[sample]
        return number * self.templates + template

    def _placeholders(self, prompts: Sequence[int], length: int) -> torch.Tensor:
        """1 for the placeholder's tokens of these prompts, (B, length), as contexts are stacked."""
        rows = [placeholder_tokens(self.prompts[prompt]) for prompt in prompts]
        return stacked(rows, length)[..., 0]

    @torch.no_grad()
    def _encode_references(self, prompts: Sequence[int]) -> None:
        """Encode prompts with the class word, and for the maps, those that were not yet.

        Earlier ones are forgotten where they take too much room.
        """
        kept = (context.nbytes for context, _ in self.references.values())
        if sum(kept) > REFERENCE_BYTES:  # a data set may have a caption for each photo
            self.references.clear()
            self.map_references.clear()
        for prompt in prompts:
            if prompt not in self.references:
                tokens = substitute(self.prompts[prompt], dict.fromkeys(self.names))
                self.references[prompt] = self._encode(tokens)
                context, _ = self.references[prompt]
                if self.reference is not None and self.with_maps:
                    context, _ = self._encode_with(self.reference, prompt)
                self.map_references[prompt] = context

    def _reference_texts(self, prompts: Sequence[int]) -> Texts:
        """These prompts with the class word."""
        encoded = [self.references[prompt] for prompt in prompts]
        return texts_of(encoded, encoded)

    def _texts(self, rows: Sequence[Rows], prompts: Sequence[int]) -> Texts:
        """What the samples' prompts are encoded to.

        Each prompt in a pass of its own, as while sampling, so that each has its pooled output.
        """
        keys, values = [], []
        for (key, value), prompt in zip(rows, prompts, strict=True):
            keys.append(self._encode_with(key, prompt))
            values.append(keys[-1] if value is key else self._encode_with(value, prompt))
        return texts_of(keys, values)

    def _encode_with(self, rows: Mapping[str, torch.Tensor], prompt: int) -> Encoded:
        """A prompt with these embeddings in the place of its placeholder."""
        person = prompt // (self.distinct_captions * self.templates)
        put_in: dict[str, Embeddings] = dict(rows)
        if self.positions[person]:
            positions = self.positions[person]
            put_in = {name: PositionFree(row, positions[name]) for name, row in rows.items()}
        return self._encode(substitute(self.prompts[prompt], {self.names[person]: put_in}))

    def _encode(self, tokens: Tokens) -> Encoded:
        """The context (1, tokens, width) and the pooled output (1, width) of a prompt."""
        encoded: Any = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return encoded

    def _conditions(
        self, text: Texts, noised: torch.Tensor, samples: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """What the U-Net is conditioned on, as ComfyUI's model makes it of each sample's prompt.

        SDXL is told two sizes: that of the square in the photo, and the one it was resized to.
        """
        scale = latent_format_of(self.model).spacial_downscale_ratio
        made: dict[str, list[torch.Tensor]] = {}
        for row, sample in enumerate(samples):
            one = slice(row, row + 1)
            conditions = self.model.model.extra_conds(
                cross_attn=text.keys[one],
                pooled_output=None if text.pooled is None else text.pooled[one],
                noise=noised[one],
                device=noised.device,
                width=self.sides[sample],
                height=self.sides[sample],
                target_width=noised.shape[-1] * scale,
                target_height=noised.shape[-2] * scale,
                prompt_type="positive",
            )
            for name, condition in conditions.items():
                made.setdefault(name, []).append(condition.process_cond(1, area=None).cond)
        made["context"] = made.pop("c_crossattn")
        return {name: torch.cat(rows).to(noised.device, self.dtype) for name, rows in made.items()}


class _Noised(NamedTuple):
    """``latents`` (B, C, h, w), the noise level ``sigma`` (B,) of each, and with noise ``x``."""

    latents: torch.Tensor
    sigma: torch.Tensor
    x: torch.Tensor

    @property
    def height(self) -> int:
        """Of the latents, in cells."""
        return self.latents.shape[-2]


class _Recorder:
    """The attention patches of one forward pass of the training.

    ``prompts`` are the numbers of the samples' prompts, ``height`` is that of the latents.
    """

    def __init__(
        self,
        denoiser: ComfyDenoiser,
        prompts: Sequence[int],
        context_v: torch.Tensor,
        height: int,
    ) -> None:
        self.denoiser = denoiser
        self.prompts = prompts
        self.context_v = context_v
        self.height = height
        self.pairs: deque[MapPair] = deque()

    def options(self) -> dict[str, Any]:
        """The ``transformer_options`` of this pass."""
        options: dict[str, Any] = {
            "patches": {"attn2_patch": [self.split]},
            **PLAIN_OPTIONS,
        }
        if self.denoiser.with_maps:
            patch = looking(self.look, self.height, otherwise=_attention_with_gradient)
            options["patches_replace"] = {PATCH: dict.fromkeys(self.denoiser.layers, patch)}
        return options

    def split(
        self, n: torch.Tensor, context: torch.Tensor, _: torch.Tensor, extra: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys from the K context, values from the V context."""
        return n, context, self.context_v

    def look(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep A_t and A_r of a layer, and give its output; see :data:`capture.Look`."""
        with torch.no_grad():
            keys = [self.denoiser.reference_key(prompt, layer.block) for prompt in self.prompts]
            a_r = attention_probabilities(q, stacked(keys, k.shape[1]), layer.heads)
        a_t = key_probabilities(q, k, layer.heads)
        self.pairs.append(MapPair(a_t, a_r, layer.size))
        return attend(attention_probabilities(q, k, layer.heads), v)


def _attention_with_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    return attention_pytorch(q, k, v, options["n_heads"])


def _loaded_now() -> list[int]:
    """What ComfyUI has loaded, as ids of the patchers."""
    return [id(patcher) for patcher in comfy.model_management.loaded_models()]


def _load_if_needed(patcher: ModelPatcher, tokens: Tokens | None = None) -> ModelPatcher:
    """Stands in for ``CLIP.load_model``, and is no cycle that would keep the weights."""
    if id(patcher) not in _loaded_now():
        comfy.model_management.load_models_gpu([patcher])
    return patcher


def _plain_attention(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


# Flash and Sage attention have no backward pass.
PLAIN_OPTIONS: dict[str, Any] = {"optimized_attention_override": _plain_attention}
"""``transformer_options`` without patches."""
