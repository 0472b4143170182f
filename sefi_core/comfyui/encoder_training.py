"""Training a mapping of a face encoder against a checkpoint that ComfyUI has loaded.

The Stable Diffusion is frozen, and is no part of what is trained: only token embeddings go into it
and gradients come out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import nn

from ..digest import digest, weights_digest
from ..errors import SeFiError, quoted
from ..face2diffusion.crops import Choice, seen_in
from ..face2diffusion.files import FaceEncoder
from ..face2diffusion.networks import EncoderShape, Output
from ..face2diffusion.networks import Mapping as FaceMapping
from ..face2diffusion.training.data import Faces, Record, read_picture
from ..face2diffusion.training.identification import features_of
from ..face2diffusion.training.loops import Log
from ..face2diffusion.training.settings import EncoderTraining
from ..faces.extract import Selection, extract_faces
from ..faces.face import Detector
from ..faces.yunet import YuNetDetector
from ..families import FAMILIES
from ..identity.identity import Identity
from ..images import resized
from ..learning.loop import Batch
from ..learning.losses import noise_loss
from ..learning.photos import FAINT, Photo, training_pictures
from ..stages import TRAINING_TIMESTEPS, stage_of_timestep
from .base_model import family_of
from .clip.embeddings import class_word_embedding, position_embeddings, with_last_repeated
from .clip.tokens import PlaceholderToken, encoder_models, items_of, with_placeholders
from .learning.denoiser import ComfyDenoiser
from .learning.pictures import sample_picture
from .learning.train import encode_pictures

logger = logging.getLogger(__name__)

NAME = "name"
"""Of the placeholder in the template."""
LONG = 30.0
"""Times the class word's vectors. Longer ones hardly turn in the steps of a training."""


class Checkpoint(NamedTuple):
    """What a loader of ComfyUI gives."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE

    @property
    def family(self) -> str:
        """Its id of :data:`families.FAMILIES`."""
        return family_of(self.model)

    @property
    def vae_digest(self) -> str:
        """Says which weights make its latents."""
        network: Any = self.vae.first_stage_model
        whole = network.state_dict()
        return tensors_digest(
            {name: v for name, v in whole.items() if not name.split(".")[0].endswith("decoder")}
        )


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """One text for all weights of a network."""
    return digest({name: weights_digest(tensor) for name, tensor in tensors.items()})


def preparation(
    settings: EncoderTraining, checkpoint: Checkpoint | None
) -> Callable[[Record], dict[str, torch.Tensor]]:
    """What a training keeps of a photo; without a checkpoint only what the encoder sees.

    See :class:`training.data.Faces`. The mask is the record's, or the head as found.
    """
    detector = YuNetDetector()
    with_mask = settings.crop == "head" or (checkpoint is not None and settings.needs_masks)

    def prepare(record: Record) -> dict[str, torch.Tensor]:
        photo = photo_of(record, detector, with_mask)
        seen = seen_in(photo, settings.crop, detector, Choice(), "the photo").picture
        kept = {"crop": (seen.movedim(-1, 0) * 255).round().to(torch.uint8)}
        if checkpoint is not None:
            latent, face = latent_of(photo, checkpoint, settings.resolution)
            kept["latent"] = latent.half()
            height, width = latent.shape[-2:]
            small = resized(face, (height, width))
            kept["mask"] = (small * 255).round().to(torch.uint8)
        return kept

    return prepare


def photo_of(record: Record, detector: Detector, with_mask: bool) -> Photo:
    """A record's photo with its mask: the record's, or ``with_mask`` the head as it is found.

    Raises :class:`SeFiError` for a mask that marks nothing, or has other proportions.
    """
    picture = read_picture(record.file)
    mask = None
    if record.mask is not None:
        mask = _mask_of(record.mask, *picture.shape[:2])
    elif with_mask:
        mask = extract_faces(picture[None], detector, Selection()).masks[0]
    return Photo(picture, mask)


def _mask_of(file: Path, height: int, width: int) -> torch.Tensor:
    """A mask in its photo's size, (H, W); one that was saved smaller may be off by a pixel."""
    mask = read_picture(file)[..., 0]
    rows, columns = mask.shape
    if abs(rows * width - columns * height) > max(height, width):
        raise SeFiError(
            f"its mask {file} is {columns} x {rows} pixels and the photo {width} x {height}: give "
            "a mask of the whole photo, or none"
        )
    if (rows, columns) != (height, width):
        mask = resized(mask[None], (height, width))[0]
    if mask.max() < FAINT:
        raise SeFiError(f"its mask {file} marks nothing: make the head white, or give no mask")
    return mask


def latent_of(
    photo: Photo, checkpoint: Checkpoint, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent (C, h, w) of a square around the face, and the face's mask in it (1, H, W).

    A ``resolution`` of 0 is the model family's own.
    """
    side = resolution or FAMILIES[checkpoint.family].resolution
    pictures, masks, _ = training_pictures([photo], side)
    latent = encode_pictures(checkpoint.model, checkpoint.vae, pictures)[0]
    return latent, torch.ones(1, *pictures.shape[1:3]) if masks is None else masks[0]


def outputs_for(settings: EncoderTraining, widths: dict[str, int]) -> list[Output]:
    """The heads of a mapping for text encoders of these widths."""
    roles: tuple[Any, ...] = ("key", "value") if settings.keys_apart else ("both",)
    return [
        Output(f"{encoder}_{role}_{number}", encoder, width, role, settings.stages)
        for encoder, width in widths.items()
        for role in roles
        for number in range(settings.vectors)
    ]


class MappingTask(nn.Module):
    """A mapping and its noise loss on photos; see :class:`training.loops.Task`.

    Raises :class:`SeFiError` for a class word of more tokens than there are vectors: the mapping
    could not begin at it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: nn.Module,
        shape: EncoderShape,
        faces: Faces,
        tests: Faces,
        settings: EncoderTraining,
    ) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        clip = checkpoint.clip
        word = class_word_embedding(clip, settings.class_word)
        if (tokens := max(map(len, word.values()))) > settings.vectors:
            raise SeFiError(
                f"the class word {quoted(settings.class_word)} has {tokens} tokens and there are "
                f"{settings.vectors} vectors to stand for it: set vectors to {tokens} or more, or "
                "choose a shorter class_word"
            )
        widths = {name: rows.shape[1] for name, rows in word.items()}
        outputs = outputs_for(settings, widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.mapping = FaceMapping(shape.features, outputs, dropout=settings.dropout)
        blank = {
            name: with_last_repeated(rows, settings.vectors)[None] for name, rows in word.items()
        }
        self.plain = Identity(
            NAME,
            settings.class_word,
            checkpoint.family,
            blank,
            blank,
            position_free=settings.position_free,
        )
        _begin_at(self.mapping, self._first_rows(clip, blank))
        self.depends_on = {
            "face encoder": tensors_digest(encoder.state_dict()),
            "crop": settings.crop,
            "model family": checkpoint.family,
            "position_free": str(settings.position_free),
            "list of people": digest(faces.names),
        }
        self.people = faces.people
        self.photos_of = [
            torch.nonzero(self.people == person).flatten().tolist()
            for person in range(len(faces.names))
        ]
        # In a list, so that they are no modules of this one: they are neither trained nor saved.
        self._frozen = [checkpoint, encoder]
        self._data = [self._of(faces), self._of(tests) if len(tests) else None]

    def _first_rows(self, clip: CLIP, blank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What draws the class word before the first step, by text encoder (vectors, width)."""
        rows = {name: one[0] for name, one in blank.items()}
        if not self.settings.position_free:
            return rows
        prompt = self.settings.template.replace("<name>", self.plain.placeholder)
        tokens = with_placeholders(clip, [self.plain]).tokenize(prompt)
        for name, model in encoder_models(clip).items():
            items = list(items_of(tokens[name]))
            places = [n for n, item in enumerate(items) if isinstance(item, PlaceholderToken)]
            rows[name] = rows[name] + position_embeddings(model)[places[: self.settings.vectors]]
        return rows

    def _of(self, faces: Faces) -> _Data:
        checkpoint, encoder = self._frozen
        settings = self.settings
        captions = [record.caption if settings.captions else "" for record in faces.records]
        masks = faces.tensors["mask"].float() / 255 if settings.needs_masks else None
        denoiser = ComfyDenoiser(
            checkpoint.model,
            checkpoint.clip,
            [self.plain],
            [settings.template],
            faces.tensors["latent"],
            masks,
            captions,
            dtype=settings.dtype,
            with_maps=False,
            class_guided=settings.class_guided,
        )
        return _Data(denoiser, features_of(encoder, faces), faces.expressions)

    @property
    def module(self) -> nn.Module:
        """Itself: the mapping is all that it holds."""
        return self

    @property
    def samples(self) -> int:
        """Number of photos to learn from."""
        return len(self.people)

    @property
    def loss_scale(self) -> float:
        """That of what the U-Net computes in."""
        return self._data[0].denoiser.loss_scale

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """U-Net and text encoder, for :func:`learning.differentiable.differentiable`."""
        denoiser = self._data[0].denoiser
        return denoiser.model.model.diffusion_model, denoiser.clip.cond_stage_model

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW on the mapping."""
        return torch.optim.AdamW(
            module.parameters(),
            self.settings.mapping_learning_rate,
            weight_decay=self.settings.mapping_weight_decay,
        )

    def forward(self, rows: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The noise loss of these photos; all chance comes from their seeds."""
        return self._loss(self._data[0], rows, seeds, self.training)

    def _loss(
        self, data: _Data, rows: Sequence[int], seeds: Sequence[int], learning: bool
    ) -> torch.Tensor:
        settings = self.settings
        sources, batches, told = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            timestep = int(torch.randint(TRAINING_TIMESTEPS, (1,), generator=generator))
            chance = torch.rand(2, generator=generator).tolist()
            source = row
            if learning and settings.another_photo:
                photos = self.photos_of[int(self.people[row])]
                others = [photo for photo in photos if photo != row] or [row]
                source = others[int(chance[0] * len(others))]
            sources.append(source)
            expression = data.expressions[row]
            if not learning or chance[1] < settings.expression_dropout:
                expression = torch.full_like(expression, float("nan"))
            told.append(expression)
            batches.append(Batch([row], [0], [timestep], seed))
        device = self.mapping.null_exp.device
        found = self.mapping(data.features[sources].to(device), torch.stack(told).to(device))
        stages = [stage_of_timestep(batch.timesteps[0], settings.stages) for batch in batches]
        embeddings = [self.mapping.rows_of(found, n, stage) for n, stage in enumerate(stages)]
        made = data.denoiser.predict(embeddings, *batches)
        weight = settings.background_weight if settings.masked else 1.0
        if settings.class_guided:
            weight = weight or 1.0
        return noise_loss(made.output, made.target, made.face, weight, made.background)

    @torch.no_grad()
    def validate(self, step: int, log: Log) -> None:
        """Of people who were kept out: the noise loss, on fixed noise, the length of what is
        predicted in lengths of the class word's vectors, and a picture of one."""
        data = self._data[1]
        if data is None:
            return
        rows = list(range(min(len(data.features), 64)))
        losses = [
            float(self._loss(data, [row], [(row + 1) * 7919 + n], False))
            for row in rows
            for n in range(2)
        ]
        length = self._length_of(data.features[rows])
        log.figures(step, validation_loss=sum(losses) / len(losses), vector_length=length)
        if length > LONG:
            logger.warning(
                "step %d: predicted vectors are %.0f times as long as the class word's, and can "
                "hardly be refined: lower mapping_learning_rate", step, length,
            )  # fmt: skip
        (model, clip, vae), _ = self._frozen
        side = data.denoiser.latents.shape[-1] * 8
        prompt = self.settings.validation_prompt.replace("<name>", self.plain.placeholder)
        identity = self._identity_of(data, 0)
        log.picture(step, "predicted", sample_picture(model, clip, vae, identity, prompt, side))

    def _identity_of(self, data: _Data, row: int) -> Identity:
        found = self.mapping(data.features[row : row + 1].to(self.mapping.null_exp.device))
        keys, values = self.mapping.vectors_of(found)
        plain = self.plain
        return Identity(
            plain.name, plain.class_word, plain.family, keys, values,
            position_free=plain.position_free,
        )  # fmt: skip

    def _length_of(self, features: torch.Tensor) -> float:
        found = self.mapping(features.to(self.mapping.null_exp.device))
        values = [found[output.name] for output in self.mapping.outputs if output.role != "key"]
        predicted, word = (
            sum(float(vectors.norm(dim=-1).mean()) for vectors in ones) / len(ones)
            for ones in (values, self.plain.value_vectors.values())
        )
        return predicted / word

    def face_encoder(self) -> FaceEncoder:
        """What was learned, with the encoder."""
        _, encoder = self._frozen
        return FaceEncoder(
            encoder,
            self.mapping,
            self.shape,
            self.plain.family,
            self.settings.crop,
            self.settings.position_free,
            self.settings.class_word,
        )


class _Data(NamedTuple):
    """What the loss needs: latents in a denoiser, features (N, F) and expressions (N, 64)."""

    denoiser: ComfyDenoiser
    features: torch.Tensor
    expressions: torch.Tensor


@torch.no_grad()
def _begin_at(mapping: FaceMapping, rows: dict[str, torch.Tensor]) -> None:
    """Have every head give its row, whatever it is asked."""
    numbers: dict[tuple[str, str], int] = {}
    for output in mapping.outputs:
        number = numbers[output.encoder, output.role] = (
            numbers.get((output.encoder, output.role), -1) + 1
        )
        last = mapping.get_submodule(output.name).get_submodule("fc_out")
        last.weight.zero_()  # pyright: ignore[reportCallIssue]
        last.bias.copy_(rows[output.encoder][number].repeat(output.stages))  # pyright: ignore[reportCallIssue]


def load_checkpoint(path: Path) -> Checkpoint:
    """MODEL, CLIP and VAE of a checkpoint file, as Load Checkpoint gives them.

    Raises :class:`SeFiError` for a file that cannot be read, without one of them, or of a family
    that this pack does not know.
    """
    try:
        with torch.inference_mode():
            model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=True, output_clip=True
            )
    except Exception as error:  # ComfyUI says in many ways that it is no checkpoint
        raise SeFiError(
            f"{path} cannot be loaded as a checkpoint ({' '.join(str(error).split())[:200]}): give "
            "a whole checkpoint of Stable Diffusion"
        ) from error
    if model is None or clip is None or vae is None or vae.first_stage_model is None:
        raise SeFiError(f"{path} lacks U-Net, text encoder or VAE: give a whole checkpoint")
    checkpoint = Checkpoint(model, clip, vae)
    if checkpoint.family not in FAMILIES:
        raise SeFiError(
            f"{path} is a {checkpoint.family}: give a checkpoint of one of {', '.join(FAMILIES)}"
        )
    return checkpoint
