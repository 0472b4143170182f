"""Prompts: placeholders and captions."""
