"""Measures of whole sets of drawn pictures: FID (torchmetrics) and CLIP score, by weights on the disk."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

_BATCH = 32


def check_weights(inception: Path | None, clip: Path | None) -> None:
    """Raises FileNotFoundError where the weights are not there, ImportError where FID's library is not."""
    if inception is not None:
        if not inception.is_file():
            raise FileNotFoundError(f"{inception} does not exist, expected the weights of Inception v3")
        _torchmetrics_fid()
    if clip is not None and not clip.is_dir():
        raise FileNotFoundError(f"{clip} is not a folder, expected one of transformers' CLIP")


def _torchmetrics_fid() -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics: pip install 'slidelora[fid]' ({error})") from error
    return FrechetInceptionDistance


def frechet_inception_distance(real: Iterable[Image.Image], drawn: Iterable[Image.Image], weights: Path) -> float:
    """FID of drawn pictures against real ones, over the 2048 features of Inception v3; lower is better.

    weights: Inception's, as torch-fidelity publishes them (pt_inception-2015-12-05-*.pth). Pictures of any size are
    resized to 299 x 299. Source: Heusel et al., arXiv 1706.08500; torchmetrics.image.fid. Raises as check_weights does,
    and ValueError for fewer than two pictures on a side.
    """
    check_weights(weights, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fid = _torchmetrics_fid()(feature=2048, feature_extractor_weights_path=str(weights)).to(device)
    for name, pictures, is_real in (("real", real, True), ("drawn", drawn, False)):
        count = 0
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (3, H, W) uint8
            fid.update(pixels[None].to(device), real=is_real)
            count += 1
        if count < 2:
            raise ValueError(f"{count} {name} pictures, FID needs two or more")
    return float(fid.compute())


@torch.no_grad()
def clip_score(pairs: Iterable[tuple[Image.Image, str]], model: Path) -> float:
    """Mean over (picture, caption) of 100 times the cosine of their CLIP embeddings, at least 0; higher is better.

    model: a folder of transformers' CLIP, processor and all; captions are cut at what it takes. Source: Hessel et al.,
    arXiv 2104.08718, with 100 for their factor of 2.5, as torchmetrics.multimodal.CLIPScore has it. That class is not
    used: the code of it that we read takes features from transformers in the form of before version 5. Raises as
    check_weights does, and ValueError for no picture.
    """
    from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig

    check_weights(None, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip: nn.Module = CLIPModel.from_pretrained(model)
    clip.to(device).eval()
    longest = CLIPTextConfig.from_pretrained(model).max_position_embeddings
    processor = CLIPProcessor.from_pretrained(model)
    total, count = 0.0, 0
    stream = iter(pairs)
    while batch := list(islice(stream, _BATCH)):
        inputs = processor(
            text=[caption for _, caption in batch],
            images=[picture.convert("RGB") for picture, _ in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
        ).to(device)
        embedded = clip(**inputs)  # both of length 1
        total += float((embedded.image_embeds * embedded.text_embeds).sum().double())
        count += len(batch)
    if not count:
        raise ValueError("no pictures, CLIP score needs one or more")
    return max(100 * total / count, 0.0)
