"""One step of DeepSpeed ZeRO in two processes that use different parts of a model, as samples of mixed tasks do.

    pip install deepspeed
    DS_ACCELERATOR=cpu ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 tests/peers/deepspeed_step.py 2

The argument is ZeRO's stage, 2 or 3. It prints the relative error of each weight against the step of one process with
both samples: first where both processes use all parts, then where each leaves out a part that the other one uses.
"""

import copy
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, used: str) -> Tensor:
        x = self.shared(x)
        x = x + self.a(x) if "a" in used else x
        return (x + self.b(x) if "b" in used else x).square().mean()


def step(model: nn.Module, accelerator: Accelerator, used: tuple[str, str]) -> dict[str, float]:
    alone, rank = copy.deepcopy(model), accelerator.process_index
    samples = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))
    engine, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(engine(samples[rank], used[rank]))
    optimizer.step()
    found = accelerator.get_state_dict(engine)
    expected = torch.optim.SGD(alone.parameters(), 0.1)
    (sum(alone(samples[i], used[i]) for i in range(2)) / 2).backward()
    expected.step()
    return {name: float((found[name].cpu() - p).norm() / p.norm()) for name, p in alone.state_dict().items()}


def main() -> None:
    config = {
        "zero_optimization": {"stage": int(sys.argv[1])},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
    }
    for used in (("ab", "ab"), ("a", "b")):
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        torch.manual_seed(0)
        errors = step(Branches(), accelerator, used)
        if accelerator.is_main_process:
            print(used, {name: round(error, 4) for name, error in errors.items()}, flush=True)
        accelerator.free_memory()


if __name__ == "__main__":
    main()
