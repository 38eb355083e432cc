import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_hosts
import torch
from closeness import assert_close
from injected_models import is_unchanged, snapshot
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

Make = Callable[..., LlamaForCausalLM]
# Mixtures that differ in memory: by gates, ranks, groups, frozen experts, and dtypes on a half-precision base.
MIXTURES: dict[str, dict[str, Any]] = {
    "sequence": {},
    "token": {"gate": "token", "top_k": 1},
    "given": {"gate": "given", "target_modules": ["q_proj", "up_proj"]},
    "ranks": {
        "experts": {"text": 2, "shared": 1},
        "r": {"text0": 2, "text1": 4, "shared": 3},
        "lora_alpha": {"text": 4, "shared": 8},
        "rank_pattern": {"v_proj": 1},
    },
    "frozen": {"frozen": ["image", "shared"]},
    "all frozen": {"frozen": ["text", "image", "shared"]},
    "half": {},
    "half adapter": {"adapter_dtype": "bfloat16"},
}


def randomise(model: nn.Module) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".frozen_" in name:
            nn.init.normal_(parameter, std=0.2)
    slidelora.freeze(model, slidelora.routing(model).config.frozen)  # makes the padding of smaller ranks zero again
    return model


@pytest.fixture
def make_peft(make_base: Make) -> Callable[..., PeftModel]:
    """Make a PeftModel with random experts and gate."""
    return lambda **options: randomise(get_peft_model(make_base(), SlideLoRAPeftConfig(**{"r": 4, **options}))).eval()


def logits(model: nn.Module, input_ids: Tensor, gates: Any = None) -> Tensor:
    """The logits under the model's learned gate, if it has one, else under the given gates."""
    with torch.no_grad():
        if slidelora.routing(model).config.gate != "given":
            return model(input_ids=input_ids).logits
        with slidelora.gates(model, gates or ["text", "image", "text"]):
            return model(input_ids=input_ids).logits


def trained(model: nn.Module) -> set[str]:
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.") for name in names}


def test_the_configuration_is_that_of_slidelora(tmp_path: Path) -> None:
    config = SlideLoRAPeftConfig(
        experts={"text": 2, "shared": 1}, adapter_dtype=torch.float32, r={"text": 2, "shared": 4}
    )
    own = slidelora.SlideLoRAConfig(
        experts={"text": 2, "shared": 1}, adapter_dtype="float32", r={"text": 2, "shared": 4}
    )
    assert config.slidelora_config() == own
    assert {field.name for field in fields(own)} < {field.name for field in fields(config)}
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SlideLoRAPeftConfig and loaded.slidelora_config() == own
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SLIDELORA"
    with pytest.raises(ValueError, match="r is -1, expected an integer of at least 1"):
        SlideLoRAPeftConfig(r=-1)
    with pytest.raises(TypeError, match="bias"):
        SlideLoRAPeftConfig(bias="all")


def test_get_peft_model_equals_inject(make_base: Make, input_ids: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = make_base(), make_base()
    before, expected = snapshot(base), base(input_ids).logits
    torch.manual_seed(4)
    model = get_peft_model(base, SlideLoRAPeftConfig(r=4, task_type="CAUSAL_LM"))
    torch.manual_seed(4)
    own = slidelora.inject(other, r=4)
    assert torch.equal(model(input_ids).logits, expected)
    assert is_unchanged(model.get_base_model(), own.state_dict()) and trained(model) == trained(own)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    slidelora.print_trainable_parameters(own)
    assert capsys.readouterr().out == printed
    taken_off = model.unload()
    assert is_unchanged(taken_off, before) and not hasattr(taken_off, "peft_config")
    assert all(parameter.requires_grad for parameter in taken_off.parameters())


@pytest.mark.parametrize("mixture", MIXTURES)
def test_save_and_load(make_base: Make, input_ids: Tensor, tmp_path: Path, mixture: str) -> None:
    dtype = torch.bfloat16 if "half" in mixture else torch.float32
    model = randomise(
        get_peft_model(make_base().to(dtype), SlideLoRAPeftConfig(**{"r": 4, **MIXTURES[mixture]}))
    ).eval()
    expected = logits(model, input_ids, "text0" if mixture == "ranks" else None)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    learned = {name for name, tensor in stored.items() if "frozen_" not in name and tensor.numel()}
    assert learned == {f"base_model.model.{name}" for name in trained(model)}
    for trainable, low in ((False, False), (True, False), (False, True)):
        base = make_base().to(dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(loaded, input_ids), expected)
        assert is_unchanged(loaded, snapshot(model))
        assert trained(loaded) == (trained(model) if trainable else set())
    again = make_base().to(dtype)
    again.load_adapter(tmp_path, is_trainable=True)
    assert is_unchanged(again, snapshot(model.get_base_model())) and trained(again) == trained(model)
    assert torch.equal(logits(again.eval(), input_ids), expected)


def test_patterns_of_files_are_bounded(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(make_base(), SlideLoRAPeftConfig(r=4, target_modules=r"(?!.*layers\.0)(?:.*\.)+[qv]_proj"))
    expected = randomise(model).eval()(input_ids).logits
    model.save_pretrained(tmp_path)  # with names in the stead of a pattern that no loader accepts
    stored = PeftConfig.from_pretrained(tmp_path)
    assert sorted(stored.target_modules) == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    assert torch.equal(PeftModel.from_pretrained(make_base(), tmp_path)(input_ids).logits, expected)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("target_modules", "exclude_modules"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**values, field: "(a+)+b"}))
        for load in (lambda: PeftConfig.from_pretrained(tmp_path), lambda: make_base().load_adapter(tmp_path)):
            with pytest.raises(ValueError, match=rf"{field} has '\(a\+\)\+b', expected a pattern that matches quickly"):
                load()


def test_modules_to_save_are_ends_of_names_not_patterns(make_base: Make) -> None:
    config = SlideLoRAPeftConfig(modules_to_save=["1.mlp", "(a+)+b"]).targets()
    model = slidelora.inject(make_base(), config)
    names = set(slidelora.injection.slide_layers(model))
    assert len(names) == 14 - 3 and not any("layers.1.mlp" in name for name in names)


def test_names_and_dtypes_come_from_the_model(make_base: Make, tmp_path: Path) -> None:
    model = get_peft_model(make_base(), SlideLoRAPeftConfig(r=4), "q_proj")  # modules have this name, too
    model.save_pretrained(tmp_path)
    path = tmp_path / "q_proj" / "adapter_model.safetensors"
    stored = load_file(path)
    assert set(stored) == {f"base_model.model.{name}" for name in trained(model)}
    save_file({name: tensor.double() for name, tensor in stored.items()}, path)
    loaded = PeftModel.from_pretrained(make_base(), path.parent, low_cpu_mem_usage=True)
    assert is_unchanged(loaded, model.state_dict()) and {parameter.dtype for parameter in loaded.parameters()} == {
        torch.float32
    }


def test_changes_by_freeze_and_add_expert_are_saved(
    make_base: Make, make_peft: Any, input_ids: Tensor, tmp_path: Path
) -> None:
    model = make_peft()
    slidelora.freeze(model, ["text"])
    slidelora.add_expert(model, "layout", r=6)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(input_ids).logits, expected) and trained(loaded) == trained(model)
    assert slidelora.routing(loaded).config == slidelora.routing(model).config


def test_models_that_share_a_configuration_save_their_own(make_base: Make, tmp_path: Path) -> None:
    config = SlideLoRAPeftConfig(r=2)
    first, second = get_peft_model(make_base(), config), get_peft_model(make_base(), config)
    assert first.peft_config["default"] is second.peft_config["default"] is config
    slidelora.freeze(first, ["text"])
    for model, frozen in ((first, ["text"]), (second, []), (first, ["text"])):
        model.save_pretrained(tmp_path)
        assert config.to_dict()["frozen"] == PeftConfig.from_pretrained(tmp_path).to_dict()["frozen"] == frozen
    assert slidelora.routing(get_peft_model(make_base(), config)).config.frozen == ()
    stored = PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, config=stored)
    assert loaded.peft_config["default"] is stored and slidelora.routing(loaded).config.frozen == ("text",)


@pytest.mark.parametrize("gate", ["sequence", "token"])
def test_the_dtype_is_that_of_peft_lora(make_base: Make, tmp_path: Path, gate: str) -> None:
    def dtypes(model: nn.Module) -> set[torch.dtype]:
        return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}

    for base in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for cast in (True, False):
            models = (
                get_peft_model(make_base().to(base), config, autocast_adapter_dtype=cast)
                for config in (LoraConfig(target_modules=["q_proj"]), SlideLoRAPeftConfig(gate=gate))
            )
            assert (
                dtypes(next(models)) == dtypes(next(models)) == {torch.float32 if cast and base.itemsize == 2 else base}
            )
    config = SlideLoRAPeftConfig(gate=gate, adapter_dtype="float64")
    model = get_peft_model(make_base().bfloat16(), config, autocast_adapter_dtype=False)
    assert dtypes(model) == {torch.float64}
    model = get_peft_model(make_base().bfloat16(), SlideLoRAPeftConfig(gate=gate), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    for cast in (True, False):
        loaded = PeftModel.from_pretrained(
            make_base().bfloat16(), tmp_path, is_trainable=True, autocast_adapter_dtype=cast
        )
        assert dtypes(loaded) == {torch.float32 if cast else torch.bfloat16}


@pytest.mark.usefixtures("transformers_adapters")
def test_peft_and_transformers_share_one_layout(
    make_base: Make, make_peft: Any, input_ids: Tensor, tmp_path: Path
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(SlideLoRAPeftConfig(r=4))
    randomise(model).eval()
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 14 + 4
    wrapped = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    assert torch.equal(wrapped(input_ids).logits, expected)
    named = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")  # its configuration names the base
    assert torch.equal(named(input_ids).logits, expected) and not trained(named)
    slidelora.save_pretrained(wrapped, tmp_path / "own")
    assert torch.equal(slidelora.load_pretrained(make_base(), tmp_path / "own")(input_ids).logits, expected)


@pytest.mark.usefixtures("transformers_adapters")
def test_a_disabled_adapter_leaves_the_base_model(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    base, model = make_base()(input_ids).logits, make_peft(frozen=["text"])
    expected, trains = model(input_ids).logits, trained(model)
    assert model.get_model_status().enabled is True
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, base)
        assert model.get_model_status().enabled is False
    assert torch.equal(model(input_ids).logits, expected) and trained(model) == trains
    plain = make_base()
    plain.add_adapter(SlideLoRAPeftConfig(r=4, frozen=["text"]))
    randomise(plain)
    plain.disable_adapters()
    assert torch.equal(plain(input_ids).logits, base)
    plain.enable_adapters()
    assert torch.equal(plain(input_ids).logits, expected) and trained(plain) == trains
    assert plain.active_adapters() == ["default"]
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set()
    model.set_requires_grad("default")
    assert trained(model) == trains


def test_one_disabled_layer_leaves_the_others(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    model, base = make_peft(gate="given"), make_base()(input_ids).logits
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    whole = logits(model, input_ids)
    layers[0].enable_adapters(False)
    assert [layer.disable_adapters for layer in layers] == [True] + [False] * (len(layers) - 1)
    one_off = logits(model, input_ids)
    with torch.no_grad():
        layers[0].lora_B.zero_()
    layers[0].enable_adapters(True)
    zeroed = logits(model, input_ids)
    assert_close(zeroed, one_off)
    assert not torch.equal(one_off, whole) and not torch.equal(one_off, base)
    with slidelora.gates(model, "text"), model.disable_adapter():
        assert torch.equal(model(input_ids).logits, base)
    with slidelora.gates(model, "text"):
        model.base_model.disable_adapter_layers()
    with slidelora.gates(model, "image"):
        assert torch.equal(model(input_ids).logits, base)
    assert torch.equal(model(input_ids).logits, base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, input_ids), zeroed)


def test_generate(make_base: Make, make_peft: Any, make_model: Make, input_ids: Tensor) -> None:
    model, own = make_peft(task_type="CAUSAL_LM"), make_model()
    mask = torch.ones_like(input_ids)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        options = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
        found = model.generate(**options)
        assert torch.equal(found, own.generate(**options))
        assert not torch.equal(found, make_base().generate(**options))
        with slidelora.gates(model, "text"):
            assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


def make_unet() -> nn.Module:
    torch.manual_seed(1)
    return tiny_hosts.unet()[0].eval()


def denoise(unet: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return unet(**tiny_hosts.unet()[1], **options).sample


def test_a_unet(tmp_path: Path) -> None:
    config = SlideLoRAPeftConfig(r=2, gate="given", target_modules=["to_q", "to_v"])
    unet = make_unet()
    base = denoise(unet)
    unet.add_adapter(config)
    randomise(unet)
    with slidelora.gates(unet, ["text", "image"]):
        expected = denoise(unet)
        unet.disable_adapters()
        assert torch.equal(denoise(unet), base) and not torch.equal(expected, base)
        unet.enable_adapters()
        assert torch.equal(denoise(unet), expected)
    unet.save_lora_adapter(tmp_path)
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(stored) == trained(unet)
    again = make_unet()
    again.add_adapter(config)
    result = peft.set_peft_model_state_dict(again, stored)
    assert not result.unexpected_keys
    with slidelora.gates(again, ["text", "image"]):
        assert torch.equal(denoise(again), expected)


def test_a_unet_refuses_a_scale() -> None:
    unet = make_unet()
    unet.add_adapter(SlideLoRAPeftConfig(r=2, gate="given", target_modules=["to_q", "to_v"]))
    randomise(unet)
    with slidelora.gates(unet, ["text", "image"]):
        expected = denoise(unet)
        unet.set_adapters("default")
        assert torch.equal(denoise(unet), expected)
        assert torch.equal(denoise(unet, cross_attention_kwargs={"scale": 1.0}), expected)
        with pytest.raises(ValueError, match=r"scale is 0\.5, expected 1: .*slidelora\.gates"):
            unet.set_adapters("default", 0.5)
        for scale in (0.5, 0.0):
            with pytest.raises(ValueError, match=rf"scale is {scale}, expected 1"):
                denoise(unet, cross_attention_kwargs={"scale": scale})
        assert torch.equal(denoise(unet), expected)


def test_merge_and_unload(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    model = make_peft()
    with pytest.raises(ValueError, match="expected constant gates"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="may state default_gates"):
        model.merge_adapter()
    with slidelora.gates(model, "text"):
        expected = model(input_ids).logits
    merged = model.merge_and_unload(gates="text")
    assert_close(merged(input_ids).logits, expected)
    assert merged.state_dict().keys() == make_base().state_dict().keys() and not hasattr(merged, "peft_config")


def test_default_gates_act_where_none_are_given(
    make_base: Make, make_peft: Any, input_ids: Tensor, tmp_path: Path
) -> None:
    weights = {"text": 0.75, "image": 0.5}
    model = make_peft(gate="given", default_gates=weights)
    with slidelora.gates(model, weights):
        expected = model(input_ids).logits
    assert torch.equal(model(input_ids).logits, expected)
    assert torch.equal(slidelora.routing(model).weights, torch.tensor([[0.75, 0.5, 0.0]]).expand(len(input_ids), 3))
    with slidelora.gates(model, "image"):
        assert not torch.equal(model(input_ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(input_ids).logits, expected)
    model.save_pretrained(tmp_path / "peft")
    slidelora.save_pretrained(model, tmp_path / "own")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "peft")
    own = slidelora.load_pretrained(make_base(), tmp_path / "own")
    for other in (loaded, own):
        assert torch.equal(other(input_ids).logits, expected)
    slidelora.add_expert(own, "layout")
    assert_close(own(input_ids).logits, expected)  # a new expert counts nothing where the weights do not name it
    assert_close(slidelora.merge(own)(input_ids).logits, expected)
    assert_close(loaded.merge_and_unload()(input_ids).logits, expected)


@pytest.mark.parametrize("weights", ["text", {"text": 0.5, "shared": 0.5}])
def test_merge_adapter_and_back(
    make_base: Make, make_peft: Any, input_ids: Tensor, tmp_path: Path, weights: Any
) -> None:
    model, base = make_peft(gate="given", default_gates=weights), make_base()(input_ids).logits
    before, expected = snapshot(model), model(input_ids).logits
    model.merge_adapter()
    merged = model(input_ids).logits
    assert_close(merged, expected)
    assert not is_unchanged(model, before) and model.get_model_status().merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(copy.deepcopy(model)(input_ids).logits, merged)
    with (
        slidelora.gates(model, "image"),
        pytest.raises(ValueError, match=r"is merged, expected no gates and .* call unmerge"),
    ):
        model(input_ids)
    with (
        slidelora.disabled(model),
        pytest.raises(ValueError, match=r"is merged, expected no .* slidelora.disabled: call unmerge"),
    ):
        model(input_ids)
    for call in (slidelora.merge, slidelora.remove):
        with pytest.raises(ValueError, match=r"is merged by PEFT, .* call unmerge_adapter\(\) first"):
            call(model)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert torch.equal(model(input_ids).logits, merged)
    model.unmerge_adapter()
    assert is_unchanged(model, before) and torch.equal(model(input_ids).logits, expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, base)
    assert torch.equal(model(input_ids).logits, expected)
    model.merge_adapter()
    plain = copy.deepcopy(model).unload()
    assert torch.equal(plain(input_ids).logits, base)
    assert_close(model.merge_and_unload()(input_ids).logits, expected)


def test_a_merge_that_fails_changes_nothing(make_peft: Any, input_ids: Tensor) -> None:
    model = make_peft(gate="given", default_gates="text")
    last = [module for module in model.modules() if isinstance(module, BaseTunerLayer)][-1]
    with torch.no_grad():
        last.lora_B.fill_(torch.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_B" not in name}
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            call()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


def test_modules_to_save_train_and_are_saved(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    config = SlideLoRAPeftConfig(
        gate="given",
        default_gates="text",
        target_modules=["q_proj", "gate_proj"],
        modules_to_save=["norm", "gate_proj"],
    )
    base = make_base()
    expected_base, before = base(input_ids).logits, snapshot(base)
    model = randomise(get_peft_model(base, config)).eval()
    assert not any("gate_proj.lora" in name for name in trained(model))
    assert "model.norm.modules_to_save.default.weight" in trained(model)
    assert not any("original_module" in name for name in trained(model))
    expected = model(input_ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, expected_base)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"] is None
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(input_ids).logits, expected) and trained(loaded) == trained(model)
    assert_close(loaded.merge_and_unload()(input_ids).logits, expected)
    assert is_unchanged(model.unload(), before)


def test_a_classifier_gets_its_head(tmp_path: Path, make_base: Make, input_ids: Tensor) -> None:
    make_base().save_pretrained(tmp_path / "base")

    def classifier() -> nn.Module:
        torch.manual_seed(1)
        found = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        found.config.pad_token_id = 0
        return found.eval()

    model = get_peft_model(classifier(), SlideLoRAPeftConfig(r=4, task_type="SEQ_CLS"))
    assert "score.modules_to_save.default.weight" in trained(model) and "score.lora_A" not in trained(model)
    expected = randomise(model).eval()(input_ids=input_ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=input_ids).logits, expected)


def test_conversion_to_plain_lora(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    targets = ["q_proj", "up_proj"]
    model = make_peft(gate="given", default_gates="text", target_modules=targets)
    expected = model(input_ids).logits
    config, stored = peft.convert_to_lora(model, rank=8)  # text and shared have rank 4 each
    lora = get_peft_model(make_base(), config).eval()
    peft.set_peft_model_state_dict(lora, stored)
    assert_close(lora(input_ids).logits, expected)
    assert not make_peft(gate="given").supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(make_peft(), rank=8)


def test_hotswapping_is_refused(make_peft: Any, tmp_path: Path) -> None:
    model = make_peft()
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"expected load_adapter\(path, name\) for a Slide-LoRA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert is_unchanged(model, before)
    parameters = dict(model.named_parameters())
    randomise(model)
    model.load_adapter(tmp_path, "default")
    assert is_unchanged(model, before) and all(parameters[name] is one for name, one in model.named_parameters())
    lora = get_peft_model(LlamaForCausalLM(model.config), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    hotswap_adapter(lora, tmp_path / "lora", adapter_name="default")


@pytest.mark.parametrize("off", [lambda model: slidelora.merge(model, gates="text"), slidelora.remove])
def test_a_merged_or_removed_adapter_is_not_saved(make_peft: Any, tmp_path: Path, off: Any) -> None:
    model = make_peft()
    off(model)
    with pytest.raises(ValueError, match=r"slidelora\.unmerge|holds 0 injected models"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_adapter_names_are_refused(make_peft: Any, input_ids: Tensor) -> None:
    model = make_peft(task_type="CAUSAL_LM")
    expected = model(input_ids=input_ids).logits
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names is \['__base__', .* expected None.*slidelora\.gates"):
            call(input_ids=input_ids, adapter_names=["__base__", "default", "default"])
    assert torch.equal(model(input_ids=input_ids).logits, expected)


@pytest.mark.usefixtures("transformers_adapters")
def test_other_bad_calls_are_named(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    base = make_base()
    before = snapshot(base)
    with pytest.raises(ValueError, match="matches no module"):
        get_peft_model(base, SlideLoRAPeftConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"modules_to_save is \['score'\], expected ends of names of modules"):
        get_peft_model(base, SlideLoRAPeftConfig(modules_to_save=["score"]))
    assert is_unchanged(base, before) and not hasattr(base, "peft_config")
    model = make_peft()
    expected = model(input_ids).logits
    with pytest.raises(ValueError, match=r"other does not exist"):
        model.delete_adapter("other")
    plain = make_base()
    plain.add_adapter(SlideLoRAPeftConfig(r=4))
    with pytest.raises(ValueError, match=r"see slidelora.remove"):
        plain.delete_adapter("default")
    with pytest.raises(ValueError, match=r"adapter 'other' does not exist, expected one of \['default'\]"):
        model.base_model.set_adapter("other")
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored, key: stored.pop(key), r"lacks base_model\.model\..*lora_A and 0 more"),
        (lambda stored, key: stored.update(other=torch.ones(1)), "has other and 0 more"),
        (lambda stored, key: stored.update({key: torch.ones(3, 4)}), r"shape \(3, 4\), expected \(12, 32\)"),
    ],
)
def test_a_file_that_does_not_fit_loads_nothing(make_peft: Any, tmp_path: Path, change: Any, message: str) -> None:
    model = make_peft()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored = {name: tensor + 1 for name, tensor in stored.items()}
    change(stored, "base_model.model.model.layers.1.self_attn.q_proj.lora_A")
    save_file(stored, tmp_path / "adapter_model.safetensors")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert is_unchanged(model, before)


def test_copies_and_the_weights_of_the_base(make_base: Make, make_peft: Any, input_ids: Tensor) -> None:
    model = make_peft(frozen=["text"])
    expected = model(input_ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids).logits, expected)
        with other.disable_adapter():
            assert not torch.equal(other(input_ids).logits, expected)
            assert torch.equal(model(input_ids).logits, expected)
        slidelora.freeze(other, [])
        assert other.peft_config["default"].to_dict()["frozen"] == []
        assert model.peft_config["default"].to_dict()["frozen"] == ["text"]
    found, base = peft.utils.save_and_load.get_base_model_state_dict(model), make_base().state_dict()
    assert found.keys() == base.keys() and all(torch.equal(found[name], base[name]) for name in base)


def test_activation_checkpointing_is_exact(make_peft: Any, input_ids: Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        model = make_peft(task_type="CAUSAL_LM").train()
        if checkpointing:
            model.gradient_checkpointing_enable(slidelora.checkpoint_kwargs(model))
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items()) and grads[0]


def test_another_version_of_peft_is_named() -> None:
    code = (
        "from peft.tuners.tuners_utils import BaseTuner\n"
        "del BaseTuner._remap_adapter_state_dict_for_load\n"
        "import slidelora.peft"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, message = failed.stderr.strip().splitlines()
    assert message.startswith(f"ImportError: peft is {peft.__version__}, expected peft>=0.21 (tested: ")
    assert "_remap_adapter_state_dict_for_load" in message
