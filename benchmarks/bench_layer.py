"""Time Llama blocks with a mixture on q, k, v and o against PEFT LoRA and PEFT X-LoRA: training and decoding.

    python benchmarks/bench_layer.py

First the mixture is compared with a PEFT LoRA of the summed rank that has the same weights. Then pairs run in turn,
timed by the thread's clock on the CPU (one thread) or by CUDA events on a GPU; the results are medians of times and of
paired ratios, with the 20th and 80th percentiles. A training step is a forward and a backward. Saved activations are
what autograd keeps for backward in addition to what it keeps for the base model. CSV and JSON go to
benchmarks/results/.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_gated_lora import DEVICE, percentiles, timed, write
from torch import Tensor, nn

import slidelora

HIDDEN, LAYERS, RANK, BATCH, LENGTH, NEW_TOKENS = 512, 2, 16, 2, 256, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PAIRS, WARM_UP = 20, 3


def llama() -> nn.Module:
    """Make the blocks, with the same weights at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(DEVICE)


def with_lora(rank: int) -> nn.Module:
    """Add a PEFT LoRA with a random B."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def with_mixture(experts: int, gate: str) -> nn.Module:
    """Inject experts with a random B; the last one is shared."""
    names = [f"e{i}" for i in range(experts - 1)] + ["shared"]
    model = slidelora.inject(llama(), experts=names, r=RANK, lora_alpha=RANK, target_modules=TARGETS, gate=gate)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def with_xlora(experts: int, folder: Path) -> nn.Module:
    """Add a PEFT X-LoRA with trainable adapters."""
    paths = {}
    for i in range(experts):
        with_lora(RANK).save_pretrained(folder / str(i))
        paths[str(i)] = str(folder / str(i))
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=HIDDEN, adapters=paths, use_trainable_adapters=True, xlora_depth=2
    )
    base = llama()
    base.config.use_cache = False
    return peft.get_peft_model(base, config)


def check() -> float:
    """Compare a mixture's logits with those of a PEFT LoRA of the summed rank; return the relative error."""
    mixture, plain = with_mixture(3, "given"), with_lora(3 * RANK)
    gates = {"e0": 0.5, "e1": -0.25, "shared": 1.5}
    with torch.no_grad():
        for name, layer in mixture.named_modules():
            if hasattr(layer, "routing"):
                twin = plain.get_submodule(f"base_model.model.{name}")
                weights = torch.tensor(list(gates.values()), device=DEVICE).repeat_interleave(RANK)
                twin.lora_A["default"].weight.copy_(layer.lora_A)
                twin.lora_B["default"].weight.copy_((layer.lora_B * weights[:, None]).T)
        ids = torch.randint(1, 512, (BATCH, LENGTH), device=DEVICE)
        with slidelora.gates(mixture, gates):
            found = mixture(input_ids=ids).logits
        expected = plain(input_ids=ids).logits
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-4:
        raise AssertionError(f"relative error is {error:.1e}, expected below 1e-4")
    return error


def training_step(model: nn.Module, gates: Any = None) -> Callable[[], object]:
    """Return a function that runs forward and backward of one batch."""
    ids = torch.randint(1, 512, (BATCH, LENGTH), device=DEVICE)
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        if gates is None:
            loss = model(input_ids=ids, labels=labels).loss
        else:
            with slidelora.gates(model, gates):
                loss = model(input_ids=ids, labels=labels).loss
        torch.autograd.grad(loss, trained, allow_unused=True)

    return step


def decoding(model: nn.Module, gates: Any = None) -> Callable[[], object]:
    """Return a function that generates greedily with a KV cache."""
    ids = torch.randint(1, 512, (BATCH, 32), device=DEVICE)
    kwargs = {"input_ids": ids, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    kwargs["attention_mask"] = torch.ones_like(ids)
    model.eval()

    def step() -> None:
        with torch.no_grad():
            if gates is None:
                model.generate(**kwargs)
            else:
                with slidelora.gates(model, gates):
                    model.generate(**kwargs)

    return step


def compare(what: str, bar: float, ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, object]:
    """Time a pair in turn."""
    times: list[tuple[float, float]] = []
    for repeat in range(WARM_UP + PAIRS):
        pair = timed(ours), timed(theirs)
        if repeat >= WARM_UP:
            times.append(pair)
    row: dict[str, object] = {"what": what, "unit": "ms", "bar": bar}
    columns = {"slidelora": [a for a, _ in times], "peer": [b for _, b in times], "ratio": [a / b for a, b in times]}
    for name, values in columns.items():
        for suffix, value in zip(("", "_p20", "_p80"), percentiles(values)):
            row[f"{name}{suffix}"] = value
    return row


def saved_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """Return the bytes of all storages that autograd saves in a step, except parameters and given gates."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    given = getattr(slidelora.routing(model), "weights", None) if hasattr(model, "slidelora_state") else None
    if given is not None and not given.requires_grad:
        known.add(given.untyped_storage().data_ptr())
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def compare_memory(mixture: nn.Module, plain: nn.Module) -> list[dict[str, object]]:
    """Compare the saved activations without those of the base model, whose embeddings train so that it has a graph."""
    base = llama().requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_(True)
    of_base = saved_bytes(base, training_step(base))
    theirs = saved_bytes(plain, training_step(plain)) - of_base
    constant = torch.rand(BATCH, 3, device=DEVICE)
    with slidelora.gates(mixture, constant):
        layers = saved_bytes(mixture, training_step(mixture)) - of_base
    learned = saved_bytes(mixture, training_step(mixture)) - of_base
    rows = []
    for what, ours, bar in (
        ("adapter activations saved, E=3, against PEFT LoRA of rank E*r", layers, 1.0),
        ("the same, with the learned gate's own", learned, float("nan")),
    ):
        row: dict[str, object] = {"what": what, "unit": "MiB", "bar": bar}
        rows.append(row | {"slidelora": ours / 2**20, "peer": theirs / 2**20, "ratio": ours / theirs})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"relative error against a PEFT LoRA of the summed rank: {check():.1e}\n")
    three, lora3 = with_mixture(3, "sequence"), with_lora(3 * RANK)
    eight, lora2 = with_mixture(8, "given"), with_lora(2 * RANK)
    two_of_eight = {"e0": 0.5, "shared": 0.5}
    rows = [
        compare(
            "training step, E=3, learned gate, against PEFT LoRA of rank E*r",
            1.0,
            training_step(three),
            training_step(lora3),
        ),
        compare(
            "training step, E=8 with 2 active, against PEFT LoRA of rank 2r",
            1.05,
            training_step(eight, two_of_eight),
            training_step(lora2),
        ),
        *compare_memory(three, lora3),
        compare("generate with KV cache, E=3, against PEFT LoRA of rank E*r", 1.02, decoding(three), decoding(lora3)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        xlora = with_xlora(3, Path(folder))
        three.train()
        rows.append(compare("training step, E=3, against PEFT X-LoRA", 0.6, training_step(three), training_step(xlora)))
    print(f"Llama blocks x {LAYERS}, hidden {HIDDEN}, r={RANK}, {BATCH} x {LENGTH} tokens, {DEVICE.type}, fp32\n")
    print("| what | slidelora | peer | ratio (20th-80th percentile) | bar | met |")
    print("|---" * 6 + "|")
    for row in rows:
        spread = f" ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})" if "ratio_p20" in row else ""
        bar = float(str(row["bar"]))
        verdict = f"{bar} | {'yes' if float(str(row['ratio'])) <= bar else 'no'}" if bar == bar else "|"
        print(
            f"| {row['what']} | {row['slidelora']:.2f} {row['unit']} | {row['peer']:.2f} {row['unit']} "
            f"| {row['ratio']:.3f}{spread} | {verdict} |"
        )
    write("layer", rows)


if __name__ == "__main__":
    main()
