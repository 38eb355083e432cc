import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]
EXPERTS = ["text", "image", "shared"]
GATES = {"text": 0.7, "shared": -0.45}
SIZES = {  # for the layers of a Llama
    "uniform": {"r": 4, "lora_alpha": 6},
    "differing": {
        "r": {"text": 2, "image": 3, "shared": 5},
        "lora_alpha": {"text": 6, "image": 1, "shared": 7},
        "rank_pattern": {r"layers.1.self_attn.\w+": 4, "up_proj": {"shared": 1}},
        "alpha_pattern": {"down_proj": 11, r"layers.0.*q_proj": {"text": 3}},
        "use_rslora": True,
    },
}


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for layer in slide_layers(model).values():
        for name in layer.names:
            nn.init.normal_(layer.expert(name).B, std=0.3)
    return model


def make_llama(make_base: Make, **fields: Any) -> LlamaForCausalLM:
    return randomise(slidelora.inject(make_base(), experts=EXPERTS, **{"gate": "given", **fields}))


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)).eval()


def make_unet() -> nn.Module:
    torch.manual_seed(1)
    return pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, use_linear_projection=True,
    ).eval()  # fmt: skip


def denoise(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 12, generator=generator)
    return unet(latents, torch.tensor([3, 900]), encoder_hidden_states=context).sample


def load_peft(base: nn.Module, path: Path) -> nn.Module:
    """Load with PEFT; a warning about a missing key or a wrong field is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, path)


@pytest.mark.parametrize("sizes", SIZES)
def test_peft_loads_each_expert_as_plain_lora(make_base: Make, input_ids: Tensor, tmp_path: Path, sizes: str) -> None:
    model = make_llama(make_base, **SIZES[sizes])
    slidelora.export_peft(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(EXPERTS)
    for expert in EXPERTS:
        files = sorted(path.name for path in (tmp_path / expert).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
        with slidelora.gates(model, {expert: 1.0}):
            expected = model(input_ids).logits
        assert relative_error(expected, make_base()(input_ids).logits) > 0.1
        assert relative_error(load_peft(make_base(), tmp_path / expert)(input_ids).logits, expected) < 1e-5


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "mlp.up_proj"], r".*layers\.1\..*(q|k)_proj"])
def test_peft_loads_a_mixture_as_one_lora(
    make_base: Make, input_ids: Tensor, tmp_path: Path, sizes: str, target_modules: Any
) -> None:
    model = make_llama(make_base, target_modules=target_modules, **SIZES[sizes])
    slidelora.export_peft(model, tmp_path, gates=GATES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with slidelora.gates(model, GATES):
        expected = model(input_ids).logits
    loaded = load_peft(make_base(), tmp_path)
    assert relative_error(loaded(input_ids).logits, expected) < 1e-5
    names = {name.removeprefix("base_model.model.") for name, _ in loaded.named_modules() if hasattr(_, "lora_A")}
    assert names == set(slide_layers(model))


def test_an_export_leaves_out_experts_with_weight_0(make_base: Make, tmp_path: Path) -> None:
    model = make_llama(make_base, **SIZES["differing"])
    slidelora.export_peft(model, tmp_path, gates=GATES)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"].shape == (2 + 5, 32)
    assert tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"].shape == (32, 4 + 4)
    assert tensors[f"{prefix}.1.mlp.up_proj.lora_A.weight"].shape == (2 + 1, 32)


def test_an_exported_mixture_has_scaling_1_in_every_layer(make_base: Make, tmp_path: Path) -> None:
    """So it is right, too, in programs that scale all layers by lora_alpha / r and read no patterns, such as vLLM."""
    slidelora.export_peft(make_llama(make_base, **SIZES["differing"]), tmp_path, gates=GATES)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["rank_pattern"] and not config.get("use_rslora")
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_export_of_conv1d_layers(input_ids: Tensor, tmp_path: Path) -> None:
    model = randomise(slidelora.inject(make_gpt2(), experts=EXPERTS, gate="given", r=2, lora_alpha=6))
    slidelora.export_peft(model, tmp_path, gates=GATES)
    with slidelora.gates(model, GATES):
        expected = model(input_ids).logits
    loaded = load_peft(make_gpt2(), tmp_path)
    assert relative_error(loaded(input_ids).logits, expected) < 1e-5
    assert relative_error(loaded.merge_and_unload()(input_ids).logits, expected) < 1e-5


MOE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
MOE_HOSTS: dict[str, dict[str, Any]] = {
    "DeepseekV3": {
        "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "Qwen3Next": {
        "num_experts": 2, "head_dim": 8, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Qwen2Moe": {"num_experts": 2, "shared_expert_intermediate_size": 8},
    "Glm4Moe": {"n_routed_experts": 2, "head_dim": 8, "first_k_dense_replace": 1},
    "Mixtral": {"num_local_experts": 2},
}  # fmt: skip


def make_moe(name: str) -> nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**MOE, **MOE_HOSTS[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.filterwarnings("ignore:no linear layer holds", "ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["all", "shared experts", "one layer"])
@pytest.mark.parametrize("host", MOE_HOSTS)
def test_peft_loads_a_moe_host(host: str, targets: str, input_ids: Tensor, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rank_pattern": {"down_proj": {"text": 2}}, "alpha_pattern": {r".*layers\.1\..*": 3}}
    if targets != "all":
        last = "(gate_proj|up_proj|down_proj)" if targets == "shared experts" and host != "Mixtral" else "(o|up)_proj"
        fields["target_modules"] = rf".*layers\.1\..*{last}"
    model = randomise(slidelora.inject(make_moe(host), experts=EXPERTS, gate="given", r=3, lora_dropout=0.1, **fields))
    slidelora.export_peft(model.eval(), tmp_path, gates=GATES)
    with slidelora.gates(model, GATES):
        expected = model(input_ids).logits
    assert relative_error(load_peft(make_moe(host), tmp_path)(input_ids).logits, expected) < 1e-5
    imported = slidelora.import_peft(make_moe(host), {"mixture": tmp_path}, shared=[], gate="given")
    assert set(slide_layers(imported)) == set(slide_layers(model))
    with slidelora.gates(imported, {"mixture": 1.0}):
        assert relative_error(imported(input_ids).logits, expected) < 1e-5


@pytest.mark.parametrize("sizes", ["uniform", "differing"])
def test_peft_and_diffusers_load_a_unet(tmp_path: Path, sizes: str) -> None:
    pattern = {} if sizes == "uniform" else {"rank_pattern": {"to_q": 3, "proj_in": {"text": 1}}}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]
    fields: dict[str, Any] = {"target_modules": [*targets, "time_emb_proj"], "r": 2, "lora_alpha": 6, **pattern}
    if sizes == "uniform":
        fields["exclude_modules"] = r"down_blocks\.1\..*"
    model = randomise(slidelora.inject(make_unet(), experts=EXPERTS, gate="given", **fields))
    slidelora.export_peft(model, tmp_path / "mixture", gates=GATES)
    slidelora.export_peft(model, tmp_path)
    for folder, gates in (("mixture", GATES), ("image", {"image": 1.0})):
        with slidelora.gates(model, gates):
            expected = denoise(model)
        assert relative_error(denoise(make_unet()), expected) > 0.01
        assert relative_error(denoise(load_peft(make_unet(), tmp_path / folder)), expected) < 1e-5
        unet = make_unet()
        unet.load_lora_adapter(tmp_path / folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        assert relative_error(denoise(unet), expected) < 1e-5
        pipeline = pytest.importorskip("diffusers").StableDiffusionPipeline(
            None, None, None, make_unet(), None, None, None, requires_safety_checker=False
        )
        pipeline.load_lora_weights(tmp_path / folder)
        assert relative_error(denoise(pipeline.unet), expected) < 1e-5


def test_an_export_without_its_learned_gate_warns(make_base: Make, tmp_path: Path) -> None:
    model = make_llama(make_base, r=2, gate="sequence")
    with pytest.warns(UserWarning, match="the sequence gate is not exported"):
        slidelora.export_peft(model, tmp_path)
    assert not any("slidelora" in key for key in load_file(tmp_path / "text" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"text": 0.0}, r"gates are \{'text': 0\.0, .*expected at least one expert with a weight"),
        (["text", "image"], "gates of 2 samples differ"),
        ("audio", "gates name 'audio'"),
    ],
)
def test_gates_that_cannot_be_exported(make_base: Make, tmp_path: Path, gates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slidelora.export_peft(make_llama(make_base, r=2), tmp_path / "out", gates=gates)
    assert not (tmp_path / "out").exists()


def test_a_layer_with_two_names_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})
    model["two"] = model["one"]
    slidelora.inject(model, gate="given", r=2)
    with pytest.raises(ValueError, match="two and one are one layer, expected one name for each"):
        slidelora.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frozen_experts_are_exported_and_imported(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    model = make_llama(make_base, **SIZES["differing"])
    with slidelora.gates(model, GATES):
        expected = model(input_ids).logits
    slidelora.freeze(model, ["text"])
    slidelora.export_peft(model, tmp_path / "mixture", gates=GATES)
    assert relative_error(load_peft(make_base(), tmp_path / "mixture")(input_ids).logits, expected) < 1e-5
    slidelora.export_peft(model, tmp_path)
    adapters = {name: tmp_path / name for name in EXPERTS}
    again = slidelora.import_peft(make_base(), adapters, gate="given", frozen=["shared"])
    with slidelora.gates(again, GATES):
        assert relative_error(again(input_ids).logits, expected) < 1e-5


def test_exported_targets_match_no_other_module(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        in_features = out_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": Wrapper(), "three": nn.ModuleDict({"two": nn.Identity()})})
    slidelora.inject(model, gate="given", r=2, target_modules=["one", "two"], exclude_modules=["three.two"])
    slidelora.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "text" / "adapter_config.json").read_text())
    assert config["target_modules"] == "one|two"


def test_the_exported_configuration_is_that_of_peft(make_base: Make, tmp_path: Path) -> None:
    slidelora.export_peft(make_llama(make_base, lora_dropout=0.25, **SIZES["uniform"]), tmp_path)
    config = json.loads((tmp_path / "text" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 4, 6, 0.25)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


PEFT: dict[str, dict[str, Any]] = {  # configurations of PEFT adapters
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*\.(q_proj|down_proj)",
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 4},
        "alpha_pattern": {"q_proj": 1, r".*\.0\.mlp\.down_proj": 9},
    },
    "layers": {
        "r": 2,
        "target_modules": ["up_proj", "q_proj"],
        "exclude_modules": ["q_proj"],
        "layers_to_transform": 1,
    },
    "gaussian": {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


def write_peft(base: nn.Module, path: Path, seed: int = 4, **fields: Any) -> nn.Module:
    """Write an adapter with PEFT and return its model."""
    torch.manual_seed(seed)
    peft = get_peft_model(base, LoraConfig(**fields)).eval()
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(path)
    return peft


@pytest.mark.parametrize("kind", PEFT)
def test_an_imported_adapter_has_the_output_of_peft(
    make_base: Make, input_ids: Tensor, tmp_path: Path, kind: str
) -> None:
    peft = write_peft(make_base(), tmp_path / "adapter", **PEFT[kind])
    expected = peft(input_ids).logits
    assert relative_error(make_base()(input_ids).logits, expected) > 0.01
    model = make_base()
    assert slidelora.import_peft(model, {"text": tmp_path / "adapter"}, gate="given") is model
    with slidelora.gates(model, {"text": 1.0}):
        assert relative_error(model(input_ids).logits, expected) < 1e-5
    adapted = {name for name, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(slide_layers(model)) == adapted


def test_different_adapters_become_experts_of_one_model(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    weights = dict(zip(PEFT, (0.3, -0.2, 0.5, 1.0, -0.7)))
    truth = make_base()
    for seed, (name, fields) in enumerate(PEFT.items()):
        peft = write_peft(make_base(), tmp_path / name, seed, **fields)
        for layer, module in peft.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                truth.get_submodule(layer).weight.data += weights[name] * module.get_delta_weight("default")
    adapters = {name: tmp_path / name for name in PEFT}
    model = slidelora.import_peft(make_base(), adapters, shared=["rslora"], gate="given")
    assert slidelora.routing(model).names == tuple(PEFT) and slidelora.routing(model).config.shared == ("rslora",)
    with slidelora.gates(model, weights):
        assert relative_error(model(input_ids).logits, truth(input_ids).logits) < 1e-5
        expected = model(input_ids).logits
    slidelora.save_pretrained(model, tmp_path / "saved")
    loaded = slidelora.load_pretrained(make_base(), tmp_path / "saved")
    with slidelora.gates(loaded, weights):
        assert torch.equal(loaded(input_ids).logits, expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_an_import_of_an_export_is_exact(make_base: Make, input_ids: Tensor, tmp_path: Path, sizes: str) -> None:
    model = make_llama(make_base, **SIZES[sizes])
    slidelora.export_peft(model, tmp_path)
    again = slidelora.import_peft(make_base(), {name: tmp_path / name for name in EXPERTS}, gate="given")
    for name, layer in slide_layers(model).items():
        for expert in EXPERTS:
            one, other = layer.expert(expert), again.get_submodule(name).expert(expert)
            assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
            assert one.scaling == pytest.approx(other.scaling, rel=1e-11)


def test_import_of_conv1d_layers(input_ids: Tensor, tmp_path: Path) -> None:
    peft = write_peft(make_gpt2(), tmp_path, r=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    model = slidelora.import_peft(make_gpt2(), {"text": tmp_path})
    with slidelora.gates(model, "text"):
        assert relative_error(model(input_ids).logits, peft(input_ids).logits) < 1e-5


def test_a_module_with_two_names_is_adapted_under_the_first(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model.append(model[0])
        return model

    x = torch.randn(3, 4)
    peft = write_peft(make(), tmp_path, r=2, target_modules=["0", "2", "3"])
    model = slidelora.import_peft(make(), {"text": tmp_path}, gate="given")
    with slidelora.gates(model, "text"):
        assert relative_error(model(x), peft(x)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected no value"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], expected no value"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is "),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is "),
        ({"layer_replication": [[0, 1]]}, "layer_replication is "),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is "),
        ({"a_later_variant": True}, "a_later_variant is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"target_modules": ["query"]}, "matches no module"),
        ({"target_modules": ["self_attn"]}, "expected linear layers only"),
        ({"r": "3"}, "r is '3', expected an integer"),
        ({"r": 4}, r"of shape \(3, 32\), expected \(4, 32\) for r=4"),
        ({"rank_pattern": {"v_proj": 2}}, r"of shape \(3, 32\), expected \(2, 32\)"),
        ({"target_modules": ["q_proj"]}, "has .*v_proj.*, not expected"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "lacks .*k_proj"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_named(
    make_base: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_peft(make_base(), tmp_path / "good", **PEFT["plain"])
    write_peft(make_base(), tmp_path / "bad", **PEFT["plain"])
    path = tmp_path / "bad" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = make_base()
    with pytest.raises(ValueError, match=f"bad/adapter_.*{message}"):
        slidelora.import_peft(model, {"text": tmp_path / "good", "image": tmp_path / "bad"})
    assert not slide_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_dora_of_peft_is_refused(make_base: Make, tmp_path: Path) -> None:
    write_peft(make_base(), tmp_path, use_dora=True, **PEFT["plain"])
    with pytest.raises(ValueError, match="use_dora is True"):
        slidelora.import_peft(make_base(), {"text": tmp_path})


def test_an_adapter_without_layers_is_named(make_base: Make, tmp_path: Path) -> None:
    write_peft(make_base(), tmp_path, **PEFT["layers"])
    save_file({}, tmp_path / "adapter_model.safetensors")
    model = make_base()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has LoRA for none of .*up_proj"):
        slidelora.import_peft(model, {"text": tmp_path})
    assert not slide_layers(model)


def test_a_small_alpha_keeps_its_digits(make_base: Make, tmp_path: Path) -> None:
    slidelora.export_peft(make_llama(make_base, r=3, lora_alpha=1.23456789e-9), tmp_path)
    config = json.loads((tmp_path / "text" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(1.23456789e-9, rel=1e-11, abs=0)


def test_pickled_adapters_are_not_read(make_base: Make, tmp_path: Path) -> None:
    write_peft(make_base(), tmp_path, **PEFT["plain"])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        slidelora.import_peft(make_base(), {"text": tmp_path})


def test_other_bad_imports_are_named(make_base: Make, make_model: Make, tmp_path: Path) -> None:
    write_peft(make_base(), tmp_path, **PEFT["plain"])
    model = make_base()
    with pytest.raises(TypeError, match=r"fields have \['r', 'target_modules'\], which come from the adapters' files"):
        slidelora.import_peft(model, {"text": tmp_path}, r=3, target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"adapters are \[.*\], expected a mapping"):
        slidelora.import_peft(model, [tmp_path])
    with pytest.raises(ValueError, match=r"experts has \['a.b'\]"):
        slidelora.import_peft(model, {"a.b": tmp_path})
    with pytest.raises(ValueError, match="unknown expert"):
        slidelora.import_peft(model, {"text": tmp_path}, shared=["image"])
    assert not slide_layers(model)
    with pytest.raises(ValueError, match="expected a plain model"):
        slidelora.import_peft(make_model(), {"text": tmp_path})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(make_base: Make, tmp_path: Path, number: float) -> None:
    get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = number
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"has {name} with NaN or infinite weights, expected finite ones"):
        slidelora.import_peft(make_base(), {"text": tmp_path})


def test_a_flipped_bit_in_an_export_is_noticed(make_base: Make, tmp_path: Path) -> None:
    slidelora.export_peft(make_llama(make_base, r=2), tmp_path, gates="text")
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="with other bytes than were saved"):
        slidelora.import_peft(make_base(), {"text": tmp_path})
