"""A picture of the plain text that is drawn beside that of the identity, from the same noise.

The sampler draws twice as many latents; the second half is the text's. A step is two calls of the
guider, each with one half, so that guidance, windows of frames and everything else of other nodes
see latents as they would without the text's. What the sampler draws of noise is the same for both.
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
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The text's half first, then the identity's, which looks at it."""
        count, mixing = self.count, self.mixing
        if self.noise is None or len(x) != 2 * count:
            return executor(x, timestep, *args, **kwargs)
        sigma = float(timestep.detach().flatten()[0])
        with self.noise.paused():
            try:
                text = None
                if not self.falling or sigma >= mixing.lowest:
                    mixing.now = Pass.TEXT
                    text = executor(x[count:], timestep[count:], *args, **kwargs)
                mixing.now = Pass.IDENTITY
                drawn = executor(x[:count], timestep[:count], *args, **kwargs)
            finally:
                mixing.now = Pass.BOTH
                mixing.steps.clear()
        # Nothing looks at the text's picture any more; its half of the sampler goes on with this.
        return torch.cat([drawn, drawn if text is None else text])


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
