"""A gate in the layer learns which expert each token needs.

A sequence mixes tokens of two kinds, and each kind needs another linear map. Nobody tells the gate which token is of
which kind: it learns that from the loss of the task. In the table that is printed, each kind must have one expert with
nearly all of its tokens, and not the same one.
"""

import torch
from torch import nn

import slidelora

torch.manual_seed(0)
kinds = torch.randint(0, 2, (16, 32))  # (B, T)
marks = torch.eye(2)[kinds]  # the first two features of a token show its kind
x = torch.cat([marks, torch.randn(16, 32, 6)], -1)  # (B, T, 8)
maps = torch.randn(2, 8, 8) / 8**0.5
target = torch.einsum("btd,btde->bte", x, maps[kinds])

model = nn.Sequential(nn.Linear(8, 8, bias=False))
slidelora.inject(model, experts=["a", "b"], r=8, gate="token", top_k=1, balance_coef=0.01)
optimizer = torch.optim.Adam(slidelora.param_groups(model, lr=1e-2, gate_lr=3e-2))
for step in range(401):
    loss = (model(x) - target).square().mean()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
    (loss + slidelora.aux_loss(model)).backward()
    optimizer.step()
    optimizer.zero_grad()

chosen = slidelora.routing(model).weights["0"].argmax(-1)  # (B, T)
print("          a      b")
for kind in range(2):
    fractions = [(chosen[kinds == kind] == expert).float().mean().item() for expert in range(2)]
    print(f"kind {kind} {fractions[0]:6.1%} {fractions[1]:6.1%}")
