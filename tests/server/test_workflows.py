"""Every shipped workflow runs to its end, and a new prompt does not train again.

With few steps: how well a face is learned is for the main job to say.
"""

import copy
import io

import numpy as np
import pytest
import skimage.data
from PIL import Image
from sefi_ide.tests.server.browser.identities import put_identity
from sefi_ide.tests.sface import MODEL, sface_file
from sefi_ide.tools.demo import add_face_files
from sefi_ide.tools.server import ServerError
from sefi_ide.tools.templates import (
    ADAPTER,
    ALL,
    ENCODER,
    LEARNING,
    MOST_ALIKE,
    PAINTED_MASK,
    QUICK_START,
    STYLES,
    TWO,
    TWO_FOUND,
    TWO_PAINTED,
)
from sefi_ide.tools.templates import QUICK_START_SDXL as SDXL
from sefi_ide.tools.workflow import nodes_of

ITS_OWN = {(MOST_ALIKE, "keep"), (TWO_FOUND, "regions"), (STYLES, "adain_mean")}
"""What a workflow is about, and sets itself: its name and the input."""


def with_few_steps(prompt):
    for class_type in ("SeFiTrainIdentity", "KSampler"):
        for node in nodes_of(prompt, class_type):
            node["inputs"]["steps"] = 4
    for node in nodes_of(prompt, "SeFiTrainIdentity"):
        node["inputs"]["predicted_steps"] = 4
    return prompt


def with_a_recogniser(server):
    """Put SFace where the server looks for it, as the workflow's note says."""
    folder = server.directory / "models" / "face_recognition"
    folder.mkdir(exist_ok=True)
    if not (folder / MODEL).exists():
        (folder / MODEL).symlink_to(sface_file())


@pytest.fixture(scope="module")
def painted(server, tmp_path_factory):
    """The photo with a painted head, as the mask editor saves it: transparent where it is."""
    file = tmp_path_factory.mktemp("pictures") / "painted.png"
    photo = Image.fromarray(skimage.data.astronaut()).convert("RGBA")
    alpha = np.full((512, 512), 255, np.uint8)
    alpha[20:210, 150:290] = 0
    photo.putalpha(Image.fromarray(alpha))
    photo.save(file)
    return server.upload(file)


SAVED = "of_the_quick_start"


@pytest.fixture(scope="module")
def quick_start(server, shipped_prompt, picture):
    """The quick start, run once for all tests: it trains and saves the identity."""
    prompt = with_few_steps(shipped_prompt(QUICK_START, picture))
    # Other tests of the server have saved other people as anna.
    nodes_of(prompt, "SeFiSaveIdentity")[0]["inputs"]["file_name"] = SAVED
    return server.run(prompt)


# First: the server keeps the results of the last prompt only, and another workflow drops them.
def test_another_prompt_draws_another_picture_without_training_again(server, quick_start):
    prompt = copy.deepcopy(quick_start.prompt)
    sampler = nodes_of(prompt, "KSampler")[0]
    positive = prompt[sampler["inputs"]["positive"][0]]["inputs"]
    assert "<" in positive["text"]
    positive["text"] += " in the snow"
    again = server.run(prompt)
    assert not again.executed("SeFiTrainIdentity")
    assert not again.executed("SeFiFaceMask")
    assert again.executed("CLIPTextEncode")
    assert again.pictures("SaveImage") != quick_start.pictures("SaveImage")


def test_quick_start_trains_and_leaves_a_small_identity_file(server, quick_start):
    assert quick_start.executed("SeFiTrainIdentity")
    (file,) = (server.directory / "models" / "sefi").glob(f"{SAVED}*.safetensors")
    assert file.stat().st_size < 100_000


@pytest.mark.parametrize("name", ALL)
def test_workflow_runs_to_its_end(name, server, quick_start, shipped_prompt, picture, painted):
    run = quick_start
    if name == MOST_ALIKE:
        with_a_recogniser(server)
    if name in (ENCODER, ADAPTER):
        add_face_files(server)
    if name in (STYLES, *TWO):
        for person in ("anna", "ben"):
            put_identity(server, f"{person}.safetensors", person)
    photo = painted if name in (PAINTED_MASK, TWO_PAINTED) else picture
    if name != QUICK_START:
        run = server.run(with_few_steps(shipped_prompt(name, photo)))
    pictures = [np.asarray(Image.open(io.BytesIO(data))) for data in run.pictures("SaveImage")]
    assert pictures
    side = 1024 if name == SDXL else 512
    for pixels in pictures:
        assert pixels.shape == (side, side, 3)
        assert pixels.std() > 1
    if name == MOST_ALIKE:
        assert len(pictures) == 3
        assert len(run.pictures("SeFiLikeness")) == 1  # the sheet
    if name == STYLES:
        assert len(pictures) == 2
        assert not np.array_equal(*pictures)
    if name == PAINTED_MASK:
        (cut_out,) = (
            picture
            for picture in map(Image.open, map(io.BytesIO, run.pictures("PreviewImage")))
            if picture.mode == "RGBA"
        )
        alpha = np.asarray(cut_out.getchannel("A"))
        assert alpha[100, 200] == 255  # the head stays
        assert alpha[400, 400] == 0
    elif name in LEARNING:
        (over_the_photo,) = run.pictures("SeFiFaceMask")
        assert Image.open(io.BytesIO(over_the_photo)).size == (512, 512)


def test_a_photo_in_which_nothing_is_painted_is_told_in_one_sentence(
    server, shipped_prompt, picture
):
    with pytest.raises(ServerError, match="SeFi Train Identity: .*masks?"):
        server.run(with_few_steps(shipped_prompt(PAINTED_MASK, picture)))


@pytest.mark.parametrize("name", ALL)
def test_a_workflow_has_the_defaults_of_the_nodes(name, server, shipped_prompt, picture):
    """Who opens it gets what was measured to be best; only names and texts are the workflow's."""
    described = server.get("/object_info")
    compared = set()
    for node in shipped_prompt(name, picture).values():
        if not node["class_type"].startswith("SeFi"):
            continue
        inputs = described[node["class_type"]]["input"]
        for key, (kind, *options) in {**inputs["required"], **inputs.get("optional", {})}.items():
            default = options[0].get("default") if options else None
            value = node["inputs"].get(key)
            if default is None or kind == "STRING" or isinstance(value, list):
                continue
            if (name, key) in ITS_OWN:
                continue
            wanted = default if isinstance(default, str) else pytest.approx(default)
            assert value == wanted, f"{node['class_type']}.{key}"
            compared.add(type(default))
    assert compared >= ({int, float, str} if name in LEARNING else {float})
