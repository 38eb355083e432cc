"""What every test runs under: no network, one seed, few threads, and uninitialised memory that shows."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# Tiny tensors gain nothing from threads, and threads that share a core with another worker wait in every operation.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


@pytest.fixture(autouse=True)
def deterministic_run() -> Iterator[None]:
    """Seed torch, and have it fill `empty` tensors with NaN (integers: their maximum): no result may rest on luck.

    Torch does so itself, also for `empty_like`, `new_empty` and `resize_`, while deterministic algorithms are on.
    """
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
