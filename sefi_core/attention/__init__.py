"""Attention maps and pictures of them."""
