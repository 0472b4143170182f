"""Run in a process of its own: Stable Diffusion 1.5 in its true shape, with random fp16 weights.

Loads the checkpoint with CheckpointLoaderSimple, trains two steps, saves, loads, applies and
samples, and prints one JSON object: what came out, and how much private memory each phase took.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 64  # pixels; the deepest level of the U-Net is then a single cell
NOISE = 1_000_003

UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
    "legacy": False,
}
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def write_checkpoint(path: Path) -> None:
    """A file of 2 GB in the layout of Stable Diffusion 1.5, every layer about variance one."""
    import comfy.ldm.models.autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel
    import comfy.ops
    import comfy.sd1_clip
    import safetensors.torch
    import torch

    with torch.device("meta"):
        modules = {
            "model.diffusion_model.": comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
                **UNET_CONFIG, device="meta", operations=comfy.ops.disable_weight_init
            ),
            "cond_stage_model.transformer.": comfy.sd1_clip.SD1ClipModel(
                device="meta", dtype=torch.float16
            ).clip_l.transformer,
            "first_stage_model.": comfy.ldm.models.autoencoder.AutoencoderKL(
                ddconfig=VAE_CONFIG, embed_dim=4
            ),
        }
    # Drawn once and repeated: a thousand million normal numbers take half a minute. The length has
    # no factor in common with any layer's, so no two rows of a layer are the same.
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).half()
    used, state_dict = 0, {}
    for prefix, module in modules.items():
        for name, shape in ((name, tensor.shape) for name, tensor in module.state_dict().items()):
            tensor = torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
            if len(shape) > 1:
                spread = 0.02 if "embedding" in name else math.prod(shape[1:]) ** -0.5
                repeats = -(-tensor.numel() // NOISE)
                drawn = noise.roll(-used).repeat(repeats)[: tensor.numel()]
                tensor = drawn.mul_(spread).reshape(shape)
                used = (used + tensor.numel()) % NOISE
            state_dict[prefix + name] = tensor
    safetensors.torch.save_file(state_dict, str(path))


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@contextmanager
def peak_of(peaks: dict[str, int], phase: str) -> Iterator[None]:
    """Note the largest private memory while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peaks[phase] = max(peaks[phase], private_bytes())

    peaks[phase] = private_bytes()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def main() -> None:
    tools = runpy.run_path(str(REPOSITORY / "tools" / "comfyui.py"))
    tools["start"](cpu=True, prefix="sefi-full-shape-")
    import folder_paths
    import torch
    from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
    from sefi_ide.nodes.identity_files import SeFiLoadIdentity, SeFiSaveIdentity
    from sefi_ide.sefi_core.comfyui import library
    from sefi_ide.sefi_core.comfyui.learning.train import train_identity
    from sefi_ide.sefi_core.learning.photos import pair_photos
    from sefi_ide.sefi_core.learning.settings import TrainingSettings

    import nodes

    library.register_model_folder()
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "full.safetensors"
    write_checkpoint(checkpoint)

    def sample(model, clip, prompt: str) -> torch.Tensor:
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
        )
        latent = {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8)}
        return nodes.common_ksampler(
            model, 1, 1, 3.0, "euler", "normal", positive, negative, latent
        )[0]["samples"]

    peaks: dict[str, int] = {}
    with torch.inference_mode():
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)
        photo = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
        with peak_of(peaks, "sampling"):
            vae.decode(sample(model, clip, "a photo of person"))
            vae.encode(photo)
        loaded = private_bytes()
        settings = TrainingSettings(
            steps=2,
            resolution=SIDE,
            preview_every=0,
            templates=("a photo of <name>",),
            captions=(),
        )
        with peak_of(peaks, "training"):
            result = train_identity(
                model, clip, vae, pair_photos([photo], None), "anna", "person", settings
            )
        SeFiSaveIdentity.execute(result.identity, "full", "error")
        identity = SeFiLoadIdentity.execute("full.safetensors").result[0]
        applied = SeFiApplyIdentity.execute(model, clip, identity, 1.0, 1.0, 0.0, 1.0).result
        with_identity = sample(*applied, "a photo of <anna>")
        without = sample(*applied, "a photo of person")

    unet = list(model.model.diffusion_model.parameters())
    print(
        json.dumps(
            {
                "checkpoint_bytes": checkpoint.stat().st_size,
                "unet_parameters": sum(p.numel() for p in unet),
                "unet_dtype": str(unet[0].dtype),
                "loaded_bytes": loaded,
                "peak_bytes": peaks,
                "training_extra_bytes": peaks["training"] - loaded,
                "losses": [step.loss for step in result.history],
                "widths": identity.widths,
                "same_after_file": identity.same_content(result.identity),
                "difference": (with_identity - without).abs().mean().item(),
                "finite": bool(torch.isfinite(with_identity).all()),
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
