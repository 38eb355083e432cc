import io
import re
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, changed, checkpoints, newest, spoiled, weights_of

from textharmony.config import ModelConfig
from textharmony.journal import claim, release
from textharmony.pipeline import TextHarmony
from textharmony.signals import Stopped
from textharmony.train.loop import train

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    out = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        train(config, SHORT, out)
    return out, weights_of(out)


@pytest.fixture
def copy(run: tuple[Path, Weights], tmp_path: Path) -> Path:
    """A run that stands before its last save: checkpoints of steps 2 and 4."""
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "model")
    shutil.rmtree(newest(out))
    return out


def test_the_newest_checkpoints_are_kept(config: ModelConfig, run: tuple[Path, Weights], tmp_path: Path) -> None:
    assert checkpoints(run[0]) == [f"0-read-step{step:06d}" for step in (2, 4, 6)]
    train(config, replace(SHORT, keep=1, save_every=3), tmp_path)
    assert checkpoints(tmp_path) == ["0-read-step000006"] and changed(run[1], weights_of(tmp_path)) == set()


def test_a_run_may_save_more_often_when_it_goes_on(config: ModelConfig, run: tuple[Path, Weights], copy: Path) -> None:
    train(config, replace(SHORT, save_every=1, keep=2, max_skipped=99, sample_every=7), copy)
    assert checkpoints(copy) == ["0-read-step000005", "0-read-step000006"]
    assert changed(run[1], weights_of(copy)) == set()


def test_a_checkpoint_by_the_clock(config: ModelConfig, tmp_path: Path) -> None:
    """Every step takes longer than this."""
    train(config, replace(SHORT, save_every=1000, save_minutes=1e-9, keep=9), tmp_path)
    assert len(checkpoints(tmp_path)) == 6
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"save_minutes is {wrong}, expected a number above 0"):
            replace(SHORT, save_minutes=wrong)


def damage(folder: Path, how: str) -> str:
    """Damage a checkpoint, and return the name of the file that a message must tell."""
    if how == "progress deleted":
        (folder / "progress.json").unlink()
        return "progress.json"
    if how == "progress emptied":
        (folder / "progress.json").write_text("{}")
        return "progress.json"
    if how == "no manifest":
        (folder / "manifest.json").unlink()
        return "manifest.json"
    name = "optimizer.bin" if how == "optimizer cut" else "model.safetensors"
    content = bytearray((folder / name).read_bytes())
    if how == "optimizer cut":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    return name


HOW = ("progress deleted", "progress emptied", "no manifest", "optimizer cut", "a bit flipped")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(
    config: ModelConfig, run: tuple[Path, Weights], copy: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the run goes on from there, to the same end."""
    name = damage(newest(copy), how)
    losses = (copy / "losses.csv").read_text()
    with pytest.raises(
        ValueError, match=rf"step000004.*{name}.*; with resume=auto .* from 0-read-step000002$"
    ) as refused:
        train(config, SHORT, copy)
    assert "\n" not in str(refused.value) and (copy / "losses.csv").read_text() == losses
    train(config, replace(SHORT, resume="auto"), copy)
    assert re.search(rf"not used: .*{name}", capsys.readouterr().err)
    assert changed(run[1], weights_of(copy)) == set() and len(checkpoints(copy)) == 3


def test_a_run_without_a_sound_checkpoint_does_not_start_over(config: ModelConfig, copy: Path) -> None:
    for folder in (copy / "checkpoint").iterdir():
        damage(folder, "progress deleted")
    before = sorted(path for path in copy.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="checkpoint has no sound checkpoint: choose another folder, or delete it"):
        train(config, replace(SHORT, resume="auto"), copy)
    assert sorted(path for path in copy.rglob("*") if path.is_file()) == before


def test_a_folder_with_other_things_is_not_trained_into(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoint").mkdir(parents=True)
    (tmp_path / "a" / "checkpoint" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"checkpoint holds model\.safetensors and no checkpoint: choose another"):
        train(config, SHORT, tmp_path / "a")
    (tmp_path / "b" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="b holds a model but no checkpoint of its run: choose another folder"):
        train(config, SHORT, tmp_path / "b")


def test_what_a_killed_save_left_is_ignored_and_removed(
    config: ModelConfig, run: tuple[Path, Weights], copy: Path
) -> None:
    shutil.copytree(newest(copy), copy / "checkpoint" / ".0-read-step000006")
    train(config, SHORT, copy)
    assert changed(run[1], weights_of(copy)) == set()
    assert [path.name for path in (copy / "checkpoint").iterdir() if path.name[0] == "."] == []


def test_a_finished_run_says_so(
    config: ModelConfig, run: tuple[Path, Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    model = run[0] / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    with spoiled(-1, lambda loss: pytest.fail("it trains")):
        again = train(config, SHORT, run[0])
    assert f"{run[0]} is finished: all of its 1 stages are done" in capsys.readouterr().err
    assert isinstance(again, TextHarmony) and model.stat().st_mtime_ns == before
    held = {name: tensor for name, tensor in again.state_dict().items() if name in run[1]}
    assert changed(run[1], held) == set()


def test_two_runs_into_one_folder_are_refused(config: ModelConfig, copy: Path) -> None:
    file = claim(copy / ".lock")
    try:
        with pytest.raises(ValueError, match=r"\.lock is being written by another run"):
            train(config, SHORT, copy)
    finally:
        release(file)
    train(config, SHORT, copy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(
    config: ModelConfig, run: tuple[Path, Weights], tmp_path: Path, number: signal.Signals, step: int
) -> None:
    """A second signal, as launchers send it, does no harm."""
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    def strike(loss: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        return loss

    with spoiled(step, strike), pytest.raises(Stopped) as stopped:
        train(config, SHORT, tmp_path)
    assert stopped.value.code == 128 + number
    assert str(stopped.value).startswith(f"stopped by {number.name}: {tmp_path} was saved after step {step} of stage")
    assert checkpoints(tmp_path)[-1] == f"0-read-step{step:06d}" and not (tmp_path / "model").exists()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(config, SHORT, tmp_path)
    assert changed(run[1], weights_of(tmp_path)) == set()


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may become larger: the writers see the errors that they see on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
@pytest.mark.parametrize(
    ("size", "match"),
    [
        (60, r"losses\.csv"),
        (10_000, r"step000006 cannot be saved: model\.safetensors: .* \([\d.]+ MB are free on the disk\)"),
        (500_000, r"step000006 cannot be saved: model\.safetensors: .* \([\d.]+ MB are free on the disk\)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    config: ModelConfig, run: tuple[Path, Weights], copy: Path, size: int, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoints(copy)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # pytest keeps what the bar writes in a file
    with small_files(size), pytest.raises(OSError, match=match) as failed:
        train(config, SHORT, copy)
    assert "\n" not in str(failed.value)
    assert [path.name for path in (copy / "checkpoint").iterdir() if path.name not in before] == []
    train(config, SHORT, copy)
    assert changed(run[1], weights_of(copy)) == set()
