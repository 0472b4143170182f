"""Training a face adapter against a checkpoint that ComfyUI has loaded.

The Stable Diffusion is frozen, and is no part of what is trained: image tokens go into its
cross-attention and gradients come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.modules.attention import attention_pytorch
from torch import nn

from ..digest import digest
from ..errors import SeFiError
from ..face2diffusion.crops import Choice, aligned_face, face_in
from ..face2diffusion.training.data import Faces, Record
from ..face2diffusion.training.loops import Log
from ..face_adapter.files import (
    INFINITE_ID,
    PLUS_V2,
    Embedder,
    FaceAdapter,
    Layer,
    in_file_order,
)
from ..face_adapter.networks import FaceProjection, PairProjection, PlusProjection, Sizes
from ..face_adapter.training.pairs import partners
from ..face_adapter.training.settings import AdapterTraining
from ..faces.face import Detector
from ..faces.yunet import YuNetDetector
from ..identity.identity import Identity
from ..injection import Beside
from ..learning.loop import Batch
from ..learning.losses import noise_loss
from ..stages import TRAINING_TIMESTEPS
from .base_model import cross_attention_layers, latent_format_of
from .clip.embeddings import class_word_embedding
from .encoder_training import NAME, Checkpoint, latent_of, photo_of, tensors_digest
from .face_embedding import CLIP_SIDE, Looks, clip_states
from .learning.denoiser import ComfyDenoiser
from .learning.pictures import picture_of
from .unet.adapter import add_beside
from .unet.capture import PATCH

VALIDATED = 32
"""Photos of people who were kept out whose loss is measured, at most."""


@dataclass(frozen=True, eq=False)
class Recogniser:
    """What says who is in a photo; ``clip`` is for the variants that look at pictures."""

    embedder: Embedder
    looking: Callable[[Detector, Choice], Looks]
    clip: ClipVisionModel | None = None

    @property
    def clip_digest(self) -> str:
        """Says which CLIP it is; empty without one."""
        return "" if self.clip is None else tensors_digest(self.clip.model.state_dict())


def preparation(
    settings: AdapterTraining, checkpoint: Checkpoint, recogniser: Recogniser
) -> Callable[[Record], dict[str, torch.Tensor]]:
    """What a training keeps of a photo; see :class:`training.data.Faces`.

    That is the "latent" of a square around the face, who it is, the "embedding", and for variants
    that look at pictures a CLIP's "states" of the face. Raises :class:`SeFiError` where such a
    variant has no CLIP.
    """
    if settings.looks_at_pictures and recogniser.clip is None:
        raise SeFiError(
            f"the variant {settings.variant} looks at pictures: give a CLIP vision model, or set "
            "variant to faceid"
        )
    detector = YuNetDetector()
    look = recogniser.looking(detector, Choice())

    def prepare(record: Record) -> dict[str, torch.Tensor]:
        photo = photo_of(record, detector, with_mask=True)
        embedding, _ = look(photo, "the photo")
        kept = {
            "latent": latent_of(photo, checkpoint, settings.resolution)[0].half(),
            "embedding": embedding,
        }
        if settings.looks_at_pictures:
            assert recogniser.clip is not None
            face = face_in(photo, detector, Choice(), "the photo")
            seen = aligned_face(photo.picture, face, CLIP_SIDE)[None]
            kept["states"] = clip_states(recogniser.clip, settings.variant, seen)[1].half()
        return kept

    return prepare


class AdapterTask(nn.Module):
    """An adapter and its noise loss on pairs of photos; see :class:`training.loops.Task`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recogniser: Recogniser,
        faces: Faces,
        tests: Faces,
        settings: AdapterTraining,
    ) -> None:
        super().__init__()
        self.settings, self.embedder = settings, recogniser.embedder
        attentions = cross_attention_layers(checkpoint.model.model.diffusion_model)
        self.blocks = in_file_order(list(attentions))
        to_k: Any = attentions[self.blocks[0]].get_submodule("to_k")
        states = faces.tensors["states"].shape[-1] if settings.looks_at_pictures else 0
        sizes = Sizes(
            recogniser.embedder.width,
            to_k.weight.shape[1],
            settings.tokens,
            states,
            depth=settings.depth,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.projection = _projection(settings.variant, sizes)
        # They begin where the text's keys and values are made.
        self.to_k = _begun_at([attentions[block].get_submodule("to_k") for block in self.blocks])
        self.to_v = _begun_at([attentions[block].get_submodule("to_v") for block in self.blocks])
        self.depends_on = {
            "face recogniser": digest(asdict(recogniser.embedder)),
            "CLIP vision model": recogniser.clip_digest if states else "",
            "model family": checkpoint.family,
            "variant": settings.variant,
            "list of people": digest(faces.names),
        }
        no_states = None
        if recogniser.clip is not None and states:
            nothing = torch.zeros(0, CLIP_SIDE, CLIP_SIDE, 3)
            no_states = clip_states(recogniser.clip, settings.variant, nothing).clone()
        # In a list, so that they are no modules of this one: they are neither trained nor saved.
        self._frozen = [checkpoint]
        self._data = [
            _data_of(checkpoint, faces, settings, no_states),
            _data_of(checkpoint, tests, settings, no_states) if len(tests) else None,
        ]

    @property
    def module(self) -> nn.Module:
        """Itself: projection and layers are all that it holds."""
        return self

    @property
    def samples(self) -> int:
        """Number of photos to learn from."""
        return len(self._learned.partners)

    @property
    def loss_scale(self) -> float:
        """That of what the U-Net computes in."""
        return self._learned.denoiser.loss_scale

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """U-Net and text encoder, for :func:`learning.differentiable.differentiable`."""
        denoiser = self._learned.denoiser
        return denoiser.model.model.diffusion_model, denoiser.clip.cond_stage_model

    @property
    def _learned(self) -> _Data:
        data = self._data[0]
        assert data is not None
        return data

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(
            module.parameters(),
            self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
        )

    def forward(self, rows: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The noise loss of these photos; all chance comes from their seeds."""
        return self._loss(self._learned, rows, seeds, self.training)

    def _loss(
        self,
        data: _Data,
        rows: Sequence[int],
        seeds: Sequence[int],
        learning: bool,
        seen: bool = True,
    ) -> torch.Tensor:
        """The loss of photos; faces are left out at random while ``learning``, or not ``seen``."""
        sources, kept, batches = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            timestep = int(torch.randint(TRAINING_TIMESTEPS, (1,), generator=generator))
            chance = torch.rand(2, generator=generator).tolist()
            others = data.partners[row]
            sources.append(others[int(chance[0] * len(others))])
            kept.append(seen and not (learning and chance[1] < self.settings.drop))
            batches.append(Batch([row], [0], [timestep], seed))
        tokens = self.tokens(data, sources, kept)
        patches = {block: self._attend(tokens, number) for number, block in enumerate(self.blocks)}
        options = {"patches_replace": {PATCH: patches}}
        output, target = data.denoiser.predict_class_word(options, *batches)
        return noise_loss(output, target)

    def tokens(self, data: _Data, rows: Sequence[int], kept: Sequence[bool]) -> torch.Tensor:
        """Image tokens (B, T, width) of photos, or of no face where it is not ``kept``."""
        device = next(self.parameters()).device
        keep = torch.tensor(kept, device=device)[:, None]
        faces = data.embeddings[list(rows)].to(device) * keep
        states = None
        if data.states is not None:
            assert data.no_states is not None
            found = data.states[list(rows)].to(device, torch.float32)
            states = torch.where(keep[:, :, None], found, data.no_states.to(device))
        return self.projection(faces[:, None], states)

    def _attend(self, tokens: torch.Tensor, number: int) -> Callable[..., torch.Tensor]:
        """An ``attn2_replace`` patch of one layer."""
        keys, values = self.to_k[number](tokens), self.to_v[number](tokens)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
        ) -> torch.Tensor:
            heads = options["n_heads"]
            face = attention_pytorch(q, keys.to(q.dtype), values.to(q.dtype), heads)
            return attention_pytorch(q, k, v, heads) + face if self.settings.text else face

        return attend

    @torch.no_grad()
    def validate(self, step: int, log: Log) -> None:
        """The noise loss of people who were kept out, on fixed noise, and a picture of one.

        The same without the face says how much of the loss the face takes away.
        """
        data = self._data[1]
        if data is None:
            return
        rows = range(min(len(data.partners), VALIDATED))
        losses = [
            [float(self._loss(data, [row], [(row + 1) * 7919], False, seen)) for row in rows]
            for seen in (True, False)
        ]
        with_face, without = (sum(of) / len(of) for of in losses)
        log.figures(step, validation_loss=with_face, validation_loss_without_face=without)
        log.picture(step, "drawn", self._picture(data))

    def _picture(self, data: _Data) -> torch.Tensor:
        """A picture (H, W, 3) of the first of these people."""
        checkpoint = self._frozen[0]
        with torch.no_grad():
            tokens = self.tokens(data, [0, 0], [True, False]).cpu()
            adapter = self.face_adapter()
            pairs = {
                block: (tokens @ layer.to_k.T, tokens @ layer.to_v.T)
                for block, layer in zip(self.blocks, adapter.layers, strict=True)
            }
        with torch.inference_mode():
            model = add_beside(checkpoint.model, Beside(pairs, with_text=self.settings.text))
        side = data.denoiser.latents.shape[-1] * latent_format_of(model).spacial_downscale_ratio
        prompt = self.settings.validation_prompt
        return picture_of(model, checkpoint.clip, checkpoint.vae, prompt, side)

    def face_adapter(self) -> FaceAdapter:
        """What was learned."""
        settings = self.settings
        layers = [
            Layer(*(one.state_dict()["weight"].detach().float().cpu() for one in pair))
            for pair in zip(self.to_k, self.to_v, strict=True)
        ]
        return FaceAdapter(
            settings.variant,
            self._frozen[0].family,
            self.projection,
            layers,
            embedder=self.embedder,
            with_text=settings.text,
        )


class _Data(NamedTuple):
    """Latents in a denoiser, embeddings (N, F), a CLIP's states (N, n, C), those of no picture."""

    denoiser: ComfyDenoiser
    embeddings: torch.Tensor
    partners: list[list[int]]
    states: torch.Tensor | None
    no_states: torch.Tensor | None


def _data_of(
    checkpoint: Checkpoint,
    faces: Faces,
    settings: AdapterTraining,
    no_states: torch.Tensor | None,
) -> _Data:
    model, clip, _ = checkpoint
    word = {
        name: rows[None] for name, rows in class_word_embedding(clip, settings.class_word).items()
    }
    plain = Identity(NAME, settings.class_word, checkpoint.family, word, word)
    captions = [record.caption if settings.captions else "" for record in faces.records]
    denoiser = ComfyDenoiser(
        model,
        clip,
        [plain],
        [settings.template],
        faces.tensors["latent"],
        None,
        captions,
        dtype=settings.dtype,
        with_maps=False,
    )
    return _Data(
        denoiser,
        faces.tensors["embedding"].float(),
        partners(faces.people),
        faces.tensors.get("states"),
        no_states,
    )


def _projection(variant: str, sizes: Sizes) -> nn.Module:
    if variant == INFINITE_ID:
        return PairProjection(sizes)
    if sizes.states:
        return PlusProjection(sizes, variant == PLUS_V2)
    return FaceProjection(sizes)


def _begun_at(layers: Sequence[Any]) -> nn.ModuleList:
    """Layers of their own with the weights of frozen ones."""
    made = nn.ModuleList()
    for layer in layers:
        outputs, inputs = layer.weight.shape
        own = nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            own.weight.copy_(layer.weight.detach().float())
        made.append(own)
    return made
