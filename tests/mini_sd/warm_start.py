"""Start a U-Net from another one's weights, where parts of both have the same shape."""

from __future__ import annotations

import torch
from torch import nn

RIDGE = 1e-3


def context_map(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The linear map (D_old, D_new) that comes closest to the old text states from the new ones.

    Both are states (N, D) of the same tokens of the same captions.
    """
    new, old = new.double(), old.double()
    gram = new.T @ new + RIDGE * len(new) * new.var() * torch.eye(new.shape[1]).double()
    return torch.linalg.solve(gram, new.T @ old).T.float()


@torch.no_grad()
def start_from(unet: nn.Module, donor: nn.Module, context: torch.Tensor) -> float:
    """Copy what fits from ``donor``; returns the share of the parameters that did.

    Keys and values of cross-attention take the new text states through ``context``, the map of
    :func:`context_map`. What is new in a residual branch starts at zero, so that it does not
    disturb what was copied, as do size and pooled conditioning.
    """
    known, copied, total = donor.state_dict(), 0, 0
    for name, parameter in unet.named_parameters():
        source = known.get(name)
        total += parameter.numel()
        if source is not None and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            source = source @ context.to(source)
        if source is not None and source.numel() == parameter.numel():
            parameter.copy_(source.reshape(parameter.shape))
            copied += parameter.numel()
        elif name.endswith(_LAST_OF_BRANCH):
            parameter.zero_()
    return copied / total


_LAST_OF_BRANCH = (
    "out_layers.3.weight", "proj_out.weight", "attn1.to_out.0.weight", "attn2.to_out.0.weight",
    "ff.net.2.weight", "label_emb.0.2.weight",
)  # fmt: skip
