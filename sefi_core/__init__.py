"""SeFi-IDE: identities as per-stage key and value tokens of a frozen Stable Diffusion model.

Everything here but the :mod:`sefi_core.comfyui` subpackage is plain PyTorch and NumPy and knows
nothing of ComfyUI.
"""
