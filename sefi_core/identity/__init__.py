"""The learned identity and its file."""
