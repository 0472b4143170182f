"""Pictures side by side with their captions."""

from __future__ import annotations

from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # pixels
CAPTION = 62  # three lines
MARGIN = 12
BACKGROUND, INK = "white", "black"


def labelled_grid(
    portrait: Image.Image, pictures: list[Image.Image], captions: list[str], columns: int = 4
) -> Image.Image:
    """The portrait at the left, as tall as the rows, and the captioned pictures right of it."""
    rows = -(-len(pictures) // columns)
    row_height, column_width = CELL + CAPTION + MARGIN, CELL + MARGIN
    left = min(rows, 2) * CELL
    sheet = Image.new(
        "RGB",
        (MARGIN + left + MARGIN + columns * column_width, MARGIN + rows * row_height),
        BACKGROUND,
    )
    top = (sheet.height - left - CAPTION) // 2
    _place(sheet, portrait, left, (MARGIN, top), "the one picture it learned from")
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, columns)
        corner = (2 * MARGIN + left + column * column_width, MARGIN + row * row_height)
        _place(sheet, picture, CELL, corner, caption)
    return sheet


def square(picture: Image.Image, side: int) -> Image.Image:
    """The picture's middle square at ``side`` pixels."""
    edge = min(picture.size)
    x, y = (picture.width - edge) // 2, (picture.height - edge) // 2
    middle = picture.convert("RGB").crop((x, y, x + edge, y + edge))
    return middle.resize((side, side), Image.Resampling.LANCZOS)


def _place(
    sheet: Image.Image, picture: Image.Image, side: int, corner: tuple[int, int], caption: str
) -> None:
    sheet.paste(square(picture, side), corner)
    font = ImageFont.load_default(size=15)
    draw = ImageDraw.Draw(sheet)
    middle = corner[0] + side // 2
    for line, text in enumerate(wrap(caption, side // 8)[:3]):
        draw.text((middle, corner[1] + side + 4 + 18 * line), text, INK, font, anchor="ma")
