"""The ViT-Adapter and the visual tokenizer against the official code's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from released_miniature import MINIATURE, assert_parity, golden, load_released, miniature_tokenizer, weights
from torch import Tensor, nn

from textharmony.model.backbones import build_vision
from textharmony.model.released.visual_tokenizer import LoRALinear, ReleasedVisualTokenizer, resize_table, sincos_grid
from textharmony.pipeline import TextHarmony


def test_the_visual_tokenizer_is_the_official_one_block_by_block() -> None:
    file = golden("visual_tokenizer")
    model = TextHarmony(MINIATURE, miniature_tokenizer()).eval()
    load_released(model, {f"visual_tokenizer.{name}": tensor for name, tensor in weights(file).items()})
    tokenizer = model.visual_tokenizer
    assert isinstance(tokenizer, ReleasedVisualTokenizer)
    seen: dict[str, Tensor] = {}

    def keep(number: int, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        for name, tensor in zip(("cls", "x", "c"), output):
            seen[f"block{number}_{name}"] = tensor

    for number, interaction in enumerate(tokenizer.adapter.interactions):
        interaction.register_forward_hook(partial(keep, number))
    with torch.no_grad():
        tokens, maps, _ = tokenizer(file["inputs.image"] * 2 - 1)
    for name, tensor in seen.items():
        assert_parity(tensor, file[f"outputs.mid_{name}"])
    assert_parity(tokens, file["outputs.vis_embed"])
    for number, level in enumerate(maps, 1):
        assert_parity(level, file[f"outputs.multiscale_c{number}"])


def test_a_table_of_positions_is_resized_as_the_official_one() -> None:
    file = golden("visual_tokenizer")
    before, after = file["inputs.position_table_before"], file["outputs.position_table_after"]
    found = torch.cat([before[:1], resize_table(before[1:], (16, 16), align_corners=True)])
    assert_parity(found, after)


def test_clip_keeps_its_table_where_the_size_is_its_own() -> None:
    config = replace(MINIATURE, vision={**MINIATURE.vision, "image_size": 32})
    vit = build_vision(config)
    table = vit.embeddings.position_embedding.weight.clone()
    tokenizer = ReleasedVisualTokenizer(config, 64, vit)
    assert torch.equal(tokenizer.vit.embeddings.position_embedding.weight, table)


def test_another_vision_model_is_refused() -> None:
    config = replace(MINIATURE, vision={**MINIATURE.vision, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="clip_vision_model of 3 layers, expected CLIP of a multiple of 4 layers"):
        ReleasedVisualTokenizer(config, 64)
    with pytest.raises(ValueError, match="expected an even number of patches"):
        ReleasedVisualTokenizer(replace(MINIATURE, image_size=(30, 30), drawing_size=(64, 64)), 64)


def test_a_plain_lora_scales_by_alpha_over_rank() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    lora, x = LoRALinear(base, 2, 8, 0.1).eval(), torch.randn(3, 6)
    assert torch.equal(lora(x), base(x))
    nn.init.normal_(lora.lora_B.weight)
    expected = base(x) + 4 * (x @ lora.lora_A.weight.T @ lora.lora_B.weight.T)
    assert_parity(lora(x), expected.detach(), 1e-6)


def test_positions_count_rows_first() -> None:
    table = sincos_grid(4, 8)
    assert table.shape == (16, 8)
    assert torch.equal(table[0:4, :4], table[:1, :4].expand(4, -1))  # one row of cells
    assert torch.equal(table[::4, 4:], table[:1, 4:].expand(4, -1))  # one column
