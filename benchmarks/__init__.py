"""Measurements of quality and cost; some modules are commands of the Makefile."""

if __name__ == "benchmarks":  # by a command; the tests have started ComfyUI themselves
    import torch

    from tools.comfyui import start

    start(cpu=not torch.accelerator.is_available(), prefix="sefi-benchmark-")
