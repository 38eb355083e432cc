"""The demonstration: one contact sheet of pictures read, words drawn, a word edited and a word located."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from textharmony.model.core import TextHarmony
from textharmony.sheets import contact_sheet

PICTURES = Path(__file__).parent / "pictures_to_read"
WORDS = ("HELLO", "2026", "LORA8")
NEW_WORD = "OPEN"
_COLORS = (("red", "white"), ("white", "blue"), ("black", "yellow"), ("yellow", "purple"), ("green", "white"))


def demonstrate(model: TextHarmony, words: Sequence[str], out: Path, say: Callable[[str], None]) -> None:
    """Reads the pictures that come with the package, draws the words, edits and locates; writes the sheet to out."""
    cells: list[tuple[Image.Image, str]] = []
    files = sorted(PICTURES.glob("*.png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    for file, picture, text in zip(files, pictures, model.read(pictures), strict=True):
        say(f"read    {file.name:<24} -> {text}")
        cells.append((_fit(picture), f"read: {text}"))
    prompts = []
    for i, word in enumerate(words):
        ink, ground = _COLORS[i % len(_COLORS)]
        prompts += [f'"{word}" in {ink} on {ground}'] * 2
    drawn = model.draw(prompts)
    for prompt, picture, read in zip(prompts, drawn, model.read(drawn), strict=True):
        say(f"draw    {prompt:<32} -> reads itself back as {read}")
        cells.append((picture, f"draw: {prompt}"))
    picture = pictures[0]
    old = model.read(picture)
    boxes = model.locate(picture, old)
    say(f"locate  {old:<32} -> {boxes} (thousandths)")
    cells.append((_fit(_outline(picture, boxes)), f"locate: {old}"))
    if boxes:
        x1, y1, x2, y2 = boxes[0]
        room = (max(0, x1 - 20), max(0, y1 - 90), min(999, x2 + 20), min(999, y2 + 120))
        edited = model.edit(picture, room, NEW_WORD)
        say(f"edit    {f'{old} to {NEW_WORD}':<32} -> reads itself back as {model.read(edited)}")
        cells.append((_fit(edited), f"edit: {old} to {NEW_WORD}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells, 4, "textharmony, the embedded tiny model").save(out)


def _fit(picture: Image.Image) -> Image.Image:
    """Scaled down to the tiny model's width."""
    return picture.resize((128, max(1, round(picture.height * 128 / picture.width))))


def _outline(picture: Image.Image, boxes: Sequence[tuple[float, float, float, float]]) -> Image.Image:
    outlined = picture.copy()
    pen = ImageDraw.Draw(outlined)
    for box in boxes:
        corners = [v / 999 * side for v, side in zip(box, picture.size * 2, strict=True)]
        pen.rectangle(corners, outline="magenta", width=max(1, picture.width // 128))
    return outlined
