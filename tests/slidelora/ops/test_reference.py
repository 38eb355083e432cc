import pytest
import torch

from slidelora.ops import gated_lora


def test_reference_is_the_formula() -> None:
    x, W = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    A, B = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    gates = torch.randn(2, 3, dtype=torch.float64)
    y = gated_lora(x @ W.T, x, A.flatten(0, 1), B.flatten(0, 1), gates, 2, 0.25, backend="reference")
    merged = W + 0.25 * torch.einsum("be,erd,ero->bod", gates, A, B)
    torch.testing.assert_close(y, torch.einsum("btd,bod->bto", x, merged))


@pytest.mark.parametrize("backend", ["reference", "stacked", "fused"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(3, 3)}, r"\(3, 3\), expected \(2, experts\)"),
        ({"gates": torch.ones(2, 4)}, "6 rows, expected 4 experts of rank 2"),
        ({"gates": torch.ones(2, 3, device="meta")}, "on meta, expected cpu"),
        ({"x": torch.ones(2, 4, 5)}, r"\(2, 4, 5\), expected \(2, 3, 5\)"),
        ({"x": torch.ones(2, 3, 4)}, r"expected \(E \* r, 4\)"),
        ({"lora_B": torch.ones(6, 8)}, r"\(6, 8\), expected"),
    ],
)
def test_bad_input_is_named(backend: str, change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "base": torch.ones(2, 3, 7),
        "x": torch.ones(2, 3, 5),
        "lora_A": torch.ones(6, 5),
        "lora_B": torch.ones(6, 7),
        "gates": torch.ones(2, 3),
    }
    gated_lora(**good, r=2, backend=backend)
    with pytest.raises(ValueError, match=message):
        gated_lora(**{**good, **change}, r=2, backend=backend)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda', expected one of"):
        gated_lora(
            torch.ones(2, 7), torch.ones(2, 5), torch.ones(6, 5), torch.ones(6, 7), torch.ones(2, 3), 2, backend="cuda"
        )
