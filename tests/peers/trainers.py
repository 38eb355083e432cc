"""Train tiny models that carry Slide-LoRA with other people's trainers, at their default settings.

    python tests/peers/trainers.py [-k WORDS] [-v]

It needs transformers, peft, diffusers and accelerate, and runs the cases of trl (with datasets) and of lightning if
these are installed. Nothing is downloaded. Each case prints one line: ok, or refused with the message, or FAILED. The
exit code is 1 if a case failed. docs/peft.md has the results.
"""

import argparse
import contextlib
import copy
import importlib.util
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

GATES = ("given", "sequence", "token")
EXPERTS = ["text", "image", "shared"]
WORDS = "the a red green blue cat dog bird sees likes draws reads on under big small house tree sun moon".split()
CASES: dict[str, Callable[[Path], str | None]] = {}


def case(name: str, *combinations: Any) -> Callable[[Any], Any]:
    """Register a function as a case for each combination of its arguments."""

    def register(function: Any) -> Any:
        for one in combinations or [()]:
            values = one if isinstance(one, tuple) else (one,)
            full = " ".join([name, *(str(value) for value in values if value is not None)])
            CASES[full] = lambda folder, values=values: function(folder, *values)
        return function

    return register


def make_base(seed: int = 1, **changes: Any) -> LlamaForCausalLM:
    """Make a Llama of two blocks."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **ids, **changes}))


def make_config(gate: str, **fields: Any) -> SlideLoRAPeftConfig:
    """Make the configuration that a trainer gets as peft_config."""
    return SlideLoRAPeftConfig(**{"experts": EXPERTS, "r": 4, "gate": gate, "task_type": "CAUSAL_LM", **fields})


def make_model(gate: str, how: str) -> nn.Module:
    """Make a PeftModel, or a model that slidelora injected."""
    if how == "peft":
        return wake(peft.get_peft_model(make_base(), make_config(gate)))
    return wake(slidelora.inject(make_base(), experts=EXPERTS, r=4, gate=gate))


def wake(model: nn.Module) -> nn.Module:
    """Give experts and gates random values, so that each of them matters and gets a gradient."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that train."""
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients."""
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that do not train."""
    return {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Assert that two sets of tensors have the same names and relative errors below a bound."""
    assert found.keys() == expected.keys() and expected, sorted(found.keys() ^ expected.keys())[:3]
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-300))
        assert error < bound, f"{name}: relative error {error:.1e}"


def assert_trained(model: nn.Module, before: dict[str, Tensor], base: dict[str, Tensor], gate: str) -> None:
    """Assert that experts and the learned gate changed, and that the base model did not."""
    after = trained(model)
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    finite = all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert finite and all(name in moved for name in before if name.endswith(("lora_A", "lora_B"))), "experts stay"
    gates = {name for name in before if "gate." in name}
    assert bool(gates) == (gate != "given") and gates <= moved, f"gates that stay: {sorted(gates - moved)[:3]}"
    now = frozen(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items()), "the base model changed"


def given(model: nn.Module, gate: str) -> Any:
    """Return the context that a caller enters for gate="given"."""
    return slidelora.gates(model, "text") if gate == "given" else contextlib.nullcontext()


def logits(model: nn.Module, gate: str) -> Tensor:
    """Return what a model says to two prompts."""
    model.eval()
    with torch.no_grad(), given(model, gate):
        return model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits.float()


def assert_loads(model: nn.Module, how: str, gate: str, folder: Path) -> None:
    """Assert that what a trainer saved, or slidelora of an injected model, gives the same logits."""
    if how == "peft":
        other = peft.PeftModel.from_pretrained(make_base(), folder)
    else:
        slidelora.save_pretrained(model, folder / "slide")
        other = slidelora.load_pretrained(make_base(), folder / "slide")
    assert torch.equal(logits(other, gate), logits(model, gate)), "what is saved gives other logits"


class Recorder(TrainerCallback):
    """Keep the gradients of each step and the losses."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(gradients(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def samples(count: int = 16) -> list[dict[str, Tensor]]:
    """Make token sequences whose first part is the prompt."""
    ids = torch.randint(3, 64, (count, 12), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(12) < 6, -100, ids)
    return [{"input_ids": i, "labels": one, "attention_mask": torch.ones_like(i)} for i, one in zip(ids, labels)]


COMMON: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


def run(trainer: Any, gate: str, resume: Any = None) -> Recorder:
    """Train, and check that the right parameters changed."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    before, base = trained(trainer.model), frozen(trainer.model)
    with given(trainer.model, gate):
        trainer.train(resume_from_checkpoint=resume)
    assert_trained(trainer.model, before, base, gate)
    return recorder


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "default": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


# transformers' Trainer


def make_trainer(folder: Path, gate: str, how: str, **options: Any) -> Trainer:
    options = {**COMMON, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **options}
    data = samples()
    return Trainer(make_model(gate, how), TrainingArguments(str(folder), **options), train_dataset=data, eval_dataset=data)


@case("transformers Trainer", *[(gate, how) for gate in GATES for how in ("peft", "injected")])
def train_and_resume(folder: Path, gate: str, how: str) -> str:
    trainer = make_trainer(folder, gate, how, save_steps=2, max_steps=16)
    recorder = run(trainer, gate)
    assert recorder.losses[-1] < recorder.losses[0], f"losses {recorder.losses}"
    assert_loads(trainer.model, how, gate, folder / "checkpoint-16")
    whole = trained(trainer.model)
    again = make_trainer(folder, gate, how, save_steps=2, max_steps=16)
    with given(again.model, gate):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in trained(again.model).items()), "resumed otherwise"
    return f"loss {recorder.losses[0]:.2f} to {recorder.losses[-1]:.2f}; resumed exactly"


@case("transformers Trainer checkpointing", *[(g, h, c) for g in GATES for h in ("peft", "injected") for c in CHECKPOINTING])
def train_checkpointed(folder: Path, gate: str, how: str, which: str) -> None:
    plain = run(make_trainer(folder, gate, how), gate)
    recorder = run(make_trainer(folder, gate, how, **CHECKPOINTING[which]), gate)
    assert_equal(recorder.gradients[0], plain.gradients[0])
    assert_equal(recorder.gradients[-1], plain.gradients[-1], 1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "load_best": {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    },
    "neftune": {"neftune_noise_alpha": 5.0},
}  # fmt: skip


@case("transformers Trainer with", *[(option, g, h) for option in OPTIONS for g in GATES for h in ("peft", "injected")])
def train_with(folder: Path, option: str, gate: str, how: str) -> None:
    trainer = make_trainer(folder, gate, how, **OPTIONS[option])
    run(trainer, gate)
    if option == "load_best":
        with given(trainer.model, gate):
            assert abs(trainer.evaluate()["eval_loss"] - trainer.state.best_metric) < 1e-4
    if option == "accumulation":
        whole, parts = make_trainer(folder, gate, how), make_trainer(folder, gate, how, **OPTIONS[option])
        assert_equal(run(parts, gate).gradients[0], run(whole, gate).gradients[0])


# TRL


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    plain = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, "<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


def phrases(count: int, length: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[index] for index in row[: length - number % 3]) for number, row in enumerate(rows)]


def make_data(kind: str, chat: bool = False) -> Any:
    """Make 8 records in the columns of one of TRL's trainers."""
    import datasets

    def turn(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if chat else " " + text

    prompts, good, bad = (phrases(8, length, seed) for seed, length in enumerate((6, 7, 5)))
    columns: dict[str, Any] = {"prompt": [turn("user", one) for one in prompts]}
    if kind == "text":
        columns = {"text": prompts}
    elif kind == "sft":
        columns["completion"] = [turn("assistant", one) for one in good]
    elif kind == "preference":
        columns |= {"chosen": [turn("assistant", one) for one in good], "rejected": [turn("assistant", one) for one in bad]}
    elif kind == "kto":
        columns |= {"completion": [turn("assistant", one) for one in good], "label": [True, False] * 4}
    return datasets.Dataset.from_dict(columns)


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward words of few letters."""
    return [float(sum(map(ord, str(one))) % 7) for one in completions]


# By name: where TRL has it, the kind of its data, and options that make it quick.
TRL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SFT": ("trl", "sft", {}),
    "DPO": ("trl", "preference", {}),
    "KTO": ("trl", "kto", {}),
    "Reward": ("trl", "preference", {}),
    "GRPO": ("trl", "grpo", {"max_completion_length": 6, "num_generations": 4}),
    "RLOO": ("trl", "grpo", {"max_completion_length": 6, "num_generations": 4}),
    "ORPO": ("trl.experimental.orpo", "preference", {}),
    "CPO": ("trl.experimental.cpo", "preference", {}),
}


def make_trl(folder: Path, name: str, gate: str, how: str, chat: bool = False, kind: str = "", **options: Any) -> Any:
    """Make one of TRL's trainers, with its defaults except for the options."""
    import importlib

    where, data, quick = TRL[name]
    module = importlib.import_module(where)
    fixed = {**COMMON, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    arguments = getattr(module, f"{name}Config")(str(folder), **{**fixed, **quick, **options})
    fields: dict[str, Any] = {"processing_class": make_tokenizer(), "train_dataset": make_data(kind or data, chat)}
    if data == "grpo":
        fields["reward_funcs"] = length_reward
    fields["model"], task = make_base(), "CAUSAL_LM"
    if name == "Reward":
        fields["model"], task = make_classifier(), "SEQ_CLS"
    if how == "peft":
        fields["peft_config"] = make_config(gate, task_type=task)
    else:
        slidelora.inject(fields["model"], experts=EXPERTS, r=4, gate=gate)
        if name in ("DPO", "KTO"):
            fields["ref_model"] = make_base()
    trainer = getattr(module, f"{name}Trainer")(args=arguments, **fields)
    wake(trainer.model)
    return trainer


def make_classifier() -> transformers.LlamaForSequenceClassification:
    """Make a Llama that gives one score."""
    config = make_base().config
    config.num_labels = 1
    torch.manual_seed(1)
    return transformers.LlamaForSequenceClassification(config)


@case("TRL", *[(name, gate, how) for name in TRL for gate in GATES for how in ("peft", "injected")])
def train_trl(folder: Path, name: str, gate: str, how: str) -> None:
    trainer = make_trl(folder, name, gate, how)
    run(trainer, gate)


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="run only the cases whose name has all these words")
    parser.add_argument("-v", action="store_true", help="print tracebacks and warnings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    counts = dict.fromkeys(("ok", "refused", "FAILED"), 0)
    for name, function in CASES.items():
        if not all(word in name.split() for word in arguments.k.split()):
            continue
        start, found, note = time.perf_counter(), "ok", ""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("default" if arguments.v else "ignore")
            transformers.set_seed(0)
            try:
                with contextlib.nullcontext() if arguments.v else contextlib.redirect_stdout(None):
                    note = function(Path(folder)) or ""
            except Exception as error:
                found, note = "FAILED", f"{type(error).__name__}: {error}"
                if arguments.v:
                    traceback.print_exc()
            if note.startswith("refused: "):
                found, note = "refused", note.removeprefix("refused: ")
        counts[found] += 1
        note = re.sub(r"\s+", " ", note)[:300]
        print(f"{found:7} {name} ({time.perf_counter() - start:.1f} s)" + (f": {note}" if note else ""), flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.items()))
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
