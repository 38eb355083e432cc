"""Mixture: the experts of one layer and the gates that weigh them."""

from typing import NamedTuple

from torch import Tensor


class Mixture(NamedTuple):
    """The experts of one layer, stacked, and the gates that weigh them.

    E is the number of experts, B of samples, and K of the experts that are active for a sample or a token.
    """

    lora_A: Tensor  # (E * rank, d_in): the A of every expert, one below the other
    lora_B: Tensor  # (E * rank, d_out): the B of every expert, transposed
    gates: Tensor  # fp32: (B, E) for each sample, (1, E) for all samples, or (..., E) for each token
    rank: int  # of every expert
    scaling: float = 1.0  # multiplies the whole sum
    # The compact form, which computes the active experts only: their indices, (1, K) for all samples, (B, K) for each
    # sample, or (..., K) for each token. `gates` then has K columns, with 0 where an index is padding. The gradients of
    # the other experts are exact zeros.
    experts: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.lora_A.shape[0] // self.rank
