"""The U-Net side: what conditioning carries, and how attention gets it."""
