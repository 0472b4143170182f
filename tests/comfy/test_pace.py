"""The time left of a training, and how many previews it can afford; with a clock of its own."""

import pytest
from sefi_ide.sefi_core.comfyui.learning.pace import PREVIEW_IN_STEPS, PREVIEW_SHARE, Pace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def train(steps: int, a_step: float, slowness: float = 1.0, every: int = 25, reload: float = 0.0):
    """Steps after which previews were drawn, and their share of the time; the report is left out.

    Previews take ``slowness`` times what is expected of them, the step after one ``reload`` more.
    """
    clock = Clock()
    pace = Pace(steps, clock)
    pace.begin()
    drawn, took = [], 0.0
    clock.now += 20 * a_step  # the first step loads models
    for number in range(1, steps + 1):
        clock.now += a_step
        if drawn and drawn[-1] == number - 1:
            clock.now += reload
            took += reload
        pace.step(number)
        scale = pace.affordable_preview() if number % every == 0 and number < steps else 0.0
        if scale:
            pace.draw(scale)
            preview = PREVIEW_IN_STEPS[scale] * a_step * slowness
            clock.now += preview
            took += preview
            pace.drawn()
            drawn.append(number)
    return drawn, took / (clock.now - 1000.0)


@pytest.mark.parametrize("a_step", [0.01, 0.5, 30.0])
@pytest.mark.parametrize("steps", [20, 60, 100, 150, 300, 1000, 5000])
def test_previews_keep_to_their_share_of_the_time(steps, a_step):
    drawn, share = train(steps, a_step)
    # The report belongs to the training too, and takes as long as some steps.
    assert share <= PREVIEW_SHARE * (1 + 13 / steps)
    assert drawn[:1] == ([25] if steps >= 100 else [])  # as soon as one is due, or none at all
    assert len(drawn) >= steps // 200


@pytest.mark.parametrize(("slowness", "reload"), [(5.0, 0.0), (1.0, 20.0), (0.2, 0.0)])
def test_where_previews_are_slower_than_expected_fewer_are_drawn(slowness, reload):
    drawn, share = train(2000, 1.0, slowness, reload=reload)
    assert drawn and share <= PREVIEW_SHARE + 1e-9
    as_expected, _ = train(2000, 1.0)
    cheaper = slowness < 1
    assert (len(drawn) > len(as_expected)) is cheaper


def test_the_time_left_is_not_shaken_by_single_slow_steps():
    clock = Clock()
    pace = Pace(100, clock)
    pace.begin()
    for number in range(1, 41):
        clock.now += 60.0 if number == 1 or number % 10 == 0 else 2.0
        pace.step(number)
        assert (pace.seconds_left() is None) is (number < 3)
    assert pace.seconds_left() == 60 * 2.0


def test_the_time_left_follows_a_training_that_has_become_slower():
    clock = Clock()
    pace = Pace(100, clock)
    for number in range(1, 61):
        clock.now += 1.0 if number <= 30 else 3.0
        pace.step(number)
    assert pace.seconds_left() == 40 * 3.0
