"""Records to samples: pictures decoded and fitted to the model, boxes moved along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from textharmony.data.faults import Faults
from textharmony.data.record import Record
from textharmony.data.sample import Sample
from textharmony.images import Box, Frame
from textharmony.prompts import Task, check_plain


def load_samples(
    records: Iterable[Record],
    faults: Faults,
    size: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
) -> Iterator[Sample]:
    """Samples of the records; one whose pictures do not decode is skipped and listed in faults.

    Count reading and decoding apart: give other faults here than to read_dataset. faults.seen is how many records were
    taken, so a run over a Mixture resumes at mixture.iterate(faults.seen). size, target_size: as of to_sample. Raises
    TooManyFaults.
    """
    for record in records:
        sample = None
        with faults.skipping(f"{record.source} {record.id}"):
            sample = to_sample(record, size, target_size)
        if sample is not None:
            yield sample


def to_sample(
    record: Record, size: tuple[int, int] | None = None, target_size: tuple[int, int] | None = None
) -> Sample:
    """One record as the collator reads it.

    size: height and width to which pictures are fitted, the rest filled, as TextHarmony's verbs do; None: as they are;
    target_size: that of targets, where it is another. An editing record's region is the box about its mask. Raises
    ValueError for more than one input image, for a text task without an answer, for text that holds a picture's tokens,
    for pictures that do not decode; FileNotFoundError.
    """
    if len(record.images) > 1:
        raise ValueError(f"{len(record.images)} images, expected one at most")
    check_plain(record.prompt)
    image = record.load() if record.images else None
    target = record.load_target()
    region = answer = None
    if record.task is Task.EDITING:
        region = _region(record, image, size)
    if record.task.modality == "text":
        answer = next(filter(str.strip, record.texts), None) or _format_boxes(record, image, size)
        check_plain(answer)
    return Sample(
        record.task,
        record.prompt,
        text=" ".join(record.words or record.texts),
        source=record.source,
        image=_pixels(image, size),
        answer=answer,
        target=_pixels(target, target_size or size),
        region=region,
    )


def _pixels(picture: Image.Image | None, size: tuple[int, int] | None) -> np.ndarray | None:
    if picture is None:
        return None
    if size is None:
        return np.asarray(picture)
    pixels = (Frame.of(picture, size).pixels + 1) * 127.5  # (3, H, W)
    return pixels.round().byte().permute(1, 2, 0).numpy()


def _placed(box: Box, picture: Image.Image, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """A box in thousandths of the picture, in pixels of what _pixels makes of it."""
    return Frame.of(picture, size or (picture.height, picture.width)).inward(box)


def _region(record: Record, image: Image.Image | None, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
    mask = record.load_mask()
    found = mask.getbbox() if mask else None
    if found is None or image is None or mask is None:
        raise ValueError("the mask of an editing record is empty")
    x1, y1, x2, y2 = (v * 999 / side for v, side in zip(found, mask.size * 2, strict=True))
    return _placed((x1, y1, x2, y2), image, size)


def _format_boxes(record: Record, image: Image.Image | None, size: tuple[int, int] | None) -> str:
    """Boxes as the model writes them, "(x1,y1)(x2,y2)" in thousandths of the picture that it sees."""
    if image is None or not record.boxes:
        raise ValueError("neither an answer nor a box to answer with")
    height, width = size or (image.height, image.width)
    said = []
    for box in record.boxes:
        placed = _placed(box, image, size)
        x1, y1, x2, y2 = (min(999, round(v / side * 999)) for v, side in zip(placed, (width, height) * 2, strict=True))
        said.append(f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})")
    return " ".join(said)
