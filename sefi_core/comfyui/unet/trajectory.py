"""A picture of the plain text that is drawn beside that of the identity, from the same noise.

The sampler draws twice as many latents; the second half is the text's. A step is two calls of the
guider, each with one half, so that guidance, windows of frames and everything else of other nodes
see latents as they would without the text's. What the sampler draws of noise is the same for both,
and what it has called behind guidance is called once, with both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrapperExecutor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .mixing import Mixing


BEHIND_GUIDANCE = "sampler_post_cfg_function"
"""The model option with functions that ComfyUI calls with a step's result and its parts."""

BEFORE_GUIDANCE = "sampler_pre_cfg_function"


class Pass(Enum):
    """What of a step is computed."""

    BOTH = "both"
    TEXT = "text"
    IDENTITY = "identity"


class OwnTrajectory:
    """The wrappers of one sampling with ``count`` latents."""

    def __init__(self, mixing: Mixing, count: int) -> None:
        self.mixing, self.count = mixing, count
        self.noise: SameNoise | None = None
        """Set while latents are doubled."""
        self.falling = False
        """Whether each noise level of the sampling is below the one before."""

    def sampler_sample(
        self,
        executor: WrapperExecutor,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Sample both; what comes back, and what ``callback`` gets, is of the identity's alone."""
        mixing, levels = self.mixing, sigmas.tolist()
        if not any(mixing.acts_at(level) and mixing.texts.any(level) for level in levels[:-1]):
            return executor(
                guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask,
                disable_pbar,
            )  # fmt: skip
        count = self.count
        self.falling = all(one > other for one, other in zip(levels, levels[1:], strict=False))

        def of_identity(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> Any:
            return None if callback is None else callback(step, x0[:count], x[:count], steps)

        doubled = [
            one if one is None or len(one) != count else torch.cat([one, one])
            for one in (noise, latent_image, denoise_mask)
        ]
        self.noise = SameNoise((count, *noise.shape[1:]))
        try:
            with self.noise:
                samples = executor(guider, sigmas, extra_args, of_identity, *doubled, disable_pbar)
        finally:
            self.noise = None
        return samples[:count]

    def predict_noise(
        self,
        executor: WrapperExecutor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The text's half first, then the identity's, which looks at it."""
        count, mixing = self.count, self.mixing
        if self.noise is None or len(x) != 2 * count:
            return executor(x, timestep, model_options, *args, **kwargs)
        if model_options.get(BEFORE_GUIDANCE):
            mixing.tell(
                "another node changes what guidance gets, of the text's picture and the identity's "
                "in turn, and an average that it keeps (APG's momentum) is of both: if the picture "
                "suffers, set trajectory to same."
            )
        listeners = SamplerListeners(executor.class_obj, model_options)

        def half(rows: slice, now: Pass) -> torch.Tensor:
            mixing.now = now
            options = listeners.options_of(now)
            return executor(x[rows], timestep[rows], options, *args, **kwargs)

        sigma = float(timestep.detach().flatten()[0])
        with self.noise.paused():
            try:
                text = None
                if not self.falling or sigma >= mixing.lowest:
                    text = half(slice(count, None), Pass.TEXT)
                drawn = half(slice(count), Pass.IDENTITY)
            finally:
                mixing.now = Pass.BOTH
                mixing.steps.clear()
        # Nothing looks at the text's picture any more; its half of the sampler goes on with this.
        return listeners.called(torch.cat([drawn, drawn if text is None else text]))


class SamplerListeners:
    """What a sampler itself has called behind guidance, as all that are named cfg_pp have.

    It keeps something of a step for all its latents. Called for each half it would know the last
    alone, so that the halves take down what it is told, and it is told once of both.
    """

    def __init__(self, guider: Any, options: dict[str, Any]) -> None:
        of_nodes = guider.model_options.get(BEHIND_GUIDANCE, [])
        self.options = options
        self.added = [one for one in options.get(BEHIND_GUIDANCE, []) if one not in of_nodes]
        self.told: dict[Pass, dict[str, Any]] = {}

    def options_of(self, half: Pass) -> dict[str, Any]:
        """The options for a half, which take down in the place of the sampler's functions."""
        if not self.added:
            return self.options

        def take_down(arguments: dict[str, Any]) -> torch.Tensor:
            self.told[half] = arguments
            denoised: torch.Tensor = arguments["denoised"]
            return denoised

        of_nodes = [one for one in self.options[BEHIND_GUIDANCE] if one not in self.added]
        return {**self.options, BEHIND_GUIDANCE: [*of_nodes, take_down]}

    def called(self, denoised: torch.Tensor) -> torch.Tensor:
        """What the functions make of both halves (latents, ...), the identity's first."""
        if Pass.IDENTITY not in self.told:  # the guider calls no such functions
            return denoised
        first = self.told[Pass.IDENTITY]
        second = self.told.get(Pass.TEXT, first)
        arguments = {
            name: torch.cat([one, second[name]])
            if isinstance(one, torch.Tensor) and one.ndim and 2 * len(one) == len(denoised)
            else one
            for name, one in first.items()
        }
        arguments["model_options"] = self.options
        for function in self.added:
            denoised = function({**arguments, "denoised": denoised})
        return denoised


class SameNoise(TorchFunctionMode):
    """While it is on, noise for twice ``shape`` (latents, ...) is that for ``shape``, twice.

    Samplers draw noise by PyTorch's functions, in the shape of their latents.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.doubled = (2 * shape[0], *shape[1:])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every function of PyTorch."""
        kwargs = kwargs or {}
        if func is torch.randn:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if tuple(size) == self.doubled:
                rest = {name: one for name, one in kwargs.items() if name != "size"}
                half = func(self.shape, **rest)
                return torch.cat([half, half])
        elif func is torch.randn_like and tuple(args[0].shape) == self.doubled:
            half = func(args[0][: self.shape[0]], *args[1:], **kwargs)
            return torch.cat([half, half])
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Off meanwhile: the model calls thousands of functions."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
