"""Trainings that are stopped at any operation of theirs.

A cancel, a lack of memory, an exception or models that are unloaded may come at any tensor
operation, forward, backward, while models are loaded or pictures drawn. Afterwards everything
upstream is what it was, bit by bit, and a plain prompt draws the picture of before.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from sefi_ide.tests.comfy import random_checkpoint, training_runs
from sefi_ide.tests.comfy.test_train_isolation import assert_same_contents, contents
from torch.utils._python_dispatch import TorchDispatchMode

from ...sefi_core.errors import SeFiError
from .campaign import NotTried

NAME = "training"
SECONDS = 300.0

SIDE = 8


class Boom(Exception):
    """Something that nobody expects."""


ERRORS: dict[str, type[BaseException] | None] = {
    "cancel": comfy.model_management.InterruptProcessingException,
    "memory": comfy.model_management.OOM_EXCEPTION,
    "exception": Boom,
    "unload": None,
    "flag": comfy.model_management.InterruptProcessingException,
}
"""What happens, and what may come out of it; the flag is set as ComfyUI's cancel button does."""


SETTINGS = (
    {"stages": 1},
    {"stages": 3, "preview_every": 1, "vectors": 2},
    {"stages": 2, "captions": "auto", "steps": 1},
    {"stages": 1, "gradient_checkpointing": "on"},
)


class Struck(TorchDispatchMode):
    """Counts tensor operations; before number ``at`` something happens, once."""

    def __init__(self, at: int | None = None, what: str = ""):
        super().__init__()
        self.count, self._at, self._what = 0, at, what

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self._at is not None and self.count > self._at:
            self._at = None
            if self._what == "unload":
                comfy.model_management.unload_all_models()
            elif self._what == "flag":
                comfy.model_management.interrupt_current_processing()
            else:
                raise ERRORS[self._what]("struck")  # type: ignore[misc]
        return function(*args, **(kwargs or {}))


class Upstream:
    """MODEL, CLIP and VAE of one family, what they hold, and what they draw."""

    def __init__(self, folder: Path, family: str, lora: bool):
        path = folder / f"{family}.safetensors"
        if not path.exists():
            random_checkpoint.save(path, torch.float32, family=random_checkpoint.FAMILIES[family])
        model, clip, vae = training_runs.load(path)
        if lora:
            model, clip = training_runs.with_lora(model, clip)
        self.models = model, clip, vae
        self.operations: dict[tuple, int] = {}
        with torch.inference_mode():  # ComfyUI marks the layers when it loads a model
            comfy.model_management.load_models_gpu([model, clip.patcher])
        self.picture = self.draw()
        self.state = self.looked_at()

    def looked_at(self) -> tuple[Any, Any]:
        """All that anybody could have changed, with nothing loaded."""
        model, clip, vae = self.models
        # What is struck while ComfyUI loads a model stays marked as loaded until the next time.
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([model, clip.patcher, vae.patcher])
        comfy.model_management.unload_all_models()
        modules = model.model, clip.cond_stage_model, vae.first_stage_model
        patchers = model, clip.patcher, vae.patcher
        around = [
            (
                repr(one.model_options),
                {key: [repr(patch) for patch in patches] for key, patches in one.patches.items()},
                sorted(one.object_patches),
                repr(one.wrappers),
                repr(one.callbacks),
                repr(one.attachments),
                sorted(one.backup),
            )
            for one in patchers
        ]
        hooks = [
            (name, len(layer._forward_hooks), len(layer._forward_pre_hooks),
             len(layer._backward_hooks), layer.training)
            for module in modules for name, layer in module.named_modules()
        ]  # fmt: skip
        switches = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        interrupted = comfy.model_management.processing_interrupted()
        return contents(*modules), (around, hooks, switches, interrupted)

    def draw(self) -> torch.Tensor:
        """What a prompt without the pack draws."""
        model, clip, vae = self.models
        noise = torch.randn(
            1, training_runs.CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3)
        )
        with torch.inference_mode():
            said = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a hat", "")]
            latent = comfy.sample.sample(
                model, noise, 2, 4.0, "euler", "normal", *said, torch.zeros_like(noise),
                disable_pbar=True, seed=0,
            )  # fmt: skip
            return vae.decode(latent)


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    torch.set_num_threads(1)
    made: dict[tuple[str, bool], Upstream] = {}
    with tempfile.TemporaryDirectory(prefix="sefi-fuzz-") as folder:

        def one_case(chance: random.Random) -> None:
            key = chance.choice(list(random_checkpoint.FAMILIES)), chance.random() < 0.7
            upstream = made.pop(key, None) or Upstream(Path(folder), *key)
            case(upstream, chance)
            made[key] = upstream  # one that was changed is not used again

        yield one_case


def case(upstream: Upstream, chance: random.Random) -> None:
    number = chance.randrange(len(SETTINGS))
    settings = {"steps": 2, **SETTINGS[number]}
    masks = chance.choice([None, [training_runs.photo_and_mask()[1]]])
    key = number, masks is None

    def train(mode: Struck) -> None:
        comfy.model_management.unload_all_models()
        with mode:
            training_runs.run(upstream.models, masks=masks, **settings)

    if key not in upstream.operations:
        mode = Struck()
        try:
            train(mode)
        except SeFiError as error:  # a family that cannot be trained
            raise NotTried(str(error)) from error
        upstream.operations[key] = mode.count
    what = chance.choice(list(ERRORS))
    mode = Struck(chance.randrange(upstream.operations[key]), what)
    try:
        train(mode)
    except (*filter(None, ERRORS.values()), SeFiError):
        pass
    finally:
        comfy.model_management.interrupt_current_processing(False)
    contents_now, around_now = upstream.looked_at()
    assert_same_contents(upstream.state[0], contents_now)
    for one, other in zip(upstream.state[1], around_now, strict=True):
        assert one == other
    assert torch.equal(upstream.draw(), upstream.picture), "another picture than before"
    comfy.model_management.unload_all_models()
