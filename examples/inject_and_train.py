"""Two tasks that need opposite weights: one frozen model serves both, with an expert for each.

The base is a random network. The task "plus" wants the sum of the inputs, "minus" wants its negative. Each sample of a
batch names its task, and the gate gives that sample the expert of the task. The last line must say that the base model
did not change.
"""

import torch
from torch import nn

import slidelora

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
x = torch.randn(64, 4)
tasks = ["plus", "minus"] * 32
target = x.sum(1, keepdim=True) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]  # (64, 1)
before = model(x)

slidelora.inject(model, experts=["plus", "minus"], r=4, gate="given")
slidelora.print_trainable_parameters(model)

optimizer = torch.optim.Adam(slidelora.param_groups(model, lr=1e-2))
for step in range(301):
    with slidelora.gates(model, tasks):
        loss = (model(x) - target).square().mean()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with slidelora.disabled(model):
    print("the base model is unchanged:", torch.equal(model(x), before))
