import pytest
import torch
from sefi_ide.sefi_core.learning.loop import Step
from sefi_ide.sefi_core.learning.report import CHART_HEIGHT, LABEL, PANEL, training_report


def report(caption: str = "", losses=(0.04, 0.03), done: int = 29, steps: int = 29, leak=0.5):
    history = [Step(n, 1.0 / n, 1.0 / n, 0.1, leak / n) for n in range(1, done + 1)]
    heat = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    photo, sample = torch.full((40, 40, 3), 0.5), torch.full((64, 64, 3), 0.25)
    maps = heat, 1 - heat
    return training_report(history, photo, maps, losses, sample, "<anna>", caption, steps)


def panel(picture: torch.Tensor, row: int, column: int) -> torch.Tensor:
    top, left = row * (PANEL + LABEL), column * PANEL
    return picture[top : top + PANEL, left : left + PANEL]


def changed(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of what differs."""
    places = (one - other).abs().sum(dim=-1).nonzero()
    assert len(places)
    (top, left), (bottom, right) = places.amin(dim=0).tolist(), places.amax(dim=0).tolist()
    return top, left, bottom, right


def test_photo_and_sample_and_attention_stand_above_the_losses():
    picture = report()
    assert picture.shape == (2 * (PANEL + LABEL) + CHART_HEIGHT, 2 * PANEL, 3)
    assert picture.min() >= 0 and picture.max() <= 1
    for column, value in ((0, 0.5), (1, 0.25)):
        shown = panel(picture, 0, column)
        assert torch.allclose(shown, torch.full_like(shown, value), atol=1e-3)
    before, after = panel(picture, 1, 0), panel(picture, 1, 1)
    assert (before - after).abs().max() > 0.2


def test_what_the_photo_was_said_to_show_stands_below_it():
    top, left, bottom, right = changed(report(), report("smiling"))
    assert PANEL <= top and bottom < PANEL + LABEL and right < PANEL and left >= 0
    long = report("smiling " * 100)
    assert long.shape == report().shape and changed(long, report())[3] < PANEL


@pytest.mark.parametrize("losses", [(0.04, 0.02), (0.04, 0.05), (0.0, 0.0)])
def test_the_loss_before_and_after_stands_above_the_curves(losses):
    top, _, bottom, _ = changed(report(), report(losses=losses))
    chart = 2 * (PANEL + LABEL)
    assert chart <= top and bottom < chart + 48


def test_a_training_that_was_stopped_says_so_below_the_curves():
    stopped, whole = report(done=29, steps=100), report(done=29, steps=29)
    top, left, bottom, _ = changed(stopped, whole)
    assert top > stopped.shape[0] - 48 and left > PANEL // 2
    assert not torch.equal(stopped, report(done=28, steps=100))


def test_a_loss_that_is_off_has_no_curve():
    green = torch.tensor([40, 132, 84]) / 255

    def is_drawn(picture: torch.Tensor) -> bool:
        return bool(((picture - green).abs().sum(dim=-1) < 0.02).any())

    assert is_drawn(report()) and not is_drawn(report(leak=0.0))


@pytest.mark.parametrize("done", [1, 2, 3, 25, 400])
def test_any_number_of_steps_has_a_chart(done):
    assert torch.isfinite(report(done=done, steps=done)).all()
