import torch
from sefi_ide.sefi_core.learning.loop import Step
from sefi_ide.sefi_core.learning.report import PANEL, training_report


def report(caption: str = "") -> torch.Tensor:
    history = [Step(n, 1.0 / n, 1.0 / n, 0.1, 0.5 / n) for n in range(1, 30)]
    heat = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    picture = torch.full((40, 40, 3), 0.5)
    return training_report(history, picture, heat, 1 - heat, picture, "<anna>", caption)


def test_four_panels_stand_above_the_losses():
    picture = report()
    assert picture.shape[1:] == (4 * PANEL, 3)
    assert picture.min() >= 0 and picture.max() <= 1
    photo, before, after = (picture[:PANEL, n * PANEL : (n + 1) * PANEL] for n in range(3))
    assert torch.allclose(photo, torch.full_like(photo, 0.5), atol=1e-3)
    assert (before - after).abs().max() > 0.2


def test_what_the_photo_was_said_to_show_stands_below_it():
    changed = (report() - report("smiling")).abs().sum(dim=-1).nonzero()
    assert len(changed)
    rows, columns = changed[:, 0], changed[:, 1]
    assert rows.min() >= PANEL and columns.max() < PANEL
    assert rows.max() < PANEL + PANEL // 4
