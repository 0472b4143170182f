"""The CLIP side: from the text of a prompt to its contexts."""
