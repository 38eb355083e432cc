"""The study's arms on miniatures: what every arm trains, that a run goes on after a kill, and what the tables say."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error

import slidelora
from textharmony.config import ModelConfig
from textharmony.data.words import is_held_out
from textharmony.pipeline import TextHarmony
from textharmony.presets.tiny import TINY, build_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TASKS = ("text", "image")
LONG = pytest.mark.skipif(not os.environ.get("TEXTHARMONY_LONG"), reason="takes some seconds: TEXTHARMONY_LONG=1")
ARMS = [
    "token",
    *(pytest.param(arm, marks=LONG) for arm in (*TASKS, "both", "table", "sequence", "lily", "xlora", "full")),
]


def miniature() -> ModelConfig:
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    unet = dict(TINY.unet) | {"block_out_channels": [8, 8], "cross_attention_dim": 32}
    assert TINY.layout is not None
    return replace(
        TINY,
        vision=dict(TINY.vision) | layers | {"num_hidden_layers": 1},
        stem=(8, 8),
        language=dict(TINY.language) | layers | {"num_hidden_layers": 4, "num_key_value_heads": 2},
        unet=unet,
        vae=dict(TINY.vae) | {"block_out_channels": [8, 8, 8]},
        layout=replace(TINY.layout, width=16, depth=1, heads=2, steps=2),
        inference_steps=1,
        max_new_tokens=2,
    )


@pytest.fixture(scope="module")
def harmony() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("harmony")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, harmony: Any) -> Namespace:
    """A miniature with random weights."""
    folder = tmp_path_factory.mktemp("harmony")
    torch.manual_seed(0)
    TextHarmony(miniature(), build_tokenizer()).save_pretrained(folder / "weights")
    sizes = {"steps": 1, "batch": 2, "samples": 0.005}
    return Namespace(model="embedded", weights=str(folder / "weights"), out=str(folder), device="cpu", jobs=1, **sizes)


def run_of(harmony: Any, arm: str, **values: Any) -> Any:
    return harmony.Run(**{"folder": "core", "arm": arm, "seed": 0, "rank": 6, "rate": 1e-3} | values)


@pytest.fixture(scope="module")
def problem(harmony: Any, options: Namespace) -> Any:
    return harmony.PROBLEMS["embedded"](options)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_its_adapter_alone(harmony: Any, problem: Any, arm: str, tmp_path: Path) -> None:
    model = problem.build(run_of(harmony, arm))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = harmony.train(problem, model, run_of(harmony, arm), 2, tmp_path / "part")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("language.") for name in moved)
    expected = {arm} if arm in TASKS else set(TASKS)
    assert {name for name in log[0] if name.endswith("loss")} == {f"{task} loss" for task in expected}
    assert ("cosine" in log[0]) == (len(expected) == 2)
    assert ("cosine of text" in log[1]) == (len(expected) == 2) and "cosine of text" not in log[0]


def count_adapter(problem: Any, run: Any) -> int:
    names = ("lora_A", "lora_B", "lily_A", "lily_B")
    named = problem.build(run).named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and any(part in name for part in names))


@pytest.mark.parametrize(
    "arm, experts",
    [
        ("table", 3),
        *(pytest.param(*a, marks=LONG) for a in (("xlora", 3), ("lily", 3), ("sequence", 2), ("sequence", 6))),
    ],
)
def test_an_adapter_has_as_many_weights_as_the_plain_lora(harmony: Any, problem: Any, arm: str, experts: int) -> None:
    plain = count_adapter(problem, run_of(harmony, "both"))
    assert count_adapter(problem, run_of(harmony, arm, experts=experts)) == plain > 0


def test_the_language_model_spells_in_another_alphabet(harmony: Any, problem: Any) -> None:
    """Each capital stands for another one, in what it reads and in what it writes; the rest is as it was."""
    arms = sys.modules["harmony_arms"]
    letters = arms.LETTERS
    others = arms.exchanged(letters)
    assert sorted(others) == sorted(letters) and all(a != b for a, b in zip(letters, others))
    language = problem.build(run_of(harmony, "full")).language
    own = problem.parts.language

    def rows(alphabet: str) -> list[int]:
        return problem.tokenizer.convert_tokens_to_ids([*alphabet])

    def logits(model: Any, word: str) -> torch.Tensor:
        return model(input_ids=torch.tensor([rows(word)])).logits[0, -1].detach()

    with slidelora.disabled(own):
        assert relative_error(logits(language, letters)[rows(letters)], logits(own, others)[rows(others)]) < 1e-5
        assert relative_error(logits(language, "abc")[rows("xyz")], logits(own, "abc")[rows("xyz")]) < 1e-5


def test_texts_are_capitals_and_one_in_ten_is_held_out(harmony: Any, problem: Any) -> None:
    letters = {*sys.modules["harmony_arms"].LETTERS}
    for split in ("train", "held_out"):
        records = list(islice(problem.records(0, split, "text"), 40))
        words = {word for record in records for word in record.words}
        assert len(words) > 20 and all(2 <= len(word) <= 6 and {*word} <= letters for word in words)
        assert {is_held_out(word) for word in words} == {split == "held_out"}


@LONG
def test_arms_see_the_same_samples_and_start_with_the_same_loss(harmony: Any, problem: Any, tmp_path: Path) -> None:
    logs = {}
    for arm in ("image", "both", "table", "lily"):
        run = run_of(harmony, arm)
        logs[arm] = harmony.train(problem, problem.build(run), run, 1, tmp_path / arm)[0]["image loss"]
    assert len({round(value, 4) for value in logs.values()}) == 1
    other = run_of(harmony, "image", seed=1)
    assert harmony.train(problem, problem.build(other), other, 1, tmp_path / "1")[0]["image loss"] != logs["image"]


@LONG
def test_experts_may_be_on_the_vit(harmony: Any, problem: Any, tmp_path: Path) -> None:
    for arm in ("both", "sequence"):
        run = run_of(harmony, arm, placement="vision")
        model = problem.build(run)
        harmony.train(problem, model, run, 2, tmp_path / arm)
        adapters = [name for name, p in model.named_parameters() if p.requires_grad]
        assert adapters and all(name.startswith("visual_tokenizer.") for name in adapters)


def test_a_killed_run_goes_on_to_the_same_weights(
    harmony: Any, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(harmony, "sequence")
    whole, cut = problem.build(run), problem.build(run)
    expected = harmony.train(problem, whole, run, 3, tmp_path / "whole")
    parents = iter([1, 1, 2])  # the process that started the run ends in its second step
    with monkeypatch.context() as context:
        context.setattr("os.getppid", lambda: next(parents))
        with pytest.raises(SystemExit, match="saved after step 2"):
            harmony.train(problem, cut, run, 3, tmp_path / "cut")
    with pytest.raises(SystemExit, match="is of , expected another: choose another --out"):
        harmony.train(problem, cut, run, 3, tmp_path / "cut", "another")
    log = harmony.train(problem, cut := problem.build(run), run, 3, tmp_path / "cut")
    assert [row["text loss"] for row in log] == [row["text loss"] for row in expected]
    for (name, p), q in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert relative_error(q.detach(), p.detach()) < 1e-6, name


def test_the_command_writes_tables_and_plot_and_makes_nothing_twice(
    harmony: Any, options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def work(told: Namespace, run: Any) -> None:  # in this process
        made.append(run.file)
        harmony.carry_out(told, run)

    monkeypatch.setattr(harmony, "work", work)
    invented = {"text loss": 1.5, "image loss": 2.0, "text accuracy": 0.25, "image accuracy": 0.5}
    monkeypatch.setattr(harmony.PROBLEMS["embedded"], "evaluate", lambda *_: invented)
    command = ["harmony.py", "--arms", "both", "--seeds", "0", "--rank", "6", "--rate", "0.001"]
    for name in ("weights", "out", "steps", "batch", "samples", "jobs"):
        command += [f"--{name}", str(getattr(options, name))]
    monkeypatch.setattr(sys, "argv", command)
    harmony.main()
    harmony.main()
    assert made == ["core/both-0.json"]
    assert re.search(r"\| core both \| 1 \| [\d,]+ \| 1.500 \| 2.000 \| 25.0 \| 50.0 \|", capsys.readouterr().out)
    out = Path(options.out)
    assert (out / "harmony.png").stat().st_size > 10_000 and (out / "results.csv").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2"])
    with pytest.raises(
        SystemExit, match=r"was made with \{'steps': 1\}, expected \{'steps': 2\}: choose another --out"
    ):
        harmony.main()


@LONG
def test_who_does_what_is_asked_has_all_points(harmony: Any, problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, records = problem.build(run_of(harmony, "both")), list[Any](), problem.records

    def watched(*arguments: Any) -> Iterator[Any]:
        for record in records(*arguments):
            seen.append(record)
            yield record

    def perform(requests: list[Any]) -> list[Any]:
        asked = [record for record in seen if record.words][-len(requests) :]
        results = {"read": lambda r: r.texts[0], "answer": lambda r: r.texts[0], "locate": lambda r: list(r.boxes)}
        return [results.get(r.task.value, lambda r: r.load_target())(r) for r in asked]

    monkeypatch.setattr(problem, "records", watched)
    monkeypatch.setattr(model, "perform", perform)
    right = problem.evaluate(model, run_of(harmony, "both"))
    assert right["text accuracy"] == right["read similarity"] == 1
    assert right["draw"] == right["draw, the judge"] and right["image accuracy"] == (right["draw"] + right["edit"]) / 2
    monkeypatch.setattr(model, "perform", lambda requests: list(reversed(perform(requests))))
    monkeypatch.setattr(problem, "options", Namespace(**vars(problem.options) | {"samples": 0.02}))
    wrong = problem.evaluate(model, run_of(harmony, "both"))
    assert wrong["read"] < 1 and wrong["read similarity"] < 1 and wrong["text loss"] == right["text loss"]


def test_differences_are_paired_by_seed_and_have_students_interval(harmony: Any) -> None:
    def result(arm: str, seed: int, loss: float, folder: str = "core") -> dict[str, Any]:
        return {"run": {"folder": folder, "arm": arm, "seed": seed}, "metrics": {"text loss": loss}}

    both = [result("both", seed, loss) for seed, loss in enumerate((1.0, 2.0, 4.0))]
    text = [result("text", seed, loss) for seed, loss in enumerate((0.9, 1.7, 3.5))]
    others = [result("sequence", 0, 5.0, "ablation/experts-2"), result("both", 7, 5.0, "ablation/rank-2")]
    rows = {(row["folder"], row["arm"]): row for row in harmony.compare([*both, *text, *others])}
    row = rows["core", "text"]
    assert row["difference"] == pytest.approx(-0.3)  # of -0.1, -0.3 and -0.5
    assert row["half width"] == pytest.approx(4.303 * 0.2 / 3**0.5)
    assert rows["core", "both"]["difference"] == 0 == rows["ablation/rank-2", "both"]["difference"]
    alone = rows["ablation/experts-2", "sequence"]  # compared with the core's, of which there is one pair
    assert alone["difference"] == 4.0 and alone["half width"] is None


def pilot_of(harmony: Any, monkeypatch: pytest.MonkeyPatch, out: Path, harm: dict[int, float]) -> dict[str, Any]:
    """Choose by invented losses: "both" has those of the arms for one task, times 1 + the harm of the rank."""

    def run_all(runs: list[Any], options: Namespace) -> list[dict[str, Any]]:
        results = []
        for run in runs:
            loss = (1 + harm[run.rank] if run.arm == "both" else 1) * (1 + abs(run.rate - 5e-3))
            metrics = {"text loss": loss, "image loss": loss, "read": 0.5, "draw": 0.5}
            results.append({"run": vars(run) | {"rate": run.rate}, "metrics": metrics})
        return results

    monkeypatch.setattr(harmony, "run_all", run_all)
    monkeypatch.setattr(harmony, "settings", lambda options: {})
    harmony.pilot(Namespace(model="embedded", out=str(out)))
    return json.loads((out / "pilot.json").read_text())


def test_the_pilot_takes_the_first_rank_with_harm(
    harmony: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pilot_of(harmony, monkeypatch, tmp_path, {12: 0.01, 6: 0.05, 3: 0.2})
    assert (found["rank"], found["rate"], found["interference"]) == (6, 5e-3, True)
    found = pilot_of(harmony, monkeypatch, tmp_path, {12: 0.01, 6: 0.015, 3: -0.2})
    assert (found["rank"], found["interference"]) == (6, False)


@LONG
def test_xlora_writes_as_transformers_does(harmony: Any, problem: Any) -> None:
    """With the classifier's and the adapters' weights at zero it is its base model, which transformers can ask."""
    xlora, plain = (problem.build(run_of(harmony, arm)).language for arm in ("xlora", "full"))
    torch.manual_seed(1)
    embeds, mask = 0.5 * torch.randn(2, 5, 32), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = plain.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=1, do_sample=False)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": [int(first[0, 0]), 3]}
    found, expected = (host.generate(inputs_embeds=embeds, **options) for host in (xlora, plain))
    assert torch.equal(found.sequences, expected.sequences) and found.sequences[0, 1:].tolist() == [0, 0, 0]
    assert relative_error(torch.stack(found.scores)[:, 1], torch.stack(expected.scores)[:, 1]) < 1e-5


@LONG
def test_smollm2s_arms_take_steps(harmony: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} = "
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    options = Namespace(model="smollm2", weights=str(tmp_path), out=str(tmp_path), device="cpu", batch=2, samples=0.01)
    problem = harmony.PROBLEMS["smollm2"](options)
    for arm in ("capitals", "both", "table", "sequence", "xlora"):
        run = run_of(harmony, arm)
        model = problem.build(run)
        (row,) = harmony.train(problem, model, run, 1, tmp_path / arm)
        assert ("reverse loss" in row) == (arm != "capitals")
        assert problem.evaluate(model, run).keys() == {
            f"{task} {kind}" for task in problem.tasks for kind in ("loss", "accuracy")
        }
