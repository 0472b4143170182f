"""Learning on ComfyUI's loaded models."""
