"""What ``make bench-cost`` compares: trainings and samplings that give the time of each step.

Every training is a function of a :class:`Case` and a number of steps and returns the seconds of
each of its steps but the first, which is not measured because it has no step before it. The floor
has nothing of the pack: ComfyUI's own U-Net and transformers' text encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.base_model import family_of
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_models
from sefi_ide.sefi_core.comfyui.learning.train import train_identity
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.loop import Step
from sefi_ide.sefi_core.learning.photos import pair_photos
from sefi_ide.sefi_core.learning.settings import DEFAULT_TEMPLATES, TrainingSettings
from sefi_ide.tests.mini_sd import architecture
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CLIPTextConfig, CLIPTextModel

from .lora import train_lora

TOKENS = 77
"""In one chunk of a prompt."""
CLASS_WORD = "person"
NAMES = ("anna", "ben", "carla")
STAGES = 5
"""Of the identities that are sampled: the paper's number, which costs more than the default's."""


@dataclass(frozen=True)
class Case:
    """The size of a training step; ``chunks`` of 77 tokens is the length of its prompts."""

    side: int
    batch: int = 1
    photos: int = 1
    chunks: int = 1

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts of that length; those of one chunk are the defaults."""
        if self.chunks == 1:
            return DEFAULT_TEMPLATES
        return ("a photo of <name> " + "very " * (TOKENS * (self.chunks - 1)),)


@dataclass(frozen=True)
class Models:
    """What a checkpoint loader gives."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE

    @classmethod
    def load(cls, checkpoint: Path) -> Models:
        """Those of a checkpoint, with weights that autograd may save.

        A loader node runs in inference mode; everything else is the same.
        """
        architecture.register()
        with torch.inference_mode(False):
            loaded = comfy.sd.load_checkpoint_guess_config(
                str(checkpoint), embedding_directory=None
            )
        return cls(*loaded[:3])

    @property
    def unet(self) -> torch.nn.Module:
        """The loaded U-Net."""
        comfy.model_management.load_models_gpu([self.model])
        return self.model.model.diffusion_model

    @property
    def device(self) -> torch.device:
        """Where the U-Net computes."""
        return self.model.load_device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return self.model.model.get_dtype_inference()

    def latents(self, case: Case) -> torch.Tensor:
        """Noise (B, C, h, w) for a step of the case."""
        channels = self.model.get_model_object("latent_format").latent_channels
        cells = case.side // 8
        return torch.randn(case.batch, channels, cells, cells, device=self.device)


def clock() -> float:
    """Seconds of work done so far.

    On a GPU the time of day, when it has finished its work. On the CPU the processor time of this
    process, which is the same on a busy machine.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(function: Callable[[], object], repeats: int) -> list[float]:
    """The seconds of each call."""
    marks = [clock()]
    for _ in range(repeats):
        function()
        marks.append(clock())
    return [end - begin for begin, end in pairwise(marks)]


# --- training ---------------------------------------------------------------------------------


class IdentityTraining:
    """The pack's ``train_identity`` with its default settings, ``captions`` excepted."""

    def __init__(self, models: Models, captions: tuple[str, ...] = ()) -> None:
        """Without captions, which have no part in a step."""
        self.models = models
        self.captions = captions
        self.seconds_before: list[float] = []
        """Seconds from each call to the end of its first step."""
        self.after_step: Callable[[], object] = lambda: None
        """Called after each step, when its time has been taken."""

    def __call__(self, case: Case, steps: int) -> list[float]:
        """Train once."""
        generator = torch.Generator().manual_seed(0)
        pictures = torch.rand(case.photos, case.side, case.side, 3, generator=generator)
        edge = case.side // 4
        masks = F.pad(torch.ones(1, case.side - 2 * edge, case.side - 2 * edge), [edge] * 4)
        marks: list[float] = []

        def on_step(_: Step) -> None:
            marks.append(clock())
            self.after_step()

        settings = TrainingSettings(
            steps=steps,
            resolution=case.side,
            batch_size=case.batch,
            templates=case.templates,
            captions=self.captions,
        )
        begin = clock()
        train_identity(
            self.models.model,
            self.models.clip,
            self.models.vae,
            pair_photos([pictures], [masks]),
            NAMES[0],
            CLASS_WORD,
            settings,
            on_step=on_step,
        )
        self.seconds_before.append(marks[0] - begin)
        return [end - begin for begin, end in pairwise(marks)]


class Floor:
    """The frozen U-Net forward and backward, its conditions leaves, and two text encoder passes.

    The U-Net is ComfyUI's module as it is, with PyTorch's attention, which is quicker on the CPU
    than ComfyUI's choice. The text encoders, SDXL's two, are transformers', because ComfyUI's adds
    in place, which autograd forbids; their token embeddings are leaves. They run to the layer that
    the family reads.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.unet = models.unet.requires_grad_(False)
        self.text_encoders = {
            name: transformers_text_encoder(models, name=name, copy=False).requires_grad_(False)
            for name in encoder_models(models.clip)
        }
        self.layers = {
            name: None if model.layer == "last" else model.layer_idx
            for name, model in encoder_models(models.clip).items()
        }
        for encoder in self.text_encoders.values():
            encoder.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_()
            )

    def __call__(self, case: Case, steps: int) -> list[float]:
        """Seconds of ``steps - 1`` steps."""
        return seconds_of(lambda: self.step(case), steps - 1)

    def text_encoder_alone(self, case: Case, steps: int) -> list[float]:
        """Seconds of ``steps - 1`` steps without the U-Net."""
        return seconds_of(lambda: _backward(*self._prompts(case)), steps - 1)

    def unet_alone(self, case: Case, steps: int) -> list[float]:
        """Seconds of ``steps - 1`` steps without the text encoders."""
        return seconds_of(lambda: _backward(self._output(case)[0]), steps - 1)

    @torch.enable_grad()
    def step(self, case: Case) -> torch.Tensor:
        """One step; the context with its gradient."""
        states = self._prompts(case)
        output, context = self._output(case)
        _backward(output, *states)
        return context

    @torch.enable_grad()
    def _output(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """What the U-Net says to noise, and the context that it had."""
        config = self.models.model.model.model_config.unet_config
        context = self._leaf(case.batch, TOKENS * case.chunks, config["context_dim"])
        pooled_and_size = config.get("adm_in_channels")  # of SDXL
        output = self.unet(
            self.models.latents(case).to(self.models.dtype),
            torch.full((case.batch,), 500.0, device=self.models.device),
            context=context,
            y=self._leaf(case.batch, pooled_and_size) if pooled_and_size else None,
            control=None,
            transformer_options={"optimized_attention_override": _pytorch_attention},
        )
        return output, context

    def _leaf(self, *shape: int) -> torch.Tensor:
        leaf = torch.randn(shape, device=self.models.device).to(self.models.dtype)
        return leaf.requires_grad_()

    @torch.enable_grad()
    def states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What each text encoder says to tokens (B, 77), and the pooled output of ``g``."""
        states = []
        for name, encoder in self.text_encoders.items():
            output = encoder(ids, output_hidden_states=True)
            layer = self.layers[name]
            states.append(
                output.last_hidden_state if layer is None else output.hidden_states[layer]
            )
            if name == "g":
                states.append(output.pooler_output)
        return states

    def _prompts(self, case: Case) -> list[torch.Tensor]:
        """The states of the prompts of keys and of values."""
        ids = _token_ids(case.batch * case.chunks, self.models.device)
        return self.states(ids) + self.states(ids)


class TextualInversion:
    """A step of diffusers' example ``textual_inversion.py`` on the same weights.

    Kinder to it than the example, its latents are encoded beforehand. As there, the optimiser
    keeps the whole table of token embeddings, and all rows but one are put back after each step.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.unet = diffusers_unet(models).requires_grad_(False)
        self.text_encoder = transformers_text_encoder(models, torch.float32).requires_grad_(False)
        self.table = self.text_encoder.get_input_embeddings().requires_grad_(True)
        self.original = self.table.weight.detach().clone()
        self.kept = torch.ones(len(self.original), dtype=torch.bool, device=models.device)
        self.kept[0] = False
        self.optimizer = torch.optim.AdamW(self.table.parameters(), 5e-4)
        self.schedule = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )

    def __call__(self, case: Case, steps: int) -> list[float]:
        """Seconds of ``steps - 1`` steps."""
        return seconds_of(lambda: self.step(case), steps - 1)

    @torch.enable_grad()
    def step(self, case: Case) -> None:
        """One step."""
        device, dtype = self.models.device, self.models.dtype
        latents = self.models.latents(case).to(dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (case.batch,), device=device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        with self._mixed_precision():
            states = self.text_encoder(_token_ids(case.batch, device)).last_hidden_state
        output = self.unet(noisy, timesteps, states.to(dtype)).sample
        torch.nn.functional.mse_loss(output.float(), noise.float()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table.weight[self.kept] = self.original[self.kept]

    def _mixed_precision(self) -> AbstractContextManager[Any]:
        half = self.models.dtype != torch.float32
        return torch.autocast(self.models.device.type, self.models.dtype, enabled=half)


class LoraTraining:
    """Core's TrainLoraNode."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def __call__(self, case: Case, steps: int) -> list[float]:
        """Train once."""
        marks: list[float] = []
        hook = register_optimizer_step_post_hook(lambda *_: marks.append(clock()))
        conditioning = encode(self.models.clip, f"a photo of {CLASS_WORD}")
        latents = self.models.latents(case).to(comfy.model_management.intermediate_device())
        try:
            train_lora(self.models.model, latents, conditioning, steps, 5e-4, 0)
        finally:
            hook.remove()
            # The node sends it away from a GPU. Whatever loads it again in inference mode makes
            # weights of it that the floor's autograd cannot save.
            comfy.model_management.load_models_gpu([self.models.model])
        return [end - begin for begin, end in pairwise(marks)]


def transformers_text_encoder(
    models: Models, dtype: torch.dtype | None = None, name: str = "l", copy: bool = True
) -> CLIPTextModel:
    """One of the CLIP's text encoders as transformers has it, in the U-Net's dtype or another.

    With ``copy`` False on the CLIP's own weights where these have that dtype.
    """
    models.clip.load_model()
    source = encoder_models(models.clip)[name].transformer
    weights = source.state_dict()
    layer = source.text_model.encoder.layers[0]
    config = CLIPTextConfig(
        vocab_size=source.get_input_embeddings().weight.shape[0],
        hidden_size=layer.mlp.fc1.weight.shape[1],
        intermediate_size=layer.mlp.fc1.weight.shape[0],
        num_hidden_layers=source.num_layers,
        num_attention_heads=layer.self_attn.heads,
        hidden_act="quick_gelu" if name == "l" else "gelu",
        eos_token_id=49407,
    )
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    wanted = encoder.state_dict()
    # Before version 5 transformers had the same names as the checkpoint.
    names = {one: one if one in weights else f"text_model.{one}" for one in wanted}
    dtype = dtype or models.dtype
    encoder.load_state_dict(
        {
            one: weights[other].detach().to(models.device, dtype, copy=copy)
            for one, other in names.items()
        },
        assign=True,
    )
    for module in encoder.modules():
        if hasattr(module, "position_ids"):  # a buffer that is not in the weights
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return encoder.to(models.device).eval()


def diffusers_unet(models: Models) -> UNet2DConditionModel:
    """The U-Net as diffusers has it; on ComfyUI's weights, not on a copy of them."""
    config = models.model.model.model_config.unet_config
    depths, attending = list(config["transformer_depth"]), []
    for blocks in config["num_res_blocks"]:
        attending.append(any(depths[:blocks]))
        depths = depths[blocks:]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            block_out_channels=[config["model_channels"] * m for m in config["channel_mult"]],
            layers_per_block=config["num_res_blocks"][0],
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attending],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attending[::-1]],
            cross_attention_dim=config["context_dim"],
            attention_head_dim=config["num_heads"],
        )
    weights = {
        f"model.diffusion_model.{name}": tensor for name, tensor in models.unet.state_dict().items()
    }
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, unet.config), assign=True)
    return unet.eval()


def _token_ids(rows: int, device: torch.device) -> torch.Tensor:
    ids = torch.full((rows, TOKENS), 49407, device=device)
    ids[:, 0] = 49406
    return ids


def _backward(*outputs: torch.Tensor) -> None:
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()


def _pytorch_attention(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


# --- sampling ---------------------------------------------------------------------------------


def halves() -> list[torch.Tensor]:
    """The left and the right half of a picture as masks, with a soft seam."""
    left = torch.linspace(8.0, -8.0, 256).sigmoid().expand(1, 256, 256)
    return [left, 1 - left]


class Sampling:
    """ComfyUI's sampling of a prompt with some identities applied, or with none."""

    def __init__(
        self,
        models: Models,
        identities: Sequence[Identity],
        words: int,
        regions: Sequence[torch.Tensor] | str = "off",
    ) -> None:
        """The prompt has ``words`` people: the identities, then the class word.

        ``regions`` are masks for the identities, or "automatic".
        """
        self.model, self.clip = models.model, models.clip
        for number, identity in enumerate(identities):
            how = {"regions": regions} if isinstance(regions, str) else {"region": regions[number]}
            applied = AppliedIdentity(identity, **how)
            self.model, self.clip = apply_identity(self.model, self.clip, applied)
        people = [identity.placeholder for identity in identities]
        people += [CLASS_WORD] * (words - len(people))
        self.prompt = "a photo of " + " and ".join(people)
        self.latents = models.latents

    @torch.inference_mode()
    def encode(self) -> list[Any]:
        """The prompt's CONDITIONING."""
        return encode(self.clip, self.prompt)

    @torch.inference_mode()
    def __call__(self, side: int, steps: int) -> list[float]:
        """Seconds of a sampling of one picture with this side, without the encoding; one figure."""
        positive, negative = self.encode(), encode(self.clip, "")
        noise = self.latents(Case(side)).cpu()
        begin = clock()
        comfy.sample.sample(
            self.model, noise, steps, 5.0, "euler", "normal", positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return [clock() - begin]


@torch.inference_mode()
def encode(clip: CLIP, prompt: str) -> list[Any]:
    """A prompt's CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def some_identities(models: Models, count: int) -> list[Identity]:
    """Identities near the class word, each with other vectors."""
    generator = torch.Generator().manual_seed(0)
    start = class_word_embedding(models.clip, CLASS_WORD)
    identities = []
    for name in NAMES[:count]:
        keys, values = (
            {
                encoder: rows + 0.1 * torch.randn(STAGES, *rows.shape, generator=generator)
                for encoder, rows in start.items()
            }
            for _ in ("keys", "values")
        )
        identities.append(Identity(name, CLASS_WORD, family_of(models.model), keys, values))
    return identities
