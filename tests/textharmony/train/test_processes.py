"""Two processes over gloo: the engines against one process, kills, and other numbers of processes."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from miniatures import SETTINGS, WRITERS, join
from processes import FSDP, Run, free_port
from safetensors.torch import load_file
from short_runs import READ, changed, checkpoints, newest, weights_of

from textharmony.config import ModelConfig, TrainConfig
from textharmony.presets import PAPER, PAPER_TRAINING
from textharmony.train.guard import all_finite

STEPS = int(os.environ.get("TEXTHARMONY_STEPS", "8"))  # of the comparison of engines
KILLS = int(os.environ.get("TEXTHARMONY_KILLS", "1"))
PATIENCE = 60 + 30 * STEPS  # seconds
ENGINES = {"ddp": {}, "fsdp": FSDP}
CONFIG = TrainConfig((READ,), save_every=2, sample_every=1000, workers=0, trackers=())
pytestmark = pytest.mark.slow
minutes = pytest.mark.skipif("TEXTHARMONY_LONG" not in os.environ, reason="takes minutes; TEXTHARMONY_LONG=1 runs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of real backbones' layouts that draws no noise but that of its drawings."""
    root = tmp_path_factory.mktemp("model")
    config = ModelConfig.from_dict(json.loads(json.dumps(PAPER.to_dict())) | SETTINGS)
    assert config.slide is not None
    still = replace(config, unconditional_share=0.0, slide={**config.slide, "lora_dropout": 0.0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = join(WRITERS["clip-llama-sd"](root / "parts"), still)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "begin_" in name:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(root / "model")
    return root / "model"


MIXED = replace(PAPER_TRAINING.stages[1], steps=STEPS, batch_size=4, warmup=1, learning_rate=1e-3)
ENGINE = TrainConfig((MIXED,), save_every=STEPS // 2, sample_every=STEPS, workers=0, trackers=(), ema_decay=0.9)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    Run(1, out / "log", folder, ENGINE, out / "run", still=True).wait()
    return out / "run"


def losses(out: Path) -> list[dict[str, float]]:
    rows = csv.DictReader((out / "losses.csv").open())
    return [{name: float(value) for name, value in row.items() if name != "stage"} for row in rows]


@minutes
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_all_tasks_as_one_does_and_go_on(
    folder: Path, alone: Path, tmp_path: Path, engine: str
) -> None:
    """With samples of all tasks, of which a process may have none; half of the steps, then the other half."""
    out = tmp_path / "run"
    run = Run(2, tmp_path / "log", folder, ENGINE, out, still=True, **ENGINES[engine])
    run.wait(PATIENCE)
    for one, two in zip(losses(alone), losses(out), strict=True):
        assert two == pytest.approx(one, rel=1e-4), engine
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (alone, out))
    assert expected.keys() == found.keys()
    together = [torch.cat([tensor.flatten() for _, tensor in sorted(t.items())]) for t in (expected, found)]
    assert relative_error(together[1], together[0]) < 1e-3
    newest(out).rename(out / "last")
    (out / "model").rename(out / "other")
    Run(2, tmp_path / "log", folder, ENGINE, out, still=True, **ENGINES[engine]).wait(PATIENCE)
    assert changed(found, load_file(out / "model" / "model.safetensors")) == set()


@minutes
def test_a_checkpoint_of_another_engine_is_refused(folder: Path, alone: Path, tmp_path: Path) -> None:
    run = Run(2, tmp_path / "log", folder, ENGINE, alone, still=True, **FSDP)
    said = [run.end(rank, timeout=120) for rank in range(2)]
    assert all("is of DDP or one process, and this run is of FSDP: expected the same engine" in line for line in said)


@pytest.fixture(scope="module")
def together(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A whole run of two processes."""
    out = tmp_path_factory.mktemp("together")
    Run(2, out / "log", config, CONFIG, out / "run").wait()
    return out / "run", weights_of(out / "run")


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not(
    config: ModelConfig, together: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Half of the kills fall into a save."""
    moments = random.Random(0)
    for index in range(KILLS):
        out = tmp_path / str(index)
        run = Run(2, tmp_path / "log", config, replace(CONFIG, save_every=1), out)
        step = moments.randrange(1, READ.steps)
        saving = index % 2 == 0
        run.wait_for(out / "checkpoint" / f"{'.' if saving else ''}0-read-step{step:06d}")
        time.sleep(moments.random() * (0.05 if saving else 0.5))
        run.kill()
        Run(2, tmp_path / "log", config, CONFIG, out).wait()
        assert changed(together[1], weights_of(out)) == set(), index
        assert (out / "losses.csv").exists()


def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_goes_on(
    config: ModelConfig, together: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = Run(2, tmp_path / "log", config, CONFIG, out)
    run.wait_for(out / "checkpoint" / "0-read-step000002")
    run.kill(rank=1)
    said = run.end(0, timeout=60)
    assert run.processes[0].exitcode == 1
    assert "textharmony: another of the 2 processes has ended" in said and "Traceback" not in said
    Run(2, tmp_path / "log", config, CONFIG, out).wait()
    assert changed(together[1], weights_of(out)) == set()


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=minutes)])
def test_a_fault_in_one_of_two_processes_skips_the_step_in_both(
    folder: Path, config: ModelConfig, tmp_path: Path, engine: str
) -> None:
    """Losses and gradients are summed over the processes, so that both see the fault."""
    out, start = tmp_path / "run", config if engine == "ddp" else folder
    said = Run(2, tmp_path / "log", start, CONFIG, out, poison=3, **ENGINES[engine]).wait()
    lines = [(out / name).read_text() for name in ("skipped.txt", "skipped-1.txt")]
    for line in lines:
        assert line.startswith("stage 'read', step 3 was skipped: the total loss is nan, the text loss is nan")
        assert line.count("\n") == 1 and line.count("synthetic train-") == 2
    assert lines[0] != lines[1] and "step 3 was skipped" in said[0] and "skipped" not in said[1]
    saved = load_file(out / "model" / "model.safetensors")
    assert all_finite(saved.values())
    assert [row["step"] for row in losses(out)] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=minutes)])
def test_another_number_of_processes_goes_on(
    config: ModelConfig, together: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, count: int
) -> None:
    """Reading draws no noise, so that all numbers of processes come to the same weights but for rounding."""
    out = tmp_path / "run"
    run = Run(2, tmp_path / "log", config, CONFIG, out)
    run.wait_for(out / "checkpoint" / "0-read-step000004")
    run.kill()
    assert not (out / "checkpoint" / "0-read-step000006").exists()
    Run(count, tmp_path / "log", config, CONFIG, out).wait()
    expected, found = together[1], weights_of(out)
    apart = [torch.cat([tensor.flatten() for _, tensor in sorted(t.items())]) for t in (expected, found)]
    assert relative_error(apart[1], apart[0]) < 1e-3


@minutes
def test_sharded_checkpoints_go_on_in_another_number_of_processes(folder: Path, tmp_path: Path) -> None:
    """Four of them; without FSDP it is refused."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    Run(2, tmp_path / "log", folder, CONFIG, whole, **FSDP).wait()
    run = Run(2, tmp_path / "log", folder, CONFIG, out, **FSDP)
    run.wait_for(out / "checkpoint" / "0-read-step000002")
    run.kill()
    assert not (out / "model").exists()
    alone = Run(1, tmp_path / "log", folder, CONFIG, out)
    assert "is of FSDP, and this run is of DDP or one process: expected the same engine" in alone.end(0, 300)
    Run(4, tmp_path / "log", folder, CONFIG, out, **FSDP).wait()
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (whole, out))
    apart = [torch.cat([tensor.flatten() for _, tensor in sorted(t.items())]) for t in (expected, found)]
    assert changed(expected, found) and relative_error(apart[1], apart[0]) < 1e-3


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=minutes)])
def test_a_signal_to_all_processes_of_the_command_keeps_the_step(tmp_path: Path, number: signal.Signals) -> None:
    """As Ctrl-C in a terminal and most schedulers send it: to the workers that load batches, too."""
    command = [sys.executable, "-m", "textharmony", "train", "-o", str(tmp_path), "--batch-size", "2", "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr is not None
    said = ""
    while not re.search(r"[1-9]\d*/\d{3,}", said):  # the second picture of the bar is of the first steps
        said += (read := os.read(run.stderr.fileno(), 4096).decode())
        assert read, said
    os.killpg(run.pid, number)
    said += run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number and "Traceback" not in said, said
    assert f"stopped by {number.name}" in said and len(checkpoints(tmp_path)) == 1


def test_torchrun_starts_the_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "textharmony", "train", "--model", str(folder), "-o", str(tmp_path / "run")]
    command += ["--steps", "1", "--batch-size", "2", "--mixed-precision", "no", "--workers", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(checkpoints(tmp_path / "run")) == 2 and "model after" in done.stdout


@minutes
def test_accelerate_launches_the_command_with_fsdp(folder: Path, tmp_path: Path) -> None:
    """With the file of the repository, on the CPU."""
    file = Path(__file__).parents[3] / "examples" / "launch" / "fsdp2.yaml"
    text = file.read_text().replace("use_cpu: false", "use_cpu: true").replace("num_processes: 8", "num_processes: 2")
    (tmp_path / "fsdp2.yaml").write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    command += ["--main_process_port", str(free_port()), "-m", "textharmony", "train", "--model", str(folder)]
    command += ["-o", str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", "--mixed-precision", "no"]
    command += ["--workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "the launcher started 2 processes" in done.stderr, done.stderr
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (newest(tmp_path / "run") / "pytorch_model_fsdp_0" / ".metadata").is_file()
