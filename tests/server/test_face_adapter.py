"""People whom nothing has seen, drawn from one photo each by the real server, without training."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sefi_ide.benchmarks.subjects import Named, Subject, prompts
from sefi_ide.tests.mini_sd.checkpoints import FACE_ADAPTER
from sefi_ide.tests.mini_sd.judges import load_judges
from sefi_ide.tests.mini_sd.wishes import caption_of
from sefi_ide.tests.mini_sd.world import named_looks
from sefi_ide.tools.demo import add_face_files
from sefi_ide.tools.server import ServerError

from .conftest import MINI_SD

PEOPLE, PROMPTS, EACH = 3, 3, 2


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def files(server):
    """The miniature's adapter, and the encoder that it sees faces with."""
    add_face_files(server)


def plain(text, seed):
    """A prompt of the class word, or of a name."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=MINI_SD.name),
        "5": node("CLIPTextEncode", clip=["1", 1], text=text),
        "6": node("CLIPTextEncode", clip=["1", 1], text=""),
        "7": node("EmptyLatentImage", width=128, height=128, batch_size=EACH),
        "8": node(
            "KSampler", model=["1", 0], positive=["5", 0], negative=["6", 0],
            latent_image=["7", 0], seed=seed, steps=20, cfg=4.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="adapter"),
    }  # fmt: skip


def adapted(text, seed, photo, mask, **settings):
    """The same with somebody's face."""
    prompt = plain(text, seed)
    prompt["2"] = node("LoadImage", image=photo)
    prompt["3"] = node("LoadImageMask", image=mask, channel="red")
    prompt["4"] = node("SeFiLoadFaceAdapter", file=FACE_ADAPTER.name)
    prompt["11"] = node(
        "SeFiApplyFaceAdapter", model=["1", 0], face_adapter=["4", 0], photos=["2", 0],
        masks=["3", 0], **{"strength": 1.0, **settings},
    )  # fmt: skip
    prompt["8"]["inputs"]["model"] = ["11", 0]
    return prompt


def pictures(server, prompt):
    found = server.run(prompt).pictures("SaveImage")
    decoded = [np.array(Image.open(io.BytesIO(one)).convert("RGB")) for one in found]
    return torch.from_numpy(np.stack(decoded)).float() / 255


def uploaded(server, folder, name, pixels):
    Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(folder / name)
    return server.upload(folder / name)


def test_a_person_is_drawn_from_one_photo(server, files, tmp_path):
    """At least half of the way from the class word to people whom the miniature knows by name."""
    judge, asked = load_judges(), prompts(4, PROMPTS)
    names = list(named_looks("person"))
    ids = {"class word": [], "adapter": [], "named": []}
    for number in range(PEOPLE):
        subject, known = Subject(4, number), Named(names[7 * number])
        (photo,) = subject.photos(1)
        face = uploaded(server, tmp_path, f"face{number}.png", photo.picture)
        mask = uploaded(server, tmp_path, f"mask{number}.png", photo.mask)
        for place, wish in enumerate(asked):
            seed = 100 * number + place
            text = caption_of(wish, "person", "person")
            for row, prompt, who in (
                ("class word", plain(text, seed), subject),
                ("adapter", adapted(text, seed, face, mask), subject),
                ("named", plain(caption_of(wish, known.name, "person"), seed), known),
            ):
                drawn = pictures(server, prompt)
                similarity = judge.identity_similarity(drawn, who.renders(asked))
                ids[row].append(float(similarity.mean()))
    means = {row: sum(found) / len(found) for row, found in ids.items()}
    halfway = (means["class word"] + means["named"]) / 2
    assert means["adapter"] >= halfway > means["class word"] + 0.2, means


def test_strength_0_is_the_picture_without_it(server, files, tmp_path):
    (photo,) = Subject(4, 0).photos(1)
    face = uploaded(server, tmp_path, "face.png", photo.picture)
    mask = uploaded(server, tmp_path, "mask.png", photo.mask)
    text = "a photo of person"
    off = pictures(server, adapted(text, 5, face, mask, strength=0.0))
    assert torch.equal(off, pictures(server, plain(text, 5)))
    on = pictures(server, adapted(text, 5, face, mask))
    assert float((on - off).abs().mean()) > 0.01


def test_a_missing_file_is_refused_before_the_graph_runs(server, files):
    asked = adapted("a photo", 1, "unused.png", "unused.png")
    asked["2"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    asked["3"] = node("SolidMask", value=1.0, width=64, height=64)
    asked["4"]["inputs"]["file"] = "no.bin"
    with pytest.raises(ServerError, match=r"'no\.bin' is not in .*face_adapters: press R"):
        server.queue(asked)
