"""Training face encoders: settings, data and loops; the Stable Diffusion comes from outside."""
