"""Time what the released architecture adds: the ViT-Adapter around CLIP, and MMFS in a decoder layer and in the UNet.

    python benchmarks/bench_released.py

The widths are the real ones, in fp32 on one thread, for one picture of 224 pixels (a grid of 16 x 16 patches), a prompt
of 128 tokens and a drawing of 256 pixels. With and without run in turn, timed by the thread's clock; the ratios are
medians of pairs, with the 20th and 80th percentiles. MMFS is timed as it is first called for a picture, and as it is
called again, when the picture's values are kept: each next token, and each next step of a drawing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_gated_lora import percentiles, write
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from textharmony.model.released.pictures import NEVER, UNetPictures, Visible, attach_language, seeing
from textharmony.model.released.visual_tokenizer import ViTAdapter
from textharmony.presets import RELEASED

PIXELS, TOKENS, DRAWING = 224, 128, 256
GRID = PIXELS // RELEASED.vision["patch_size"]
WIDTH = RELEASED.vision["hidden_size"]


def picture() -> Visible:
    """One picture that a row sees from its first column on."""
    maps = [torch.randn(1, WIDTH, side, side) for side in (4 * GRID, 2 * GRID, GRID, GRID // 2)]
    whole = torch.zeros(1, 1, dtype=torch.long)
    return Visible(maps, whole, whole, torch.full_like(whole, NEVER))


def vision() -> dict[str, Callable[[], object]]:
    assert RELEASED.released is not None
    heads = RELEASED.vision["num_attention_heads"]
    vit = CLIPVisionModel(CLIPVisionConfig(**{**RELEASED.vision, "image_size": PIXELS})).eval()
    vit = getattr(vit, "vision_model", vit)  # where transformers wraps it
    adapter = ViTAdapter(WIDTH, heads, RELEASED.released.stem)
    pixels = torch.randn(1, 3, PIXELS, PIXELS)
    return {"without": lambda: vit(pixels), "with": lambda: adapter(vit, pixels)}


def with_and_without(host: torch.nn.Module, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    kept = picture()

    def under(visible: Visible) -> None:
        with seeing([host], visible):
            run()

    return {"without": run, "with": lambda: under(picture()), "with, again": lambda: under(kept)}


def language() -> dict[str, Callable[[], object]]:
    assert RELEASED.released is not None
    model = LlamaForCausalLM(LlamaConfig(**{**RELEASED.language, "num_hidden_layers": 1, "vocab_size": 8})).eval()
    attach_language(model, WIDTH, GRID, RELEASED.released.every, 2)
    embeds = torch.randn(1, TOKENS, model.config.hidden_size)
    return with_and_without(model.model.layers[0], lambda: model.model(inputs_embeds=embeds))


def unet() -> dict[str, Callable[[], object]]:
    assert RELEASED.released is not None
    model = UNet2DConditionModel.from_config(RELEASED.unet).eval()
    UNetPictures(model, WIDTH, RELEASED.released.mmfs_width, DRAWING // 8)
    latents = torch.randn(1, model.config.in_channels, DRAWING // 8, DRAWING // 8)
    context: Tensor = torch.randn(1, RELEASED.context_tokens, model.config.cross_attention_dim)
    return with_and_without(model, lambda: model(latents, 500, context))


PARTS = {"CLIP ViT-L/14, ViT-Adapter": vision, "decoder layer of 13B, MMFS": language, "UNet of SD 2, MMFS": unet}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    print("| what | seconds without | ratio (20th to 80th percentile) |\n|---|---|---|")
    for part, make in PARTS.items():
        calls = make()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(-1, repeats):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                if repeat >= 0:
                    taken[name].append(time.thread_time() - start)
        base = taken.pop("without")
        for name, times in taken.items():
            median, low, high = percentiles([one / other for one, other in zip(times, base, strict=True)])
            seconds = statistics.median(base)
            row = {"part": part, "what": name, "ratio": round(median, 3), "p20": round(low, 3), "p80": round(high, 3)}
            rows.append({**row, "seconds_without": round(seconds, 3), "repeats": repeats})
            print(f"| {part}, {name} | {seconds:.2f} | {median:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
        del calls
    write("released", rows)


if __name__ == "__main__":
    main()
