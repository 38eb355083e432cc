"""Contact sheets: pictures in a grid, each with a caption below."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _CAPTION = 8, 18


def contact_sheet(
    cells: Sequence[tuple[Image.Image, str]], columns: int, title: str = "", zoom: int = 2
) -> Image.Image:
    """One picture of all cells (picture, caption), row by row, each zoom times its size."""
    width = max(picture.width for picture, _ in cells) * zoom
    height = max(picture.height for picture, _ in cells) * zoom
    rows = -(-len(cells) // columns)
    top = 28 if title else 0
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, top + rows * (height + _CAPTION + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    pen.text((_GAP, 6), title, fill="black", font=ImageFont.load_default(16))
    for i, (picture, caption) in enumerate(cells):
        x = _GAP + (i % columns) * (width + _GAP)
        y = top + _GAP + (i // columns) * (height + _CAPTION + _GAP)
        sheet.paste(picture.resize((picture.width * zoom, picture.height * zoom)), (x, y))
        pen.text((x, y + picture.height * zoom + 1), caption, fill="black", font=font)
    return sheet
