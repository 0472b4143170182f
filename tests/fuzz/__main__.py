"""``make fuzz``: faults of every kind, on two cores for ten minutes.

``SEED`` chooses other cases, ``MINUTES`` another time, and ``CASE=files:17`` runs one case alone.
The last line is one JSON object with how many cases were tried and clean in each campaign; the exit
status is 1 if any was not.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # as a folder, whose package is still to be found
    __package__ = "sefi_ide.tests.fuzz"
    tools = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "comfyui.py"))
    tools["name_the_pack"]()

from .campaign import told_of
from .children import WITH_COMFYUI, campaign_of, watched

LANES = (
    {"files": 0.2, "readers": 0.1, "kills": 0.1, "training": 0.6},
    {"graphs": 0.65, "prompts": 0.35},
)
"""What runs beside each other, each campaign with its share of the time."""


def main() -> int:
    arguments = ArgumentParser()
    arguments.add_argument("--campaign")
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--cases", type=int)
    arguments.add_argument("--seconds", type=float)
    arguments.add_argument("--note", type=Path)
    given = arguments.parse_args()
    seed = int(os.environ.get("SEED") or 0)
    if given.campaign:  # in a process of its own
        logging.disable(logging.ERROR)
        sys.path.insert(0, str(tools["comfyui_path"]()))
        if given.campaign in WITH_COMFYUI:
            tools["start"](cpu=True, prefix="sefi-fuzz-")
        campaign = campaign_of(given.campaign)
        told = told_of(campaign, seed, given.first, given.cases, given.seconds, given.note)
        print(json.dumps(told), flush=True)
        return 0
    if case := os.environ.get("CASE"):
        name, _, number = case.partition(":")
        told = {name: watched(name, seed, first=int(number), cases=1)}
    else:
        seconds = 60 * float(os.environ.get("MINUTES") or 10)
        with ThreadPoolExecutor(len(LANES)) as lanes:
            parts = lanes.map(lambda lane: in_turn(lane, seed, seconds), LANES)
            told = {name: one for part in parts for name, one in part.items()}
    for name, one in told.items():
        for number, what in one.pop("failures").items():
            print(
                f"--- not clean; to repeat it: make fuzz SEED={seed} CASE={name}:{number}\n{what}"
            )
    print(json.dumps({**told, "seed": seed}))
    return 0 if all(one["tried"] == one["clean"] for one in told.values()) else 1


def in_turn(lane: dict[str, float], seed: int, seconds: float) -> dict[str, dict]:
    """One campaign after the other."""
    return {name: watched(name, seed, seconds=share * seconds) for name, share in lane.items()}


if __name__ == "__main__":
    sys.exit(main())
