"""The only bridge between the method and ComfyUI: nothing else in the pack's core imports it."""
