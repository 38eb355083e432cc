"""A scene, one picture with the words in it and their boxes, as records of the four kinds of task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from textharmony.data.record import Record
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task

# A scene is itself a record: images[0] is the picture, words, boxes and polygons what stands in it, in the data set's
# order; extra["caption"] a caption where there is one.


def read(scene: Record) -> Iterator[Record]:
    """One record that asks for all words, joined by spaces."""
    if scene.words:
        yield replace(scene, task=Task.PERCEPTION, prompt=READ_QUESTION, texts=(" ".join(scene.words),))


def locate(scene: Record) -> Iterator[Record]:
    """A record for each word that stands once in the picture; the answer is `boxes`, and `texts` is empty."""
    count = Counter(scene.words)
    for i, word in enumerate(scene.words):
        if count[word] == 1:
            prompt = LOCATE_QUESTION.format(text=word)
            yield replace(_one(scene, i), task=Task.PERCEPTION, prompt=prompt, texts=())


def edit(scene: Record) -> Iterator[Record]:
    """A record for each word: its place is masked and is to be filled with what stood there."""
    for i, word in enumerate(scene.words):
        prompt = FILL_QUESTION.format(text=word)
        yield replace(_one(scene, i), task=Task.EDITING, prompt=prompt, texts=(word,), target=scene.images[0])


def draw(scene: Record) -> Iterator[Record]:
    """One record that asks for the whole picture, of the scene's caption; a scene without one gives none."""
    caption = scene.extra.get("caption")
    if caption:
        yield replace(scene, task=Task.GENERATION, prompt=caption, images=(), target=scene.images[0], texts=scene.words)


def _one(scene: Record, i: int) -> Record:
    return replace(
        scene,
        id=f"{scene.id}#{i}",
        boxes=scene.boxes[i : i + 1],
        words=scene.words[i : i + 1],
        polygons=scene.polygons[i : i + 1],
    )


VIEWS: dict[str, Callable[[Record], Iterator[Record]]] = {"read": read, "locate": locate, "edit": edit, "draw": draw}
