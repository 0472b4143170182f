"""What the nodes of the pack share: the type of an identity in the graph and their menu."""

from __future__ import annotations

from comfy_api.latest import io

SEFI_IDENTITY = io.Custom("SEFI_IDENTITY")
"""Carries a :class:`sefi_core.identity.Identity` from node to node, as it is."""

CATEGORY = "SeFi-IDE"
