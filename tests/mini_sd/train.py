"""Make the miniature Stable Diffusion: ``python tests/mini_sd/train.py [--device cuda]``.

Parts, in order: data, linear autoencoder, text encoder, U-Net, TAESD, judges, export. Every
part keeps its state in ``build/mini_sd`` and goes on where it was stopped; ``--only PART``
runs one, ``--minutes PART=M`` changes a budget. Without such a state it goes on from the shipped
checkpoint (text encoder and latent space stay), unless ``--fresh`` is given: then allow three
hours on two cores.
"""

from __future__ import annotations

# ruff: noqa: E402
import argparse
import logging
import os
import runpy
from pathlib import Path

if __name__ == "__main__":  # as a file, whose package and ComfyUI are still to be found
    __package__ = "sefi_ide.tests.mini_sd"
    tools = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "comfyui.py"))
    tools["start"](cpu=True, prefix="sefi-mini-sd-")

import safetensors.torch
import torch

from ...tools.comfyui import REPOSITORY
from . import architecture, autoencoder, judges, text_encoder, unet
from .dataset import END, SHOTS_EACH, TWINS, Dataset, make_dataset, make_families
from .runtime import CHECKPOINT
from .training_loop import train

BUILD = REPOSITORY / "build" / "mini_sd"
LINEAR = CHECKPOINT.with_name("linear.safetensors")
PICTURES_PER_SHARD, SHARDS = 16_000, 4
FAMILIES = 1200
MINUTES = {"linear": 6.0, "text_encoder": 6.0, "unet": 90.0, "taesd": 25.0,
           "judges": 20.0}  # fmt: skip
LATENT_CHUNK = 128


class Maker:
    """Builds the parts; each method trains or loads one and leaves its state in ``BUILD``."""

    def __init__(self, device: str, minutes: dict[str, float], fresh: bool = False):
        torch.manual_seed(0)
        text_encoder.allow_backward()
        self.device, self.minutes = torch.device(device), minutes
        self.generator = torch.Generator().manual_seed(1)
        modules = architecture.build_modules()
        self.unet = modules["model.diffusion_model."].to(self.device)
        self.transformer = modules["cond_stage_model.transformer."].requires_grad_(True)
        self.taesd = modules["first_stage_model."]
        self.resumed = CHECKPOINT.exists() and not fresh
        if self.resumed:
            shipped = safetensors.torch.load_file(CHECKPOINT)
            for prefix, module in modules.items():
                part = {
                    k.removeprefix(prefix): v for k, v in shipped.items() if k.startswith(prefix)
                }
                module.load_state_dict(part)
            self.taesd.vae_scale.data.fill_(1.0)

    def data(self) -> Dataset:
        """All training pictures; drawn once."""
        shards = []
        for shard in range(SHARDS):
            path = BUILD / f"data{shard}.pt"
            if not path.exists():
                BUILD.mkdir(parents=True, exist_ok=True)
                make_dataset(PICTURES_PER_SHARD, seed=100 + shard).save(path)
            shards.append(Dataset.load(path))
        return Dataset(**{k: torch.cat([getattr(s, k) for s in shards]) for k in vars(shards[0])})

    def linear_autoencoder(self) -> autoencoder.LinearAutoencoder:
        """The linear autoencoder that defines the latent space."""
        linear = autoencoder.LinearAutoencoder().to(self.device)
        if self.resumed:
            linear.load_state_dict(safetensors.torch.load_file(LINEAR))
            return linear.requires_grad_(False).eval()
        pictures = Dataset.load(BUILD / "data0.pt").pictures

        def step(_):
            crop = autoencoder.crops(pictures, 8, 64, self.generator)
            return linear.loss(crop.to(self.device))

        path = BUILD / "linear.pt"
        train(linear, step, path, self.minutes["linear"], 3e-3, average=0.99, weight_decay=0.0)
        return linear.requires_grad_(False).eval()

    def latents(self, data: Dataset) -> torch.Tensor:
        """Latents (N, C, 16, 16) fp16 of all pictures, from the linear autoencoder."""
        path = BUILD / "latents.pt"
        if not path.exists():
            linear = self.linear_autoencoder()
            chunks = []
            with torch.no_grad():
                for chunk in data.pictures.split(LATENT_CHUNK):
                    chunks.append(linear.encode(chunk.to(self.device).float() / 255).half().cpu())
            torch.save(torch.cat(chunks), path)
        return torch.load(path, weights_only=True)

    def text_encoder(self, data: Dataset) -> text_encoder.Words:
        """ComfyUI's CLIP text model with the words of the world."""
        words = text_encoder.Words(self.transformer, architecture.CONTEXT_DIM).to(self.device)
        if self.resumed:
            return words.requires_grad_(False).eval()

        def step(number):
            rows = torch.randint(len(data), (48,), generator=self.generator)
            words_end = int((data.ids[rows] == END).int().argmax(dim=1).max())
            length = data.ids.shape[1] if number % 8 == 0 else words_end + 2
            return text_encoder.text_step(words, data, rows, length)

        train(words, step, BUILD / "text.pt", self.minutes["text_encoder"], 2e-3, average=0.99)
        return words.requires_grad_(False).eval()

    def train_unet(self, data: Dataset) -> None:
        """The U-Net, on the linear autoencoder's latents and the frozen text states."""
        words = self.text_encoder(data)
        task = unet.UNetTask(self.unet, words, data, self.latents(data), self.device, seed=2)
        batch = 32 if self.device.type == "cpu" else 128
        train(self.unet, lambda _: task.step(batch), BUILD / "unet.pt", self.minutes["unet"], 8e-4)

    def train_taesd(self) -> None:
        """TAESD's decoder, from the linear one on; its encoder stays linear."""
        linear, taesd = self.linear_autoencoder(), self.taesd.to(self.device)
        pictures = Dataset.load(BUILD / "data0.pt").pictures
        if not self.resumed:
            autoencoder.as_taesd(linear, taesd)
        taesd.taesd_encoder.requires_grad_(False)

        def step(_):
            crop = autoencoder.crops(pictures, 8, 64, self.generator).to(self.device)
            return autoencoder.decoder_loss(taesd, linear, crop)

        path = BUILD / "taesd.pt"
        train(taesd, step, path, self.minutes["taesd"], 6e-4, average=0.99, weight_decay=0.0)

    def train_judges(self) -> None:
        """The judges, on families whose members share hair and skin."""
        linear, net = self.linear_autoencoder(), judges.JudgeNet()
        if self.resumed:
            net.load_state_dict(judges.load_judges().net.state_dict())
        net.to(self.device)
        data, people = make_families(FAMILIES, seed=200)

        def round_trip(pictures):
            latents = linear.encode(pictures)
            noise = autoencoder.LATENT_NOISE * torch.randn_like(latents)
            return linear.decode(latents + noise).clamp(0, 1)

        def step(_):
            families = torch.randint(FAMILIES, (3, 1), generator=self.generator)
            rows = (families * TWINS * SHOTS_EACH + torch.arange(TWINS * SHOTS_EACH)).flatten()
            return judges.judge_step(net, data, rows, people[rows], round_trip)

        train(net, step, BUILD / "judges.pt", self.minutes["judges"], 2e-3, average=0.99)

    def export(self) -> None:
        """Write the checkpoint and the judges; parts that were not trained again stay."""
        words = text_encoder.Words(self.transformer, architecture.CONTEXT_DIM)
        linear, net = autoencoder.LinearAutoencoder(), judges.JudgeNet()
        parts = {"text": words, "unet": self.unet, "taesd": self.taesd, "linear": linear}
        for name, module in (*parts.items(), ("judges", net)):
            path = BUILD / f"{name}.pt"
            if path.exists():
                state = torch.load(path, weights_only=True, map_location="cpu")
                module.load_state_dict(state["ema"])
        if (BUILD / "linear.pt").exists():
            safetensors.torch.save_file(linear.state_dict(), LINEAR)
        if (BUILD / "judges.pt").exists():
            judges.save_judges(net)
        # ComfyUI divides what TAESD encodes by its scale: latents as Stable Diffusion's.
        self.taesd.vae_scale.data.fill_(architecture.MiniLatent.scale_factor)
        modules = {
            "model.diffusion_model.": self.unet.cpu(),
            "cond_stage_model.transformer.": self.transformer,
            "first_stage_model.": self.taesd,
        }
        safetensors.torch.save_file(
            architecture.checkpoint_state_dict(modules, torch.float16), CHECKPOINT
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="one part: data, linear, text, unet, taesd, judges, export")
    parser.add_argument("--minutes", nargs="*", default=[], help="budgets, e.g. unet=20")
    parser.add_argument("--fresh", action="store_true", help="do not go on from the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(options.threads)
    budgets = dict(MINUTES)
    for item in options.minutes:
        part, _, value = item.partition("=")
        budgets[part] = float(value)
    maker = Maker(options.device, budgets, options.fresh)
    parts = {
        "data": lambda: maker.data(),
        "linear": maker.linear_autoencoder,
        "text": lambda: maker.text_encoder(maker.data()),
        "unet": lambda: maker.train_unet(maker.data()),
        "taesd": maker.train_taesd,
        "judges": maker.train_judges,
        "export": maker.export,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
