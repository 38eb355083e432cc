"""Both resamplers against the official code's: with and without a mask, and their gradients."""

import pytest
import torch
from released_miniature import assert_parity, golden, weights

from textharmony.model.released.q_former import QFormer

SIZES = {
    "visual_resampler": (5, 48, 40, 4, 2, 4, 64, True, 0.1),
    "context_resampler": (7, 32, 64, 1, 1, 4, 64, False, 0.0),
}


def ours(name: str) -> str:
    return name.replace("blip2qformer.encoder.", "").replace("blip2qformer.", "")


@pytest.mark.parametrize("name", sorted(SIZES))
def test_resamplers_are_the_official_ones(name: str) -> None:
    file = golden(name)
    resampler = QFormer(*SIZES[name]).eval()
    resampler.load_state_dict({ours(key): tensor for key, tensor in weights(file).items()})
    context = file["inputs.context"].requires_grad_(True)
    assert_parity(resampler(context), file["outputs.unmasked"])
    found = resampler(context, file["inputs.mask"])
    assert_parity(found, file["outputs.masked"])
    found.backward(file["inputs.grad_output"])
    assert_parity(context.grad, file["grads.context_masked"], 1e-4)
    parameters = dict(resampler.named_parameters())
    expected = {key.removeprefix("grads."): grad for key, grad in file.items() if key.startswith("grads.")}
    del expected["context_masked"]
    for key, grad in expected.items():
        if key.endswith(("k_norm.bias", "attention.key.bias")):  # a shift of all keys changes nothing
            if float(grad.abs().max()) < 1e-4:
                assert float((parameters[ours(key)].grad - grad).abs().max()) < 1e-5
                continue
        assert_parity(parameters[ours(key)].grad, grad, 1e-4)


def test_what_the_mask_hides_makes_no_difference() -> None:
    torch.manual_seed(0)
    resampler = QFormer(3, 8, 6, 2, 2, 2, 16, True, 0.1).eval()
    context, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = resampler(context, mask)
    assert_parity(found[0], resampler(context[:1, :3])[0].detach(), 1e-6)
    assert_parity(found[1], resampler(context[1:, :1])[0].detach(), 1e-6)
