"""slidelora.peft with the Trainer of transformers and the compute_loss of docs/peft.md."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, default_data_collator

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def documented_trainer() -> Any:
    (block,) = [block for block in BLOCKS if "class SlideLoRATrainer" in block]
    namespace: dict[str, Any] = {"slidelora": slidelora}
    exec(block, namespace)
    return namespace["SlideLoRATrainer"]


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))


def samples(count: int) -> list[dict[str, Tensor]]:
    input_ids = torch.randint(1, 64, (count, 10), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(10) < 4, -100, input_ids)
    return [{"input_ids": input_ids[i], "labels": labels[i], "modality": torch.tensor(i % 2)} for i in range(count)]


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    model.train()
    return found


class Recorder(TrainerCallback):
    """Save the logits with each checkpoint, and kill the process after a given step."""

    def __init__(self, directory: Path, kill_after: int | None) -> None:
        self.directory, self.kill_after = directory, kill_after

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.save(logits(model), self.directory / f"logits-{state.global_step}.pt")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def train(directory: Path, kill_after: int | None = None, resume: bool = False) -> PeftModel:
    torch.set_num_threads(1)
    config = SlideLoRAPeftConfig(r=4, lora_dropout=0.2, balance_coef=0.1, supervised_coef=0.5, frozen=["image"])
    model = get_peft_model(make_base(), config)
    arguments = TrainingArguments(
        str(directory / "checkpoints"),
        max_steps=5,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    recorder = Recorder(directory, kill_after)
    trainer = documented_trainer()(model, arguments, train_dataset=samples(16), callbacks=[recorder])
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # as the process that is killed does
    code = (
        f"import pathlib, runpy; runpy.run_path({__file__!r})['train'](pathlib.Path({str(tmp_path)!r}), kill_after=3)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not list(checkpoint.glob("*model*.bin")) and len(list(checkpoint.glob("*.safetensors"))) == 1
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert all("lora_" in name or "frozen_" in name or "_gate." in name for name in stored)
    restored = PeftModel.from_pretrained(make_base(), checkpoint)
    assert torch.equal(logits(restored), torch.load(tmp_path / "logits-2.pt"))

    resumed = train(tmp_path, resume=True)
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.state_dict().items())
    assert not torch.equal(logits(resumed), logits(restored))


def test_the_documented_loss_equals_that_of_the_accumulated_batch(tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def make() -> PeftModel:
        model = get_peft_model(make_base(), SlideLoRAPeftConfig(r=4, balance_coef=0.3, supervised_coef=0.7))
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    batches: list[dict[str, Tensor]] = []

    def collate(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batches.append(default_data_collator(features))
        return dict(batches[-1])

    model = make()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = documented_trainer()(
        model,
        arguments,
        collate,
        samples(6),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.train()

    other = make()
    names = ["text", "image"]
    loss = torch.zeros(())
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert len(batches) == 3
    for batch in batches:
        found = other(input_ids=batch["input_ids"], labels=batch["labels"]).logits[:, :-1]
        total = cross_entropy(found.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        auxiliary = slidelora.aux_loss(other, [names[index] for index in batch["modality"].tolist()])
        assert auxiliary > 0
        loss = loss + total / items + auxiliary / 3
    loss.backward()
    trained = {name: parameter for name, parameter in other.named_parameters() if parameter.requires_grad}
    expected = {name: parameter.detach() - parameter.grad for name, parameter in trained.items()}
    assert_close({name: model.get_parameter(name) for name in trained}, expected)
    assert not any(torch.equal(expected[name], trained[name]) for name in trained)


@pytest.mark.usefixtures("transformers_adapters")
def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in BLOCKS:
        exec(compile(block, str(DOCS), "exec"), namespace)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert torch.equal(logits(namespace["restored"]), logits(namespace["trainer"].model))
