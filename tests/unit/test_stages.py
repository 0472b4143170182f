import math
import random

import pytest
import torch
from sefi_ide.sefi_core.stages import stage_edges, stage_of_sigma, stage_of_timestep


def stable_diffusion_sigmas(timesteps: int = 1000) -> torch.Tensor:
    """Sigmas of Stable Diffusion's schedule: betas linear in their square roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return ((1 - kept) / kept).sqrt().float()


SCHEDULES = {
    "1000": stable_diffusion_sigmas(),
    "50": stable_diffusion_sigmas()[19::20],
    "37": stable_diffusion_sigmas(37),
    "one": torch.tensor([1.0]),
    "from 0 to inf": torch.tensor([0.0, 0.5, 1.0, math.inf]),
    "neighbouring floats": torch.tensor([1.0, 1.0000001, 1.0000002], dtype=torch.float32),
}


def test_five_stages_of_the_paper():
    assert [stage_of_timestep(t, 5) for t in (0, 199, 200, 399, 400, 600, 800, 999)] == [
        0, 0, 1, 1, 2, 3, 4, 4,
    ]  # fmt: skip
    assert stage_of_timestep(-3, 5) == 0
    assert stage_of_timestep(1000, 5) == 4
    assert stage_of_timestep(199.99, 5) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_training_sigma_has_the_stage_of_its_timestep(schedule):
    sigmas = SCHEDULES[schedule].tolist()
    most = len(sigmas) if math.isinf(sigmas[-1]) else 1000
    chosen = random.Random(0).sample(range(1, 1001), 25) + [1, 2, 3, 5, 10, 999, 1000]
    for stages in {min(stages, most) for stages in chosen}:
        edges = stage_edges(SCHEDULES[schedule], stages)
        assert len(edges) == stages - 1
        assert list(edges) == sorted(edges)
        for t, sigma in enumerate(sigmas):
            # Written with integers alone, so that it cannot share a rounding error.
            assert stage_of_sigma(sigma, edges) == stages * t // len(sigmas), (stages, t)
            assert stage_of_timestep(t, stages, len(sigmas)) == stages * t // len(sigmas)


@pytest.mark.parametrize("stages", [2, 5, 10, 1000])
def test_sigmas_that_were_rounded_keep_their_stage(stages):
    sigmas = SCHEDULES["1000"]
    edges = stage_edges(sigmas, stages)
    for factor in (1 - 1e-4, 1 + 1e-4):
        found = [stage_of_sigma(sigma, edges) for sigma in (sigmas * factor).tolist()]
        assert found == [stages * t // 1000 for t in range(1000)]


def test_stage_rises_with_sigma_and_is_clamped():
    edges = stage_edges(SCHEDULES["1000"], 7)
    between = torch.logspace(-6, 6, 5000).tolist()
    found = [stage_of_sigma(sigma, edges) for sigma in [0.0, *between, math.inf]]
    assert found == sorted(found)
    assert found[0] == 0 and found[-1] == 6
    assert set(found) == set(range(7))


def test_one_stage_has_no_edge():
    assert stage_edges(SCHEDULES["1000"], 1) == ()
    assert stage_of_sigma(3.0, ()) == 0


@pytest.mark.parametrize(
    "sigmas, stages",
    [([], 5), ([2.0, 1.0], 5), ([1.0, math.nan, 2.0], 5), ([math.nan], 5), ([1.0, 2.0], 0)],
)
def test_impossible_schedules_are_refused(sigmas, stages):
    with pytest.raises(ValueError):
        stage_edges(sigmas, stages)
