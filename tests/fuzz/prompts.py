"""Prompts with wrong values and wrong links, sent to a real server.

Whatever is sent, the server stays, the pack's nodes say what is wrong in one sentence, and a plain
prompt runs afterwards.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sefi_ide.sefi_core.face2diffusion.files import write_face_encoder
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    Embedder,
    FaceAdapter,
    write_face_adapter,
)
from sefi_ide.sefi_core.faces.recognition import SFACE
from sefi_ide.tests.unit.face2diffusion_files import encoder_for, save_expression
from sefi_ide.tests.unit.face_adapter_files import adapter_for
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tests.unit.recognition_models import save_recogniser
from sefi_ide.tools.server import ComfyServer, ServerError

from .any_node import MODES
from .campaign import REPOSITORY

NAME = "prompts"
SECONDS = 180.0

CHECKPOINT = REPOSITORY / "tests" / "mini_sd" / "mini_sd.safetensors"
PICTURE = "face.png"
"""Without a face."""
FACE = "drawn.png"
"""With one, as SeFi Likeness needs."""
ENCODER = "faces.safetensors"
WIDTH = 128
"""Of the miniature's token embeddings, which the encoder predicts, and of its contexts."""
ADAPTER = "adapter.safetensors"
CHANNELS = (128, 192, 192, 192, 128, 128, 192)
"""Of the miniature's cross-attentions, the middle's last."""

Prompt = dict[str, dict[str, Any]]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**64, 10**40, 1.5, -0.5, 1e300, float("nan"),
    float("inf"), "", " ", "7", "nan", "auto", "<anna>", "../x", "a" * 3000, "\0", "\ud800", "\n",
    {}, {"__value__": []}, {"__value__": [1, 2]}, {"a": 1}, [], [1], [None, None], ["no", 0],
)  # fmt: skip


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def everything() -> Prompt:
    """A prompt with every node of the pack; the small values keep it quick."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT.name),
        "2": node("LoadImage", image=PICTURE),
        "3": node(
            "SeFiFaceMask", image=["2", 0], detector="auto", which_face="largest",
            face_index=0, region="face", grow=0, feather=0, none_found="whole picture",
            crop_size=64, crop_margin=0.3,
        ),
        "4": node(
            "SeFiTrainIdentity", model=["1", 0], clip=["1", 1], vae=["1", 2], photos=["3", 1],
            masks=["3", 2], name="anna", class_word="person", captions="", steps=1, seed=0,
            stages=1, resolution=64, preview_every=0, templates="a photo of <name>", vectors=1,
        ),
        "5": node("SeFiSaveIdentity", identity=["4", 0], file_name="", if_exists="new number"),
        "6": node("SeFiLoadIdentity", file="bob.safetensors", name=""),
        "7": node(
            "SeFiApplyIdentity", model=["1", 0], clip=["1", 1], identity=["4", 0], strength_k=1.0,
            strength_v=1.0, start_percent=0.0, end_percent=1.0, stage_strengths="0.5",
            regions="automatic",
        ),
        "8": node(
            "SeFiApplyIdentity", model=["7", 0], clip=["7", 1], identity=["6", 0], strength_k=1.0,
            strength_v=1.0,
        ),
        "9": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "10": node(
            "SeFiAttentionMap", model=["20", 0], clip=["20", 1], latent=["9", 0],
            prompt="a photo of <anna>", words="<anna>", timestep=400, seed=0, image=["2", 0],
        ),
        "11": node("PreviewImage", images=["10", 0]),
        "12": node("PreviewImage", images=["3", 1]),
        "13": node("LoadImage", image=FACE),
        "14": node(
            "SeFiLikeness", reference=["13", 0], images=["13", 0], training_photo=["13", 0],
            encoder="auto", threshold=-1.0, keep=0,
        ),
        "15": node("FuzzVision", clip=["1", 1]),
        "17": node("SeFiLoadFaceEncoder", file=ENCODER, mapping="auto"),
        "18": node(
            "SeFiPredictIdentity", face_encoder=["17", 0], photos=["13", 0], masks=["19", 0],
            expression=["13", 0], name="eve", class_word="", detector="auto",
            which_face="largest", face_index=0,
        ),
        "19": node("SolidMask", value=1.0, width=96, height=96),
        "20": node(
            "SeFiApplyIdentity", model=["8", 0], clip=["8", 1], identity=["18", 0], strength_k=1.0,
            strength_v=1.0,
        ),
        "22": node(
            "SeFiMixIdentities", first=["4", 0], second=["6", 0], ratio_k=0.3, ratio_v=0.7,
            name="", class_word="person",
        ),
        "23": node(
            "SeFiExportEmbedding", identity=["4", 0], file_name="", if_exists="new number",
        ),
        "24": node("SeFiLoadEmbedding", file="bob.safetensors", class_word="person", name="dora"),
        "25": node(
            "SeFiExportEmbedding", identity=["22", 0], file_name="mix", if_exists="overwrite",
        ),
        "26": node("SeFiSaveIdentity", identity=["24", 0], file_name="", if_exists="overwrite"),
        "21": node("PreviewImage", images=["18", 1]),
        "27": node("SeFiLoadFaceAdapter", file=ADAPTER, variant="auto"),
        "28": node(
            "SeFiApplyFaceAdapter", model=["20", 0], face_adapter=["27", 0], photos=["13", 0],
            masks=["19", 0], strength=1.0, weights="1", region=["19", 0], text=True,
        ),
        "29": node("PreviewImage", images=["28", 1]),
        "16": node(
            "SeFiPromptScore", clip=["15", 0], clip_vision=["15", 1], images=["13", 0],
            prompts="a photo of <anna> in a hat", likeness=["14", 4], identity=["4", 0],
            fulfilled="closest prompt", threshold=0.22,
        ),
        "30": node(
            "SeFiMixedAttention", model=["20", 0], trajectory="own", adain_mean="keys and values",
            face_hidden="automatic", start_percent=0.0, end_percent=1.0, identity="SeFi",
            face_mask=["19", 0],
        ),
        "31": node("CLIPTextEncode", clip=["20", 1], text="a photo of <anna>"),
        "32": node(
            "KSampler", model=["30", 0], positive=["31", 0], negative=["31", 0],
            latent_image=["9", 0], seed=0, steps=1, cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "33": node("VAEDecode", samples=["32", 0], vae=["1", 2]),
        "34": node("PreviewImage", images=["33", 0]),
    }  # fmt: skip


def _adapter() -> FaceAdapter:
    """One for the miniature that sees faces with the encoder beside it."""
    return adapter_for(FACEID, "sd1", CHANNELS, WIDTH, Embedder("sefi", ENCODER, 10, False))


def plain(seed: int) -> Prompt:
    """A prompt without the pack."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT.name),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a hat"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "4": node(
            "KSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0],
            seed=seed, steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("PreviewImage", images=["5", 0]),
    }  # fmt: skip


def broken(chance: random.Random) -> Prompt:
    """Everything, with something wrong at the pack's nodes."""
    prompt = copy.deepcopy(everything())
    own = [name for name, one in prompt.items() if one["class_type"].startswith("SeFi")]
    for number in range(chance.choice([1, 1, 2])):
        inputs = prompt[chance.choice(own)]["inputs"]
        name = chance.choice(list(inputs))
        kind = chance.randrange(8)
        if kind < 3:
            inputs[name] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 6:
            source = str(100 + number)
            prompt[source] = node("FuzzAnything", what=chance.choice(MODES))
            inputs[name] = [source, 0]
        elif kind == 6:
            inputs[name] = [chance.choice(list(prompt)), chance.choice([0, 0, 1, 2, 9, -1])]
        else:
            del inputs[name]
    return prompt


@contextmanager
def prepared() -> Iterator[Callable[[random.Random], None]]:
    with tempfile.TemporaryDirectory(prefix="sefi-fuzz-") as folder:
        server = ComfyServer(Path(folder), [CHECKPOINT], ("--cpu", "--cache-lru", "60"))
        shutil.copy(Path(__file__).with_name("any_node.py"), server.directory / "custom_nodes")
        colours = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(1))
        picture = Image.fromarray(colours.to(torch.uint8).numpy())
        picture.save(server.directory / "input" / PICTURE)
        Image.fromarray(drawn(96)).save(server.directory / "input" / FACE)
        save_recogniser(server.directory / "models" / "face_recognition" / SFACE.files[0])
        encoders = server.directory / "models" / "face2diffusion"
        encoders.mkdir()
        write_face_encoder(encoder_for("sd1", {"l": WIDTH}), encoders / ENCODER)
        save_expression(encoders / "expression.onnx")
        adapters = server.directory / "models" / "face_adapters"
        adapters.mkdir()
        write_face_adapter(_adapter(), adapters / ADAPTER)
        seeds = itertools.count(1)
        with server:
            bob = everything()
            bob["4"]["inputs"]["name"] = bob["5"]["inputs"]["file_name"] = "bob"
            for name in ("6", "8", "20", "22", "24", "25", "26"):
                del bob[name]
            bob["16"]["inputs"]["prompts"] = "a photo"
            bob["10"]["inputs"] |= {"model": ["1", 0], "clip": ["1", 1], "words": "photo",
                                    "prompt": "a photo"}  # fmt: skip
            server.run(bob)
            server.run(everything())
            yield lambda chance: case(server, broken(chance), next(seeds))


def case(server: ComfyServer, prompt: Prompt, seed: int) -> None:
    told = ""
    try:
        prompt_id = server.post("/prompt", {"prompt": prompt})["prompt_id"]
    except urllib.error.HTTPError as error:
        error.read()  # refused: by validation, or because ComfyUI itself cannot read it
    else:
        with suppress(ServerError):  # of a node that failed; a server that died fails below
            server.wait(prompt_id, SECONDS)
        entry = server.get(f"/history/{prompt_id}")[prompt_id]
        error = dict(entry["status"]["messages"]).get("execution_error")
        if error is not None and error["node_type"].startswith("SeFi"):
            told = f"{error['exception_type']}: {error['exception_message'].strip()}"
            if "sefi_ide.SeFiError" != error["exception_type"]:
                told += "\n" + "".join(error["traceback"])
                raise AssertionError(f"{told}\n{json.dumps(prompt)}")
            assert "\n" not in told and ": " in told, told
    run = server.run(plain(seed))
    assert run.executed("KSampler") and run.pictures("PreviewImage"), told
