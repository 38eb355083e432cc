"""Memory and step time of the preset "paper" on H100s under each engine, from counted parameters and operations.

Nothing is trained: the model is built without weights, and torch counts the operations of its parts. The assumptions
stand in capitals below; docs/scaling.md has the table that this prints.
"""

import re

import torch
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode

from textharmony.model.core import ADAPTER
from textharmony.pipeline import TextHarmony
from textharmony.presets import PAPER, PAPER_TRAINING
from textharmony.presets.tiny import build_tokenizer

PEAK, USED = 989e12, 0.4  # operations a second of an H100 in bf16, and the part of them that training reaches
NVLINK, NETWORK = 450e9, 50e9  # bytes a second of each GPU within a node of 8, and between nodes
TOKENS = 740  # of a sample: 512 for each picture, prompt and answer
SAMPLES = 4  # of a micro-batch on one GPU
# Pictures that are read for a sample, by the tasks of the stage: half of them are drawings that are fed back.
PICTURES = {"align": 1.0, "tune": 1.25}
DRAWINGS = 0.5
GB = 1e9


def operations(module: torch.nn.Module, *arguments: object, **named: object) -> float:
    """Of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*arguments, **named)
    return float(counter.get_total_flops())


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def main() -> None:
    with init_empty_weights(include_buffers=True):
        model = TextHarmony(PAPER, build_tokenizer()).to("meta").eval()
    config, language = PAPER, model.language.config
    vit = operations(model.visual_tokenizer.vit, meta(1, 3, *config.image_size), interpolate_pos_encoding=True)
    side = config.target_size[0] // model.image_decoder.cell
    context = meta(1, config.context_tokens, model.image_decoder.unet.config.cross_attention_dim)
    unet = operations(
        model.image_decoder.unet, meta(1, model.image_decoder.unet.config.in_channels, side, side), meta(1), context
    )
    vae = operations(model.image_decoder.vae.encode, meta(1, 3, *config.target_size))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    words = sum(n for name, n in counts.items() if name.startswith("language") and not ADAPTER.search(name))
    # Per token of the language model: weights, and attention over half of the tokens on average.
    token = 2 * words + 2 * language.num_hidden_layers * language.hidden_size * TOKENS
    print(f"parameters: {sum(counts.values()) / 1e9:.2f} billion, of which the language model {words / 1e9:.2f}")
    for part, value in model.count_parameters().items():
        print(f"  {part:22} {value / 1e6:10.1f} million")
    print(f"forward, in 1e12 operations: ViT {vit / 1e12:.2f}, UNet {unet / 1e12:.2f}, VAE {vae / 1e12:.2f}")
    print("\n| stage | engine | GPUs | weights | gradients, Adam, EMA | activations | GB a GPU | step, s | samples/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for stage in PAPER_TRAINING.stages:
        trained = {name for name in counts if re.match(stage.trainable, name)}
        free = sum(counts[name] for name in trained)
        own = sum(counts.values()) - words  # all that is not the frozen language model; in fp32
        average = sum(n for name, n in counts.items() if name.startswith("image_decoder.") and ".vae." not in name)
        vit_trains = any(name.startswith("visual_tokenizer.vit") for name in trained)
        # Forward, once more in backward (checkpoints), gradients of the inputs and, where weights train, of weights.
        for_sample = (
            3 * token * TOKENS + PICTURES[stage.name] * vit * (4 if vit_trains else 1) + DRAWINGS * (4 * unet + vae)
        )
        # A checkpoint of bf16 for each layer, and one layer in full (34 hidden states' worth in the language model).
        layers = (language.num_hidden_layers + 34) * TOKENS * language.hidden_size * 2
        patches = (config.image_size[0] // 14) ** 2
        vision = PICTURES[stage.name] * ((24 if vit_trains else 0) + 34) * patches * 1024 * 2
        drawing = DRAWINGS * 2.5 * GB  # of one block of the UNet in full, and the checkpoints of the others
        activations = SAMPLES * (layers + vision + drawing)
        for engine in ("DDP", "FSDP2"):
            for gpus in (8, 64):
                share = 1 if engine == "DDP" else 1 / gpus
                weights = (2 * words + 4 * own) * share
                # DDP: autocast's copies in bf16. FSDP2: two gathered layers and, for the whole step, all the rest.
                layer = words / language.num_hidden_layers
                weights += 2 * own if engine == "DDP" else 2 * (2 * layer + own)
                states = ((4 + 8) * free + 4 * average) * share + (4 * free if engine == "DDP" else 4 * own)
                bandwidth = NVLINK if gpus == 8 else NETWORK
                micro = stage.batch_size // gpus // SAMPLES or 1
                samples = min(SAMPLES, stage.batch_size // gpus)
                compute = for_sample * samples * micro / (PEAK * USED)
                moved = 8 * free if engine == "DDP" else micro * 2 * (2 * words + 2 * own) + 4 * free
                seconds = max(compute, moved / bandwidth)  # the two overlap
                total = weights + states + activations
                numbers = f"{weights / GB:.0f} | {states / GB:.0f} | {activations / GB:.0f} | {total / GB:.0f}"
                print(
                    f"| {stage.name} | {engine} | {gpus} | {numbers} | {seconds:.2f} "
                    f"({'compute' if compute > moved / bandwidth else 'network'}) | {stage.batch_size / seconds:.0f} |"
                )


if __name__ == "__main__":
    main()
