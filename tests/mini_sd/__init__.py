"""Miniature Stable Diffusions and their world: rendered portraits, judges, a training script."""
