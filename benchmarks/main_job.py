"""``make main-job``: are unseen people learned from one portrait, through the real server?

For every identity the quick-start workflow trains on one drawn portrait; then each prompt is
drawn with the placeholder and with the class word. The identity judge compares the pictures with
renders of the person, the attribute judge looks for what was prompted. ``FAMILY`` chooses the
miniature (sd1 or sdxl), ``SEED`` people and prompts, ``IDENTITIES`` and ``PROMPTS`` how many. With
``START=predicted`` the drawn world's face encoder predicts each identity and the training goes on
from there. The last line is one JSON object; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sefi_ide.sefi_core import evaluation
from sefi_ide.tests.mini_sd import world
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS, chosen_family
from sefi_ide.tests.mini_sd.judges import load_judges
from sefi_ide.tests.mini_sd.wishes import Wish, caption_of, pictures_of, random_wish, shot_of
from sefi_ide.tools import demo, templates
from sefi_ide.tools.server import ComfyServer
from sefi_ide.tools.workflow import Prompt, nodes_of

logger = logging.getLogger(__name__)

SHARE_OF_THE_WAY = 0.5
"""From the class word's similarity to that of the person's own renders."""
PROMPT_TOLERANCE = 0.10
CLASS_WORD = "person"


def measure(
    server: ComfyServer, family: str, seed: int, identities: int, prompts: int
) -> dict[str, float]:
    """The figures of the main job on a running server that has the family's miniature."""
    judges = load_judges()
    rng = np.random.default_rng(10**6 + seed)
    wishes = [random_wish(rng) for _ in range(prompts)]
    predicted = demo.starts_predicted()
    workflow = templates.ENCODER if predicted else demo.WORKFLOWS[family]
    prompt, checkpoint = demo.prompt_of(server, workflow), CHECKPOINTS[family].name
    if predicted:
        demo.add_face_files(server)
    adapted = _adapted(server, prompt, checkpoint, seed)
    plain = _pictures(server, adapted, wishes, f"a {CLASS_WORD}")
    rows: dict[str, list[float]] = {"id": [], "id_class": [], "id_renders": [], "prompt_share": []}
    for number in range(identities):
        look = world.unseen_look(1000 * seed + number)
        renders = _renders(look, wishes, 1000 * seed + number)
        adapted = _adapted(server, prompt, checkpoint, 1000 * seed + number)
        drawn = _pictures(server, adapted, wishes, f"<{demo.NAME}>")
        others = _renders(look, wishes, 77_000 + 1000 * seed + number)
        found = evaluation.quality(
            judges.identity_similarity(drawn, renders), judges.found(drawn, wishes)
        )
        rows["id"].append(found["id"])
        rows["prompt_share"].append(found["prompt"])
        rows["id_class"].append(judges.identity_similarity(plain, renders).mean().item())
        rows["id_renders"].append(judges.identity_similarity(others, renders).mean().item())
        logger.info("%d of %d: %s", number + 1, identities, {k: v[-1] for k, v in rows.items()})
    figures = {name: float(np.mean(values)) for name, values in rows.items()}
    figures["prompt_share_class"] = evaluation.prompt_share(judges.found(plain, wishes))
    figures["id_bar"] = figures["id_class"] + SHARE_OF_THE_WAY * (
        figures["id_renders"] - figures["id_class"]
    )
    return figures


def missed(figures: dict[str, float]) -> list[str]:
    """The bars that the figures do not reach, in words."""
    lines = []
    if figures["id"] < figures["id_bar"]:
        lines.append(f"id is {figures['id']:.3f}, the bar is {figures['id_bar']:.3f}")
    lowest = figures["prompt_share_class"] - PROMPT_TOLERANCE
    if figures["prompt_share"] < lowest:
        lines.append(f"prompt_share is {figures['prompt_share']:.3f}, the bar is {lowest:.3f}")
    return lines


def _renders(look, wishes: list[Wish], seed: int) -> torch.Tensor:
    return pictures_of(
        [shot_of(look, CLASS_WORD, wish, seed + 100 * n) for n, wish in enumerate(wishes)]
    )


def _adapted(server: ComfyServer, prompt: Prompt, checkpoint: str, seed: int) -> Prompt:
    """The quick start on the portrait of the person that ``seed`` chooses."""
    adapted = copy.deepcopy(prompt)
    with tempfile.TemporaryDirectory() as folder:
        portrait = Path(folder) / f"portrait_{seed}.png"
        Image.fromarray(demo.draw(seed, "portrait")).save(portrait)
        photo = server.upload(portrait)
    demo.adapt(adapted, photo, checkpoint, miniature=True)
    return adapted


def _pictures(server: ComfyServer, prompt: Prompt, wishes: list[Wish], word: str) -> torch.Tensor:
    """One picture (128, 128, 3) per wish, drawn by the server; trains first if need be."""
    pictures = []
    for number, wish in enumerate(wishes):
        wished = copy.deepcopy(prompt)
        demo.positive_text(wished)["text"] = caption_of(wish, word.removeprefix("a "))
        nodes_of(wished, "KSampler")[0]["inputs"]["seed"] = number
        if not word.startswith("<"):  # the class word needs no training
            _bypass_identity(wished)
        run = server.run(wished, stop_at=("SaveImage",))
        picture = Image.open(io.BytesIO(run.pictures("SaveImage")[0])).convert("RGB")
        pictures.append(torch.from_numpy(np.array(picture)).float() / 255)
    return torch.stack(pictures)


def _bypass_identity(prompt: Prompt) -> None:
    """Connect what follows SeFi Apply Identity to the checkpoint itself."""
    apply_id = next(k for k, n in prompt.items() if n["class_type"] == "SeFiApplyIdentity")
    sources = [prompt[apply_id]["inputs"]["model"], prompt[apply_id]["inputs"]["clip"]]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == apply_id:
                node["inputs"][name] = sources[value[1]]


def main() -> int:
    """Run with settings from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    family = chosen_family()
    seed = int(os.environ.get("SEED") or 1)
    identities = int(os.environ.get("IDENTITIES") or 8)
    prompts = int(os.environ.get("PROMPTS") or 12)
    with tempfile.TemporaryDirectory(prefix="sefi-main-job-") as directory:
        with ComfyServer(Path(directory), [CHECKPOINTS[family]], demo.server_arguments()) as server:
            figures = measure(server, family, seed, identities, prompts)
    lines = missed(figures)
    for line in lines:
        logger.error("missed: %s", line)
    sys.stdout.write(json.dumps({k: round(v, 4) for k, v in figures.items()}) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
