"""Which stage of an identity serves which moment of the diffusion process.

The training timesteps ``0 <= t < T`` are cut into S equal stages, ``floor(S * t / T)``; stage 0 is
the least noisy and stage S - 1 the noisiest (the rule of ProSpect, which SeFi-IDE builds on).
Samplers run on sigmas, and continuous samplings have no timestep at all, so while sampling a stage
is found by sigma: the S - 1 edges between the stages are fixed once from the sigmas of the discrete
training schedule, and every training timestep's sigma falls into exactly the stage of its timestep.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch

TRAINING_TIMESTEPS = 1000


def stage_of_timestep(t: float, stages: int, timesteps: int = TRAINING_TIMESTEPS) -> int:
    """The stage of training timestep ``t``, clamped to 0 and ``stages - 1`` at the ends."""
    return min(stages - 1, max(0, math.floor(stages * t / timesteps)))


def first_timestep(stage: int, stages: int, timesteps: int = TRAINING_TIMESTEPS) -> int:
    """The least noisy training timestep of a stage; that of ``stages`` is ``timesteps``."""
    return -(-stage * timesteps // stages)


def stage_edges(training_sigmas: torch.Tensor | Sequence[float], stages: int) -> tuple[float, ...]:
    """The ``stages - 1`` sigmas, ascending, at which the next noisier stage begins.

    ``training_sigmas`` are the sigmas of all T training timesteps in ascending order
    (``model_sampling.sigmas`` in ComfyUI). An edge lies at the geometric mean of the two sigmas it
    parts, so that rounding of a sigma on either side does not carry it across. With more stages
    than timesteps some stages stay empty, and edges above the last timestep are infinite.

    Raises ValueError for a schedule that is empty, not ascending or has NaN, and for no stages.
    """
    sigmas = torch.as_tensor(training_sigmas, dtype=torch.float64).flatten().tolist()
    if not sigmas or any(map(math.isnan, sigmas)) or sigmas != sorted(sigmas):
        raise ValueError("training sigmas must be a non-empty ascending sequence")
    if stages < 1:
        raise ValueError(f"at least one stage is needed, not {stages}")

    edges = []
    for stage in range(1, stages):
        first = first_timestep(stage, stages, len(sigmas))
        if first == len(sigmas):
            edges.append(math.inf)
            continue
        low, high = sigmas[first - 1], sigmas[first]
        middle = math.sqrt(low) * math.sqrt(high)
        # A terminal sigma of 0 has no geometric mean above it; the edge is then its neighbour.
        edges.append(middle if low < middle <= high else high)
    return tuple(edges)


def stage_of_sigma(sigma: float, edges: Sequence[float]) -> int:
    """The stage of a noise level: below the first edge 0, from the last edge on the noisiest."""
    return bisect_right(edges, sigma)
