"""Make a miniature: ``python tests/mini_sd/train.py [--family sd1|sdxl] [--device cuda]``.

Parts, in order: data, linear autoencoder, text encoder, U-Net, TAESD, judges, export. Pictures,
autoencoders and judges are made with the first family and are the same for all. Every part keeps
its state in ``build/mini_sd`` (``build/mini_sd_sdxl``) and goes on where it was stopped; ``--only
PART`` runs one, ``--minutes PART=M`` changes a budget. Without such a state it goes on from the
shipped checkpoint (text encoder and latent space stay), unless ``--fresh`` is given: then allow
three hours on two cores. Afresh the U-Net of SDXL starts from the first miniature's, where parts
have the same shape. ``--world 2`` makes a miniature of the second drawn world, in
``build/mini_sd_2`` (``build/mini_sd_2_sdxl``): its text encoder, U-Net, TAESD and judges start
from the first world's. ``--half`` computes in bfloat16.
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
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--world", choices=("1", "2"), default=os.environ.get("WORLD") or "1")
    os.environ["WORLD"] = chosen.parse_known_args()[0].world  # read where the package is imported
    tools["start"](cpu=True, prefix="sefi-mini-sd-")

import safetensors.torch
import torch

from . import architecture, autoencoder, judges, text_encoder, unet, warm_start
from .architecture import Family
from .checkpoints import BUILD, CHECKPOINTS, FIRST_WORLD
from .dataset import END, SHOTS_EACH, TWINS, Dataset, make_dataset, make_families
from .editions import EDITION, FIRST
from .framing import random_framing
from .training_loop import train

log = logging.getLogger("mini_sd")

DATA = BUILD / ("mini_sd" if EDITION is FIRST else f"mini_sd_{EDITION.number}")
LINEAR = FIRST_WORLD["sd1"].with_name("linear.safetensors")
PICTURES_PER_SHARD, SHARDS = 16_000, 4
FAMILIES = 1200
MINUTES = {"linear": 6.0, "text_encoder": 6.0, "unet": 90.0, "taesd": 25.0,
           "judges": 20.0}  # fmt: skip
LATENT_CHUNK = 128
CAPTIONS_OF_MAP = 1024


class Maker:
    """Builds the parts of a miniature; each method trains or loads one and leaves its state."""

    def __init__(
        self,
        family: Family,
        device: str,
        minutes: dict[str, float],
        fresh: bool = False,
        half: bool = False,
    ) -> None:
        torch.manual_seed(0)
        text_encoder.allow_backward()
        self.family, self.minutes, self.half = family, minutes, half
        self.device = torch.device(device)
        self.build = (
            DATA if family is architecture.SD1 else DATA.with_name(f"{DATA.name}_{family.name}")
        )
        self.generator = torch.Generator().manual_seed(1)
        self.modules = family.build_modules()
        self.words = text_encoder.Words(
            family, {k: self.modules[k].requires_grad_(True) for k in family.encoders}
        )
        self.unet, self.taesd = self.modules["unet"], self.modules["vae"]
        first = FIRST_WORLD[family.name]
        self.grows = EDITION is not FIRST
        """Whether all but the latent space is learned on, from the first world's checkpoint."""
        self.resumed = first.exists() and not fresh and not self.grows
        if self.resumed or self.grows:
            family.load(self.modules, safetensors.torch.load_file(first))
        self.shared = family is not architecture.SD1 or self.resumed or self.grows
        """Whether autoencoders and judges are those that there are."""
        if self.shared:
            self.taesd.load_state_dict(self._first()["vae"].state_dict())
            self.taesd.vae_scale.data.fill_(1.0)

    def _first(self) -> dict[str, torch.nn.Module]:
        """The modules of the SD 1.x miniature: of this world where it is made, or of the first."""
        made = CHECKPOINTS["sd1"] if CHECKPOINTS["sd1"].exists() else FIRST_WORLD["sd1"]
        modules = architecture.SD1.build_modules()
        architecture.SD1.load(modules, safetensors.torch.load_file(made))
        return modules

    def _donor(self) -> tuple[Family, dict[str, torch.nn.Module]]:
        """Family and modules that the U-Net starts from: of the world before, or of SD1."""
        if not self.grows:
            return architecture.SD1, self._first()
        modules = self.family.build_modules()
        self.family.load(modules, safetensors.torch.load_file(FIRST_WORLD[self.family.name]))
        return self.family, modules

    def data(self) -> Dataset:
        """All training pictures; drawn once."""
        shards = []
        for shard in range(SHARDS):
            path = DATA / f"data{shard}.pt"
            if not path.exists():
                DATA.mkdir(parents=True, exist_ok=True)
                make_dataset(PICTURES_PER_SHARD, seed=100 + shard).save(path)
            shards.append(Dataset.load(path))
        return Dataset(**{k: torch.cat([getattr(s, k) for s in shards]) for k in vars(shards[0])})

    def linear_autoencoder(self) -> autoencoder.LinearAutoencoder:
        """The linear autoencoder that defines the latent space."""
        linear = autoencoder.LinearAutoencoder().to(self.device)
        if self.shared:
            linear.load_state_dict(safetensors.torch.load_file(LINEAR))
            return linear.requires_grad_(False).eval()
        pictures = Dataset.load(DATA / "data0.pt").pictures

        def step(_):
            crop = autoencoder.crops(pictures, 8, 64, self.generator)
            return linear.loss(crop.to(self.device))

        path = self.build / "linear.pt"
        train(linear, step, path, self.minutes["linear"], 3e-3, average=0.99, weight_decay=0.0)
        return linear.requires_grad_(False).eval()

    def latents(self, data: Dataset) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (N, C, 16, 16) fp16 of all pictures, from the linear autoencoder, and sizes.

        For a family with size conditioning the pictures are framed, and so are the regions of
        ``data``; for others there are no sizes.
        """
        framing = None
        if self.family.pooled_dim:
            framing = random_framing(len(data), torch.Generator().manual_seed(3))
            data.regions = (
                framing.cut(data.regions.flatten(1, 2).float()).byte().view_as(data.regions)
            )
        path = self.build / "latents.pt"
        if not path.exists():
            linear = self.linear_autoencoder()
            chunks = []
            with torch.no_grad():
                for rows in torch.arange(len(data)).split(LATENT_CHUNK):
                    pictures = data.pictures[rows].float() / 255
                    if framing is not None:
                        pictures = framing[rows].show(pictures)
                    chunks.append(linear.encode(pictures.to(self.device)).half().cpu())
            torch.save(torch.cat(chunks), path)
        return torch.load(path, weights_only=True), None if framing is None else framing.sizes

    def text_encoder(self, data: Dataset) -> text_encoder.Words:
        """ComfyUI's CLIP text models with the words of the world."""
        words = self.words.to(self.device)
        if self.resumed:
            return words.requires_grad_(False).eval()

        def step(number):
            rows = torch.randint(len(data), (48,), generator=self.generator)
            words_end = int((data.ids[rows] == END).int().argmax(dim=1).max())
            length = data.ids.shape[1] if number % 8 == 0 else words_end + 2
            losses = [text_encoder.text_step(e, data, rows, length) for e in words.values()]
            return torch.stack(losses).sum()

        path = self.build / "text.pt"
        rate = 5e-4 if self.grows else 2e-3
        train(words, step, path, self.minutes["text_encoder"], rate, average=0.99)
        return words.requires_grad_(False).eval()

    def train_unet(self, data: Dataset) -> None:
        """The U-Net, on the linear autoencoder's latents and the frozen text states."""
        words, path = self.text_encoder(data), self.build / "unet.pt"
        if self.shared and not self.resumed and not path.exists():
            self._start_unet(words, data)
        latents, sizes = self.latents(data)
        self.unet.to(self.device)
        task = unet.UNetTask(self.unet, words, data, latents, sizes, self.device, seed=2)
        batch = 32 if self.device.type == "cpu" else 128

        def step(_):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                return task.step(batch)

        train(self.unet, step, path, self.minutes["unet"], 8e-4)

    @torch.no_grad()
    def _start_unet(self, words: text_encoder.Words, data: Dataset) -> None:
        """Start from another miniature, whose text states are guessed from the new ones."""
        family, donor = self._donor()
        old = text_encoder.Words(family, donor).eval()
        rows = torch.arange(CAPTIONS_OF_MAP)
        states = [
            encoders.cpu()(data.ids[rows], data.looks[rows], data.kinds[rows], marks)[0].flatten(
                0, 1
            )
            for encoders, marks in ((old, None), (words, data.marks[rows]))
        ]
        words.to(self.device)
        fitted = warm_start.context_map(*states)
        unexplained = (states[0] - states[1] @ fitted.T).var() / states[0].var()
        share = warm_start.start_from(self.unet, donor["unet"], fitted)
        log.info("%.2f of the U-Net copied, %.2f of the states unexplained", share, unexplained)

    def train_taesd(self) -> None:
        """TAESD's decoder, from the linear one on; its encoder stays linear."""
        linear, taesd = self.linear_autoencoder(), self.taesd.to(self.device)
        pictures = Dataset.load(DATA / "data0.pt").pictures
        if not (self.resumed or self.grows):
            autoencoder.as_taesd(linear, taesd)
        taesd.taesd_encoder.requires_grad_(False)

        def step(_):
            crop = autoencoder.crops(pictures, 8, 64, self.generator).to(self.device)
            return autoencoder.decoder_loss(taesd, linear, crop)

        path = self.build / "taesd.pt"
        train(taesd, step, path, self.minutes["taesd"], 6e-4, average=0.99, weight_decay=0.0)

    def train_judges(self) -> None:
        """The judges, on families whose members share hair and skin."""
        linear, net = self.linear_autoencoder(), judges.JudgeNet()
        if self.resumed:
            net.load_state_dict(judges.load_judges().net.state_dict())
        elif self.grows:
            net = judges.grown_judges()
        net.to(self.device)
        data, people = make_families(FAMILIES, seed=200)

        def round_trip(pictures):
            latents = linear.encode(pictures)
            noise = autoencoder.LATENT_NOISE * torch.randn_like(latents)
            return linear.decode(latents + noise).clamp(0, 1)

        def judge(pictures):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                return net(pictures).float()

        def step(_):
            families = torch.randint(FAMILIES, (3, 1), generator=self.generator)
            rows = (families * TWINS * SHOTS_EACH + torch.arange(TWINS * SHOTS_EACH)).flatten()
            return judges.judge_step(judge, data, rows, people[rows], round_trip)

        train(net, step, self.build / "judges.pt", self.minutes["judges"], 2e-3, average=0.99)

    def export(self) -> None:
        """Write the checkpoint and the judges; parts that were not trained again stay."""
        linear, net = autoencoder.LinearAutoencoder(), judges.JudgeNet()
        parts = {"text": self.words, "unet": self.unet, "taesd": self.taesd, "linear": linear}
        for name, module in (*parts.items(), ("judges", net)):
            path = self.build / f"{name}.pt"
            if path.exists():
                state = torch.load(path, weights_only=True, map_location="cpu")
                module.load_state_dict(state["ema"])
        if (self.build / "linear.pt").exists():
            safetensors.torch.save_file(linear.state_dict(), LINEAR)
        if (self.build / "judges.pt").exists():
            judges.save_judges(net)
        # ComfyUI divides what TAESD encodes by its scale: latents as Stable Diffusion's.
        self.taesd.vae_scale.data.fill_(self.family.latent_scale)
        safetensors.torch.save_file(
            self.family.checkpoint(self.modules, torch.float16), CHECKPOINTS[self.family.name]
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", choices=tuple(architecture.FAMILIES), default="sd1")
    parser.add_argument("--world", choices=("1", "2"), help="the drawn world; 1 unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="one part: data, linear, text, unet, taesd, judges, export")
    parser.add_argument("--minutes", nargs="*", default=[], help="budgets, e.g. unet=20")
    parser.add_argument("--fresh", action="store_true", help="do not go on from the checkpoint")
    parser.add_argument("--half", action="store_true", help="U-Net and judges in bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(options.threads)
    budgets = dict(MINUTES)
    for item in options.minutes:
        part, _, value = item.partition("=")
        budgets[part] = float(value)
    family = architecture.FAMILIES[options.family]
    maker = Maker(family, options.device, budgets, options.fresh, options.half)
    parts = {
        "data": lambda: maker.data(),
        "linear": maker.linear_autoencoder,
        "text": lambda: maker.text_encoder(maker.data()),
        "unet": lambda: maker.train_unet(maker.data()),
        "taesd": maker.train_taesd,
        "judges": maker.train_judges,
        "export": maker.export,
    }
    if family is not architecture.SD1:
        parts = {name: parts[name] for name in ("data", "text", "unet", "export")}
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
