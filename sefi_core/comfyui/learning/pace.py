"""How fast a training goes, and what it may spend on pictures."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

PREVIEW_SHARE = 0.03
"""Of a training's time that previews take at most."""

PREVIEW_IN_STEPS = {1.0: 5.2, 0.75: 2.9}
"""Training steps that a preview takes whose side is that share of the training pictures'.

Counted in operations for Stable Diffusion 1.5 at 512 pixels; a step takes 1.75e12. Where the large
one takes too long, the small one is drawn."""

REPORT_IN_STEPS = 12.0
"""Training steps that the report takes, which is part of the training; counted likewise."""

_RECENT_STEPS = 25
_TOO_FEW = 3


class Pace:
    """The time that ``steps`` steps take, from the last ones; ``clock`` is in seconds."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.clock = steps, clock
        self.began = self.ended = clock()
        self.number = 0
        self.durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.spent = 0.0
        self.slowness = 0.0  # seconds of a preview for each of the steps that it should take
        self.drawing: tuple[float, float] | None = None  # since when, and how many steps it takes
        self.has_drawn = 0.0  # in the last step: how many steps it should have taken

    def begin(self) -> None:
        """What comes now is a step, whatever took time before it."""
        self.ended = self.clock()

    def step(self, number: int) -> None:
        """A step is done; the first one counts for nothing, since models are loaded in it."""
        now = self.clock()
        duration, self.ended = now - self.ended, now
        usual = self.a_step()
        if self.has_drawn and usual is not None:
            # Drawing may have pushed the model out of memory, which the step after it pays for.
            self._count(max(0.0, duration - usual), self.has_drawn)
        elif self.number:
            self.durations.append(duration)
        self.has_drawn = 0.0
        self.number = number

    def a_step(self) -> float | None:
        """Seconds of a usual step, or None while too few are known."""
        return statistics.median(self.durations) if len(self.durations) >= _TOO_FEW - 1 else None

    def seconds_left(self) -> float | None:
        """Seconds that the steps to come will take, or None while too few are known."""
        usual = self.a_step()
        return None if usual is None else usual * (self.steps - self.number)

    def affordable_preview(self) -> float:
        """Share of the training pictures' side that one more preview can have, 0 for none.

        The first one may be drawn on account of the whole training, later ones of what has passed.
        """
        usual, left = self.a_step(), self.seconds_left()
        if usual is None or left is None:
            return 0.0
        time_for_it = self.clock() - self.began
        if not self.slowness:
            time_for_it += left + REPORT_IN_STEPS * usual
        for scale, steps in PREVIEW_IN_STEPS.items():
            cost = steps * (self.slowness or usual)
            if self.spent + cost <= PREVIEW_SHARE * time_for_it:
                return scale
        return 0.0

    def draw(self, scale: float) -> None:
        """A preview of that share of the side is begun."""
        self.drawing = self.clock(), PREVIEW_IN_STEPS[scale]

    def drawn(self) -> None:
        """A preview, if one was begun, is done; the step's own time goes on from here."""
        if self.drawing is not None:
            began, in_steps = self.drawing
            now = self.clock()
            self.slowness = 0.0
            self._count(now - began, in_steps)
            self.drawing, self.ended, self.has_drawn = None, now, in_steps

    def _count(self, seconds: float, in_steps: float) -> None:
        self.spent += seconds
        self.slowness += seconds / in_steps
