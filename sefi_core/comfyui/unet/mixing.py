"""Mixed attention: the picture of an identity looks at that of the plain text as well.

Each step is computed twice. The first pass is the *text version*: class words in the places of
placeholders, other packs' identities taken away (:mod:`.text_version`). What every self-attention
layer attends to is recorded. In the second pass the rows with an identity attend to that besides
their own (:mod:`.mixing_step`); others that ComfyUI computes with them, of the same guidance, twice
to their own, which changes nothing. The text's rows see either the same latents, or those of a
picture of their own (:mod:`.trajectory`).

All of it is set up for one sampling, in the guider's copies of options and conditionings, by an
``OUTER_SAMPLE`` wrapper. ``CALC_COND_BATCH`` makes the passes, ``DIFFUSION_MODEL`` the patches of a
call, behind those of other packs. As in :mod:`.sampling` a row is known by a number in its
``model_conds``, with its place in the picture, and tiles of other packs by content.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..base_model import model_sampling_of, representative_layers, uncompiled
from .capture import PATCH as CROSS_ATTENTION
from .capture import looking, previous_patch
from .conditioning import fingerprints
from .mixing_step import MixSettings, Rows, Step
from .places import Place, found_in, number_conditionings
from .text_version import CONTEXT, PLACES_KEY, Texts, number_of
from .trajectory import OwnTrajectory, Pass

logger = logging.getLogger(__name__)

WRAPPERS_KEY = "sefi_mixed_attention"
STEP_KEY = "sefi_mixed_attention_step"

PATCH = "attn1_patch"
SELF_ATTENTION = "attn1"

Groups = Sequence[list[dict[str, Any]] | None]
"""What ComfyUI computes at once: the conditionings of positive, negative and others."""


class Mixing:
    """Mixed attention in one sampling of a ``guider``, with latents of ``size``."""

    def __init__(self, settings: MixSettings, guider: Any, size: tuple[int, int]) -> None:
        self.settings, self.size = settings, size
        self.texts = Texts(guider, settings.of_others)
        self.sampling = model_sampling_of(guider.model_patcher)
        of_percent = self.sampling.percent_to_sigma
        self.lowest = float(of_percent(settings.end_percent))
        self.highest = float(of_percent(settings.start_percent))
        self.now = Pass.BOTH
        self.steps: deque[Step | None] = deque()
        """What the text's pass has left, where it is not computed together with the identity's."""
        self._told: set[str] = set()

    def begin(self, options: dict[str, Any], latents: int) -> None:
        """Number the conditionings; set the wrappers of the sampling in its options."""
        number_conditionings(self.texts.conds, PLACES_KEY, latents, self.size)
        wrappers = {kind: dict(by_key) for kind, by_key in options.get("wrappers", {}).items()}
        inner = {
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
            WrappersMP.DIFFUSION_MODEL: self.diffusion_model,
        }
        if self.settings.own:
            own = OwnTrajectory(self, latents)
            inner[WrappersMP.SAMPLER_SAMPLE] = own.sampler_sample
            others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
            wrappers[WrappersMP.PREDICT_NOISE] = {WRAPPERS_KEY: [own.predict_noise], **others}
        for kind, wrapper in inner.items():
            wrappers.setdefault(kind, {})[WRAPPERS_KEY] = [wrapper]
        options["wrappers"] = wrappers

    def acts_at(self, sigma: float) -> bool:
        """Whether a noise level is in the range."""
        return self.lowest <= sigma <= self.highest

    def calc_cond_batch(
        self,
        executor: WrapperExecutor,
        model: Any,
        conds: Groups,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Compute a call for the text, for the identity, or for one after the other."""

        def compute(groups: Groups, step: Step | None) -> list[torch.Tensor]:
            options = self._options(model_options, step, groups)
            return executor(model, groups, x, timestep, options)

        sigma = float(timestep.detach().flatten()[0])
        acts = self.acts_at(sigma)
        numbers = [self.texts.acting(group if acts else None, sigma) for group in conds]
        acting = frozenset[int]().union(*numbers)
        step = Step(self.settings, self.size, acting, x, timestep[:1]) if acting else None
        if self.now is Pass.TEXT:
            self.steps.append(step)
            return compute([self.texts.of(group) for group in conds], step)
        if self.now is Pass.IDENTITY:
            recorded = self.steps.popleft() if self.steps else None
            step = recorded if recorded is not None and recorded.numbers == acting else None
        if step is None:
            return executor(model, conds, x, timestep, model_options)
        identities = [group if own else None for group, own in zip(conds, numbers, strict=True)]
        others = [None if own else group for group, own in zip(conds, numbers, strict=True)]
        plain: list[torch.Tensor] | None = None
        if self.now is Pass.BOTH:
            # Where other nodes' patches are taken away, what has no identity must not lose them.
            groups = identities if self.settings.of_others else conds
            text = compute([self.texts.of(group) for group in groups], step)
            plain = None if self.settings.of_others else text
        step.recording, step.latents = False, x
        drawn = compute(identities, step)
        if plain is None and any(others):
            plain = executor(model, others, x, timestep, model_options)
        return [
            one if own or plain is None else plain[number]
            for number, (one, own) in enumerate(zip(drawn, numbers, strict=True))
        ]

    def diffusion_model(
        self,
        executor: WrapperExecutor,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None,
        control: dict[str, Any] | None,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Add the patches of a call in which rows are recorded or mixed."""
        given = kwargs.pop(PLACES_KEY, ())
        step: Step | None = transformer_options.get(STEP_KEY)
        rows = [] if step is None else self._identities_in(step, given, x, context)
        if step is not None and rows:
            patches = transformer_options.get("patches", {})
            replaced = transformer_options.get("patches_replace", {})
            patch = step.patch(rows, len(x), replaced.get(SELF_ATTENTION, {}))
            patches = {**patches, PATCH: [*patches.get(PATCH, []), patch]}
            transformer_options = {**transformer_options, "patches": patches}
            if step.recording and self._finds_faces():
                of_layers = replaced.get(CROSS_ATTENTION, {})
                look = step.looking(rows, len(x), self.texts.columns)
                unet: Any = executor.class_obj
                of_layers = of_layers | {
                    block: looking(look, x.shape[-2], previous_patch(of_layers, block))
                    for block in representative_layers(unet)
                }
                replaced = {**replaced, CROSS_ATTENTION: of_layers}
                transformer_options["patches_replace"] = replaced
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _options(
        self, model_options: dict[str, Any], step: Step | None, groups: Groups
    ) -> dict[str, Any]:
        """The options of a pass; the step is told of the conditionings that it is computed with."""
        options = model_options.get("transformer_options", {})
        if step is None or step.recording:
            options = self.texts.options(options)
        if step is not None:
            every = [cond for group in groups for cond in group or ()]
            step.contexts = {
                number: cond["model_conds"][CONTEXT].cond
                for cond in every
                if (number := number_of(cond)) in step.numbers and CONTEXT in cond["model_conds"]
            }
        return {**model_options, "transformer_options": {**options, STEP_KEY: step}}

    def _identities_in(
        self, step: Step, given: Sequence[Place], x: torch.Tensor, context: torch.Tensor | None
    ) -> Rows:
        """The rows of a call in which identities act."""
        size = tuple(x.shape[-2:])
        places: Sequence[Place | None] = given
        if len(given) != len(x) or any((one.height, one.width) != size for one in given):
            places = self._tiles(step, x, context) if given and context is not None else ()
        return [
            (index, place)
            for index, place in enumerate(places)
            if place is not None and place.number in step.numbers
        ]

    def _tiles(self, step: Step, x: torch.Tensor, context: torch.Tensor) -> list[Place | None]:
        """The places of rows that another node has cut once more, found in the step's latents."""
        scaled = self.sampling.calculate_input(step.sigma, step.latents).to(x)
        known = {
            marks: number
            for number, one in step.contexts.items()
            for marks in fingerprints(one.to(context))
        }
        found: list[Place | None] = []
        for row, marks in zip(x, fingerprints(context), strict=True):
            number = next((known[own] for own in known if marks[: len(own)] == own), None)
            place = None if number is None else found_in(scaled, row)
            if number is not None and place is None:
                self.tell(
                    "another node changed the part of the picture that the model sees, and what "
                    "the text draws there cannot be found: nothing is mixed."
                )
            found.append(place and place._replace(number=number))
        return found

    def _finds_faces(self) -> bool:
        finds = self.settings.hides and self.settings.mask is None
        if finds and self.settings.of_others:
            self.tell(
                "where other nodes' identities are in the text's picture is not known, and no face "
                "is hidden: connect a face_mask."
            )
            return False
        return finds

    def tell(self, message: str) -> None:
        """Log it once in the sampling."""
        if message not in self._told:
            self._told.add(message)
            logger.info("SeFi Mixed Attention: %s", message)


def mix_attention(model: ModelPatcher, settings: MixSettings) -> ModelPatcher:
    """A clone of ``model`` that samples with mixed attention."""

    def outer_sample(
        executor: WrapperExecutor, noise: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        guider: Any = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        Mixing(settings, guider, (noise.shape[-2], noise.shape[-1])).begin(options, len(noise))
        # Where the MODEL knows identities, their own wrapper has seen to it.
        with uncompiled() if settings.of_others else nullcontext():
            return executor(noise, *args, **kwargs)

    clone = without_mixing(model)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPERS_KEY, outer_sample)
    return clone


def without_mixing(model: ModelPatcher) -> ModelPatcher:
    """A clone of ``model`` that samples without it."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPERS_KEY)
    return clone
