"""What keeps a step from ruining a model: losses, gradients and weights that are not finite, or explode."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from textharmony.train.progress import add_lines

# Times the stage's first loss, or times 1 if that was smaller: no training that works comes there, in one step or in
# half of the last RECENT steps.
EXPLODED, LOST, RECENT = 10, 3, 20
_SHOWN = 4  # samples that a message names; the file has all


class Diverged(ValueError):
    """Too many steps in a row were skipped."""


class Guard:
    """Decides which steps of a stage are skipped, lists them, and ends a run that only skips."""

    def __init__(
        self,
        stage: str,  # its name
        out: Path,
        process: int,
        allowed: int,  # steps in a row that may be skipped
        first: float | None = None,  # the total loss of the stage's first step, if it is done
    ) -> None:
        self.stage, self.first, self.skipped, self.in_a_row = stage, first, 0, 0
        self._allowed, self._out, self._process = allowed, out, process
        self._recent = deque[float](maxlen=RECENT)  # total losses

    def find_fault(self, losses: Mapping[str, float], norm: float) -> str | None:
        """Tell what is wrong with a step's losses over all processes, or with the norm of its gradient."""
        bad = [f"the {name} loss is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not math.isfinite(norm):
            bad.append(f"the gradient's norm is {norm}")
        if bad:
            return ", ".join(bad)
        total = losses["total"]
        if self.first is None:
            self.first = total
        self._recent.append(total)
        usual, scale = median(self._recent), max(1.0, abs(self.first))
        if abs(total) > EXPLODED * scale:
            return f"the total loss is {total:.3g} and was {self.first:.3g} in the first step: it exploded"
        if len(self._recent) == RECENT and usual > LOST * scale:
            was = f"was {self.first:.3g} in the first step"
            return f"the median of the last {RECENT} total losses is {usual:.3g} and {was}: it exploded"
        return None

    def skip(self, step: int, fault: str, records: Sequence[str]) -> None:
        """List a skipped step with the samples of this process; raise Diverged if there are too many in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        line = f"stage {self.stage!r}, step {step} was skipped: {fault}"
        add_lines(self._out, "skipped", self._process, [f"{line}; samples: {', '.join(records)}"])
        if self._process == 0:
            more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
            tqdm.write(f"{line}; samples: {', '.join(records[:_SHOWN])}{more}", file=sys.stderr)
        if self.in_a_row >= self._allowed:
            raise Diverged(
                f"{line}, as were {self.in_a_row} in a row, expected fewer than {self._allowed}: lower the learning "
                f"rate, or see {self._out / 'skipped.txt'} for the samples"
            )

    def keep(self) -> None:
        """Count a step that was not skipped."""
        self.in_a_row = 0


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of this process's parts of tensors are finite."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return all(bool(tensor.isfinite().all()) for tensor in own)
