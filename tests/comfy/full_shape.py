"""Run in a process of its own: a family's true shape with random fp16 weights, ``FAMILY=sdxl``.

Loads the checkpoint with CheckpointLoaderSimple, trains two steps, saves, loads, applies and
samples, and prints one JSON object: what came out, and how much private memory each phase took.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 64  # pixels; the deepest level of the U-Net is then a single cell
NOISE = 1_000_003
STEPS = 2

_SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}
_SD1 = {
    **_SD,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
}
UNET_CONFIGS = {
    "sd1": _SD1,
    "sd2": {
        **_SD1,
        "num_heads": -1,
        "num_head_channels": 64,
        "context_dim": 1024,
        "use_linear_in_transformer": True,
    },
    "sdxl": {
        **_SD,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 64,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
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


def layout(family: str):
    """The tensors of the family's checkpoint as ComfyUI saves them, on the meta device."""
    import comfy.ldm.models.autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel
    import comfy.ops
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    import comfy.text_encoders.sd2_clip
    import torch
    from sefi_ide.tests.mini_sd.architecture import saved_state

    supported, text_model, encoders = {
        "sd1": (comfy.supported_models.SD15, comfy.sd1_clip.SD1ClipModel, "l"),
        "sd2": (comfy.supported_models.SD20, comfy.text_encoders.sd2_clip.SD2ClipModel, "h"),
        "sdxl": (comfy.supported_models.SDXL, comfy.sdxl_clip.SDXLClipModel, "lg"),
    }[family]
    config = supported(UNET_CONFIGS[family])
    with torch.device("meta"):
        unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
            **UNET_CONFIGS[family], device="meta", operations=comfy.ops.disable_weight_init
        )
        text = text_model(device="meta", dtype=torch.float16)
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE_CONFIG, embed_dim=4)
    named = {name: getattr(text, f"clip_{name}").transformer for name in encoders}
    return saved_state(config, {"unet": unet, **named, "vae": vae})


def write_checkpoint(path: Path, family: str) -> None:
    """A fp16 checkpoint of the family's true shape, every layer about variance one.

    Written tensor by tensor: SDXL's would not fit beside a copy of itself.
    """
    import torch

    shapes = {name: tensor.shape for name, tensor in layout(family).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Drawn once and repeated: a thousand million normal numbers take half a minute. The length has
    # no factor in common with any layer's, so no two rows of a layer are the same.
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).half()
    used = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
            if len(shape) > 1:
                spread = 0.02 if "embedding" in name else math.prod(shape[1:]) ** -0.5
                repeats = -(-tensor.numel() // NOISE)
                drawn = noise.roll(-used).repeat(repeats)[: tensor.numel()]
                tensor = drawn.mul_(spread).reshape(shape)
                used = (used + tensor.numel()) % NOISE
            file.write(tensor.contiguous().numpy().tobytes())


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
    family = os.environ.get("FAMILY", "sd1")
    write_checkpoint(checkpoint, family)

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
            steps=STEPS,
            resolution=SIDE,
            preview_every=0,
            templates=("a photo of <name>",),
            captions=(),
        )
        began = time.perf_counter()
        with peak_of(peaks, "training"):
            result = train_identity(
                model, clip, vae, pair_photos([photo], None), "anna", "person", settings
            )
        seconds = time.perf_counter() - began
        SeFiSaveIdentity.execute(result.identity, "full", "error")
        identity = SeFiLoadIdentity.execute("full.safetensors").result[0]
        applied = SeFiApplyIdentity.execute(model, clip, identity, 1.0, 1.0, 0.0, 1.0).result
        with_identity = sample(*applied, "a photo of <anna>")
        without = sample(*applied, "a photo of person")

    unet = list(model.model.diffusion_model.parameters())
    print(
        json.dumps(
            {
                "family": identity.family,
                "seconds_per_step": seconds / STEPS,
                "checkpoint_bytes": checkpoint.stat().st_size,
                "unet_parameters": sum(p.numel() for p in unet),
                "unet_dtype": str(unet[0].dtype),
                "loaded_bytes": loaded,
                "peak_bytes": peaks,
                "training_extra_bytes": peaks["training"] - loaded,
                "extra_bytes_per_weight": (peaks["training"] - loaded)
                / sum(p.numel() for p in unet),
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
