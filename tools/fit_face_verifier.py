"""Fit the second opinion of the LBP face detector: ``sefi_core/faces/lbp_verifier.safetensors``.

A linear discriminant between faces and what the cascade wrongly takes for faces. Faces: the hundred
of ``skimage.data.lfw_subset()``, moved, turned and mirrored a little. Other things: the cascade's
candidates in the thumbnails of ComfyUI's workflow templates, or in the pictures of the folders that
are given. Among them are faces, of course. They are left out by themselves: first whatever the
cascade is sure of, then whatever the first fit takes for a face.

    python -m tools.fit_face_verifier [--pictures 220] [folder ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from sefi_ide.sefi_core.faces import lbp

TEMPLATES = ("api", "image", "video", "other")
SURE_MARGIN = 30.0
SHRINKAGE = 0.5
VIEWS_PER_FACE, VIEWS_PER_CANDIDATE = 12, 4


def template_folders() -> list[Path]:
    """The folders of the thumbnails that ComfyUI's requirements bring along."""
    specs = [
        importlib.util.find_spec(f"comfyui_workflow_templates_media_{kind}") for kind in TEMPLATES
    ]
    return [Path(spec.origin).parent for spec in specs if spec is not None]


def faces(rng: np.random.Generator) -> np.ndarray:
    """Views (n, 24, 24) of the LFW faces, as loosely framed as the cascade frames them."""
    from skimage.data import lfw_subset

    views = []
    for face in lfw_subset()[:100]:
        padded = np.pad(face, 8, mode="edge")
        for number in range(VIEWS_PER_FACE):
            view = lbp.sample(
                padded,
                np.array(padded.shape) / 2 + rng.uniform(-1, 1, 2),
                rng.uniform(0.9, 1.1) * len(face) / lbp.WINDOW,
                rng.uniform(-12, 12),
                (lbp.WINDOW, lbp.WINDOW),
            )
            views.append(view[:, ::-1] if number % 2 else view)
    return np.stack(views)


def discriminant(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, float]:
    """Fisher's, with shrunk covariance; 0 is half-way, 1 one standard deviation of the faces."""
    covariance = (np.cov(positive.T) + np.cov(negative.T)) / 2
    covariance += SHRINKAGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, positive.mean(0) - negative.mean(0))
    weights /= (positive @ weights).std()
    return weights, -float((positive.mean(0) + negative.mean(0)) @ weights / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--pictures", type=int, default=220)
    options = parser.parse_args()
    files = sorted(
        file
        for folder in options.folders or template_folders()
        for file in folder.rglob("*")
        if file.suffix.lower() in (".webp", ".jpg", ".jpeg", ".png")
    )
    random.Random(0).shuffle(files)
    detector = lbp.LbpDetector()
    candidates = []
    for number, file in enumerate(files[: options.pictures], start=1):
        with Image.open(file) as picture:
            candidates += detector.candidates(np.asarray(picture.convert("RGB")))
        print(f"\r{number} pictures, {len(candidates)} candidates", end="", file=sys.stderr)
    print(file=sys.stderr)

    rng = np.random.default_rng(0)
    positive = detector.features(faces(rng))
    unsure = [one for one in candidates if one.margin < SURE_MARGIN]
    described = [
        detector.features(rng.permutation(one.patches)[:VIEWS_PER_CANDIDATE]) for one in unsure
    ]
    weights, bias = discriminant(positive, np.concatenate(described))
    others = [one for one in described if (one @ weights).mean() + bias < 0.5]
    weights, bias = discriminant(positive, np.concatenate(others))
    save_file(
        {"weights": weights.astype(np.float32), "bias": np.array(bias, np.float32)},
        lbp.VERIFIER_FILE,
    )
    print(f"{lbp.VERIFIER_FILE.name}: {len(positive)} views of faces, {len(others)} other things")


if __name__ == "__main__":
    main()
