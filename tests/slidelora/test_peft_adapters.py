"""Several Slide-LoRAs by name on one model."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_hosts
import torch
from closeness import assert_close
from injected_models import is_unchanged, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import slidelora
from slidelora.peft import SlideLoRAPeftConfig

Make = Callable[..., LlamaForCausalLM]
GIVEN: dict[str, Any] = {"gate": "given", "default_gates": "text", "r": 4}
# Adapters that differ in experts, ranks, targets and the kind of gate.
OTHERS: dict[str, dict[str, Any]] = {
    "sequence": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "token": {"gate": "token", "experts": ["x", "y"], "shared": ["y"], "target_modules": ["v_proj"]},
    "given": {**GIVEN, "r": 2, "target_modules": ["q_proj", "up_proj"], "experts": ["a", "b"], "default_gates": "a"},
    "ranks": {"r": {"text": 2, "image": 4, "shared": 3}, "frozen": ["image"]},
}


def randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    slidelora.freeze(model, slidelora.routing(model).config.frozen)  # makes the padding of smaller ranks zero again


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def make_two(make_base: Make) -> Callable[..., PeftModel]:
    """Make a PeftModel with the random adapters "default", which acts, and "other"."""

    def make(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> PeftModel:
        torch.manual_seed(2)
        model = get_peft_model(make_base(), SlideLoRAPeftConfig(**(first or {"r": 4}))).eval()
        randomise(model)
        model.add_adapter("other", SlideLoRAPeftConfig(**(second or OTHERS["sequence"])))
        model.set_adapter("other")
        randomise(model)
        model.set_adapter("default")
        return model

    return make


@pytest.mark.parametrize("other", OTHERS)
def test_each_adapter_acts_as_if_alone(
    make_base: Make, make_two: Any, input_ids: Tensor, tmp_path: Path, other: str
) -> None:
    model = make_two(second=OTHERS[other])
    model.save_pretrained(tmp_path)
    folders = {"default": tmp_path, "other": tmp_path / "other"}
    expected = {}
    for name, folder in folders.items():
        alone = PeftModel.from_pretrained(make_base(), folder, is_trainable=True).eval()
        expected[name] = logits(alone, input_ids)
        model.set_adapter(name)
        assert torch.equal(logits(model, input_ids), expected[name])
        assert trained(model) == trained(alone) and model.active_adapters == [name]
        assert slidelora.routing(model).config == slidelora.routing(alone).config
        state = model.state_dict()
        for key, tensor in alone.state_dict().items():
            assert torch.equal(state[key], tensor)
    assert not torch.equal(expected["default"], expected["other"])
    base = logits(make_base(), input_ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), base)
        model.set_adapter("default")
        assert torch.equal(logits(model, input_ids), base)
    assert torch.equal(logits(model, input_ids), expected["default"])
    loaded = PeftModel.from_pretrained(make_base(), folders["other"], adapter_name="other")
    loaded.load_adapter(folders["default"], "default", low_cpu_mem_usage=True)
    for name in ("other", "default", "other"):
        loaded.set_adapter(name, inference_mode=True)
        assert torch.equal(logits(loaded, input_ids), expected[name]) and not trained(loaded)


def test_one_adapter_has_no_other_names(make_base: Make, make_two: Any) -> None:
    alone, two = get_peft_model(make_base(), SlideLoRAPeftConfig(r=4)), make_two()
    names = set(alone.state_dict())
    assert names == {f"base_model.model.{name}" for name in slidelora.inject(make_base(), r=4).state_dict()}
    resting = {name.partition(".slide_adapters.other.")[2] for name in set(two.state_dict()) - names}
    q_proj = {f"model.layers.{layer}.self_attn.q_proj.lora_{letter}" for layer in (0, 1) for letter in "AB"}
    assert q_proj < resting and len(resting) == 2 * 4 + 4
    two.delete_adapter("other")
    assert set(two.state_dict()) == names


def test_a_step_trains_the_active_adapter_only(make_two: Any, input_ids: Tensor) -> None:
    model = make_two().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name in ("default", "other"):
        model.set_adapter(name)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert changed and changed <= trained(model) and not any("slide_adapters" in key for key in changed)


def test_a_new_adapter_rests_and_changes_nothing(make_base: Make, make_two: Any, input_ids: Tensor) -> None:
    model = make_two()
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)  # a user trains more of the base
    expected, before = logits(model, input_ids), trained(model)
    model.add_adapter("third", SlideLoRAPeftConfig(gate="token"))
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert torch.equal(logits(model, input_ids), expected) and trained(model) == before
    model.set_requires_grad("third")
    third = trained(model) - before
    assert third and all(".slide_adapters.third." in name for name in third)
    model.set_requires_grad(["default", "third"], False)
    assert trained(model) == {"base_model.model.model.norm.weight"}
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other", "third"] and status.active_adapters == ["default"]
    plain = model.unload()
    assert is_unchanged(plain, snapshot(make_base())) and len(trained(plain)) == len(list(plain.parameters()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_adapters_of_their_own(make_two: Any, input_ids: Tensor, duplicate: Any) -> None:
    model = make_two(second=OTHERS["token"])
    expected = logits(model, input_ids)
    other = duplicate(model)
    other.set_adapter("other")
    assert not torch.equal(logits(other, input_ids), expected)
    assert torch.equal(logits(model, input_ids), expected) and model.active_adapters == ["default"]
    part = copy.deepcopy(model.base_model.model.model.layers[0])
    assert sum(one.numel() for one in part.parameters()) < sum(one.numel() for one in model.parameters()) / 2


@pytest.mark.usefixtures("transformers_adapters")
@pytest.mark.parametrize("second", ["sequence", "token"])
def test_models_of_transformers(
    make_base: Make, make_two: Any, input_ids: Tensor, tmp_path: Path, second: str, capfd: Any
) -> None:
    two = make_two(second=OTHERS[second])
    expected = {"default": logits(two, input_ids)}
    two.save_pretrained(tmp_path)
    two.set_adapter("other")
    expected["other"] = logits(two, input_ids)
    model = make_base()
    model.load_adapter(tmp_path)
    capfd.readouterr()
    model.load_adapter(tmp_path / "other", adapter_name="other")
    assert "MISSING" not in "".join(capfd.readouterr())
    assert model.active_adapters() == ["other"]
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model, input_ids), expected[name])
        assert trained(model) and not any("slide_adapters" in one for one in trained(model))
    model.disable_adapters()
    assert torch.equal(logits(model, input_ids), logits(make_base(), input_ids))
    model.enable_adapters()
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapters() == ["default"] == list(model.peft_config)
    assert torch.equal(logits(model, input_ids), expected["default"])
    model.add_adapter(SlideLoRAPeftConfig(r=2), "new")
    assert model.active_adapters() == ["new"]
    model.save_pretrained(tmp_path / "new")
    assert all(one.shape[0] in (6, 3, 64) or "lora_B" in name for name, one in load_file(
        tmp_path / "new" / "adapter_model.safetensors").items())  # fmt: skip


def test_a_unet() -> None:
    torch.manual_seed(1)
    unet, inputs = tiny_hosts.unet()
    config = {"r": 2, "gate": "given", "default_gates": "text"}

    def denoise() -> Tensor:
        with torch.no_grad():
            return unet(**inputs).sample

    unet.eval().add_adapter(SlideLoRAPeftConfig(**config, target_modules=["to_q", "to_v"]))
    randomise(unet)
    first = denoise()
    unet.add_adapter(SlideLoRAPeftConfig(**config, target_modules=["to_k", "to_v"]), "other")
    assert unet.active_adapters() == ["other"]
    randomise(unet)
    second = denoise()
    unet.set_adapters("default")
    assert torch.equal(denoise(), first) and not torch.equal(first, second)
    unet.set_adapter("other")
    assert torch.equal(denoise(), second)
    with pytest.raises(ValueError, match="expected one, since a Slide-LoRA acts alone"):
        unet.set_adapters(["default", "other"])
    assert torch.equal(denoise(), second)
    unet.fuse_lora()
    assert_close(denoise(), second)
    unet.unfuse_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.delete_adapters("other")
    assert torch.equal(denoise(), first)


@pytest.mark.parametrize("fields", [{"gate": "token"}, OTHERS["ranks"], {**GIVEN, "r": 2}])
def test_the_reference_of_trl_is_a_copy(make_base: Make, input_ids: Tensor, fields: dict[str, Any]) -> None:
    """As DPOTrainer does it; an adapter of another name starts at zero."""
    config = SlideLoRAPeftConfig(**fields)
    model = get_peft_model(make_base(), config).eval()
    plain = logits(model, input_ids)
    randomise(model)
    expected = logits(model, input_ids)
    model.add_adapter("ref", config)
    model.add_adapter("next", config)
    assert torch.equal(logits(model, input_ids), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model, input_ids), expected)
    randomise(model)
    model.set_adapter("default")
    assert torch.equal(logits(model, input_ids), expected)
    model.set_adapter("next")
    assert torch.equal(logits(model, input_ids), plain)


def test_two_models_of_peft_share_a_base(make_base: Make, make_two: Any, input_ids: Tensor, tmp_path: Path) -> None:
    two = make_two()
    first = logits(two, input_ids)
    two.save_pretrained(tmp_path)
    base = make_base()
    a = PeftModel.from_pretrained(base, tmp_path, "a")
    b = PeftModel.from_pretrained(base, tmp_path / "other", "b")
    assert a.active_adapters == b.active_adapters == ["b"]
    assert not torch.equal(logits(a, input_ids), first)
    a.set_adapter("a")
    assert b.active_adapters == ["a"] and torch.equal(logits(b, input_ids), first)
    config = b.peft_config["a"]
    with pytest.raises(ValueError, match=r"the model has an adapter 'a', expected another name"):
        PeftModel.from_pretrained(base, tmp_path / "other", "a")
    assert b.peft_config["a"] is config and torch.equal(logits(a, input_ids), first)


def test_merging_several(make_base: Make, make_two: Any, input_ids: Tensor) -> None:
    model = make_two(GIVEN, OTHERS["given"])
    base, before = make_base(), snapshot(model)
    outputs = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        outputs[name] = logits(model, input_ids)
        alone = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        assert_close(logits(alone, input_ids), outputs[name])
        assert alone.state_dict().keys() == base.state_dict().keys()
    path = "model.layers.0.self_attn.q_proj.weight"
    weight, q_proj = base.state_dict()[path], "base_model.model.model.layers.0.self_attn.q_proj"
    deltas = {}
    for name in outputs:
        model.set_adapter(name)
        deltas[name] = model.get_submodule(q_proj).get_delta_weight(name)
    both = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    assert_close(both.state_dict()[path], weight + deltas["default"] + deltas["other"])
    model.set_adapter("default")
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_close(logits(model, input_ids), logits(both, input_ids))
    assert model.get_model_status().merged_adapters == ["default", "other"]
    assert_close(logits(copy.deepcopy(model), input_ids), logits(both, input_ids))
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    assert is_unchanged(model, before) and torch.equal(logits(model, input_ids), outputs["default"])
    model.merge_adapter(["other", "default"])
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), logits(base, input_ids))
    assert torch.equal(logits(model, input_ids), outputs["default"]) and is_unchanged(model, before)
    model.merge_adapter(["other", "default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_adapter("other")
    assert torch.equal(logits(model, input_ids), outputs["other"])
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"adapters are \['other'\], expected the active one, 'default', too"):
        model.merge_adapter(["other"])
    assert is_unchanged(model, before)


def test_a_merge_that_fails_changes_nothing(make_two: Any, input_ids: Tensor) -> None:
    model = make_two(GIVEN, {**OTHERS["given"], "default_gates": None})
    before = snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="may state default_gates"):
            call(adapter_names=["default", "other"])
    assert is_unchanged(model, before)
    model = make_two(GIVEN, OTHERS["given"])
    with torch.no_grad():
        model.get_parameter("base_model.model.slide_adapters.other.model.layers.1.mlp.up_proj.lora_B").fill_(torch.nan)
    expected = logits(model, input_ids)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            call(adapter_names=["default", "other"])
        assert model.active_adapters == ["default"] and torch.equal(logits(model, input_ids), expected)
        assert model.get_model_status().merged_adapters == []


def test_modules_to_save_belong_to_an_adapter(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")

    def classifier() -> nn.Module:
        torch.manual_seed(1)
        found = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        found.config.pad_token_id = 0
        return found.eval()

    before = snapshot(classifier())
    model = get_peft_model(classifier(), SlideLoRAPeftConfig(**GIVEN, modules_to_save=["score"]))
    randomise(model.eval())
    expected = {"default": logits(model, input_ids)}
    second = {**GIVEN, "target_modules": ["q_proj", "score"]}  # experts on the layer that the other one saves
    model.add_adapter("other", SlideLoRAPeftConfig(**second))
    assert torch.equal(logits(model, input_ids), expected["default"])
    model.set_adapter("other")
    assert "base_model.model.score.lora_A" in trained(model) and not any("modules_to_save" in x for x in trained(model))
    randomise(model)
    expected["other"] = logits(model, input_ids)
    model.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapters" / "other").eval()
    assert torch.equal(logits(loaded, input_ids), expected["other"])
    loaded.load_adapter(tmp_path / "adapters", "head")
    loaded.set_adapter("head")
    assert torch.equal(logits(loaded, input_ids), expected["default"])
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded, input_ids), expected["other"])
    for name in ("default", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model, input_ids), expected[name])
    model.set_adapter("default")
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(logits(merged, input_ids), expected["default"])
    assert is_unchanged(model.unload(), before)


def test_what_one_adapter_saves_has_no_experts_of_another(make_base: Make, input_ids: Tensor) -> None:
    model = get_peft_model(make_base(), SlideLoRAPeftConfig(**GIVEN, target_modules=["up_proj"]))
    before, expected = snapshot(model), logits(model, input_ids)
    with pytest.raises(ValueError, match=r"modules_to_save has model\.layers\.0\.mlp, and adapter 'default' has"):
        model.add_adapter("other", SlideLoRAPeftConfig(**GIVEN, target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert is_unchanged(model, before) and list(model.peft_config) == ["default"]
    model = get_peft_model(
        make_base(), SlideLoRAPeftConfig(**GIVEN, target_modules=["q_proj"], modules_to_save=["mlp"])
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj is targeted, and another adapter saves"):
        model.add_adapter("other", SlideLoRAPeftConfig(**GIVEN, target_modules=["up_proj"]))
    assert is_unchanged(model, before) and torch.equal(logits(model, input_ids), expected)


def test_deleting(make_base: Make, make_two: Any, input_ids: Tensor) -> None:
    model = make_two()
    model.set_adapter("other")
    expected = logits(model, input_ids)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted. Setting active .* other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    assert torch.equal(logits(model, input_ids), expected)
    model.delete_adapter("other")
    assert model.active_adapters == [] and model.peft_config == {}
    assert is_unchanged(model.get_base_model() if model.peft_config else model.base_model.model, snapshot(make_base()))
    model.add_adapter("new", SlideLoRAPeftConfig(r=2))
    assert model.active_adapters == []  # as in PEFT, it acts once it is set
    assert torch.equal(model.base_model.model(input_ids).logits, logits(make_base(), input_ids))
    with pytest.raises(ValueError, match="is injected already"):
        slidelora.inject(model.base_model.model, r=2)
    model.set_adapter("new")
    assert model.active_adapters == ["new"] and len(trained(model)) == 2 * 14 + 4


def test_a_file_loads_into_its_adapter_only(make_two: Any, tmp_path: Path, input_ids: Tensor) -> None:
    model = make_two()
    model.save_pretrained(tmp_path)
    path = tmp_path / "other" / "adapter_model.safetensors"
    stored = load_file(path)
    before = snapshot(model)
    save_file({**stored, "base_model.model.model.layers.0.self_attn.v_proj.lora_A": torch.ones(12, 32)}, path)
    with pytest.raises(ValueError, match=r"the adapter has .*v_proj\.lora_A and 0 more, not expected"):
        model.load_adapter(path.parent, "other")
    assert is_unchanged(model, before)
    save_file({name: tensor + 1 for name, tensor in stored.items()}, path)
    model.load_adapter(path.parent, "other")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(stored) and all(".slide_adapters.other." in name for name in changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [True, False])
def test_dtypes_are_those_of_peft_lora(make_base: Make, dtype: torch.dtype, cast: bool) -> None:
    model = get_peft_model(make_base().to(dtype), SlideLoRAPeftConfig(), autocast_adapter_dtype=cast)
    for name, gate in (("other", "sequence"), ("third", "token")):
        model.add_adapter(name, SlideLoRAPeftConfig(gate=gate), autocast_adapter_dtype=cast)
    expected = torch.float32 if cast and dtype == torch.float16 else dtype
    resting = [parameter for name, parameter in model.named_parameters() if "slide_adapters" in name]
    assert {parameter.dtype for parameter in resting} == {expected}
    model.set_adapter("third")
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {expected}


def test_functions_of_slidelora_are_for_the_active_adapter(
    make_base: Make, make_two: Any, input_ids: Tensor, tmp_path: Path
) -> None:
    model = make_two(second=OTHERS["sequence"])
    before = {name: one for name, one in snapshot(model).items() if "slide_adapters" in name}
    slidelora.add_expert(model, "layout")
    slidelora.freeze(model, ["text"])
    expected = logits(model, input_ids)
    slidelora.save_pretrained(model, tmp_path / "own")
    assert torch.equal(logits(slidelora.load_pretrained(make_base(), tmp_path / "own"), input_ids), expected)
    state = model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in before.items())
    model.set_adapter("other")
    assert slidelora.routing(model).names == ("text", "image", "shared")
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "peft")
    assert torch.equal(logits(loaded, input_ids), expected)
    assert peft.PeftConfig.from_pretrained(tmp_path / "peft" / "other").frozen == ()
    with slidelora.gates(model, "layout"):
        merged = logits(model, input_ids)
    slidelora.merge(model, gates="layout")
    assert_close(logits(model, input_ids), merged)
    with pytest.raises(ValueError, match=r"slidelora\.unmerge"):
        model.set_adapter("other")
    slidelora.unmerge(model)
    assert torch.equal(logits(model, input_ids), expected)
    base = slidelora.remove(model)
    assert is_unchanged(base.base_model.model, snapshot(make_base()))


def test_bad_calls_are_named(make_base: Make, make_two: Any, input_ids: Tensor) -> None:
    model = make_two(GIVEN, OTHERS["given"])
    before, expected, trains = snapshot(model), logits(model, input_ids), trained(model)
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.base_model.set_adapter(["default", "other"]), "expected one, since a Slide-LoRA acts alone"),
        (lambda: model.base_model.set_adapter([]), r"adapters are \[\], expected one"),
        (lambda: model.base_model.set_adapter("third"), r"'third' does not exist, expected one of \['default', 'oth"),
        (lambda: model.set_requires_grad("third"), "'third' does not exist"),
        (lambda: model.merge_adapter(["third"]), "'third' does not exist"),
        (lambda: model.merge_and_unload(adapter_names=["third"]), "'third' does not exist"),
        (lambda: model(input_ids=input_ids, adapter_names=["other"] * 3), "adapter_names is .* expected None"),
        (lambda: peft.convert_to_lora(model, rank=8), r"has adapters \['default', 'other'\], expected 'default' only"),
        (lambda: model.add_adapter("bad", SlideLoRAPeftConfig(target_modules=["query"])), "matches no module"),
        (lambda: model.add_adapter("bad", SlideLoRAPeftConfig(modules_to_save=["no"])), "expected ends of names"),
        (lambda: model.add_adapter("mlp", SlideLoRAPeftConfig(**GIVEN)), "adapter name is 'mlp', which is also in"),
        (lambda: model.add_adapter("0", SlideLoRAPeftConfig(**GIVEN)), "adapter name is '0'"),
        (lambda: model.add_adapter("a.b", SlideLoRAPeftConfig(**GIVEN)), "adapter name is 'a.b'"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
        assert is_unchanged(model, before) and trained(model) == trains
        assert list(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]
    assert torch.equal(logits(model, input_ids), expected) and not model.supports_lora_conversion()
    model.delete_adapter("other")
    assert model.supports_lora_conversion() and peft.convert_to_lora(model, rank=8)


@pytest.mark.usefixtures("transformers_adapters")
@pytest.mark.parametrize("onto", ["lora", "slide"])
def test_another_method_is_refused(make_base: Make, onto: str) -> None:
    model, lora = make_base(), LoraConfig(r=2, target_modules=["q_proj"])
    if onto == "lora":
        model.add_adapter(lora, "lora")
        before = snapshot(model)
        for call in (
            lambda: model.add_adapter(SlideLoRAPeftConfig()),
            lambda: get_peft_model(model, SlideLoRAPeftConfig()),
        ):
            with pytest.raises(ValueError, match=r"has adapters \['lora'\] of another method, expected none or Slide"):
                call()
        assert is_unchanged(model, before) and set(model.peft_config) == {"lora"}
    else:
        model.add_adapter(SlideLoRAPeftConfig())
        with pytest.raises(ValueError, match=r"share the model with no other method of PEFT"):
            model.add_adapter(lora, "lora")
