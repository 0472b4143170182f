"""From a photo to pictures without training, through the real server with a random encoder."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder, write_face_encoder
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.sefi_core.identity.file import read_identity
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tools.server import ServerError

from .conftest import MINI_SD

FILE = "predicts.safetensors"
WIDTH = 128
"""Of the miniature's token embeddings."""


def write_encoder(server, seed):
    folder = server.directory / "models" / "face2diffusion"
    folder.mkdir(exist_ok=True)
    write_face_encoder(encoder_for("sd1", {"l": WIDTH}, seed=seed), folder / FILE)
    return folder / FILE


@pytest.fixture
def encoder(server):
    """The file of an encoder for the miniature, in the server's folder."""
    file = write_encoder(server, 5)
    yield file
    file.unlink()


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def prompt(picture, text="a photo of <zoe>"):
    """Load, predict, apply, sample and save, as somebody would connect it."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=MINI_SD.name),
        "2": node("LoadImage", image=picture),
        "3": node("SeFiLoadFaceEncoder", file=FILE),
        "4": node("SeFiPredictIdentity", face_encoder=["3", 0], photos=["2", 0], name="zoe"),
        "5": node("SeFiSaveIdentity", identity=["4", 0], file_name="", if_exists="overwrite"),
        "6": node(
            "SeFiApplyIdentity", model=["1", 0], clip=["1", 1], identity=["4", 0], strength_k=1.0,
            strength_v=1.0,
        ),
        "7": node("CLIPTextEncode", clip=["6", 1], text=text),
        "8": node("CLIPTextEncode", clip=["6", 1], text=""),
        "9": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "10": node(
            "KSampler", model=["6", 0], positive=["7", 0], negative=["8", 0],
            latent_image=["9", 0], seed=3, steps=3, cfg=5.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "11": node("VAEDecode", samples=["10", 0], vae=["1", 2]),
        "12": node("PreviewImage", images=["11", 0]),
        "13": node("SaveImage", images=["4", 1], filename_prefix="crops"),
    }  # fmt: skip


def test_a_photo_becomes_pictures_and_a_file(server, encoder, picture):
    run = server.run(prompt(picture))
    assert run.executed("SeFiPredictIdentity") and run.executed("KSampler")
    (drawn,) = run.pictures("PreviewImage")
    (crop,) = run.pictures("SaveImage")

    (face,) = YuNetDetector().detect(skimage.data.astronaut())
    seen = aligned(skimage.data.astronaut(), face.points)
    assert np.abs(decoded(crop) - seen).max() <= 1  # SaveImage rounds down
    saved = read_identity(server.directory / "models" / "sefi" / "zoe.safetensors")
    pixels = (torch.from_numpy(seen).float() / 255 * 2 - 1).movedim(-1, 0)[None]
    keys, values = read_face_encoder(encoder).predict(pixels)
    torch.testing.assert_close(saved.key_vectors["l"], keys["l"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(saved.value_vectors["l"], values["l"], atol=1e-4, rtol=1e-4)
    assert (saved.family, saved.class_word, saved.position_free) == ("sd1", "person", True)

    (word,) = server.run(prompt(picture, "a photo of person")).pictures("PreviewImage")
    assert np.abs(decoded(drawn) - decoded(word)).mean() > 1


def test_an_encoder_is_read_again_only_when_its_file_has_changed(server, encoder, picture):
    server.run(prompt(picture))
    again = server.run(prompt(picture))
    assert not again.executed("SeFiPredictIdentity")
    write_encoder(server, 6)
    assert server.run(prompt(picture)).executed("SeFiPredictIdentity")


def test_a_missing_file_is_refused_before_the_graph_runs(server, encoder, picture):
    asked = prompt(picture)
    asked["3"]["inputs"]["file"] = "msid.pt"
    with pytest.raises(ServerError, match=r"'msid\.pt' is not in .*face2diffusion: press R"):
        server.queue(asked)


def test_the_list_has_what_is_in_the_folder(server, encoder):
    inputs = server.get("/object_info/SeFiLoadFaceEncoder")["SeFiLoadFaceEncoder"]["input"]
    assert FILE in inputs["required"]["file"][1]["options"]
