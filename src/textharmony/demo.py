"""The demonstration: pictures read, words drawn, a word located and edited, on one contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from textharmony.boxes import SCALE
from textharmony.images import contact_sheet, open_image, outline, save_picture
from textharmony.pipeline import TextHarmony

PICTURES = Path(__file__).parent / "pictures_to_read"
WORDS = ("HELLO", "2026", "LORA8")
NEW_WORD = "OPEN"
_COLORS = (("red", "white"), ("white", "blue"), ("black", "yellow"), ("yellow", "purple"), ("green", "white"))


def demonstrate(model: TextHarmony, words: Sequence[str], out: Path, say: Callable[[str], None]) -> None:
    """Read the pictures in the package, draw words, locate and edit a word, say so, and write a sheet of all."""
    cells: list[tuple[Image.Image, str]] = []
    files = sorted(PICTURES.glob("*.png"))
    pictures = [open_image(file) for file in files]
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
    cells.append((_fit(outline(picture, boxes, "magenta", max(1, picture.width // 128))), f"locate: {old}"))
    if boxes:
        x1, y1, x2, y2 = boxes[0]
        around = (max(0, x1 - 20), max(0, y1 - 90), min(SCALE, x2 + 20), min(SCALE, y2 + 120))
        edited = model.edit(picture, around, NEW_WORD)
        say(f"edit    {f'{old} to {NEW_WORD}':<32} -> reads itself back as {model.read(edited)}")
        cells.append((_fit(edited), f"edit: {old} to {NEW_WORD}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(contact_sheet(cells, 4, "textharmony, the embedded tiny model"), out)


def _fit(picture: Image.Image) -> Image.Image:
    """Scale a picture to the tiny model's width."""
    return picture.resize((128, max(1, round(picture.height * 128 / picture.width))))
