"""The parts of ``make demo`` that need no server."""

import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from sefi_ide.sefi_core.faces.recognition import SFACE
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS
from sefi_ide.tests.unit.recognition_models import save_recogniser
from sefi_ide.tools.comfyui import REPOSITORY
from sefi_ide.tools.demo import OUTPUTS, WORKFLOWS, upright
from sefi_ide.tools.demo_scores import clip_files, likeness, prompt_scores

ORIENTATION = 0x0112


def test_a_photo_taken_sideways_is_turned(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # its top is at the right
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (20, 0, 40, 20))
    picture.save(tmp_path / "photo.png", exif=exif)
    turned = upright(tmp_path / "photo.png")
    assert turned.size == (20, 40) and turned.mode == "RGB"
    assert turned.getpixel((10, 5)) == (0, 0, 255) and turned.getpixel((10, 35)) == (255, 0, 0)


def test_likeness_where_there_is_a_model(tmp_path, capsys):
    """The model of the test embeds mean colours, so that the same face is as alike as can be."""
    photo = Image.fromarray(skimage.data.astronaut())
    empty = Image.new("RGB", (64, 64))
    assert likeness([photo], photo, tmp_path) is None
    assert f"put {SFACE.files[0]} into {tmp_path / 'face_recognition'}" in capsys.readouterr().out
    save_recogniser(tmp_path / "face_recognition" / SFACE.files[0])
    found = likeness([photo, empty], photo, tmp_path)
    assert found == [pytest.approx(SFACE.likeness(1), abs=4e-3), 0]
    assert "no face" in capsys.readouterr().out
    assert likeness([photo], empty, tmp_path) is None
    assert "no face was found in reference" in capsys.readouterr().out


def save(file, **shapes):
    """A file of these tensors, whose names have two underscores for a point."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, file)
    return file


def test_the_models_of_the_prompt_score_are_those_that_go_together(tmp_path):
    vision, texts = tmp_path / "clip_vision", tmp_path / "text_encoders"
    plain = save(tmp_path / "sd15.safetensors", cond__weight=(768, 768))
    sdxl = save(tmp_path / "sdxl.safetensors", embedders__1__model__text_projection=(1280, 1280))
    save(vision / "ip_adapters" / "h.safetensors", visual_projection__weight=(1024, 1280))
    save(vision / "siglip.safetensors", head__weight=(1024, 1152))
    (vision / "cut_off.safetensors").write_bytes(b"12345")

    def missing(checkpoint):
        found = clip_files(checkpoint, tmp_path)
        assert isinstance(found, str)
        return found

    assert missing(sdxl) == f"put CLIP-ViT-bigG-14 into {vision}"
    assert missing(plain) == (
        f"put CLIP-ViT-L-14 into {vision} and put clip_l.safetensors into {texts}"
    )
    large = save(vision / "openclip.safetensors", visual__proj=(1024, 768))
    assert missing(plain) == f"put clip_l.safetensors into {texts}"
    text = save(texts / "clip_l.safetensors", text_projection__weight=(768, 768))
    assert clip_files(plain, tmp_path) == (large, text)
    assert clip_files(tmp_path / "sd15.ckpt", tmp_path) == (large, text)
    assert clip_files(sdxl, tmp_path) == (large, text)
    big = save(vision / "z_g.safetensors", visual_projection__weight=(1280, 1664))
    assert clip_files(sdxl, tmp_path) == (big, sdxl)  # its own text encoder is what it draws with


def test_a_prompt_score_without_models_says_what_to_put_where(tmp_path, capsys):
    picture = Image.new("RGB", (64, 64))
    checkpoint = save(tmp_path / "sd15.safetensors", cond__weight=(768, 768))
    assert prompt_scores([picture], ["a dog"], checkpoint, tmp_path, None) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No prompt score: put CLIP-ViT-L-14 into ") and line.endswith(".")


def test_every_miniature_has_its_demo():
    """A quick start of its own, and a folder that no other family's demo empties."""
    assert WORKFLOWS.keys() == OUTPUTS.keys() == CHECKPOINTS.keys()
    assert len(set(OUTPUTS.values())) == len(set(WORKFLOWS.values())) == len(OUTPUTS)
    for name in WORKFLOWS.values():
        assert (REPOSITORY / "workflows" / f"{name}.json").is_file()
