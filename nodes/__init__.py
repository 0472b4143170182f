"""The nodes, one module per task of the user."""

from __future__ import annotations

import logging
from importlib import import_module

from comfy_api.latest import io

logger = logging.getLogger(__name__)

NODES = {
    "SeFiFaceMask": "face_mask",
    "SeFiTrainIdentity": "train_identity",
    "SeFiTrainIdentities": "train_identities",
    "SeFiLoadFaceEncoder": "predict_identity",
    "SeFiPredictIdentity": "predict_identity",
    "SeFiLoadFaceAdapter": "face_adapter",
    "SeFiApplyFaceAdapter": "face_adapter",
    "SeFiSaveIdentity": "identity_files",
    "SeFiLoadIdentity": "identity_files",
    "SeFiMixIdentities": "mix_identities",
    "SeFiApplyIdentity": "apply_identity",
    "SeFiMixedAttention": "mixed_attention",
    "SeFiAttentionMap": "attention_map",
    "SeFiLikeness": "likeness",
    "SeFiPromptScore": "prompt_score",
    "SeFiExportEmbedding": "embedding_files",
    "SeFiLoadEmbedding": "embedding_files",
}
"""Node class (named like its node id) -> module of this package."""


def load() -> list[type[io.ComfyNode]]:
    """Import the nodes. One that fails is reported in the log and does not take the rest away."""
    nodes = []
    for name, module in NODES.items():
        try:
            node = getattr(import_module(f".{module}", __name__), name)
            node.GET_SCHEMA()  # ComfyUI drops the whole pack when one schema raises
        except Exception:
            logger.exception("SeFi-IDE: the node %s could not be loaded and is missing.", name)
        else:
            nodes.append(node)
    return nodes
