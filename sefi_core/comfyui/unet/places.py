"""Which conditioning and which part of the picture each row of the U-Net's batch is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.conds
import torch
from comfy.patcher_extension import WrapperExecutor
from comfy.utils import repeat_to_batch_size


class Place(NamedTuple):
    """What a row is of; sizes in latent cells."""

    number: int
    """Of its conditioning in the sampling."""
    latent: int
    """Of its picture in the batch of latents."""
    height: int
    width: int
    top: int
    left: int


def of_picture(number: int, latents: int, size: tuple[int, int]) -> RowPlaces:
    """The rows of a conditioning that is of whole pictures (height, width)."""
    return RowPlaces(torch.tensor([[number, latent, *size, 0, 0] for latent in range(latents)]))


def number_conditionings(
    conds: Sequence[dict[str, Any]], key: str, latents: int, size: tuple[int, int]
) -> None:
    """Give each conditioning of a sampling its number, under ``key`` of its ``model_conds``."""
    for number, cond in enumerate(conds):
        places = of_picture(number, latents, size)
        cond["model_conds"] = {**cond.get("model_conds", {}), key: places}


def keeping_latents(run_key: str) -> Callable[..., torch.Tensor]:
    """A ``PREDICT_NOISE`` wrapper that lets the run under ``run_key`` know the step's latents."""

    def predict_noise(
        executor: WrapperExecutor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        guider: Any = executor.class_obj
        run = guider.model_options.get("transformer_options", {}).get(run_key)
        if run is not None:
            run.latents = x
        return executor(x, timestep, *args, **kwargs)

    return predict_noise


class RowPlaces(comfy.conds.CONDRegular):
    """The :class:`Place` of each row as whole numbers (rows, 6).

    An entry of ``model_conds``, so that ComfyUI cuts it to areas and windows of frames with what it
    belongs to. Where a batch is put together it becomes a list, which stays on the CPU.
    """

    def process_cond(
        self, batch_size: int, area: Sequence[int] | None = None, **kwargs: Any
    ) -> RowPlaces:
        """The rows of a call of the U-Net; ``area`` has the sizes, then where they begin."""
        rows = repeat_to_batch_size(self.cond, batch_size)
        if area is not None:
            half = len(area) // 2
            crop = [*area[half - 2 : half], *area[-2:]]
            rows = torch.cat([rows[:, :2], rows.new_tensor([crop]).expand(len(rows), 4)], dim=1)
        return self._copy_with(rows)

    def concat(self, others: Sequence[RowPlaces]) -> list[Place]:
        """The places of all rows of the batch."""
        rows = torch.cat([self.cond, *(other.cond for other in others)])
        return [Place(*row) for row in rows.tolist()]


def found_in(pictures: torch.Tensor, row: torch.Tensor) -> Place | None:
    """Where a row (channels, height, width) was cut out of ``pictures`` (latents, ...).

    Latents have noise, so that their numbers tell the place. None where nothing of the pictures is
    equal to the row, which then was changed after it was cut.
    """
    channels, (height, width) = pictures.shape[1], row.shape[-2:]
    row = row[:channels]
    rows, columns = (
        whole - part + 1 for whole, part in zip(pictures.shape[-2:], (height, width), strict=True)
    )
    if rows <= 0 or columns <= 0 or len(row) != channels:
        return None
    corners = pictures[:, :, :rows, :columns] == row[:, :1, :1]
    for latent, top, left in corners.all(1).nonzero().tolist():
        if torch.equal(pictures[latent, :, top : top + height, left : left + width], row):
            return Place(-1, latent, height, width, top, left)
    return None


Levels = float | Sequence[float]
"""The noise level (sigma) of all rows, or one for each of a number of rows that is repeated."""


def levels_in(options: Mapping[str, Any]) -> Levels:
    """The noise levels of a call of the U-Net; trainings may have another for each latent."""
    levels = options["sigmas"].detach().flatten().tolist()
    return levels[0] if levels.count(levels[0]) == len(levels) else levels


def of_rows(levels: Levels, count: int) -> Sequence[float]:
    """The noise level of each of ``count`` rows."""
    if isinstance(levels, int | float):
        return [levels] * count
    return [levels[row % len(levels)] for row in range(count)]


def rows_in(
    given: Sequence[Place],
    x: torch.Tensor,
    sampling: Any,
    latents: torch.Tensor | None,
    sigmas: torch.Tensor,
) -> Sequence[Place | None]:
    """What of the picture each row of the U-Net's input (rows, channels, height, width) is.

    ``given`` are ComfyUI's. Rows that another pack has cut once more, into tiles, are looked for in
    the step's ``latents``, scaled for the model by ``sampling``; None where they are not found.
    """
    size = tuple(x.shape[-2:])
    if len(given) == len(x) and all((one.height, one.width) == size for one in given):
        return given
    if latents is None:
        return [None] * len(x)
    pictures = sampling.calculate_input(sigmas[:1], latents).to(x)
    return [found_in(pictures, row) for row in x]
