"""Mixed attention: against an oracle, and where there is nothing to mix."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.comfyui.attention_maps import attention_maps
from sefi_ide.tests.comfy.composition import (
    NEGATIVE,
    SCALE,
    SIDE,
    STEPS,
    TEXT,
    TOLERANCE,
    World,
    apply,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.mixing import PLACE, TRAJECTORIES, WORD, batches, difference, mixed
from sefi_ide.tests.comfy.mixing_oracle import MixedOracle, person_mask
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import of_all_families

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_all_families]

# Against the oracle.

MASK = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(41))
ADAIN = {"off": "", "keys": "k", "values": "v", "keys and values": "kv"}


def oracle(setting, trajectory="own", **settings) -> MixedOracle:
    return MixedOracle(setting.plain.model, own=trajectory == "own", place=PLACE, **settings)


@pytest.mark.parametrize(
    ("trajectory", "adain_mean", "hidden"),
    [
        ("own", "off", None),
        ("own", "keys", None),
        ("own", "values", MASK[0]),
        ("own", "keys and values", person_mask),
        ("same", "off", person_mask),
        ("same", "keys and values", MASK[0]),
    ],
)
def test_what_is_mixed_behind_the_projections(setting, trajectory, adain_mean, hidden):
    settings = {"adain_mean": adain_mean, "face_hidden": "off" if hidden is None else "automatic"}
    if hidden is MASK[0] or isinstance(hidden, torch.Tensor):
        settings["face_mask"] = MASK
    drawn = text_case()(mixed(setting.applied, trajectory, **settings), setting.noise)
    by_hand = oracle(setting, trajectory, adain=ADAIN[adain_mean], hidden=hidden)
    expected, _ = by_hand.sample_both(setting.noise, setting.plain.sigmas(), text_guidance(setting))
    assert difference(drawn, expected) < TOLERANCE
    # Where nearly all of the picture is hidden, little is mixed.
    without = text_case()(setting.applied, setting.noise)
    assert difference(drawn, without) > 5 * difference(drawn, expected)


def test_a_face_is_hidden(setting):
    """A mask of zeros hides nothing, one of ones everything: then nothing of the text's is left."""

    def drawn(**settings):
        return text_case()(mixed(setting.applied, **settings), setting.noise)

    nothing, everything = (drawn(face_mask=torch.full((1, 5, 7), share)) for share in (0.0, 1.0))
    assert difference(nothing, drawn(face_hidden="off")) < TOLERANCE
    assert difference(everything, text_case()(setting.applied, setting.noise)) < TOLERANCE
    found = drawn()
    assert difference(found, nothing) > TOLERANCE < difference(found, everything)


@TRAJECTORIES
def test_a_range(setting, trajectory):
    drawn = text_case()(
        mixed(setting.applied, trajectory, face_hidden="off", start_percent=0.3, end_percent=0.8),
        setting.noise,
    )
    expected, _ = oracle(setting, trajectory, start=0.3, end=0.8).sample_both(
        setting.noise, setting.plain.sigmas(), text_guidance(setting)
    )
    assert difference(drawn, expected) < TOLERANCE


@TRAJECTORIES
def test_of_two_areas_only_the_identitys_is_mixed(setting, trajectory):
    def case(world):
        def area(text, x):
            return nodes.ConditioningSetArea().append(world.encode(text), 32, 64, x, 0, 1.0)[0]

        positive = area(TEXT, 0) + area("a tree in fog", 32)
        return world.sample(positive, world.encode(NEGATIVE), setting.noise)

    settings = {"adain_mean": "keys", "face_mask": MASK}
    drawn = case(mixed(setting.applied, trajectory, **settings))
    left, right = (SIDE, 4, 0, 0), (SIDE, 4, 0, 4)
    positive = [Region(setting.prompt(TEXT), left), Region(setting.prompt("a tree in fog"), right)]
    negative = [Region(setting.prompt(NEGATIVE), cells) for cells in (None, left, right)]
    expected, _ = oracle(setting, trajectory, adain="k", hidden=MASK[0]).sample_both(
        setting.noise, setting.plain.sigmas(), cfg(positive, negative, SCALE)
    )
    assert difference(drawn, expected) < TOLERANCE


# Where there is nothing to mix.


@TRAJECTORIES
@pytest.mark.parametrize(
    "why", ["no-identity", "out-of-range", "identity-over", "no-patched-model"]
)
def test_nothing_to_mix(setting, trajectory, why):
    """The same bits, and no call of the U-Net more."""
    text, settings, world = TEXT, {}, setting.applied
    if why == "no-identity":
        text = WORD
    elif why == "no-patched-model":
        world, text = setting.plain, WORD
    elif why == "out-of-range":  # none of three steps is in it
        settings = {"start_percent": 0.05, "end_percent": 0.06}
    else:
        anna = setting.anna
        applied = apply(setting.plain.model, setting.plain.clip, anna, start=0.05, end=0.06)
        world = World(*applied, setting.applied.people)
    expected, before = batches(world, lambda: text_case(text)(world, setting.noise))
    other = mixed(world, trajectory, **settings)
    drawn, calls = batches(world, lambda: text_case(text)(other, setting.noise))
    assert torch.equal(drawn, expected)
    assert calls == before


def test_steps_after_the_range_cost_nothing(setting):
    early = mixed(setting.applied, end_percent=0.3)
    _, calls = batches(early, lambda: text_case()(early, setting.noise))
    assert calls == [2, 1, 1] + [2] * (STEPS - 1)


@TRAJECTORIES
def test_what_came_before_is_untouched(setting, trajectory):
    """Pictures are the same each time, and so are those of the MODEL before the node."""
    before = text_case()(setting.applied, setting.noise)
    options = setting.applied.model.model_options
    wrappers = {kind: dict(by_key) for kind, by_key in setting.applied.model.wrappers.items()}
    world = mixed(mixed(setting.applied, "same"), trajectory)
    drawn = [text_case()(world, setting.noise) for _ in range(3)]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    once = text_case()(mixed(setting.applied, trajectory), setting.noise)
    assert torch.equal(once, drawn[0])  # a second node replaces the first
    assert torch.equal(text_case()(setting.applied, setting.noise), before)
    assert setting.applied.model.model_options == options
    assert setting.applied.model.wrappers == wrappers
    assert difference(drawn[0], before) > TOLERANCE


def test_the_node_before_apply(setting):
    """The order of the two nodes does not matter."""
    model = mixed(setting.plain).model
    world = World(*apply(model, setting.plain.clip, setting.anna), setting.applied.people)
    drawn = text_case()(world, setting.noise)
    expected = text_case()(mixed(setting.applied), setting.noise)
    assert difference(drawn, expected) < TOLERANCE


@TRAJECTORIES
def test_attention_maps_are_those_of_the_identity(setting, trajectory):
    arguments = {"samples": setting.noise}, "a photo of <anna>", ["<anna>"], 400, 0
    world = mixed(setting.applied, trajectory)
    one, other = (attention_maps(w.model, w.clip, *arguments) for w in (world, setting.applied))
    assert all(map(torch.equal, one.layers, other.layers))
