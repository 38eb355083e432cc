"""Train tiny models that carry Slide-LoRA with other people's trainers, at their default settings.

    python tests/peers/trainers.py [-k WORDS] [-v]

It needs transformers, peft, diffusers and accelerate, and runs the cases of trl (with datasets) and of lightning if
these are installed. Nothing is downloaded. Each case prints one line: ok, or refused with the message, or FAILED. The
exit code is 1 if a case failed. docs/trainers.md has the results.
"""

import argparse
import contextlib
import copy
import importlib
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}

import peft
import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

GATES = ("given", "sequence", "token")
EXPERTS = ["text", "image", "shared"]
WORDS = "the a red green blue cat dog bird sees likes draws reads on under big small house tree sun moon".split()
HOW = [(gate, how) for gate in GATES for how in ("peft", "injected")]
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


def make_base() -> LlamaForCausalLM:
    """Make a Llama of two blocks."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


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


class Watch:
    """Keep the gates of each row of tokens that a model with a sequence gate is called with."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[tuple[tuple[int, ...], Tensor]] = []
        host = next(module for module in model.modules() if "slidelora_state" in vars(module))
        host.register_forward_hook(self.see, with_kwargs=True)

    def see(self, host: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state = slidelora.routing(host)
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is not None and not state.scope.disabled and not state.base_only:
            for ids, weights in zip(tokens.tolist(), state.weights):
                self.rows.append((tuple(one for one in ids if one > 2), weights.detach()))

    def by_prompt(self, prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]:
        """Return the rows that begin with each prompt, without the one-token steps of generation."""
        found = {prompt: [row for row in self.rows if row[0][: len(prompt)] == prompt] for prompt in prompts}
        return {prompt: rows for prompt, rows in found.items() if rows}


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
    return Trainer(
        make_model(gate, how), TrainingArguments(str(folder), **options), train_dataset=data, eval_dataset=data
    )


@case("transformers Trainer", *HOW)
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


@case(
    "transformers Trainer checkpointing",
    *[(*one, c) for one in HOW for c in CHECKPOINTING],
)
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


@case("transformers Trainer with", *[(option, *one) for option in OPTIONS for one in HOW])
def train_with(folder: Path, option: str, gate: str, how: str) -> None:
    trainer = make_trainer(folder, gate, how, **OPTIONS[option])
    run(trainer, gate)
    if option == "load_best":
        with given(trainer.model, gate):
            assert abs(trainer.evaluate()["eval_loss"] - trainer.state.best_metric) < 1e-4
    if option == "accumulation":
        whole, parts = make_trainer(folder, gate, how), make_trainer(folder, gate, how, **OPTIONS[option])
        assert_equal(run(parts, gate).gradients[0], run(whole, gate).gradients[0])


@case("transformers Trainer with label_smoothing", *HOW)
def train_smoothed(folder: Path, gate: str, how: str) -> str | None:
    if gate == "sequence":  # the same gate as with labels in the call
        trainers = [make_trainer(folder, gate, how, max_steps=1, label_smoothing_factor=one) for one in (0.0, 0.1)]
        trainers[1].data_collator = slidelora.PromptCollator(trainers[1].data_collator)
        seen = []
        for trainer in trainers:
            seen.append(Watch(trainer.model))
            trainer.train()
            trainer.evaluate()
        assert len(seen[0].rows) == len(seen[1].rows) == 20
        first = [torch.stack([weights for _, weights in one.rows[:4]]) for one in seen]
        assert_equal({"gates": first[1]}, {"gates": first[0]})
    try:
        run(make_trainer(folder, gate, how, label_smoothing_factor=0.1), gate)
    except ValueError as error:
        return f"refused: {error}"
    return None


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
        columns |= {
            "chosen": [turn("assistant", one) for one in good],
            "rejected": [turn("assistant", one) for one in bad],
        }
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


@case("TRL", *[(name, *one) for name in TRL for one in HOW])
def train_trl(folder: Path, name: str, gate: str, how: str) -> None:
    options = {"beta": 0.0} if (name, how) == ("RLOO", "injected") else {}  # else it asks the hub for a reference
    trainer = make_trl(folder, name, gate, how, **options)
    run(trainer, gate)
    if name == "Reward":
        return
    if how == "peft":
        trainer.save_model(str(folder))
    with torch.autocast("cpu", torch.bfloat16):  # as the trainer wrapped the model's forward: bf16 is TRL's default
        assert_loads(trainer.model, how, gate, folder)


@case("TRL checkpointing", *[(n, *one, c) for n in ("SFT", "DPO", "GRPO") for one in HOW for c in CHECKPOINTING])
def train_trl_checkpointed(folder: Path, name: str, gate: str, how: str, which: str) -> None:
    found = []
    for options in ({"gradient_checkpointing": False}, {} if which == "default" else CHECKPOINTING[which]):
        transformers.set_seed(0)
        found.append(run(make_trl(folder, name, gate, how, max_steps=1, bf16=False, **options), gate).gradients[0])
    assert_equal(found[1], found[0])


@case("TRL gate sees the prompt", *[(n, h) for n in TRL if n not in ("SFT", "Reward") for h in ("peft", "injected")])
def score_as_sampled(folder: Path, name: str, how: str) -> str:
    options = {"beta": 0.0} if name in ("RLOO", "GRPO") else {}
    trainer = make_trl(folder, name, "sequence", how, max_steps=1, bf16=False, **options)
    watch = Watch(trainer.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(one.message) for one in caught if "slidelora.prompt" in str(one.message)]
    tokenizer = make_tokenizer()
    prompts = [tuple(tokenizer(one["prompt"])["input_ids"]) for one in make_data(TRL[name][1])]
    groups = watch.by_prompt(prompts)
    assert groups and max(len({row for row, _ in rows}) for rows in groups.values()) > 1, "no prompt has two answers"
    worst = max(float((weights - rows[0][1]).norm()) for rows in groups.values() for _, weights in rows)
    if told:
        return f"warns: {told[0][:90]}..."
    assert worst < 1e-5, f"two rows with the same prompt have gates that differ by {worst:.1e}"
    return f"{sum(map(len, groups.values()))} rows of {len(groups)} prompts"


@case("TRL DPO of a trained PeftModel", *GATES)
def dpo_of_adapter(folder: Path, gate: str) -> str | None:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(str(folder), **{**COMMON, "max_steps": 1, "bf16": False})
    fields = {"processing_class": make_tokenizer(), "train_dataset": make_data("preference")}
    try:
        trainer = DPOTrainer(make_model(gate, "peft"), args=arguments, **fields)
        first = run(trainer, gate).losses[0]
    except RuntimeError as error:  # the gates that are given are those of the adapter that trains
        assert gate == "given", error
        return f"refused: {error}"
    assert abs(first - math.log(2)) < 1e-4, f"the first loss is {first:.4f}, expected log 2: the reference is another"
    return None


TRL_OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": ("SFT", "text", {}),
    "packing": ("SFT", "sft", {"packing": True, "max_length": 32}),
    "precompute": ("DPO", "", {"precompute_ref_log_probs": True}),
    "label_smoothing": ("SFT", "sft", {"label_smoothing_factor": 0.1}),
    "beta": ("GRPO", "", {"beta": 0.1}),
    "iterations": ("GRPO", "", {"num_iterations": 2}),
    "accumulation": ("GRPO", "", {"gradient_accumulation_steps": 2}),
    "chat": ("GRPO", "", {}),
}


@case("TRL with", *[(o, *one) for o in TRL_OPTIONS for one in HOW if (o, one[1]) != ("beta", "injected")])
def train_trl_with(folder: Path, option: str, gate: str, how: str) -> str | None:
    name, kind, options = TRL_OPTIONS[option]
    trainer = make_trl(folder, name, gate, how, option == "chat", kind, **options)
    if option == "label_smoothing":
        trainer.data_collator = slidelora.PromptCollator(trainer.data_collator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if (option, gate) == ("text", "sequence"):  # each token has a label, so that the gate sees no prompt
            trainer.train()
        else:
            run(trainer, gate)
    told = [str(one.message) for one in caught if "gate" in str(one.message)]
    assert bool(told) == (option == "text" and gate == "sequence"), told
    return f"warns: {told[0][:90]}..." if told else None


# By hand: a quantised model, the loops of diffusers' examples, accelerate, Lightning


def step(model: nn.Module, gate: str) -> dict[str, Tensor]:
    """Return the gradients of two forwards under different gates before one backward."""
    model.train()
    batch = {name: torch.stack([one[name] for one in samples(4)]) for name in samples(1)[0]}
    losses = []
    for name in ("text", "image"):
        with slidelora.gates(model, name) if gate == "given" or name == "image" else contextlib.nullcontext():
            losses.append(model(**batch).loss)
    sum(losses).backward()
    return gradients(model)


@case("prepare_model_for_kbit_training", *[(gate, reentrant) for gate in GATES for reentrant in (True, False)])
def train_quantised(folder: Path, gate: str, reentrant: bool) -> None:
    plain = step(make_model(gate, "peft"), gate)
    base = make_base()
    base.is_loaded_in_4bit = True
    kwargs = {"use_reentrant": reentrant}
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
    assert base.is_gradient_checkpointing
    del base.is_loaded_in_4bit
    assert_equal(step(wake(peft.get_peft_model(base, make_config(gate))), gate), plain)


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DConditionModel(**blocks, **sizes, cross_attention_dim=12, attention_head_dim=4)


def make_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    sizes = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
    }
    return FluxTransformer2DModel(**sizes, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))


def make_sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(1)
    sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    return SD3Transformer2DModel(
        **sizes, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4
    )


def make_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10)


def noise_inputs(name: str, count: int = 4) -> dict[str, Tensor]:
    """Make the inputs of a diffusion model."""
    torch.manual_seed(4)
    times, text = torch.randint(0, 10, (count,)), torch.randn(count, 5, 12)
    if name == "Flux":
        return {
            "hidden_states": torch.randn(count, 16, 4), "encoder_hidden_states": text, "timestep": times / 10,
            "pooled_projections": torch.randn(count, 8), "txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3),
        }  # fmt: skip
    noisy = torch.randn(count, 4, 8, 8)
    if name == "DiT":
        return {"hidden_states": noisy, "timestep": times, "class_labels": times}
    if name == "SD3":
        pooled = torch.randn(count, 8)
        return {"hidden_states": noisy, "encoder_hidden_states": text, "timestep": times, "pooled_projections": pooled}
    return {"sample": noisy, "timestep": times, "encoder_hidden_states": text}


DIFFUSERS = {"UNet": make_unet, "Flux": make_flux, "SD3": make_sd3, "DiT": make_dit}
COMBINATIONS = [(name, *one) for name in DIFFUSERS for one in HOW if "sequence" not in one]
COMBINATIONS = [one for one in COMBINATIONS if one[::2] != ("DiT", "peft")]  # diffusers has no add_adapter for it


@case("diffusers", *COMBINATIONS)
def train_diffusers(folder: Path, name: str, gate: str, how: str) -> str:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    fields: dict[str, Any] = {"experts": EXPERTS, "r": 4, "gate": gate, "target_modules": targets}
    inputs, names = noise_inputs(name), ["text", "image", "text", "image"]

    def make(checkpointing: bool) -> Any:
        model = DIFFUSERS[name]()
        if how == "peft":
            model.add_adapter(SlideLoRAPeftConfig(**fields))
        else:
            slidelora.inject(model, **fields)
        if checkpointing:
            model.enable_gradient_checkpointing()
        return wake(model).train()

    def loss_of(model: Any, names: Any = names) -> Tensor:
        with slidelora.gates(model, names) if gate == "given" else contextlib.nullcontext():
            return model(**inputs).sample.square().mean()

    both = []
    for checkpointing in (False, True):
        model = make(checkpointing)
        (loss_of(model) + loss_of(model, "shared")).backward()
        both.append(gradients(model))
    assert_equal(both[1], both[0])

    model = make(True)
    before, base = trained(model), frozen(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = EMAModel(parameters, decay=0.5)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameters, lr=1e-2))
    losses = []
    for _ in range(6):
        loss = loss_of(wrapped)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert_trained(model, before, base, gate)
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    with torch.no_grad():
        averaged = loss_of(model)
        slidelora.save_pretrained(model, folder)
        assert torch.equal(loss_of(slidelora.load_pretrained(DIFFUSERS[name](), folder).eval()), averaged)
        if how == "peft":
            model.save_lora_adapter(folder / "diffusers")
            other = make(False).eval()
            peft.set_peft_model_state_dict(
                other, safetensors.torch.load_file(folder / "diffusers" / "pytorch_lora_weights.safetensors")
            )
            assert torch.equal(loss_of(other), averaged)
    ema.restore(parameters)
    with torch.no_grad():
        assert not torch.equal(loss_of(model), averaged)
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


@case("accelerate", *HOW)
def train_accelerate(folder: Path, gate: str, how: str) -> str:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    def train(steps: int, resume: Path | None = None) -> tuple[nn.Module, list[float]]:
        transformers.set_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model(gate, how)
        before, base = trained(model), frozen(model)
        optimizer = torch.optim.AdamW(slidelora.param_groups(model, lr=1e-2))
        data = DataLoader(samples(), batch_size=4)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        if resume is not None:
            accelerator.load_state(resume)
        losses = []
        for _ in range(steps):
            for batch in data:
                with accelerator.accumulate(model):
                    with given(model, gate):
                        loss = model(**batch).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        if steps == 2 and resume is None:
            accelerator.save_state(folder / "state")
        assert_trained(accelerator.unwrap_model(model), before, base, gate)
        return model, losses

    train(2)
    whole, losses = train(4)
    resumed, _ = train(2, folder / "state")
    assert_equal(trained(resumed), trained(whole), 1e-6)
    assert sum(losses[-4:]) < sum(losses[:4])
    return f"loss {sum(losses[:4]) / 4:.2f} to {sum(losses[-4:]) / 4:.2f}; resumed"


@case("Lightning", *[(package, *one) for package in ("lightning", "pytorch_lightning") for one in HOW])
def train_lightning(folder: Path, package: str, gate: str, how: str) -> str:
    from torch.utils.data import DataLoader

    lightning: Any = importlib.import_module("lightning.pytorch" if package == "lightning" else package)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = make_model(gate, how), []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            with given(self.model, gate):
                loss = self.model(**batch).loss
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)

    def train(epochs: int, resume: str | None = None) -> Any:
        module, start = Module(), copy.deepcopy(trained)
        before, base = start(module.model), frozen(module.model)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=str(folder), **quiet)
        trainer.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=resume)
        assert_trained(module.model, before, base, gate)
        return module, trainer

    _, half = train(2)
    path = half.checkpoint_callback.best_model_path
    whole, _ = train(4)
    resumed, _ = train(4, path)
    assert_equal(trained(resumed), trained(whole), 1e-6)
    loaded = Module.load_from_checkpoint(path)
    assert_loads(loaded.model, "injected", gate, folder)
    assert whole.losses[-1] < whole.losses[0]
    return f"loss {whole.losses[0]:.2f} to {whole.losses[-1]:.2f}; resumed"


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="run only the cases whose name has all these words")
    parser.add_argument("-v", action="store_true", help="print tracebacks and warnings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.NOTSET if arguments.v else logging.WARNING)
    counts = dict.fromkeys(("ok", "refused", "FAILED"), 0)
    for name, function in CASES.items():
        if not all(word in name.split() for word in arguments.k.split()):
            continue
        start, found, note = time.perf_counter(), "ok", ""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("default" if arguments.v else "ignore")
            transformers.set_seed(0)
            # Trainers leave their precision to what comes after them; accelerate has no public way to forget it.
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
            AcceleratorState._reset_state(True)  # noqa: SLF001
            try:
                with contextlib.ExitStack() as quiet:
                    if not arguments.v:
                        nowhere = quiet.enter_context(open(os.devnull, "w"))
                        quiet.enter_context(contextlib.redirect_stdout(nowhere))
                        quiet.enter_context(contextlib.redirect_stderr(nowhere))
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
