"""ComfyUI's loaded Stable Diffusion as the training loop sees it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...attention.maps import attend, attention_probabilities, key_probabilities
from ...errors import SeFiError
from ...identity.identity import Identity
from ...learning.loop import Batch, Prediction
from ...learning.losses import MapPair
from ...learning.parametrisation import Vectors
from ...stages import stage_of_timestep
from ...text.captions import with_caption
from ...text.placeholders import expand_template
from ..base_model import LEVELS, Block, cross_attention_layers, training_sigmas
from ..clip.tokens import PlaceholderToken, Tokens, substitute, with_placeholders

logger = logging.getLogger(__name__)

_ACTIVATION_FACTOR = 6.0
"""Memory of forward and backward over ComfyUI's estimate for a forward alone."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


class ComfyPredictor:
    """Noised latents in, the U-Net's output and attention maps out.

    ``latents`` (N, C, h, w) are what the U-Net is trained on, ``masks`` (N, 1, H, W) the faces in
    them or None, ``captions`` (N) what else each of them shows. ``identity`` says which placeholder
    stands for which class word. Use it inside :func:`trainable.differentiable`.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        identity: Identity,
        templates: Sequence[str],
        latents: torch.Tensor,
        masks: torch.Tensor | None,
        captions: Sequence[str] | None = None,
        dtype: str = "auto",
        with_maps: bool = True,
    ) -> None:
        for name, patcher in (("model", model), ("clip", clip.patcher)):
            if patcher.injections:
                raise SeFiError(
                    f"{name} has a LoRA in bypass mode, or something else that is injected into "
                    "its layers, whose gradients cannot be followed: load the LoRA with Load LoRA, "
                    "or leave that node out"
                )
        self.model = private_clone(model)
        self.clip = with_placeholders(clip, [identity])
        self.name = identity.name
        self.stages = identity.stages
        self.latents, self.masks = latents, masks
        self.with_maps = with_maps
        self.load(1)  # puts the clone's object patches in force, such as another sampling type
        captions = captions or [""] * len(latents)
        distinct = list(dict.fromkeys(captions))
        self.captions = [distinct.index(caption) for caption in captions]
        self.templates = len(templates)
        self.prompts = [
            self.clip.tokenize(with_caption(expand_template(template, identity.name), caption))
            for caption in distinct
            for template in templates
        ]
        base = self.model.model
        self.dtype = DTYPES.get(dtype, base.get_dtype_inference())
        self.sampling = base.model_sampling
        self.sigmas = training_sigmas(base)
        self.layers = cross_attention_layers(base.diffusion_model)
        self.references: dict[int, torch.Tensor] = {}
        self.reference_keys: dict[tuple[int, Block], torch.Tensor] = {}

    @property
    def samples(self) -> int:
        """Number of training latents."""
        return len(self.latents)

    def load(self, samples: int) -> None:
        """Have ComfyUI load both models, with room for so many samples at once."""
        patchers = [self.model, self.clip.patcher]
        if all(map(_is_in_dynamic_vram, patchers)):
            return  # loading again would prepare every module again
        shape = (samples, *self.latents.shape[1:])
        needed = self.model.memory_required(shape) * _ACTIVATION_FACTOR
        with torch.inference_mode():  # as in any node, so that the weights stay what they were
            comfy.model_management.load_models_gpu(patchers, memory_required=int(needed))

    def __call__(self, keys: Vectors, values: Vectors, batch: Batch) -> Prediction:
        """See :class:`training.Predictor`."""
        stages = [stage_of_timestep(t, self.stages) for t in batch.timesteps]
        prompts = list(map(self._prompt_of, batch.samples, batch.templates))
        # Before the U-Net is loaded: with --disable-smart-memory ComfyUI unloads it to encode.
        if self.with_maps:
            self._encode_references(prompts)
        context_k, context_v = self._contexts(keys, values, stages, prompts)
        self.load(len(batch.samples))
        device = self.model.load_device
        latents = self.latents[batch.samples].to(device, torch.float32)
        generator = torch.Generator().manual_seed(batch.noise_seed)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        sigma = self.sigmas[batch.timesteps].to(device, torch.float32)
        noised = self.sampling.noise_scaling(sigma, noise, latents)
        recorder = _Recorder(self, prompts, context_v.to(device, self.dtype), latents.shape)
        output = self.model.model.diffusion_model(
            self.sampling.calculate_input(sigma, noised).to(self.dtype),
            self.sampling.timestep(sigma).float(),
            context=context_k.to(device, self.dtype),
            control=None,
            transformer_options=recorder.options(),
        ).float()
        layers = recorder.pairs
        recorder.pairs = deque(maxlen=0)  # gradient checkpointing would record again
        # The denoised latent is linear in the output, whether that is noise or velocity; the
        # target is the output that would denoise to the latent.
        zeros = torch.zeros_like(noised)
        gain = self.sampling.calculate_denoised(sigma, torch.ones_like(noised), zeros)
        target = (latents - self.sampling.calculate_denoised(sigma, zeros, noised)) / gain
        return Prediction(
            output=output,
            target=target,
            layers=list(layers),
            placeholder=self._placeholders(prompts, context_k.shape[1]).to(device),
            face=None if self.masks is None else self.masks[batch.samples].to(device),
        )

    def reference_key(self, prompt: int, block: Block) -> torch.Tensor:
        """A layer's keys (1, tokens, channels) of a prompt with the class word, computed once."""
        if (prompt, block) not in self.reference_keys:
            with torch.no_grad():
                context = self.references[prompt].to(self.model.load_device, self.dtype)
                self.reference_keys[prompt, block] = self.layers[block].to_k(context)
        return self.reference_keys[prompt, block]

    def _prompt_of(self, sample: int, template: int) -> int:
        """The number of a sample's prompt: captions one after the other, templates in each."""
        return self.captions[sample] * self.templates + template

    def _placeholders(self, prompts: Sequence[int], length: int) -> torch.Tensor:
        """1 for the placeholder's tokens of these prompts, (B, length), as contexts are stacked."""
        rows = [_placeholder_tokens(self.prompts[prompt]) for prompt in prompts]
        return _stacked(rows, length)[..., 0]

    @torch.no_grad()
    def _encode_references(self, prompts: Sequence[int]) -> None:
        """Encode prompts with the class word, those that were not yet."""
        for prompt in prompts:
            if prompt not in self.references:
                self.references[prompt] = self._encode([self.prompts[prompt]])[0]

    def _contexts(
        self, keys: Vectors, values: Vectors, stages: list[int], numbers: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V contexts (B, tokens, width) of the samples' stages and prompts.

        All prompts go through the text encoder in one batch, as if they were chunks of one.
        """
        prompts = []
        for vectors in (keys,) if values is keys else (keys, values):
            for stage, number in zip(stages, numbers, strict=True):
                rows = {encoder: tensor[stage] for encoder, tensor in vectors.items()}
                prompts.append(substitute(self.prompts[number], {self.name: rows}))
        encoded = self._encode(prompts)
        length = math.lcm(*(context.shape[1] for context in encoded))
        context_k, *rest = (
            _stacked(encoded[first : first + len(stages)], length)
            for first in range(0, len(encoded), len(stages))
        )
        return context_k, rest[0] if rest else context_k

    def _encode(self, prompts: Sequence[Tokens]) -> list[torch.Tensor]:
        """The contexts (1, tokens, width) of several prompts."""
        joined = {
            encoder: [chunk for prompt in prompts for chunk in prompt[encoder]]
            for encoder in prompts[0]
        }
        context = self.clip.encode_from_tokens(joined)
        sizes = [sum(len(c) for c in next(iter(prompt.values()))) for prompt in prompts]
        return list(context.split(sizes, dim=1))


class _Recorder:
    """The attention patches of one forward pass of the training."""

    def __init__(
        self,
        predictor: ComfyPredictor,
        prompts: list[int],
        context_v: torch.Tensor,
        shape: torch.Size,
    ) -> None:
        self.predictor = predictor
        self.prompts = prompts
        self.context_v = context_v
        self.shape = shape
        self.pairs: deque[MapPair] = deque()

    def options(self) -> dict[str, Any]:
        """The ``transformer_options`` of this pass."""
        options: dict[str, Any] = {
            "patches": {"attn2_patch": [self.split]},
            # Flash and Sage attention have no backward pass.
            "optimized_attention_override": _plain_attention,
        }
        if self.predictor.with_maps:
            blocks = dict.fromkeys(self.predictor.layers, self.attend)
            options["patches_replace"] = {"attn2": blocks}
        return options

    def split(
        self, n: torch.Tensor, context: torch.Tensor, _: torch.Tensor, extra: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys from the K context, values from the V context."""
        return n, context, self.context_v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]
    ) -> torch.Tensor:
        """Attention of one layer; its maps are kept if it is at one of the levels."""
        height, width = extra["activations_shape"][-2:]
        heads = extra["n_heads"]
        if round(self.shape[-2] / height) not in LEVELS:
            return attention_pytorch(q, k, v, heads)
        block = (*extra["block"], extra["block_index"])
        with torch.no_grad():
            keys = [self.predictor.reference_key(prompt, block) for prompt in self.prompts]
            reference_k = _stacked(keys, k.shape[1])
            reference = attention_probabilities(q, reference_k, heads)
        self.pairs.append(MapPair(key_probabilities(q, k, heads), reference, (height, width)))
        return attend(attention_probabilities(q, k, heads), v)


def _is_in_dynamic_vram(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI has loaded it, and fetches each weight when it is used."""
    loaded = comfy.model_management.loaded_models()
    return patcher.is_dynamic() and any(patcher is other for other in loaded)


def _plain_attention(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


def _placeholder_tokens(tokens: Tokens) -> torch.Tensor:
    """1 for the placeholder's tokens of a prompt, (1, tokens, 1)."""
    chunks = next(iter(tokens.values()))
    marked = [isinstance(item, PlaceholderToken) for chunk in chunks for item, *_ in chunk]
    return torch.tensor(marked, dtype=torch.float32)[None, :, None]


def _stacked(tensors: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Prompts (1, tokens, width) as one batch (B, length, width).

    ``length`` is a multiple of each; the prompts are repeated, as ComfyUI's ``CONDCrossAttn`` does.
    """
    if len(tensors) == 1 and tensors[0].shape[1] == length:
        return tensors[0]
    return torch.cat([tensor.repeat(1, length // tensor.shape[1], 1) for tensor in tensors])
