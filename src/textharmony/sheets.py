"""Contact sheets: pictures in a grid, each with a caption below."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_ZOOM, _GAP, _CAPTION = 2, 8, 18


def contact_sheet(cells: Sequence[tuple[Image.Image, str]], columns: int, title: str = "") -> Image.Image:
    """One picture of all cells (picture, caption), row by row, each twice its size."""
    width = max(picture.width for picture, _ in cells) * _ZOOM
    height = max(picture.height for picture, _ in cells) * _ZOOM
    rows = -(-len(cells) // columns)
    top = 28 if title else 0
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, top + rows * (height + _CAPTION + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    pen.text((_GAP, 6), title, fill="black", font=ImageFont.load_default(16))
    for i, (picture, caption) in enumerate(cells):
        x = _GAP + (i % columns) * (width + _GAP)
        y = top + _GAP + (i // columns) * (height + _CAPTION + _GAP)
        sheet.paste(picture.resize((picture.width * _ZOOM, picture.height * _ZOOM)), (x, y))
        pen.text((x, y + picture.height * _ZOOM + 1), caption, fill="black", font=font)
    return sheet
