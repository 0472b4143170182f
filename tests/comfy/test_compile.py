"""TorchCompileModel after SeFi Apply Identity: no prompt gets the code of another."""

from __future__ import annotations

import comfy.sample
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.embeddings import class_word_embedding
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.tests.mini_sd.architecture import LATENT_CHANNELS

PROMPTS = ("a photo of person", "a photo of <anna>", "a photo of <bob>", "a photo of person")


def sample(model, clip, prompt: str) -> torch.Tensor:
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "blurry")
    )
    noise = torch.randn(1, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        model, noise, 2, 4.0, "euler", "normal", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip


@torch.inference_mode()
def test_every_prompt_is_drawn_as_without_compilation(mini_sd, fresh_compiler):
    model, clip, _ = mini_sd
    word = class_word_embedding(clip, "person")["l"]
    for seed, name in enumerate(("anna", "bob")):
        generator = torch.Generator().manual_seed(seed)
        keys, values = (
            {"l": word + 0.1 * torch.randn(1, 1, 128, generator=generator)} for _ in "kv"
        )
        identity = Identity(name, "person", "sd1", keys, values)
        model, clip = apply_identity(model, clip, AppliedIdentity(identity))
    compiled = model.clone()
    # The node does this; its backends need a C++ compiler.
    set_torch_compile_wrapper(
        compiled, "eager", options={"guard_filter_fn": skip_torch_compile_dict}
    )
    drawn = []
    for prompt in PROMPTS:
        expected = sample(model, clip, prompt)
        drawn.append(sample(compiled, clip, prompt))
        torch.testing.assert_close(drawn[-1], expected, rtol=1e-3, atol=1e-3)
    assert (drawn[0] - drawn[1]).abs().mean() > 0.01 < (drawn[1] - drawn[2]).abs().mean()
