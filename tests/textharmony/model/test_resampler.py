"""The resampler against formulas and torch's own attention, in float64."""

import numpy as np
import pytest
import torch
from closeness import relative_error
from torch import nn

from textharmony.model.resampler import Attention, Block, PerceiverResampler, sincos_positions


@pytest.mark.parametrize(("length", "width"), [(1, 2), (7, 16), (300, 64)])
def test_sincos_positions_against_the_formula(length: int, width: int) -> None:
    """Vaswani et al. 2017, section 3.5, sines first."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2)[None] / width)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    assert relative_error(sincos_positions(length, width), expected) < 1e-4


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_torchs_own(crossed: bool, masked: bool) -> None:
    layer = Attention(12, 3).double()
    nn.init.normal_(layer.norm.weight)
    oracle = nn.MultiheadAttention(12, 3, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([layer.to_q.weight, layer.to_kv.weight]))
        oracle.out_proj.weight.copy_(layer.to_out.weight)
    x, context = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    normed = layer.norm(x)
    attended = context if crossed else normed
    mask = torch.rand(2, attended.shape[1]) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True
    expected, _ = oracle(normed, attended, attended, key_padding_mask=None if mask is None else ~mask)
    assert relative_error(layer(x, context if crossed else None, mask), expected) < 1e-12


def test_a_block_adds_to_what_it_gets() -> None:
    block = Block(8, 2)
    with torch.no_grad():
        block.attend.to_out.weight.zero_()
        block.perceptron[-1].weight.zero_()
        block.perceptron[-1].bias.zero_()
    x = torch.randn(2, 3, 8)
    assert torch.equal(block(x), x)


@pytest.fixture
def resampler() -> PerceiverResampler:
    return PerceiverResampler(10, 16, queries=5, depth=2, heads=4).double()


def test_a_context_of_any_length_gives_as_many_tokens_as_queries(resampler: PerceiverResampler) -> None:
    for length in (1, 5, 40):
        found = resampler(torch.randn(3, length, 10).double())
        assert found.shape == (3, 5, 16)
        # Normalised: of mean 0 and variance 1.
        assert found.mean(-1).norm() < 1e-12 * found.norm()
        assert relative_error(found.var(-1, correction=0), torch.ones(3, 5)) < 1e-3


def test_masked_context_is_not_read(resampler: PerceiverResampler) -> None:
    context, positions = torch.randn(2, 6, 10).double(), sincos_positions(9, 16).double()
    padded = torch.cat([context, 1e3 * torch.randn(2, 3, 10).double()], 1)
    mask = (torch.arange(9) < 6).expand(2, -1)
    alone = resampler(context, positions[:6])
    assert relative_error(resampler(padded, positions, mask), alone) < 1e-12
    assert relative_error(resampler(padded, positions), alone) > 1e-2


def test_positions_tell_the_order(resampler: PerceiverResampler) -> None:
    context, order = torch.randn(1, 6, 10).double(), torch.tensor([5, 3, 0, 1, 4, 2])
    assert relative_error(resampler(context[:, order]), resampler(context)) < 1e-12
    positions = sincos_positions(6, 16).double()
    plain = resampler(context, positions)
    assert relative_error(resampler(context[:, order], positions), plain) > 1e-3
    # Positions may differ by sample.
    moved = positions[order].expand(1, -1, -1)
    assert relative_error(resampler(context[:, order], moved), plain) < 1e-12


def test_every_parameter_learns(resampler: PerceiverResampler) -> None:
    # A query is a direction: the last norm takes the gradient of a plain sum away.
    (resampler(torch.randn(2, 4, 10).double()) ** 3).sum().backward()
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
