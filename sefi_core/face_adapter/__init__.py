"""Face adapters: an image cross-attention that draws a person from a photo, without training."""
