"""What the nodes of the pack share: the type of an identity in the graph and their menu."""

from __future__ import annotations

from comfy_api.latest import io

from ..sefi_core.errors import SeFiError
from ..sefi_core.identity.identity import Identity

SEFI_IDENTITY = io.Custom("SEFI_IDENTITY")
"""Carries a :class:`sefi_core.identity.Identity` from node to node, as it is."""

CATEGORY = "SeFi-IDE"


def check_identity(identity: object, name: str = "identity") -> Identity:
    """``identity`` if it is one; nodes that pass on anything may bring what is none.

    Raises :class:`SeFiError` with the input's ``name`` otherwise.
    """
    if isinstance(identity, Identity):
        return identity
    what = "empty" if identity is None else f"a {type(identity).__name__}"
    raise SeFiError(
        f"{name} is {what}: connect the identity of SeFi Load Identity or SeFi Train Identity"
    )
