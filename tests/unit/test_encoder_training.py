"""Settings and losses of the training of face encoders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.networks import EncoderShape
from sefi_ide.sefi_core.face2diffusion.training.arcface import ArcFace, identification_auc
from sefi_ide.sefi_core.face2diffusion.training.settings import (
    PUBLISHED,
    parse_changes,
    read_settings,
)


def test_arcface_adds_the_margin_to_the_own_angle():
    loss = ArcFace(2, 3, margin=0.5, scale=10.0)
    with torch.no_grad():
        angles = torch.tensor([0.0, 1.0, 2.0])
        loss.directions.copy_(torch.stack([angles.cos(), angles.sin()], 1) * 3)
    feature = torch.tensor([[math.cos(0.3), math.sin(0.3)]]) * 7
    logits = [10 * math.cos(0.3 + 0.5), 10 * math.cos(0.7), 10 * math.cos(1.7)]
    wanted = -logits[0] + math.log(sum(map(math.exp, logits)))
    assert loss(feature, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-5)


def test_arcface_falls_with_the_angle_all_the_way_round():
    """Where the cosine with the margin would turn, too."""
    loss = ArcFace(2, 2, margin=0.5, scale=1.0)
    with torch.no_grad():
        loss.directions.copy_(torch.tensor([[1.0, 0.0], [0.0, 1e-9]]))
    angles = torch.linspace(0.01, 3.13, 200)
    values = [
        loss(torch.tensor([[math.cos(a), math.sin(a)]]), torch.tensor([0])).item() for a in angles
    ]
    own = torch.tensor(values) - torch.tensor(
        [float(torch.logsumexp(torch.tensor([0.0, math.sin(a)]), 0)) for a in angles]
    )
    assert (own.diff() > -0.3).all() and own[-1] > own[0]


def test_the_auc_counts_pairs():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert identification_auc(features, torch.tensor([0, 0, 1, 1])) == 1.0
    assert identification_auc(features, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.25, abs=0.26)
    assert math.isnan(identification_auc(features, torch.tensor([0, 0, 0, 0])))


def test_settings_come_from_a_file_and_from_changes(tmp_path):
    published = read_settings(PUBLISHED, {})
    assert published.shape == EncoderShape() and published.class_guided and not published.masked
    assert (published.margin, published.vectors, published.expression_dropout) == (0.5, 2, 0.2)
    assert read_settings(PUBLISHED, {"vectors": 3}).vectors == 3
    assert read_settings(None, json.loads(json.dumps(published.as_json()))) == published
    file = tmp_path / "settings.json"
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ('{"vectors": 0}', "vectors"),
        ('{"speed": 3}', "there is no setting speed: choose from"),
        ('{"shape": {"kind": "rnn"}}', "shape is no shape"),
        ('{"masked": "yes"}', "masked"),
        ('{"another_photo": "no"}', "another_photo is 'no': set it to true or false"),
        ('{"shape": "cnn"}', "shape is 'cnn': write a JSON object"),
        ('{"shape": null}', "shape is 'None': write a JSON object"),
        ('{"template": "a photo"}', "has the placeholder 0 times"),
        ('{"template": "<name> and <name>"}', "has the placeholder 2 times"),
        ('{"template": 3}', "template is '3': write a text"),
        ('{"validation_prompt": null}', "validation_prompt is 'None': write a text"),
        ('{"class_word": ""}', "the class word '' is no word"),
        ('{"class_word": 3}', "the class word '3' is no word"),
        ("[" * 100_000, "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(SeFiError, match=said):
            read_settings(file, {})
    assert parse_changes(["template=" + "[" * 100_000])["template"].startswith("[[")
    file.write_bytes(b'\xef\xbb\xbf{"vectors": 3}')
    assert read_settings(file, {}).vectors == 3
