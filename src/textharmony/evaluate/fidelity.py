"""FID (torchmetrics) and CLIP score of a set of drawings, with weights from the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def check_weights(inception: Path | None, clip: Path | None) -> None:
    """Raise FileNotFoundError if weights that are named are missing, ImportError if FID's library is."""
    if inception is not None:
        if not inception.is_file():
            raise FileNotFoundError(f"{inception} does not exist, expected the weights of Inception v3")
        _torchmetrics_fid()
    if clip is not None and not clip.is_dir():
        raise FileNotFoundError(f"{clip} is not a folder, expected a folder of transformers' CLIP")


def _torchmetrics_fid() -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics: pip install 'slidelora[fid]' ({error})") from error
    return FrechetInceptionDistance


def frechet_inception_distance(real: Iterable[Image.Image], drawn: Iterable[Image.Image], weights: Path) -> float:
    """Compute the FID of drawn and real pictures from the 2048 features of Inception v3; lower is better.

    Source: Heusel et al., arXiv 1706.08500; torchmetrics.image.fid.

    Args:
        real: Pictures of any size, which are resized to 299 x 299.
        drawn: The same.
        weights: Of Inception v3, as torch-fidelity publishes them (pt_inception-2015-12-05-*.pth).

    Raises:
        ValueError: There are fewer than two pictures of a kind.
        FileNotFoundError: The weights are missing.
        ImportError: torchmetrics is missing.
    """
    check_weights(weights, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fid = _torchmetrics_fid()(feature=2048, feature_extractor_weights_path=str(weights)).to(device)
    for name, pictures in (("real", real), ("drawn", drawn)):
        count = 0
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (3, H, W) uint8
            fid.update(pixels[None].to(device), real=name == "real")
            count += 1
        if count < 2:
            raise ValueError(f"there are {count} {name} pictures, FID needs two or more")
    return float(fid.compute())


@torch.no_grad()
def clip_score(pairs: Iterable[tuple[Image.Image, str]], model: Path) -> float:
    """Compute the mean of 100 times the cosine of the CLIP embeddings of pictures and captions; higher is better.

    Source: Hessel et al., arXiv 2104.08718, with the factor and the minimum, 0, of torchmetrics.multimodal.CLIPScore,
    which we do not use because it expects features in the form that transformers returned before version 5.

    Args:
        pairs: Pictures and their captions; long captions are cut.
        model: A folder of transformers' CLIP with its processor.

    Raises:
        ValueError: There are no pairs.
        FileNotFoundError: The folder is missing.
    """
    from transformers import CLIPModel, CLIPProcessor

    check_weights(None, model)
    clip: Any = CLIPModel.from_pretrained(model)
    clip.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    longest = clip.config.text_config.max_position_embeddings
    processor = CLIPProcessor.from_pretrained(model)
    cosines: list[float] = []
    for picture, caption in pairs:
        image = picture.convert("RGB")
        inputs = processor(text=[caption], images=[image], return_tensors="pt", truncation=True, max_length=longest)
        embedded = clip(**inputs.to(clip.device))  # its embeddings have length 1
        cosines.append(float((embedded.image_embeds * embedded.text_embeds).sum()))
    if not cosines:
        raise ValueError("there are no pictures, CLIP score needs one or more")
    return max(100 * sum(cosines) / len(cosines), 0.0)
