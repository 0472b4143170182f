"""A miniature Stable Diffusion and its world: rendered portraits, judges, a training script."""
