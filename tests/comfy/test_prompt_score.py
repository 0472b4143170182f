"""SeFi Prompt Score with small random models of ComfyUI's real classes."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from comfy_execution.graph_utils import ExecutionBlocker
from sefi_ide.nodes.prompt_score import SeFiPromptScore
from sefi_ide.sefi_core.comfyui import prompt_score
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.clip.tokens import encoder_models
from sefi_ide.sefi_core.comfyui.methods import AppliedIdentity
from sefi_ide.sefi_core.comfyui.prompt_score import COLOUR_PROMPT, COLOURS
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.tests.comfy.made_identity import make_identity
from sefi_ide.tests.comfy.vision import WIDTH, plain, taught, vision_model

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def clip(mini_sd):
    """A text encoder whose projection is whatever it is."""
    return mini_sd[1]


@pytest.fixture
def vision():
    return vision_model()


def execute(clip, vision, images, prompts, *rest, **settings):
    return SeFiPromptScore.execute(clip, vision, images, prompts, *rest, **settings).result


def prompts_of(*names):
    return "\n".join(COLOUR_PROMPT.format(name) for name in names)


def test_pictures_that_show_their_prompts_have_scores_of_1_and_others_less(clip, vision):
    taught(clip, vision)
    score, fulfilled, who, _, table = execute(
        clip, vision, plain("red", "blue"), prompts_of("red", "blue")
    )
    assert score == pytest.approx(1, abs=1e-3) and fulfilled == 1.0
    assert isinstance(who, ExecutionBlocker) and "SeFi Likeness" in who.message
    swapped = execute(clip, vision, plain("blue", "red"), prompts_of("red", "blue"))
    assert swapped[0] < score - 0.01 and swapped[1] == 0.0
    assert table.splitlines()[2].endswith(f"| {COLOUR_PROMPT.format('red')} |")


def test_id_p_in_the_graph(clip, vision):
    taught(clip, vision)
    images, prompts = plain("red", "red", "green"), prompts_of("red", "blue", "green")
    _, fulfilled, who, person, table = execute(clip, vision, images, prompts, (0.9, 0.8, 0.1))
    assert fulfilled == pytest.approx(2 / 3)
    assert who == pytest.approx(1.8 / 3) and person == pytest.approx(1.0 / 3)
    assert "| 0.900 |" in table


def test_the_score_is_clips_own_cosine(clip, vision):
    """Against the two models called by hand, with another text and another picture."""
    taught(clip, vision)
    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(1))
    tokens = clip.tokenize("a dog and a cat")
    pooled = clip.encode_from_tokens(tokens, return_pooled="unprojected")[1]
    weight = encoder_models(clip)["l"].transformer.text_projection.weight
    seen = vision.encode_image(picture)["image_embeds"]
    wanted = F.cosine_similarity(pooled @ weight.T, seen).item()
    found = execute(clip, vision, picture, "a dog and a cat", fulfilled="threshold")[0]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_placeholder_counts_as_its_class_word(mini_sd, vision):
    model, clip, _ = mini_sd
    taught(clip, vision)
    identity = make_identity("anna", width=WIDTH)
    plain_text = f"a photo of {identity.class_word} in the snow"
    picture = plain("white")
    wanted = execute(clip, vision, picture, plain_text)[0]
    prompt = "a photo of <anna> in the snow"
    assert execute(clip, vision, picture, prompt, None, identity)[0] == wanted
    applied = apply_identity(model, clip, AppliedIdentity(identity))[1]
    assert execute(applied, vision, picture, prompt)[0] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(SeFiError, match="SeFi Prompt Score: prompts has '<anna>'"):
        execute(clip, vision, picture, prompt)


def test_the_clip_is_left_as_it_was(clip, vision):
    taught(clip, vision)
    clip.clip_layer(-2)
    before = clip.encode_from_tokens(clip.tokenize("a dog"), return_pooled=True)
    score = execute(clip, vision, plain("red"), prompts_of("red"))[0]
    after = clip.encode_from_tokens(clip.tokenize("a dog"), return_pooled=True)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert score == pytest.approx(1, abs=1e-3)  # the last layer counts, whatever clip skip says


@pytest.mark.parametrize("weight", ["zeros", "nan", "random"])
def test_a_checkpoint_without_the_projection_is_refused(clip, vision, weight):
    """What ComfyUI leaves in its place is whatever was in memory."""
    taught(clip, vision)
    generator = torch.Generator().manual_seed(3)
    values = {
        "zeros": torch.zeros(WIDTH, WIDTH),
        "nan": torch.full((WIDTH, WIDTH), torch.nan),
        "random": torch.randn(WIDTH, WIDTH, generator=generator),
    }[weight]
    projection = encoder_models(clip)["l"].transformer.text_projection
    projection.weight = torch.nn.Parameter(values, requires_grad=False)
    prompt_score._agreeing.clear()
    with pytest.raises(SeFiError, match="SeFi Prompt Score: .*do not tell a red picture"):
        execute(clip, vision, plain("red"), prompts_of("red"))


def test_models_of_other_widths_and_kinds_are_refused(clip):
    with pytest.raises(SeFiError, match="pictures have 768 numbers, texts l 128.*clip_l"):
        execute(clip, vision_model(768), plain("red"), "x")
    with pytest.raises(SeFiError, match="shares no space with text"):
        execute(clip, vision_model(model_type="siglip_vision_model"), plain("red"), "x")


def test_missing_models_are_named(clip, vision):
    for models, name in (((clip, None), "clip_vision"), ((None, vision), "clip")):
        said = f"^SeFi Prompt Score: the {name} input is empty: connect the"
        with pytest.raises(SeFiError, match=said):
            execute(*models, plain("red"), "x")


@pytest.mark.parametrize(
    ("images", "prompts", "why"),
    [
        (torch.zeros(0, 8, 8, 3), "x", "images is empty"),
        (
            torch.zeros(8, 8, 3),
            "x",
            r"images is a tensor of the shape \(8, 8, 3\)",
        ),
        (torch.full((1, 8, 8, 3), torch.nan), "x", "images holds values that are not numbers"),
        (torch.zeros(1, 8, 8, 3), " ", "prompts is empty"),
        (torch.zeros(1, 8, 8, 3), 5, "prompts is an int: write a text, or connect"),
        (torch.zeros(3, 8, 8, 3), "x\ny", "prompts has 2 lines and images has 3"),
    ],
)
def test_bad_input_is_named(clip, vision, images, prompts, why):
    taught(clip, vision)
    with pytest.raises(SeFiError, match=f"SeFi Prompt Score: {why}"):
        execute(clip, vision, images, prompts)


def test_likeness_and_identity_of_something_else_are_named(clip, vision):
    taught(clip, vision)
    red = plain("red"), prompts_of("red")
    for rest, why in (
        ((0.5,), "likeness is a float: connect the output likeness of SeFi Likeness"),
        (((0.5, None),), "likeness is a tuple: connect the output likeness"),
        (((float("nan"),),), "likeness is a tuple: connect the output likeness"),
        ((None, "anna"), "identity is a str: connect the identity of SeFi Load Identity"),
    ):
        with pytest.raises(SeFiError, match=f"SeFi Prompt Score: {why}"):
            execute(clip, vision, *red, *rest)
    with pytest.raises(SeFiError, match="likeness is of 2 pictures and images are 1"):
        execute(clip, vision, *red, (0.5, 0.5))


def test_the_two_are_tried_once(clip, vision, monkeypatch):
    taught(clip, vision)
    seen = []
    encode = vision.encode_image
    monkeypatch.setattr(vision, "encode_image", lambda one: seen.append(len(one)) or encode(one))
    for _ in range(2):
        execute(clip, vision, plain("red"), prompts_of("red"))
    assert seen == [len(COLOURS), 1, 1]


def test_cancelling_stops(clip, vision):
    taught(clip, vision)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(clip, vision, plain("red"), prompts_of("red"))
