"""The demonstration: pictures read and asked about, words drawn, located and edited, on one contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from textharmony.boxes import Box, from_pixels, to_pixels
from textharmony.images import contact_sheet, open_image, outline, save_picture, shorten
from textharmony.pipeline import TextHarmony

PICTURES = Path(__file__).parent / "pictures_to_read"
WORDS = ("HELLO", "Open 24h", "coffee")
_CAPTIONS = (
    '"{word}" in red on white',
    'a navy sign that says "{word}" in gold letters',
    'please write "{word}" in #802000 on ivory',
    'the word "{word}" on a yellow background',
)
QUESTIONS = ("how many letters does it have?", "is there any text?", "what is the third character?")
NEW_WORDS = ("OPEN", "2026")
_CELL = (256, 112)  # pixels


def list_pictures() -> list[Path]:
    """The pictures that come with the package, none of which the renderer of the training made."""
    return sorted(path for path in PICTURES.iterdir() if path.suffix in (".jpg", ".png"))


def demonstrate(model: TextHarmony, words: Sequence[str], out: Path, say: Callable[[str], None]) -> None:
    """Read and ask about the pictures in the package, draw words, locate and edit some, say so, and write a sheet."""
    cells: list[tuple[Image.Image, str]] = []
    files = list_pictures()
    pictures = [open_image(file) for file in files]
    prompts = [_CAPTIONS[i % len(_CAPTIONS)].format(word=word) for i, word in enumerate(words) for _ in range(2)]
    drawn = model.draw(prompts)  # first: a word that cannot be drawn is said before anything else is
    texts = model.read(pictures)
    for file, picture, text in zip(files, pictures, texts, strict=True):
        say(f"read    {file.name:<28} -> {text}")
        cells.append((picture, f"read: {text}"))
    for file, picture, question in zip(files, pictures, QUESTIONS, strict=False):
        answer = model.answer(picture, question)
        say(f"answer  {file.name}, {question} -> {answer}")
        cells.append((picture, f"{question} {answer}"))
    for prompt, picture, read in zip(prompts, drawn, model.read(drawn), strict=True):
        say(f"draw    {prompt} -> reads itself back as {read}")
        cells.append((picture, prompt))
    for file, picture, old, new in zip(reversed(files), reversed(pictures), reversed(texts), NEW_WORDS, strict=False):
        boxes = model.locate(picture, old) if old else []
        say(f"locate  {old} in {file.name} -> {boxes} (thousandths)")
        cells.append((outline(picture, boxes, "magenta", max(1, picture.width // 128)), f"locate: {old}"))
        if boxes:
            edited = model.edit(picture, _around(boxes[0], picture.size), new)
            say(f"edit    {old} to {new} in {file.name} -> reads itself back as {model.read(edited)}")
            cells.append((edited, f"edit: {old} to {new}"))
    shown = [(ImageOps.contain(picture, _CELL), shorten(caption, 42)) for picture, caption in cells]
    save_picture(contact_sheet(shown, 5, "textharmony, the embedded tiny model", 1), out)


def _around(box: Box, size: tuple[int, int]) -> Box:
    """A box that is larger by a fifth of its height on each side, in thousandths of a picture."""
    x1, y1, x2, y2 = to_pixels(box, size)
    grow = max(2.0, 0.2 * (y2 - y1))
    return from_pixels((max(0, x1 - grow), max(0, y1 - grow), min(size[0], x2 + grow), min(size[1], y2 + grow)), size)
