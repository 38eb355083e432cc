import csv
import json
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
from short_runs import changed, newest

from textharmony.config import ModelConfig, Stage, TrainConfig
from textharmony.data.faults import TooManyFaults
from textharmony.data.loading import Source
from textharmony.pipeline import TextHarmony
from textharmony.presets import PAPER_TRAINING, TINY_TRAINING
from textharmony.presets.tiny import build_tokenizer
from textharmony.train.engine import select_parameters
from textharmony.train.loop import train

ALL = {"read": 0.6, "locate": 0.4, "draw": 1, "answer": 1, "edit": 1}
CONFIG = TrainConfig(
    stages=(
        Stage("autoencoder", r"image_decoder\.vae", {"draw": 1}, 2, 2, 1e-3, losses=("autoencoder",), warmup=1),
        Stage("align", r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)", ALL, 3, 4, 1e-3, warmup=1),
        Stage(
            "tune",
            r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
            ALL,
            5,
            4,
            1e-3,
            adapters=True,
            losses=("text", "image", "layout", "words", "gate"),
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


def test_a_run_writes_model_losses_and_samples(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
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
        parts = {name: float(row[name]) for name in ("text", "image", "layout", "words", "gate")}
        assert all(parts[name] > 0 for name in ("text", "image", "layout", "words"))
        assert (parts["gate"] > 0) == (row["stage"] == "tune")
        expected = parts["text"] + 10 * parts["image"] + parts["layout"] + parts["words"] + parts["gate"]
        assert float(row["total"]) == pytest.approx(expected, rel=1e-4)


def test_a_stage_changes_what_it_trains_and_nothing_else(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage, against the checkpoint at its start."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 6)
        train(config, CONFIG, tmp_path)
    before = load_file(newest(tmp_path) / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], run[1][name])}
    assert any(".lora_A" in name for name in moved) and any(name.startswith("visual_tokenizer.vit") for name in moved)
    assert any("unet" in name for name in moved) and any("slidelora_gate" in name for name in moved)
    frozen = {n for n in before if n.startswith("language.") and "lora_" not in n and "slidelora_gate" not in n}
    frozen |= {name for name in before if name.startswith(("image_decoder.vae", "image_decoder.latent_"))}
    assert len(frozen) > 20 and not moved & frozen


def test_two_processes_train_as_one_does(config: ModelConfig, tmp_path: Path) -> None:
    """Losses that draw no noise and weigh samples alike; each process has half of the batch."""
    stages = (
        Stage("autoencoder", r"image_decoder\.vae", {"draw": 1}, 1, 2, 1e-3, losses=("autoencoder",), warmup=1),
        Stage("read", r"visual_tokenizer|language\.(?!.*lora_)", {"read": 1}, 3, 4, 1e-3, losses=("text",)),
    )
    given = config, TrainConfig(stages, save_every=2, sample_every=1000)
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = """if True:
        import pickle, sys
        from textharmony.train.loop import train
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
    both = load_file(newest(tmp_path / "two") / "model.safetensors")
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
    with pytest.raises(ValueError, match=r"step\d+ is of another configuration"):
        train(config, replace(CONFIG, seed=1), run[0])
    with pytest.raises(ValueError, match=r"step\d+ is of another configuration"):
        train(replace(config, guidance_scale=2.0), CONFIG, run[0])


def test_select_parameters_frees_exactly_what_matches(model: TextHarmony) -> None:
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    stage = Stage("some", r"begin_image|visual_tokenizer\.(?!vit)", {"read": 1}, 1, 1, 1e-3)
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
def test_the_spelling_stage_leaves_the_vit_alone(model: TextHarmony, free: set[str]) -> None:
    assert not free & adapters_of(model) and not any(n.startswith("visual_tokenizer") for n in free)
    assert {"language.model.embed_tokens.weight", "image_decoder.planner.line_out.weight"} <= free


def test_only_stages_of_the_autoencoder_train_the_vae(model: TextHarmony) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    for stage in TINY_TRAINING.stages:
        select_parameters(model, stage)
        trained = any(p.requires_grad for p in model.image_decoder.vae.parameters())
        assert trained == ("autoencoder" in stage.losses), stage.name
    for p, flag in zip(model.parameters(), flags):
        p.requires_grad_(flag)


def test_a_stage_for_the_decoder_alone_leaves_latents_as_they_were(config: ModelConfig, tmp_path: Path) -> None:
    """The UNet was trained on them: neither the encoder nor their mean and spread may change."""
    first = CONFIG.stages[0]
    decoder = replace(first, name="strokes", trainable=r"image_decoder\.vae\.decoder")
    seen = []
    for count in (1, 2):
        model = train(config, replace(CONFIG, stages=(first, decoder)[:count]), tmp_path / str(count))
        seen.append({name: value.clone() for name, value in model.image_decoder.state_dict().items()})
    different = changed(*seen)
    assert different and all(name.startswith("vae.decoder.") for name in different)


def test_a_stage_with_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage 'x' has losses \['sound'\]"):
        Stage("x", ".", {"read": 1}, 1, 1, 1e-3, losses=("text", "sound"))


# From a folder: the paper's stages, a few steps of each.
SHORT = replace(
    PAPER_TRAINING,
    stages=tuple(
        replace(stage, steps=3, batch_size=4, warmup=1, learning_rate=1e-3) for stage in PAPER_TRAINING.stages
    ),
    save_every=2,
    sample_every=1000,
    mixed_precision=None,
    gradient_checkpointing=False,
    max_faults=0.2,
    shuffle_buffer=4,
    window=1,  # with which any number of micro-batches and processes sees the same batches
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(united: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of real backbones' layouts, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("united") / "model"
    united.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Source, ...]]:
    """Sources of both stages: captioned pictures, of which some are corrupt, and records of all tasks."""
    root = tmp_path_factory.mktemp("data")
    (root / "captioned").mkdir()
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 0, 90)).save(root / "captioned" / f"{i}.png")
        (root / "captioned" / f"{i}.txt").write_text(f"shade {i}")
    (root / "captioned" / "3.png").write_bytes(b"cut off")
    (root / "captioned" / "5.txt").write_text(" ")
    (root / "own").mkdir()
    Image.new("RGB", (40, 20), "white").save(root / "own" / "a.png")
    lines: list[dict[str, object]] = [
        {"task": "answer", "prompt": "what", "images": ["a.png"], "texts": ["HELLO"]},
        {"task": "locate", "prompt": "where", "images": ["a.png"], "boxes": [[0, 0, 500, 999]], "words": ["HELLO"]},
        {
            "task": "edit",
            "prompt": "fill",
            "images": ["a.png"],
            "target": "a.png",
            "boxes": [[0, 0, 500, 999]],
            "texts": ["A"],
        },
    ]
    (root / "own" / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    captioned, own = Source("captioned", str(root / "captioned")), Source("folder", str(root / "own"), weight=2)
    return {"align": (captioned, own), "tune": (own, captioned)}


@pytest.fixture(scope="module")
def tuned(
    request: pytest.FixtureRequest,
    folder: Path,
    data: dict[str, tuple[Source, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, tuple[Source, ...]] | None, Path, Weights]:
    """A whole run through both stages: its data, folder and final weights."""
    given, out = None if request.param == "words" else data, tmp_path_factory.mktemp("tuned")
    with torch.random.fork_rng():
        weights = dict(train(folder, SHORT, out, given).state_dict())
    return given, out, weights


Tuned = tuple[dict[str, tuple[Source, ...]] | None, Path, Weights]
both = pytest.mark.parametrize(
    ("miniature", "tuned"), [("clip-llama-sd", "records"), ("siglip-qwen-sdv", "words")], indirect=True
)


@both
def test_both_stages_train_what_they_should_and_leave_the_rest_bit_for_bit(tuned: Tuned, folder: Path) -> None:
    weights = tuned[2]
    start = dict(TextHarmony.from_pretrained(folder).state_dict())
    moved = changed(start, weights)
    frozen = {n for n in start if n.startswith("language.") and not ("lora_" in n or "slidelora_gate" in n)}
    frozen |= {n for n in start if n.startswith(("image_decoder.vae", "image_decoder.latent_"))}
    assert len(frozen) > 40 and not moved & frozen
    for part in (
        r"visual_tokenizer.vit",
        "visual_tokenizer.resampler",
        "visual_tokenizer.project",
        "image_decoder.unet",
        "image_decoder.resampler",
        "begin_image",
        "begin_head",
    ):
        assert any(name.startswith(part) for name in moved), part
    assert any("lora_A" in name for name in moved) and any("slidelora_gate" in name for name in moved)


@both
def test_the_model_is_written_in_the_dtype_of_its_weights(tuned: Tuned) -> None:
    _, out, weights = tuned
    written = dict(TextHarmony.from_pretrained(out / "model").state_dict())
    assert changed(weights, written) == set()
    tensors = load_file(out / "model" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "weight" in name} == {torch.float32}


@both
def test_a_checkpoint_from_a_folder_leaves_out_what_stays_as_it_is(tuned: Tuned, folder: Path) -> None:
    _, out, weights = tuned
    held = load_file(newest(out) / "model.safetensors")
    assert not any(n.startswith("image_decoder.vae.") for n in held)
    assert all("lora_" in n or "slidelora_gate" in n for n in held if n.startswith("language."))
    assert changed(dict(TextHarmony.from_pretrained(folder).state_dict()), weights) <= set(held) < set(weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in held.items())


@both
def test_stages_that_draw_show_what_a_model_without_layout_draws(tuned: Tuned) -> None:
    for name in ("samples-0-align-00003.png", "samples-1-tune-00003.png"):
        with Image.open(tuned[1] / name) as sheet:
            assert sheet.width > 6 * 256


@both
def test_a_resumed_run_from_a_folder_ends_as_an_uninterrupted_one(
    tuned: Tuned, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in the first stage, and once more in the second."""
    data, out, weights = tuned
    for step in (3, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, step)
            train(folder, SHORT, tmp_path, data)
        torch.manual_seed(step)
    again = dict(train(folder, SHORT, tmp_path, data).state_dict())
    assert changed(weights, again) == set()
    assert (tmp_path / "losses.csv").read_text() == (out / "losses.csv").read_text()
    if data is not None:
        lines = (tmp_path / "faults.txt").read_text().splitlines()
        assert sorted(lines) == sorted((out / "faults.txt").read_text().splitlines())
        assert len(lines) == 2 and any("3.png" in line for line in lines) and any("5.png" in line for line in lines)
    else:
        assert not (tmp_path / "faults.txt").exists()


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_a_stage_without_adapters_leaves_vit_and_experts_alone(folder: Path, tmp_path: Path) -> None:
    config = replace(SHORT, stages=SHORT.stages[:1])
    start = dict(TextHarmony.from_pretrained(folder).state_dict())
    moved = changed(start, dict(train(folder, config, tmp_path).state_dict()))
    assert moved and not any("lora_" in n or "slidelora_gate" in n or ".vit." in n for n in moved)
    assert {n.split(".")[0] for n in moved} == {"visual_tokenizer", "image_decoder", "begin_image", "begin_head"}


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_too_many_corrupt_records_stop_the_run_with_the_list(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(60):
        (pictures / f"{i}.png").write_bytes(b"no picture")
        (pictures / f"{i}.txt").write_text("x")
    sources = (Source("captioned", str(pictures)),)
    with pytest.raises(TooManyFaults, match="15 of 15 records are corrupt"):
        train(folder, SHORT, tmp_path / "out", {"align": sources, "tune": sources})
    lines = (tmp_path / "out" / "faults.txt").read_text().splitlines()
    assert len(lines) == 15 and all("is not a picture" in line for line in lines)


@pytest.mark.parametrize("miniature", ["siglip-qwen-sdv"], indirect=True)
def test_gradient_checkpointing_changes_no_bit(
    folder: Path, data: dict[str, tuple[Source, ...]], tmp_path: Path
) -> None:
    config, data = replace(SHORT, stages=SHORT.stages[1:]), {"tune": data["tune"]}
    assert SHORT.stages[1].adapters
    plain = dict(train(folder, config, tmp_path / "plain", data).state_dict())
    again = dict(train(folder, replace(config, gradient_checkpointing=True), tmp_path / "again", data).state_dict())
    assert changed(dict(TextHarmony.from_pretrained(folder).state_dict()), plain)
    assert changed(plain, again) == set()


@pytest.mark.parametrize("miniature", ["siglip-qwen-sdv"], indirect=True)
def test_half_batches_add_up(folder: Path, data: dict[str, tuple[Source, ...]], tmp_path: Path) -> None:
    """A loss that draws no noise and weighs samples alike."""
    config = replace(SHORT, stages=(replace(SHORT.stages[0], losses=("text",)),))
    given = {"align": data["align"][1:]}
    start = dict(TextHarmony.from_pretrained(folder).state_dict())
    whole = dict(train(folder, config, tmp_path / "whole", given).state_dict())
    config = replace(config, gradient_accumulation_steps=2)
    halves = dict(train(folder, config, tmp_path / "halves", given).state_dict())
    moved = sum(float((whole[name] - tensor).square().sum()) for name, tensor in start.items())
    apart = sum(float((whole[name] - tensor).square().sum()) for name, tensor in halves.items())
    assert moved > 1e-6 and apart < 0.01 * moved, (moved, apart)


MIXED = """if True:
    import pickle, sys
    import torch
    from textharmony.pipeline import TextHarmony
    from textharmony.train.loop import train

    under, hidden_states = set(), TextHarmony.hidden_states

    def watched(self, *args):
        under.add(torch.is_autocast_enabled("cpu"))
        return hidden_states(self, *args)

    TextHarmony.hidden_states = watched
    folder, config, out = pickle.load(open(sys.argv[1], "rb"))
    model = train(folder, config, out)
    unwrapped = "forward" not in model.__dict__ or not hasattr(model.forward, "__wrapped__")
    print(sorted(under), {str(p.dtype) for p in model.parameters()}, unwrapped)"""


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_mixed_precision_computes_in_bf16_and_keeps_fp32(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since accelerate holds one precision for a process."""
    config = replace(PAPER_TRAINING, stages=SHORT.stages, save_every=2, sample_every=1000)
    assert config.mixed_precision == "bf16" and config.gradient_checkpointing
    (tmp_path / "given").write_bytes(pickle.dumps((folder, config, tmp_path)))
    done = subprocess.run([sys.executable, "-c", MIXED, tmp_path / "given"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Under autocast in training, without it when samples are drawn.
    assert done.stdout.strip().splitlines()[-1] == "[False, True] {'torch.float32'} True"
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert all(0 < float(row["total"]) < 1e3 for row in rows)


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_what_cannot_be_trained_is_refused_before_anything_is_done(
    config: ModelConfig, folder: Path, data: dict[str, tuple[Source, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"sources for \['align'\], expected them for each of \['align', 'tune'\]"):
        train(folder, SHORT, out, {"align": data["align"], "tune": ()})
    with pytest.raises(ValueError, match=r"sources for \['align', 'tune', 'later'\]"):
        train(folder, SHORT, out, data | {"later": data["tune"]})
    with pytest.raises(ValueError, match="data set is 'nonesuch'"):
        train(folder, SHORT, out, data | {"tune": (Source("nonesuch", "x"),)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(folder, SHORT, out, data | {"tune": (Source("folder", "nowhere"),)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(tmp_path / "nowhere", SHORT, out)
    with pytest.raises(ValueError, match="'align' has batch_size 4, expected a multiple of 3"):
        train(folder, replace(SHORT, gradient_accumulation_steps=3), out)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0"):
        replace(SHORT, gradient_accumulation_steps=0)
    with pytest.raises(ValueError, match="the model plans layouts"):
        train(config, SHORT, out, data)
    autoencoder = replace(CONFIG, stages=CONFIG.stages[:1])
    with pytest.raises(ValueError, match="'autoencoder' trains the autoencoder, expected rendered words"):
        train(folder, autoencoder, out, {"autoencoder": data["tune"]})
    assert not out.exists()


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_a_checkpoint_of_other_data_is_refused(
    folder: Path, data: dict[str, tuple[Source, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        train(folder, SHORT, tmp_path, data)
    with pytest.raises(ValueError, match=r"step\d+ is of another configuration"):
        train(folder, SHORT, tmp_path)
    with pytest.raises(ValueError, match=r"step\d+ is of another configuration"):
        train(folder, SHORT, tmp_path, data | {"tune": data["tune"][:1]})


def test_a_frozen_language_model_in_half_precision(folder: Path, tmp_path: Path) -> None:
    """Its experts and all that trains stay fp32; a stage that would train its weights is refused."""
    stage = replace(SHORT.stages[-1], steps=1, batch_size=2)
    config = replace(SHORT, stages=(stage,), language_dtype="bfloat16")
    start = TextHarmony.from_pretrained(folder, {"language": torch.bfloat16}).state_dict()
    trained = train(folder, config, tmp_path / "run")
    again = TextHarmony.from_pretrained(tmp_path / "run" / "model", {"language": torch.bfloat16}).state_dict()
    kinds = {name: tensor.dtype for name, tensor in trained.state_dict().items()}
    base = {n for n in kinds if n.startswith("language.") and "lora_" not in n and "slidelora_gate" not in n}
    assert {kinds[n] for n in base} == {torch.bfloat16} and {kinds[n] for n in kinds.keys() - base} == {torch.float32}
    assert all(torch.equal(again[name], start[name]) for name in base)
    assert not torch.equal(again["begin_head"], start["begin_head"])
    whole = replace(config, stages=(replace(stage, trainable="language"),))
    with pytest.raises(ValueError, match=r"trains language\..*, whose weights are not fp32"):
        train(folder, whole, tmp_path / "other")
    with pytest.raises(ValueError, match="language_dtype is 'int8'"):
        replace(config, language_dtype="int8")


def test_loss_weights_belong_to_the_training() -> None:
    config = replace(CONFIG, loss_weights={"text": 3.0})
    assert config.loss_weights == {"text": 3.0} and CONFIG.loss_weights == {"text": 1.0, "image": 10.0}
    with pytest.raises(ValueError, match=r"loss_weights has \['sound'\], expected some of"):
        replace(CONFIG, loss_weights={"sound": 1.0})
    with pytest.raises(ValueError, match="workers is -1, expected at least 0"):
        replace(CONFIG, workers=-1)


def test_worker_processes_change_no_bit(
    config: ModelConfig, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for workers in (0, 2):
        weights = train(config, replace(CONFIG, workers=workers), tmp_path / str(workers)).state_dict()
        assert changed(run[1], dict(weights)) == set()
