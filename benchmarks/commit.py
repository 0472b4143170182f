"""Which commit the figures of a run belong to."""

from __future__ import annotations

import subprocess

from sefi_ide.tools.comfyui import REPOSITORY


def measured_at() -> str:
    """A sentence with the checked-out commit, for the pages that show figures."""
    describe = ["git", "describe", "--always", "--dirty= with changes", "--exclude=*"]
    try:
        run = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return "Measured at an unknown commit."
    return f"Measured at commit {run.stdout.strip()}."
