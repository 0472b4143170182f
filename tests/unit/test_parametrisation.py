"""All parametrisations begin at the start vectors and can be trained."""

from __future__ import annotations

import pytest
import torch
from sefi_ide.sefi_core.learning.parametrisation import (
    PARAMETRISATIONS,
    OffsetVectors,
    build_parametrisation,
)

STAGES, VECTORS = 3, 2
WIDTHS = {"g": 80, "l": 64}


def start_vectors(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {
            encoder: torch.randn(STAGES, VECTORS, width, generator=generator)
            for encoder, width in WIDTHS.items()
        }
        for _ in range(2)
    )


def loss_of(parameters: torch.nn.Module, role: int, stage: int) -> torch.Tensor:
    return parameters()[role]["l"][stage].square().sum()


@pytest.fixture(params=PARAMETRISATIONS)
def kind(request) -> str:
    return request.param


def test_training_begins_at_the_start_vectors(kind):
    start = start_vectors()
    if kind == "shared":  # as for every new identity: the class word's embedding for both
        start = start[0], start[0]
    for made, given in zip(build_parametrisation(kind, *start, seed=1)(), start, strict=True):
        assert made.keys() == given.keys()
        for encoder in given:
            for stage in range(STAGES):
                torch.testing.assert_close(made[encoder][stage], given[encoder][stage])


@pytest.mark.parametrize(
    ("kind", "length"),
    [("direct", 1.0), ("shared", 1.0), ("offsets", 1 + OffsetVectors.OFFSET_STEP)],
)
def test_a_learning_rate_is_measured_in_the_encoders_units(kind, length):
    """A first step of AdamW is the learning rate itself, times the unit.

    The common vectors of "offsets" make such a step, and each offset a shorter one.
    """
    start = start_vectors()
    parameters = build_parametrisation(kind, start[0], start[0], seed=1, units={"g": 4.0})
    before = parameters()[0]
    optimizer = torch.optim.AdamW(parameters.parameters(), 1e-3, weight_decay=0.0)
    sum(rows.sum() for rows in parameters()[0].values()).backward()
    optimizer.step()
    after = parameters()[0]
    for encoder, unit in (("g", 4.0), ("l", 1.0)):
        torch.testing.assert_close(
            before[encoder] - after[encoder],
            torch.full_like(after[encoder], 1e-3 * unit * length),
            rtol=1e-2,
            atol=0,
        )


def test_every_stage_role_and_encoder_can_be_learned(kind):
    """From one start, 2 * STAGES different targets for each encoder are reached.

    Shared vectors have STAGES of them.
    """
    word = {encoder: torch.ones(STAGES, VECTORS, width) for encoder, width in WIDTHS.items()}
    targets = start_vectors(seed=5)
    if kind == "shared":
        targets = targets[0], targets[0]
    parameters = build_parametrisation(kind, word, word, seed=1)
    rate = 3e-3 if kind == "self-attention" else 5e-2
    optimizer = torch.optim.AdamW(parameters.parameters(), rate)

    def error() -> torch.Tensor:
        return sum(
            (torch.stack(list(made[encoder])) - target[encoder]).square().mean()
            for made, target in zip(parameters(), targets, strict=True)
            for encoder in WIDTHS
        )

    before = error().item()
    for _ in range(300):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.05 * before


def test_the_start_vectors_are_copied(kind):
    start = start_vectors()
    parameters = build_parametrisation(kind, *start, seed=1)
    start[0]["l"].zero_()
    assert parameters()[0]["l"][0].abs().sum() > 0


def test_the_seed_decides_and_the_global_state_does_not(kind):
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        parameters = build_parametrisation(kind, *start_vectors(), seed=7)
        assert torch.equal(before, torch.get_rng_state())
        states.append(parameters.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_shared_vectors_stay_the_same_for_keys_and_values():
    parameters = build_parametrisation("shared", *start_vectors(), seed=0)
    optimizer = torch.optim.AdamW(parameters.parameters(), 0.1)
    loss_of(parameters, role=0, stage=1).backward()
    optimizer.step()
    keys, values = parameters()
    for encoder in WIDTHS:
        assert torch.equal(keys[encoder], values[encoder])


def test_direct_vectors_are_independent():
    parameters = build_parametrisation("direct", *start_vectors(), seed=0)
    before = [[rows.clone() for rows in made["l"]] for made in parameters()]
    optimizer = torch.optim.AdamW(parameters.parameters(), 0.1, weight_decay=0.0)
    loss_of(parameters, role=0, stage=1).backward()
    optimizer.step()
    after = [made["l"] for made in parameters()]
    for role in range(2):
        for stage in range(STAGES):
            moved = not torch.equal(before[role][stage], after[role][stage])
            assert moved == ((role, stage) == (0, 1))


def test_offsets_share_what_every_stage_needs():
    """A step for one stage moves all stages alike, and that one further; values stay."""
    step = OffsetVectors.OFFSET_STEP
    start = start_vectors()
    parameters = build_parametrisation("offsets", *start, seed=0)
    optimizer = torch.optim.AdamW(parameters.parameters(), 0.1, weight_decay=0.0)
    parameters()[0]["l"][1].sum().backward()
    optimizer.step()
    (moved, still), (keys, values) = parameters(), start
    for stage, length in enumerate((1, 1 + step, 1)):
        expected = torch.full_like(keys["l"][stage], 0.1 * length)
        torch.testing.assert_close(keys["l"][stage] - moved["l"][stage], expected)
    torch.testing.assert_close(still["l"], values["l"])


def test_offsets_of_one_stage_are_direct():
    """So what was measured with one stage holds, and nothing is learned twice."""
    start = [{name: rows[:1] for name, rows in part.items()} for part in start_vectors()]
    states = [
        build_parametrisation(kind, *start, seed=0).state_dict() for kind in ("offsets", "direct")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_self_attention_block_shares_what_it_learns():
    """A step for one vector moves the others too: that is what the block is for."""
    parameters = build_parametrisation("self-attention", *start_vectors(), seed=0)
    optimizer = torch.optim.AdamW(parameters.parameters(), 1e-2)
    before = [made["l"].detach().clone() for made in parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(parameters, role=0, stage=1).backward()
        optimizer.step()
    for made, previous in zip(parameters(), before, strict=True):
        assert all(not torch.equal(made["l"][stage], previous[stage]) for stage in range(STAGES))
