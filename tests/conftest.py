"""What every test runs under: no network, one seed, few threads, and uninitialised memory that shows."""

import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

# A shell ignores Ctrl-C for what it runs in the background, and what that starts would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

THREADS = int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1))
torch.set_num_threads(THREADS)  # here for fixtures of a session or module, which run before those of a test


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
