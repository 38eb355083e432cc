import csv
import os
import pickle
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from textharmony.config import TINY_TRAINING, ModelConfig, Stage, TrainConfig
from textharmony.model import TextHarmony
from textharmony.tokens import build_tokenizer
from textharmony.training import select_parameters, train

FOUR = {"perception": 1, "generation": 1, "comprehension": 1, "editing": 1}
CONFIG = TrainConfig(
    stages=(
        Stage("autoencoder", r"image_decoder\.vae", {"generation": 1}, 2, 2, 1e-3, losses=("autoencoder",), warmup=1),
        Stage("align", r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)", FOUR, 3, 4, 1e-3, warmup=1),
        Stage(
            "tune",
            r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
            FOUR,
            5,
            4,
            1e-3,
            adapters=True,
            losses=("text", "image", "layout", "columns", "gate"),
            warmup=1,
        ),
    ),
    save_every=2,
    sample_every=1000,
)


@pytest.fixture(scope="module")
def run(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A whole run's folder and final weights."""
    out = tmp_path_factory.mktemp("run")
    model = train(config, CONFIG, out)
    return out, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the backward pass of a step, counted from 1."""
    backward, count = Accelerator.backward, 0

    def interrupted(self: Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", interrupted)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("steps", [(2,), (8,), (4, 3, 5)], ids=str)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    config: ModelConfig,
    run: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: tuple[int, ...],
) -> None:
    """Cut off before any checkpoint, in a stage, and several times over."""
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, step)
            train(config, CONFIG, tmp_path)
        torch.manual_seed(step)  # what else happens in between does not matter
    weights = train(config, CONFIG, tmp_path).state_dict()
    assert changed(run[1], dict(weights)) == set()
    assert (tmp_path / "losses.csv").read_text() == (run[0] / "losses.csv").read_text()


def test_a_finished_run_is_not_run_again(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    interrupt(monkeypatch, 1)
    assert changed(run[1], dict(train(config, CONFIG, tmp_path / "run").state_dict())) == set()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_run_cut_off_while_it_renames_checkpoints_goes_on(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old checkpoint is aside, the new one not yet in its place: the work of neither may be lost."""
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / "checkpoint.old")
    interrupt(monkeypatch, 1)
    assert changed(run[1], dict(train(config, CONFIG, tmp_path / "run").state_dict())) == set()


def test_a_run_writes_what_it_says(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    out, weights = run
    written = TextHarmony.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(written[name], tensor.half().float()) for name, tensor in weights.items())
    for name in ("losses.png", "samples-0-autoencoder-00002.png", "samples-1-align-00003.png"):
        with Image.open(out / name) as sheet:
            assert sheet.width > 256
    assert not [entry.name for entry in out.iterdir() if "partial" in entry.name or entry.name.endswith(".old")]


def test_losses_are_reported_apart(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    rows = list(csv.DictReader((run[0] / "losses.csv").open()))
    assert [row["stage"] for row in rows] == sorted(
        (row["stage"] for row in rows), key=["autoencoder", "align", "tune"].index
    )
    assert {"autoencoder", "align", "tune"} == {row["stage"] for row in rows} and rows[-1]["step"] == "5"
    assert float(rows[0]["total"]) == float(rows[0]["autoencoder"]) > 0 == float(rows[0]["text"])
    for row in (row for row in rows if row["stage"] != "autoencoder"):
        parts = {name: float(row[name]) for name in ("text", "image", "layout", "columns", "gate")}
        assert all(parts[name] > 0 for name in ("text", "image", "layout", "columns"))
        assert (parts["gate"] > 0) == (row["stage"] == "tune")
        expected = parts["text"] + 10 * parts["image"] + parts["layout"] + parts["columns"] + parts["gate"]
        assert float(row["total"]) == pytest.approx(expected, rel=1e-4)


def test_a_stage_changes_what_it_trains_and_nothing_else(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage, against the checkpoint at its start."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 6)
        train(config, CONFIG, tmp_path)
    before = load_file(tmp_path / "checkpoint" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], run[1][name])}
    assert any(".lora_A" in name for name in moved) and any(name.startswith("visual_tokenizer.vit") for name in moved)
    assert any("unet" in name for name in moved) and any("slidelora_gate" in name for name in moved)
    frozen = {n for n in before if n.startswith("language.") and "lora_" not in n and "slidelora_gate" not in n}
    frozen |= {name for name in before if name.startswith(("image_decoder.vae", "image_decoder.latent_"))}
    assert len(frozen) > 20 and not moved & frozen


def test_two_processes_train_as_one_does(config: ModelConfig, tmp_path: Path) -> None:
    """Losses that draw no noise and weigh samples alike; each process has half of the batch."""
    stages = (
        Stage("autoencoder", r"image_decoder\.vae", {"generation": 1}, 1, 2, 1e-3, losses=("autoencoder",), warmup=1),
        Stage("read", r"visual_tokenizer|language\.(?!.*lora_)", {"perception": 1}, 3, 4, 1e-3, losses=("text",)),
    )
    given = config, TrainConfig(stages, save_every=2, sample_every=1000)
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = """if True:
        import pickle, sys
        from textharmony.training import train
        train(*pickle.load(open(sys.argv[1], "rb")), sys.argv[2])"""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "given"), str(tmp_path / "two")],
            env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    alone = train(*given, tmp_path / "one").state_dict()
    both = load_file(tmp_path / "two" / "checkpoint" / "model.safetensors")
    torch.manual_seed(0)
    start = TextHarmony(config, build_tokenizer()).state_dict()
    # Adam makes a whole step of a gradient that is rounding alone, so a few weights differ.
    moved = apart = 0.0
    for name, tensor in both.items():
        if not name.startswith(("image_decoder.vae", "image_decoder.latent_")):  # those did draw noise
            moved += float((alone[name] - start[name]).square().sum())
            apart += float((alone[name] - tensor).square().sum())
    assert moved > 1e-6 and apart < 0.01 * moved, (moved, apart)


def test_a_checkpoint_of_another_configuration_is_refused(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    with pytest.raises(ValueError, match=r"checkpoint is of another configuration"):
        train(config, replace(CONFIG, seed=1), run[0])
    with pytest.raises(ValueError, match=r"checkpoint is of another configuration"):
        train(replace(config, image_weight=2.0), CONFIG, run[0])


def test_select_parameters_frees_exactly_what_matches(model: TextHarmony) -> None:
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    stage = Stage("some", r"begin_image|visual_tokenizer\.(?!vit)", {"perception": 1}, 1, 1, 1e-3)
    try:
        trained = select_parameters(model, stage)
        expected = {
            name
            for name in flags
            if name == "begin_image" or (name.startswith("visual_tokenizer.") and ".vit." not in name)
        }
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert {id(p) for p in trained} == {id(model.get_parameter(name)) for name in expected}
        with pytest.raises(ValueError, match=r"stage 'none' trains nothing.*'nothing_here'"):
            select_parameters(model, replace(stage, name="none", trainable="nothing_here"))
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


@pytest.fixture
def free(model: TextHarmony, request: pytest.FixtureRequest) -> set[str]:
    """Names of the parameters that a stage of the tiny preset trains."""
    flags = [p.requires_grad for p in model.parameters()]
    (stage,) = (stage for stage in TINY_TRAINING.stages if stage.name == request.param)
    select_parameters(model, stage)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    for p, flag in zip(model.parameters(), flags):
        p.requires_grad_(flag)
    return names


def adapters_of(model: TextHarmony) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".lora_" in name or "slidelora_gate" in name}


@pytest.mark.parametrize("free", ["tune"], indirect=True)
def test_the_second_stage_freezes_language_model_and_vae(model: TextHarmony, free: set[str]) -> None:
    names = {name for name, _ in model.named_parameters()}
    adapters = adapters_of(model)
    frozen = {n for n in names if n.startswith("image_decoder.vae.")}
    frozen |= {n for n in names if n.startswith("language.")} - adapters
    assert len(adapters) > 10 and len(frozen) > 20
    assert free == names - frozen


@pytest.mark.parametrize("free", ["align"], indirect=True)
def test_the_first_stage_freezes_vae_and_adapters(model: TextHarmony, free: set[str]) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert free == {n for n in names if not n.startswith("image_decoder.vae.")} - adapters_of(model)


@pytest.mark.parametrize("free", ["spelling"], indirect=True)
def test_what_spells_has_no_eyes(model: TextHarmony, free: set[str]) -> None:
    assert not free & adapters_of(model) and not any(n.startswith("visual_tokenizer") for n in free)
    assert {"language.model.embed_tokens.weight", "image_decoder.planner.line_out.weight"} <= free


def test_only_the_autoencoder_stage_trains_the_vae(model: TextHarmony) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    for stage in TINY_TRAINING.stages:
        select_parameters(model, stage)
        vae = {p.requires_grad for p in model.image_decoder.vae.parameters()}
        assert vae == {"autoencoder" in stage.losses}, stage.name
    for p, flag in zip(model.parameters(), flags):
        p.requires_grad_(flag)


def test_a_stage_names_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"stage 'x' has losses \['sound'\]"):
        Stage("x", ".", {"perception": 1}, 1, 1, 1e-3, losses=("text", "sound"))
