"""Face2Diffusion (arXiv 2403.05094): an encoder that predicts an identity from a photo."""
