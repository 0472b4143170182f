"""Gradients that pass through half precision."""

import torch


class ThroughHalf(torch.autograd.Function):
    """The same number, whose gradient passes through half precision: small ones vanish."""

    gain = 1e-8

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return ((gradient * ThroughHalf.gain).half() / ThroughHalf.gain).float()
