"""Every family of hosts: injected, trained, saved, loaded, merged, exported, imported and made plain again."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts as hosts
import torch
from accelerate import cpu_offload, dispatch_model
from closeness import assert_close, relative_error
from injected_models import count_hooks, is_unchanged, randomise, snapshot
from peft import PeftModel
from tiny_hosts import IDS, Host
from torch import Tensor, nn

import slidelora
from slidelora.injection import slide_layers

MOE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HOSTS: dict[str, Callable[[], Host]] = {
    "llama": hosts.causal("Llama"),
    "qwen2": hosts.causal("Qwen2"),
    "mistral": hosts.causal("Mistral"),
    "gemma": hosts.causal("Gemma", head_dim=8),
    "phi": hosts.causal("Phi"),
    "gpt_neox": hosts.causal("GPTNeoX"),
    "mixtral": hosts.causal("Mixtral", **MOE),
    "qwen2_moe": hosts.causal("Qwen2Moe", **MOE, shared_expert_intermediate_size=8),
    "gpt2": hosts.gpt2,
    "opt": hosts.opt,
    "mamba": hosts.mamba,
    "t5": hosts.t5,
    "bert": hosts.bert,
    "vit": hosts.vit,
    "clip": hosts.clip,
    "siglip": hosts.siglip,
    "whisper": hosts.whisper,
    "unet": hosts.unet,
    "dit": hosts.dit,
    "sd3": hosts.sd3,
    "flux": hosts.flux,
    "mlp": hosts.mlp,
    "torch_transformer": hosts.torch_transformer,
}
LANGUAGE = "llama qwen2 mistral gemma phi gpt_neox mixtral qwen2_moe gpt2 opt mamba t5 bert".split()
# Mamba reads the weight of dt_proj and does not call the layer.
OPTIONS: dict[str, dict[str, Any]] = {"mamba": {"exclude_modules": ["dt_proj"]}}


def make_host(name: str) -> Host:
    """Make a host, with the same weights at each call; torch.matmul rounds otherwise for weights that train."""
    torch.manual_seed(1)
    model, inputs = HOSTS[name]()
    return model.eval().requires_grad_(False), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The loss if there is one, else the output, as one tensor."""
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    return output if isinstance(output, Tensor) else output[0]


def run_frozen(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The same as `run`, without gradients."""
    with torch.no_grad():
        return run(model, inputs)


@pytest.fixture(autouse=True)
def no_fast_path() -> Iterator[None]:
    """Turn off the fast path of TransformerEncoderLayer, which rounds otherwise; injected layers never take it."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_host(name: str, tmp_path: Path) -> None:
    model, inputs = make_host(name)
    base = run_frozen(model, inputs)
    before = snapshot(model)
    options = {"gate": "sequence" if name in LANGUAGE else "given", **OPTIONS.get(name, {})}
    slidelora.inject(model, r=2, **options)
    given: Any = torch.tensor([[0.5, 0.2, 0.3]])
    with slidelora.gates(model, given):
        assert torch.equal(run_frozen(model, inputs), base)

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 0.02)
    for _ in range(2):  # lora_A has no gradient before lora_B's first step
        optimizer.zero_grad()
        with nullcontext() if options["gate"] == "sequence" else slidelora.gates(model, given):
            run(model, inputs).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    layers = slide_layers(model)
    assert sum(bool(layer.lora_B.any()) for layer in layers.values()) >= 0.9 * len(layers)

    with slidelora.gates(model, given):
        trained = run_frozen(model, inputs)
    assert not torch.equal(trained, base)
    slidelora.save_pretrained(model, tmp_path)
    other, inputs = make_host(name)
    slidelora.load_pretrained(other, tmp_path)
    with slidelora.gates(other, given):
        assert torch.equal(run_frozen(other, inputs), trained)

    slidelora.remove(model)
    assert is_unchanged(model, before) and torch.equal(run_frozen(model, inputs), base)


@pytest.mark.parametrize("gate", [["text", "image"], "learned"])
@pytest.mark.parametrize("name", ["opt", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_flattened_tokens_have_the_gates_of_their_samples(name: str, gate: Any) -> None:
    model, _ = make_host(name)
    slidelora.inject(model, r=2)
    randomise(model)
    with nullcontext() if gate == "learned" else slidelora.gates(model, gate):
        together = model(input_ids=IDS).logits
    weights = slidelora.routing(model).weights
    assert relative_error(weights[0], weights[1]) > 0.01
    for row in range(2):
        with slidelora.gates(model, weights[row : row + 1].detach()):
            alone = model(input_ids=IDS[row : row + 1]).logits
        assert_close(together[row], alone[0])


def test_injected_layers_do_not_take_the_fast_path() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    model, inputs = make_host("torch_transformer")
    slidelora.inject(model, r=2, gate="given")
    for layer in slide_layers(model).values():
        nn.init.ones_(layer.lora_B)
    with slidelora.gates(model, "text"):
        mixture = run_frozen(model, inputs)
    with slidelora.disabled(model):
        assert relative_error(mixture, run_frozen(model, inputs)) > 0.01
    assert all("out_proj" not in name for name in slide_layers(model))
    slidelora.remove(model)
    assert not any(count_hooks(module) for module in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts_are_named_once(name: str) -> None:
    def warned(**options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            slidelora.inject(make_host(name)[0], r=2, **options)
        return [str(warning.message) for warning in caught if "skipped" in str(warning.message)]

    (message,) = warned()
    assert "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj: skipped" in message
    assert not warned(target_modules=["q_proj"]) and not warned(exclude_modules=["experts"])
    assert warned(target_modules=["q_proj", "gate_up_proj"]) == [
        "no linear layer holds model.layers.*.mlp.experts.gate_up_proj: skipped"
    ]


@pytest.mark.parametrize("weights", ["dispatched", "offloaded"])
def test_device_maps(weights: str) -> None:
    model, inputs = make_host("llama")
    base = run_frozen(model, inputs)
    expected, _ = make_host("llama")
    slidelora.inject(expected, r=2)
    if weights == "dispatched":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        cpu_offload(model, torch.device("cpu"))
    slidelora.inject(model, r=2)
    assert torch.equal(run_frozen(model, inputs), base)
    for module in (model, expected):
        torch.manual_seed(2)
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.device.type == "cpu", key
                nn.init.normal_(parameter, std=0.2)
    assert torch.equal(run_frozen(model, inputs), run_frozen(expected, inputs))


@pytest.mark.parametrize("gate", ["sequence", "token"])
@pytest.mark.parametrize("r", [2, {"text": 1, "image": 2, "shared": 3}])
def test_a_model_offloaded_after_injection(gate: str, r: Any) -> None:
    model, inputs = make_host("llama")
    randomise(slidelora.inject(model, r=r, gate=gate))
    expected = run_frozen(model, inputs)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(run_frozen(model, inputs), expected)


def test_gates_by_name_on_a_model_offloaded_after_injection() -> None:
    model, inputs = make_host("llama")
    randomise(slidelora.inject(model, r=2, gate="given"))
    with slidelora.gates(model, "text"):
        expected = run_frozen(model, inputs)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for value in ("text", torch.tensor([[0.5, 0.0, 0.5]])):
        with slidelora.gates(model, value):
            assert slidelora.routing(model).weights.device.type == "cpu"
            assert torch.equal(run_frozen(model, inputs), expected)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    names = [name for name in ("logits", "sample", "logits_per_image") if hasattr(output, name)]
    return output if isinstance(output, Tensor) else getattr(output, names[0]) if names else output[0]


# PEFT refuses a layer with the name out_proj in Mamba.
EXPORT_OPTIONS: dict[str, dict[str, Any]] = {"mamba": {"exclude_modules": ["dt_proj", "out_proj"]}}


def pipeline_of(name: str, *parts: Any) -> Any:
    return getattr(pytest.importorskip("diffusers"), name)(*parts)


PIPELINES: dict[str, Callable[[nn.Module], Any]] = {
    "unet": lambda unet: pipeline_of("StableDiffusionPipeline", None, None, None, unet, *[None] * 4, False),
    "sd3": lambda transformer: pipeline_of("StableDiffusion3Pipeline", transformer, *[None] * 8),
    "flux": lambda transformer: pipeline_of("FluxPipeline", *[None] * 6, transformer),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_fusing_projections_with_experts_is_refused(name: str) -> None:
    model, inputs = make_host(name)
    base = run_frozen(model, inputs)
    randomise(slidelora.inject(model, r=2, gate="given", target_modules=["to_k", "to_out.0"]))
    with slidelora.gates(model, "text"):
        expected = run_frozen(model, inputs)
    modules = list(map(id, model.modules()))
    attention = next(module for module in model.modules() if hasattr(module, "to_k"))
    pipelines = [PIPELINES[name](model)] if name == "unet" else []  # no other one fuses projections
    for host in (model, attention, copy.deepcopy(model), *pipelines):
        fuse = host.fuse_projections if host is attention else host.fuse_qkv_projections
        with pytest.raises(ValueError, match=r"have experts, expected none: .*slidelora.remove, or .*merge_and_unload"):
            fuse()
    with slidelora.gates(model, "text"):
        assert torch.equal(run_frozen(model, inputs), expected) and list(map(id, model.modules())) == modules
    with torch.no_grad():
        slidelora.remove(model).fuse_qkv_projections()
    fused = run_frozen(model, inputs)
    assert (fused - base).norm() < 1e-5 * base.norm() and list(map(id, model.modules())) != modules


@pytest.mark.parametrize("name", PIPELINES)
def test_projections_that_nobody_calls_get_no_experts(name: str) -> None:
    model, _ = make_host(name)
    options: dict[str, Any] = {"r": 2, "gate": "given"}
    with torch.no_grad():
        model.fuse_qkv_projections()
    names = [key for key, _ in model.named_parameters()]
    for targets in (["to_v"], "all-linear", ["to_k", "to_out.0"]):
        with pytest.raises(
            ValueError, match=r"is fused into to_\w+, .* unfuse_qkv_projections\(\) first, or target to_"
        ):
            slidelora.inject(model, **options, target_modules=targets)
    assert [key for key, _ in model.named_parameters()] == names
    slidelora.remove(slidelora.inject(model, **options, target_modules=["to_qkv"]))
    model.unfuse_qkv_projections()
    if name == "unet":  # the joint layers stay
        with pytest.raises(ValueError, match=r"to_qkv is unfused, expected a layer that the model calls"):
            slidelora.inject(model, **options, target_modules=["to_qkv"])
    slidelora.inject(model, **options, target_modules=["to_v"])


@pytest.mark.parametrize("name", PIPELINES)
def test_fused_projections_with_experts_stay_fused(name: str) -> None:
    model, inputs = make_host(name)
    with torch.no_grad():
        model.fuse_qkv_projections()
    base = run_frozen(model, inputs)
    slidelora.inject(model, r=2, gate="given", target_modules=["to_qkv"])
    with pytest.raises(ValueError, match="have experts, expected none"):
        model.unfuse_qkv_projections()
    slidelora.remove(model)
    assert torch.equal(run_frozen(model, inputs), base)
    model.unfuse_qkv_projections()
    slidelora.inject(model, r=2, gate="given", target_modules=["to_out.0"])
    with torch.no_grad():
        model.fuse_qkv_projections()
    model.unfuse_qkv_projections()


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_host_merged_exported_and_imported(name: str, tmp_path: Path) -> None:
    model, inputs = make_host(name)
    base = outputs(model, inputs)
    slidelora.inject(model, r=2, lora_alpha=6, gate="given", **EXPORT_OPTIONS.get(name, {}))
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    gates = {"text": 0.7, "shared": -0.45}
    with slidelora.gates(model, gates):
        mixture = outputs(model, inputs)
    assert relative_error(base, mixture) > 0.05
    slidelora.merge(model, gates)
    assert_close(outputs(model, inputs), mixture)
    with slidelora.gates(slidelora.unmerge(model), gates):
        assert torch.equal(outputs(model, inputs), mixture)

    slidelora.export_peft(model, tmp_path, gates=gates)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        loaded = PeftModel.from_pretrained(make_host(name)[0], tmp_path)
    assert_close(outputs(loaded.base_model.model, inputs), mixture)
    if name in PIPELINES:
        pipeline = PIPELINES[name](make_host(name)[0])
        pipeline.load_lora_weights(tmp_path)
        assert_close(outputs(pipeline.unet if name == "unet" else pipeline.transformer, inputs), mixture)
    other = slidelora.import_peft(make_host(name)[0], {"all": tmp_path}, gate="given")
    with slidelora.gates(other, "all"):
        assert_close(outputs(other, inputs), mixture)


@pytest.mark.parametrize(
    "name", ["qwen2_moe", "gpt2", "mamba", "t5", "clip", "whisper", "unet", "flux", "torch_transformer"]
)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_token_gates_in_a_host(name: str, tmp_path: Path) -> None:
    model, inputs = make_host(name)
    base = run_frozen(model, inputs)
    options = {"gate": "token", "top_k": 1, "balance_coef": 0.1, "z_coef": 0.1, **OPTIONS.get(name, {})}
    slidelora.inject(model, r=2, **options)
    assert torch.equal(run_frozen(model, inputs), base)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 0.02)
    for _ in range(2):
        optimizer.zero_grad()
        (run(model, inputs).square().mean() + slidelora.aux_loss(model)).backward()
        optimizer.step()
    layers = slide_layers(model)
    learning = [bool(layer.gate.weight.grad.any()) for layer in layers.values()]
    assert sum(learning) >= 0.9 * len(layers)
    trained = run_frozen(model, inputs)
    weights = slidelora.routing(model).weights
    assert set(weights) == set(layers) and all(value.shape[-1] == 3 for value in weights.values())
    slidelora.save_pretrained(model, tmp_path)
    other, inputs = make_host(name)
    slidelora.load_pretrained(other, tmp_path)
    assert not torch.equal(trained, base) and torch.equal(run_frozen(other, inputs), trained)
    slidelora.remove(model)
    assert torch.equal(run_frozen(model, inputs), base)
