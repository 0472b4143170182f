"""What SeFi Train Identity cannot be queued with, as ComfyUI asks before it runs anything."""

from __future__ import annotations

import asyncio
from unittest import mock

import execution
import pytest
from sefi_ide.nodes.train_identity import SeFiTrainIdentity

import nodes

TEXTS = {"name": "anna", "class_word": "person", "captions": "auto", "templates": "<name> at home"}


def refusals(**changes) -> list[dict]:
    """ComfyUI's errors for a prompt that trains with these texts."""
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "photos": ["2", 0]}
    inputs = {**TEXTS, "steps": 3, "seed": 0, "gradient_checkpointing": "auto", **changes, **links}
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"class_type": "EmptyImage", "inputs": {
            "width": 64, "height": 64, "batch_size": 1, "color": 0,
        }},
        "3": {"class_type": "SeFiTrainIdentity", "inputs": inputs},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 2]}},
        "9": {"class_type": "PrimitiveString", "inputs": {"value": ""}},
    }  # fmt: skip
    from comfy_extras.nodes_primitive import String

    known = {"SeFiTrainIdentity": SeFiTrainIdentity, "PrimitiveString": String}
    validated = {"1": (True, [], "1")}  # there is no such checkpoint
    with mock.patch.dict(nodes.NODE_CLASS_MAPPINGS, known):
        asyncio.run(execution.validate_inputs("prompt", prompt, "4", validated))
    return validated["3"][1]


BAD = [
    ({"name": "anna banana"}, "the name 'anna banana' cannot be used"),
    ({"name": ""}, "the name '' cannot be used"),
    ({"name": "con"}, "cannot be saved under the name 'con'"),
    ({"class_word": "  "}, "the class word '  ' is no word"),
    ({"class_word": "<cat>"}, "the class word '<cat>' has characters"),
    ({"captions": "smiling\n<anna> laughing"}, "the caption '<anna> laughing' has brackets"),
    ({"captions": 301 * "a"}, "a caption has 301 characters"),
    ({"templates": "a photo of anna"}, "'a photo of anna' has the placeholder 0 times"),
    ({"templates": "<name>\n<name> and <anna>"}, "has the placeholder 2 times"),
    ({"templates": " \n"}, "templates is empty"),
    ({"gradient_checkpointing": "sometimes"}, "gradient_checkpointing is 'sometimes'"),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_texts_are_refused_before_anything_is_loaded(changes, said):
    errors = refusals(**changes)
    assert errors and {error["type"] for error in errors} == {"custom_validation_failed"}
    assert all(said in error["details"] and "\n" not in error["details"] for error in errors)
    assert set(changes) <= {error["extra_info"]["input_name"] for error in errors}


GOOD = [
    {},
    {"name": "Zo\u00eb_2", "class_word": "very old person", "captions": ""},
    {"captions": "auto\nsmiling\n"},
    {"templates": "a photo of <anna>\n\n  <name>, outside  "},
    {"gradient_checkpointing": True},
    {"name": ["9", 0], "class_word": ["9", 0], "captions": ["9", 0], "templates": ["9", 0]},
    {"name": ["9", 0], "templates": "<zoe> at home"},
]


@pytest.mark.parametrize("changes", GOOD)
def test_what_may_be_queued(changes):
    """Linked texts are not known yet; execution checks them."""
    assert refusals(**changes) == []


def test_prompts_without_the_optional_inputs():
    assert SeFiTrainIdentity.validate_inputs() is True
    assert SeFiTrainIdentity.validate_inputs(name=["anna"], class_word=["person"]) is True


def test_numbers_are_still_checked_by_comfyui():
    (error,) = refusals(steps=0)
    assert error["type"] == "value_smaller_than_min"
    assert error["extra_info"]["input_name"] == "steps"
