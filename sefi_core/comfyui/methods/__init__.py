"""Kinds of identity, one module for each: what fills a placeholder's places in a prompt."""

from __future__ import annotations

from .tokens import AppliedIdentity

METHODS = {"tokens": AppliedIdentity, "position-free": AppliedIdentity}
"""``Identity.kind`` -> what an identity of that kind is when it is applied, as
:class:`clip.encoder.Applied` asks."""
