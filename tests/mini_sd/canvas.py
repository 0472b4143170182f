"""Drawing in pixels of the 128 pixel frame, on a picture of twice that size."""

from __future__ import annotations

from PIL import Image, ImageDraw

SIZE = 128
SCALE = 2


class Canvas:
    """PIL drawing in 128 pixel coordinates on a larger picture."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.draw = ImageDraw.Draw(image)

    @staticmethod
    def scaled(points):
        return [tuple(SCALE * c for c in p) for p in points]

    def ellipse(self, x, y, rx, ry, fill, outline=None, width=0.0):
        box = [SCALE * (x - rx), SCALE * (y - ry), SCALE * (x + rx), SCALE * (y + ry)]
        self.draw.ellipse(box, fill=fill, outline=outline, width=round(SCALE * width))

    def box(self, x, y, rx, ry, fill, radius=0.0, outline=None, width=0.0):
        box = [SCALE * (x - rx), SCALE * (y - ry), SCALE * (x + rx), SCALE * (y + ry)]
        self.draw.rounded_rectangle(
            box, SCALE * radius, fill=fill, outline=outline, width=round(SCALE * width)
        )

    def polygon(self, points, fill):
        self.draw.polygon(self.scaled(points), fill=fill)

    def line(self, points, fill, width):
        self.draw.line(
            self.scaled(points), fill=fill, width=max(1, round(SCALE * width)), joint="curve"
        )

    def arc(self, x, y, rx, ry, start, end, fill, width):
        box = [SCALE * (x - rx), SCALE * (y - ry), SCALE * (x + rx), SCALE * (y + ry)]
        self.draw.arc(box, start, end, fill=fill, width=max(1, round(SCALE * width)))


def shade(rgb, factor: float):
    """A colour made lighter (factor > 1) or darker."""
    return tuple(int(max(0, min(255, c * factor))) for c in rgb)


def blend(a, b, t: float):
    """Linear blend of two colours."""
    return tuple(int(round(x + (y - x) * t)) for x, y in zip(a, b, strict=True))
