"""Identities made for tests, and what lies in their folder."""

from __future__ import annotations

from pathlib import Path

import torch
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.identity.saving import LOCK


def make_identity(name="anna", value=1.0, width=768, thumbnail=None) -> Identity:
    embeddings = {"l": torch.full((5, 1, width), float(value))}
    return Identity(name, "person", "sd1", embeddings, embeddings, {"steps": 1}, thumbnail)


def files_in(folder: Path) -> list[str]:
    """Everything below a folder, temporary leftovers included but not the savers' lock."""
    paths = (path for path in folder.rglob("*") if path.name != LOCK)
    return sorted(path.relative_to(folder).as_posix() for path in paths)
