"""Two processes with gloo on the CPU: DistributedDataParallel and FSDP2 do what one process does with both batches."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from closeness import relative_error
from injected_models import gradients, randomise
from safetensors.torch import load_file
from tiny_hosts import Words
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import slidelora

GATES = ("sequence", "token")
INPUT_IDS = torch.arange(24).view(4, 6) % 7


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return Words()


def make_model(gate: str) -> nn.Module:
    return randomise(slidelora.inject(make_base(), experts=["a", "b", "shared"], r=3, gate=gate), std=0.2)


def backward(model: nn.Module, input_ids: Tensor) -> None:
    model(input_ids).square().mean().backward()


def train(model: nn.Module, input_ids: Tensor) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    backward(model, input_ids)
    optimizer.step()
    optimizer.zero_grad()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.fc, model.out, model):
        fully_shard(module, mesh=mesh)
    return model


def work(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/processes", rank=rank, world_size=2)
    part = INPUT_IDS[2 * rank : 2 * rank + 2]
    for gate in GATES:
        for find in (True, False):
            parallel = DistributedDataParallel(make_model(gate), find_unused_parameters=find)
            with slidelora.gates(parallel, "a"):
                backward(parallel, part)
            given = gradients(parallel.module)
            backward(parallel, part)
            torch.save([given, gradients(parallel.module)], directory / f"{gate} {find}.pt")
        sharded = shard(make_model(gate))
        with slidelora.gates(sharded, "a"):
            backward(sharded, part)
        sharded.zero_grad()
        train(sharded, part)
        slidelora.save_pretrained(sharded, directory / gate)
        slidelora.export_peft(sharded, directory / gate / "experts")
        slidelora.export_peft(sharded, directory / gate / "mixture", gates={"a": 0.5, "shared": 2})
        dist.barrier()
        resumed = shard(slidelora.load_pretrained(make_base(), directory / gate))
        train(resumed, part)
        slidelora.save_pretrained(resumed, directory / f"{gate} resumed")
        flat = FullyShardedDataParallel(make_model(gate), use_orig_params=True, device_id=torch.device("cpu"))
        for save in (slidelora.save_pretrained, slidelora.export_peft):
            with pytest.raises(ValueError, match=r"two dimensions: FSDP flattened it; make the call inside of"):
                save(flat, directory / "nowhere")
        with FullyShardedDataParallel.summon_full_params(flat):
            slidelora.save_pretrained(flat, directory / f"{gate} flat")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(path)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    yield path


@pytest.mark.parametrize("find", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_given_and_learned_gates_under_ddp(directory: Path, gate: str, find: bool) -> None:
    model = make_model(gate)
    with slidelora.gates(model, "a"):
        backward(model, INPUT_IDS)
    expected = [gradients(model)]
    backward(model, INPUT_IDS)
    expected.append(gradients(model))
    for found, reference in zip(torch.load(directory / f"{gate} {find}.pt"), expected):
        for name, gradient in reference.items():
            assert torch.equal(found[name], gradient) or relative_error(found[name], gradient) < 1e-5, name
        others = found.keys() - reference.keys()  # the gates that did not run
        assert all("gate." in name and not found[name].any() for name in others)
        assert not (others and find)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.filterwarnings("ignore:the .* gate is not exported")
def test_a_model_that_fsdp2_shards_is_saved_exported_and_resumed(directory: Path, tmp_path: Path, gate: str) -> None:
    model = make_model(gate)
    slidelora.save_pretrained(model, tmp_path / f"{gate} flat")
    train(model, INPUT_IDS)
    slidelora.save_pretrained(model, tmp_path / gate)
    slidelora.export_peft(copy.deepcopy(model), tmp_path / gate / "experts")
    slidelora.export_peft(model, tmp_path / gate / "mixture", gates={"a": 0.5, "shared": 2})
    train(model, INPUT_IDS)
    slidelora.save_pretrained(model, tmp_path / f"{gate} resumed")
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(paths) == 7
    for path in paths:
        assert (directory / path).with_name("adapter_config.json").read_text() == (
            (tmp_path / path).with_name("adapter_config.json").read_text()
        )
        found, expected = load_file(directory / path), load_file(tmp_path / path)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected)


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))


def test_a_model_that_is_wrapped_already_is_refused(tmp_path: Path) -> None:
    options = {"experts": ["a", "shared"], "r": 2, "gate": "given"}
    saved = slidelora.inject(make_base(), **options)
    slidelora.save_pretrained(saved, tmp_path)
    with one_process(tmp_path):
        for wrap in (DistributedDataParallel, fully_shard):
            wrapped = wrap(make_base())
            names = list(wrapped.state_dict())
            with pytest.raises(ValueError, match=r"the model is wrapped by .* already, .* inject first, then wrap"):
                slidelora.inject(wrapped, **options)
            with pytest.raises(ValueError, match=r"the model is wrapped by .* already, .* inject first, then wrap"):
                slidelora.load_pretrained(wrapped, tmp_path)
            assert list(wrapped.state_dict()) == names


@contextmanager
def one_process(directory: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
