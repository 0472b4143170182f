"""An identity that the shipped miniature has learned in two steps."""

from sefi_ide.benchmarks import methods, subjects
from sefi_ide.sefi_core.identity.identity import Identity


def learned(mini, **overrides) -> Identity:
    """What the method ``sefi`` learns of one photo; ``overrides`` are settings of training."""
    photos = subjects.Subject(1, 0).photos(1)
    return methods.learn_identity(mini, "sefi", photos, "person", {"steps": 2, **overrides})
