"""Deformable attention against the official code's, and what it refuses."""

import copy

import pytest
import torch
from released_miniature import assert_parity, golden, weights

from textharmony.model.released.deformable import MMFS, DeformableAttention, centres, deformable_attention
from textharmony.model.released.visual_tokenizer import to_maps


def test_multi_scale_deformable_attention_is_the_official_one() -> None:
    file = golden("ms_deform_attn")
    attention = DeformableAttention(32, 4, 3)
    attention.load_state_dict(weights(file))
    maps = to_maps(file["inputs.features"], file["inputs.spatial_shapes"].tolist())
    reference = file["inputs.reference_points"][0, :, 0]
    assert_parity(centres(16, 16, reference.device), reference, 1e-6)
    assert_parity(attention(file["inputs.query"], reference, maps), file["outputs.y"])


def test_a_sample_between_cells_is_their_mean_and_outside_there_is_nothing() -> None:
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None, None]
    at = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [-2.0, 0.5]])[None, :, None, None, None]
    found = deformable_attention([value], at, torch.ones(1, 4, 1, 1, 1))
    assert_parity(found.flatten(), torch.tensor([1.0, 2.0, 4.0, 0.0]), 1e-6)


def test_a_query_that_sees_nothing_gets_the_projected_ignore_token() -> None:
    torch.manual_seed(0)
    attention = MMFS(8, 32, 32, [2.0, 1.0], pictures=4, spread=1.0)
    attention.ignore_token.normal_()
    attention.output_proj.bias.data.normal_()
    query, reference = torch.randn(1, 3, 8), torch.full((1, 2), 0.5)
    values = [attention.values(torch.randn(2, side, side, 32)) for side in (4, 2)]
    expected = attention.output_proj(attention.ignore_token[0]).expand(1, 3, -1)
    assert_parity(attention(query, reference, values, torch.zeros(1, 3, 2, dtype=torch.bool)), expected.detach())
    assert_parity(attention(query, reference, [], torch.zeros(1, 3, 0, dtype=torch.bool)), expected.detach())
    seen = torch.tensor([[[False, False], [True, False], [True, True]]])
    found = attention(query, reference, values, seen)
    assert_parity(found[:, :1], expected[:, :1].detach())
    # An unseen picture makes no difference, whatever it shows.
    other = [value.clone() for value in values]
    for value in other:
        value[1].fill_(7)
    assert_parity(attention(query, reference, other, seen)[:, :2], found[:, :2].detach(), 1e-6)
    assert not torch.equal(attention(query, reference, other, seen)[:, 2], found[:, 2])


def test_more_pictures_than_the_table_are_named() -> None:
    attention = MMFS(8, 32, 32, [1.0], pictures=3, spread=1.0)
    values = [attention.values(torch.randn(3, 2, 2, 32))]
    with pytest.raises(ValueError, match="a row has 3 pictures, expected at most 2"):
        attention(torch.randn(1, 1, 8), torch.full((1, 2), 0.5), values, torch.ones(1, 1, 3, dtype=torch.bool))


def test_half_precision_samples_at_precise_places() -> None:
    """bfloat16 has 8 bits: it cannot tell the cells of a map of 300 apart."""
    torch.manual_seed(0)
    attention = MMFS(8, 32, 32, [1.0], pictures=3, spread=100.0)
    query, reference = torch.randn(1, 2, 8), torch.full((1, 2), 0.5)
    level, seen = torch.randn(1, 300, 300, 32), torch.ones(1, 2, 1, dtype=torch.bool)
    half = copy.deepcopy(attention).bfloat16()
    attention.load_state_dict(half.float().state_dict())  # offsets that bfloat16 has
    expected = attention(query, reference, [attention.values(level)], seen)
    half = half.bfloat16()
    found = half(query.bfloat16(), reference, [half.values(level.bfloat16())], seen)
    assert found.dtype == torch.bfloat16
    assert_parity(found.float(), expected.detach(), 0.1)
