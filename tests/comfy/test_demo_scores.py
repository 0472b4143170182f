"""The prompt score of ``make demo`` with a text encoder and a vision model that go together."""

from __future__ import annotations

import comfy.clip_vision
import comfy.sd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_models
from sefi_ide.sefi_core.comfyui.prompt_score import COLOUR_PROMPT
from sefi_ide.tests.comfy.vision import WIDTH, plain, taught, vision_model
from sefi_ide.tools.demo_scores import prompt_scores

NAMES = ("red", "blue", "green")


@pytest.fixture
def score(mini_sd, tmp_path, monkeypatch, inference_mode):
    """``score(pictures, likeness)`` with the miniature and a small vision model beside it.

    ComfyUI tells vision models by how many layers they have, so a small one cannot come from its
    file; the text encoder must be taught.
    """
    clip, vision = mini_sd[1], vision_model()
    texts, checkpoint = tmp_path / "text_encoders", tmp_path / "sd15.safetensors"
    for folder, name in (
        (texts, "text_projection.weight"),
        (tmp_path / "clip_vision", "visual_projection.weight"),
    ):
        folder.mkdir()
        save_file({name: torch.zeros(WIDTH, 64)}, folder / "model.safetensors")
    save_file({"weight": torch.zeros(1)}, checkpoint)
    read = []
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: read.append(path) or vision)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda paths: read.append(*paths) or clip)

    def run(colours, likeness, taught_clip=True):
        if taught_clip:
            taught(clip, vision)
        prompts = [COLOUR_PROMPT.format(name) for name in NAMES]
        pictures = [Image.fromarray((plain(name)[0] * 255).byte().numpy()) for name in colours]
        figures = prompt_scores(pictures, prompts, checkpoint, tmp_path, likeness)
        assert read == [
            str(texts / "model.safetensors"),
            str(tmp_path / "clip_vision" / "model.safetensors"),
        ]
        return figures

    return run


def test_pictures_that_show_their_prompts(score, capsys):
    figures = score(NAMES, [0.9, 0.6, 0.3])
    assert figures == {
        "prompt_score": pytest.approx(1, abs=2e-2),
        "prompt_share": 1.0,
        "id_p": pytest.approx(0.6),
    }
    assert "fulfilled 1.00, ID(P) 0.600" in capsys.readouterr().out


def test_a_picture_of_something_else_counts_as_nobodys(score):
    figures = score(("red", "green", "green"), [0.9, 0.6, 0.3])
    assert figures["prompt_share"] == pytest.approx(2 / 3)
    assert figures["id_p"] == pytest.approx(0.4)


def test_without_a_likeness_there_is_no_id_p(score, capsys):
    assert score(NAMES, None).keys() == {"prompt_score", "prompt_share"}
    assert "ID(P)" not in capsys.readouterr().out


def test_models_that_do_not_understand_each_other_are_named(score, mini_sd, capsys):
    projection = encoder_models(mini_sd[1])["l"].transformer.text_projection
    projection.weight = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    assert score(NAMES, None, taught_clip=False) == {}
    said = capsys.readouterr().out
    assert said.startswith("No prompt score with model.safetensors and model.safetensors: ")
    assert "do not understand each other" in said
