"""Loops that others wrote: the Trainer of transformers, training scripts of diffusers, accelerate.

tests/peers/trainers.py runs more of them, also those of TRL and Lightning.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from closeness import assert_close
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from injected_models import gradients, randomise
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

EXPERTS = ["text", "image", "shared"]
Maker = Callable[..., LlamaForCausalLM]


def samples(count: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 64, (count, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": one, "labels": torch.where(torch.arange(10) < 4, -100, one)} for one in ids]


class Recorder(TrainerCallback):
    """Keep the gradients of each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(gradients(model))


def make_trainer(model: nn.Module, directory: Path, **options: Any) -> Trainer:
    collate = options.pop("data_collator", None)
    loss = options.pop("compute_loss_func", None)
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(str(directory), max_steps=1, per_device_train_batch_size=4, **fixed, **options)
    data = {"train_dataset": samples(), "eval_dataset": samples()}
    return Trainer(model, arguments, collate, **data, compute_loss_func=loss)


@pytest.mark.parametrize(
    ("gate", "how"), [("given", "peft"), ("sequence", "peft"), ("sequence", "injected"), ("token", "peft")]
)
def test_gradients_of_the_trainer_with_its_checkpointing(
    make_base: Maker, make_model: Maker, tmp_path: Path, gate: str, how: str
) -> None:
    found = []
    for options in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        if how == "peft":
            config = SlideLoRAPeftConfig(experts=EXPERTS, r=4, gate=gate, task_type="CAUSAL_LM")
            model: Any = randomise(get_peft_model(make_base(), config), std=0.2)
        else:
            model = make_model(gate=gate)
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options} if found else {}
        trainer, recorder = make_trainer(model, tmp_path, **checkpointing), Recorder()
        trainer.add_callback(recorder)
        with slidelora.gates(model, "text") if gate == "given" else nullcontext():
            trainer.train()
        found.append(recorder.gradients[0])
    assert any("gate." in name for name in found[0]) == (gate != "given")
    for other in found[1:]:
        assert_close(other, found[0])


def seen_gates(trainer: Trainer) -> Tensor:
    """Return the gates of all calls that training and evaluation make."""
    seen: list[Tensor] = []
    state = slidelora.routing(trainer.model)
    trainer.model.register_forward_hook(lambda *_: seen.append(state.weights.detach()))
    trainer.train()
    trainer.evaluate()
    return torch.cat(seen)


KEEPS_LABELS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a loss of one's own": {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.mean()},
}


@pytest.mark.parametrize("which", KEEPS_LABELS)
def test_an_answer_whose_labels_the_trainer_keeps_is_refused_or_told(
    make_model: Maker, tmp_path: Path, which: str
) -> None:
    expected = seen_gates(make_trainer(make_model(), tmp_path, learning_rate=0.0))
    assert len(expected) == 12 and (expected[4:] - expected[4]).norm() > 0.1
    options = KEEPS_LABELS[which]
    with pytest.raises(ValueError, match=r"num_items_in_batch but no labels.*data_collator=slidelora.PromptCollator"):
        make_trainer(make_model(), tmp_path, **options).train()
    collate = slidelora.PromptCollator(default_data_collator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = seen_gates(make_trainer(make_model(), tmp_path, learning_rate=0.0, data_collator=collate, **options))
    assert_close(told, expected)
    make_trainer(make_model(gate="token"), tmp_path, data_collator=collate, **options).train()
    make_trainer(make_model(gate="token"), tmp_path, **options).train()
    with pytest.warns(UserWarning, match=r"no labels, so the gate reads every token.*slidelora.prompt"):
        make_trainer(make_model(), tmp_path, **options).evaluate()


def test_what_a_prompt_collator_and_slidelora_prompt_refuse(make_model: Maker, input_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels are None, expected \(3, 9\)"):
        slidelora.PromptCollator(lambda batch: batch)({"input_ids": input_ids})
    with pytest.raises(ValueError, match=r"labels are \(3, 8\), expected \(3, 9\) as the input_ids of a causal"):
        slidelora.PromptCollator(lambda batch: batch)({"input_ids": input_ids, "labels": input_ids[:, :8]})
    for mask, message in (([True], "slidelora_prompt is list"), (torch.ones(9), r"slidelora_prompt is \(9,\)")):
        with pytest.raises(ValueError, match=rf"{message}, expected a tensor \(batch, time\)"):
            make_model()(input_ids, slidelora_prompt=mask)
    with pytest.raises(ValueError, match=r"the prompt's mask is \(3, 8\), expected \(3, 9\)"):
        make_model()(input_ids, slidelora_prompt=torch.ones(3, 8))


def test_a_prompt_that_one_call_is_told(make_model: Maker, input_ids: Tensor) -> None:
    model, mask = make_model(), torch.arange(9).expand(3, 9) < 5
    with torch.no_grad(), slidelora.prompt(model, mask):
        expected = model(input_ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids, slidelora_prompt=mask).logits, expected)
        assert torch.equal(model(input_ids=input_ids, slidelora_prompt=mask.long()).logits, expected)
        labels = torch.where(mask, -100, input_ids)
        shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
        assert_close(model(input_ids, shift_labels=shifted).logits, expected)
        assert not torch.equal(model(input_ids).logits, expected)


def test_generate_is_called_with_prompts_in_training_too(make_model: Maker, input_ids: Tensor) -> None:
    model = make_model().train()
    with torch.no_grad():
        model(input_ids, labels=torch.full_like(input_ids, -100))
        expected = slidelora.routing(model).weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert_close(slidelora.routing(model).weights, expected)


def make_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(1)
    sizes = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    context = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    return SD3Transformer2DModel(**sizes, **context, out_channels=4)


@pytest.mark.parametrize("how", ["peft", "injected"])
def test_a_diffusers_loop_with_checkpointing_and_averaged_weights(tmp_path: Path, how: str) -> None:
    names = ["text", "image", "text", "image"]
    inputs = {"hidden_states": torch.randn(4, 4, 4, 4), "encoder_hidden_states": torch.randn(4, 5, 12)}
    inputs |= {"pooled_projections": torch.randn(4, 8), "timestep": torch.arange(4)}
    fields = {"experts": EXPERTS, "r": 4, "gate": "given", "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}

    def make() -> SD3Transformer2DModel:
        model = make_transformer()
        if how == "peft":
            model.add_adapter(SlideLoRAPeftConfig(**fields))
        else:
            slidelora.inject(model, **fields)
        torch.manual_seed(2)
        return randomise(model, std=0.2).train()

    def loss_of(model: nn.Module, value: Any = names) -> Tensor:
        with slidelora.gates(model, value):
            return model(**inputs).sample.square().mean()

    plain, model = make(), make()
    model.enable_gradient_checkpointing()
    for one in (plain, model):
        (loss_of(one) + loss_of(one, "shared")).backward()
    assert_close(gradients(model), gradients(plain))
    model.zero_grad()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = EMAModel(parameters, decay=0.5)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameters, lr=1e-2))
    losses = []
    for _ in range(3):
        loss = loss_of(wrapped)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    average.store(parameters)
    average.copy_to(parameters)
    slidelora.save_pretrained(model, tmp_path)
    with torch.no_grad():
        averaged = loss_of(model)
        assert torch.equal(loss_of(slidelora.load_pretrained(make_transformer(), tmp_path).train()), averaged)
        average.restore(parameters)
        assert not torch.equal(loss_of(model), averaged)


@pytest.mark.parametrize("gate", ["sequence", "token"])
def test_an_accelerate_loop_resumes(make_model: Maker, tmp_path: Path, gate: str) -> None:
    def train(epochs: int, save: bool = False, resume: bool = False) -> dict[str, Tensor]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model: Any = make_model(gate=gate).train()
        optimizer: Any = torch.optim.AdamW(slidelora.param_groups(model, lr=1e-2))
        model, optimizer, data = accelerator.prepare(model, optimizer, DataLoader(samples(), batch_size=2))
        targets = ["text", "image"] if gate == "sequence" else None
        if resume:
            accelerator.load_state(tmp_path)
        for _ in range(epochs):
            for batch in data:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss + slidelora.aux_loss(model, targets)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        if save:
            accelerator.save_state(tmp_path)
        return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}

    start, half, whole = train(0), train(1, save=True), train(2)
    assert all((half[name] - start[name]).norm() > 0 for name in start)
    resumed = train(1, resume=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
