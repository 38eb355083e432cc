"""Digests of the model and of what records ask: no old answer is taken for a new one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image

from textharmony.data.record import Record
from textharmony.images import Picture
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task


def digest_model(model: TextHarmony) -> str:
    """Digest weights, configuration and tokenizer as they are in memory, wherever they were loaded from.

    Raises:
        ValueError: Weights are offloaded.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([model.config.to_dict(), model.tokenizer.get_vocab()], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded, expected weights in memory, of which predictions keep a digest")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def digest_record(record: Record) -> str:
    """Digest what a record asks: the task, the texts of its request, and its pictures. Its answers may change."""
    asked: dict[Task, object] = {Task.LOCATE: record.words, Task.EDIT: [record.texts, record.boxes, record.polygons]}
    fields = [record.task.value, record.prompt, asked.get(record.task)]
    digest = hashlib.sha256(json.dumps(fields, default=float).encode())
    for picture in (*record.images, record.mask):
        digest.update(b"" if picture is None else _digest_picture(picture))
    return digest.hexdigest()[:16]


def _digest_picture(picture: Picture) -> bytes:
    if isinstance(picture, (str, Path)):
        try:
            picture = Path(picture).read_bytes()
        except OSError as error:  # such a record is a fault
            picture = type(error).__name__.encode()
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    form = (picture.mode, picture.size) if isinstance(picture, Image.Image) else (picture.dtype, picture.shape)
    return hashlib.sha256(str(form).encode() + picture.tobytes()).digest()
