"""Core's TrainLoraNode and LoraModelLoader as plain functions, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_train import LoraModelLoader, TrainLoraNode

Lora = dict[str, torch.Tensor]


def train_lora(
    model: ModelPatcher,
    latents: torch.Tensor,
    conditioning: list[Any],
    steps: int,
    learning_rate: float,
    seed: int,
    rank: int = 8,
) -> Lora:
    """The LoRA that core's node trains on ``latents`` (N, C, h, w), as VAE Encode gives them.

    ``conditioning`` is the CONDITIONING of one prompt, for all latents. One latent a step, in
    fp32 and without gradient checkpointing; everything else is the node's default. The node loads
    a second copy of the model from its file. The same seed gives the same LoRA.
    """
    inputs = {
        "model": model,
        "latents": {"samples": latents},
        "positive": conditioning,
        "batch_size": 1,
        "steps": steps,
        "grad_accumulation_steps": 1,
        "learning_rate": learning_rate,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": seed,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    devices = range(torch.cuda.device_count())
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # the node draws start weights and sigmas from the global state
        return TrainLoraNode.execute(**{name: [value] for name, value in inputs.items()}).result[0]


def apply_lora(model: ModelPatcher, lora: Lora, strength: float = 1.0) -> ModelPatcher:
    """A clone of the model with the LoRA, by core's Load LoRA Model."""
    return LoraModelLoader.execute(model, lora, strength).result[0]
