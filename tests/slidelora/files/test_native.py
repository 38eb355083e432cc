import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import drop_metadata
from injected_models import is_unchanged, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import slidelora
from slidelora.files import native
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]


@pytest.fixture
def saved(make_model: Make, tmp_path: Path) -> Path:
    slidelora.save_pretrained(make_model(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("gate", ["sequence", "given"])
def test_round_trip_is_exact(make_model: Make, make_base: Make, tmp_path: Path, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate, target_modules=["q_proj", "up_proj"])
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(base := make_base(), tmp_path)
    assert loaded is base
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    with slidelora.gates(model, "text"), slidelora.gates(loaded, "text"):
        assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)


def test_round_trip_of_different_ranks(make_model: Make, make_base: Make, tmp_path: Path, input_ids: Tensor) -> None:
    model = make_model(
        r={"text": 2, "image": 5, "shared": 1}, rank_pattern={"o_proj": 3}, lora_alpha=5, adapter_dtype="bfloat16"
    )
    for layer in slide_layers(model).values():  # make_model filled the rows of padding, too
        for index, rank in enumerate(layer.ranks):
            layer.lora_A.detach().view(3, layer.r, -1)[index, rank:] = 0
            layer.lora_B.detach().view(3, layer.r, -1)[index, rank:] = 0
    slidelora.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn."
    assert tensors[f"{key}q_proj.lora_A.image.weight"].shape == (5, 32)
    assert tensors[f"{key}o_proj.lora_B.text.weight"].shape == (32, 3)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    for name, parameter in model.named_parameters():
        assert (
            torch.equal(parameter, loaded.get_parameter(name)) and parameter.dtype == loaded.get_parameter(name).dtype
        )


def test_round_trip_of_groups(make_model: Make, make_base: Make, tmp_path: Path, input_ids: Tensor) -> None:
    model = make_model(experts={"text": 2, "image": ["layout", "glyph"], "shared": 1})
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    for gate in ("image", ["text", "glyph", "layout"], {"text": 1, "shared": -1}):
        with slidelora.gates(model, gate), slidelora.gates(loaded, gate):
            assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)


def test_files_contain_the_adapter_only(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == 14 * 3 * 2 + 4
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    assert tensors[f"{key}A.text.weight"].shape == (4, 32) and tensors[f"{key}B.text.weight"].shape == (48, 4)
    assert json.loads((saved / "adapter_config.json").read_text())["experts"] == ["text", "image", "shared"]


def fails(make_base: Make, path: Path, error: type[Exception], message: str, **changes: Any) -> None:
    model = make_base(**changes)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        slidelora.load_pretrained(model, path)
    assert not slide_layers(model) and is_unchanged(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"shape \(4, 32\), expected \(8, 32\).* r=8"),
        ({"experts": ["text", "audio", "shared"]}, "lacks .*audio.*expected them for experts"),
        ({"experts": ["text", "shared"]}, "has .*image.*not expected"),
        ({"target_modules": ["q_proj"]}, "has .*down_proj.*not expected"),
        ({"gate": "given"}, "has .*slidelora_gate.*not expected"),
        ({"r": -1}, "not a Slide-LoRA configuration: r is -1"),
        ({"peft_type": "LORA"}, r"unknown \['peft_type'\]"),
    ],
)
def test_a_configuration_that_does_not_fit(make_base: Make, saved: Path, change: dict[str, Any], message: str) -> None:
    drop_metadata(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **change}))
    fails(make_base, saved, ValueError, message)


def test_a_base_that_does_not_fit(make_base: Make, saved: Path) -> None:
    fails(make_base, saved, ValueError, r"expected \(4, 64\)", hidden_size=64)
    fails(make_base, saved, ValueError, r"lacks .*layers\.2\.", num_hidden_layers=3)
    fails(make_base, saved, ValueError, r"has .*layers\.1\..*not expected", num_hidden_layers=1)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(make_base: Make, saved: Path, length: int) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    fails(make_base, saved, ValueError, "adapter_model.safetensors is not a complete safetensors file")


def test_files_with_other_content(make_base: Make, saved: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, saved / "adapter_model.safetensors")
    fails(make_base, saved, ValueError, "is not a complete safetensors file")
    save_file({"x": torch.ones(2)}, saved / "adapter_model.safetensors")
    fails(make_base, saved, ValueError, "lacks base_model.*")
    (saved / "adapter_config.json").write_text("[1]")
    fails(make_base, saved, ValueError, "a list, expected an object")
    (saved / "adapter_config.json").write_text("{")
    fails(make_base, saved, ValueError, "adapter_config.json is not JSON")
    fails(make_base, tmp_path / "nowhere", FileNotFoundError, "has no adapter_model.safetensors")


@pytest.mark.parametrize("stop", ["weights", "first replace", "second write", "second replace"])
def test_an_interrupted_save_leaves_a_complete_adapter(
    make_model: Make, make_base: Make, saved: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_model(r=2, experts=["a", "b"], shared=[])
    calls = []

    def stopping(name: str, function: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if calls.count(name) == at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    if stop == "weights":
        monkeypatch.setattr(native, "save_file", stopping("save", save_file, 1))
    elif stop == "second write":
        monkeypatch.setattr(native.os, "fsync", stopping("fsync", os.fsync, 2))
    else:
        monkeypatch.setattr(native.os, "replace", stopping("replace", os.replace, 1 if stop == "first replace" else 2))
    with pytest.raises(KeyboardInterrupt):
        slidelora.save_pretrained(other, saved)
    monkeypatch.undo()
    loaded = slidelora.load_pretrained(make_base(), saved)
    complete = other if stop == "second replace" else make_model()
    assert all(torch.equal(parameter, complete.get_parameter(name)) for name, parameter in loaded.named_parameters())
    assert len(list(saved.iterdir())) == 2
    slidelora.save_pretrained(other, saved)
    slidelora.load_pretrained(make_base(), saved)


def test_saving_over_a_damaged_adapter(make_model: Make, make_base: Make, saved: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (saved / name).write_bytes(b"\xff")
    slidelora.save_pretrained(make_model(), saved)
    slidelora.load_pretrained(make_base(), saved)


def test_loading_onto_the_meta_device_is_refused(make_base: Make, saved: Path) -> None:
    base = make_base().to("meta")
    with pytest.raises(
        ValueError, match="q_proj is on the meta device, expected weights: load those of the base model"
    ):
        slidelora.load_pretrained(base, saved)
    assert not slide_layers(base)
    slidelora.export_peft(slidelora.load_pretrained(make_base(), saved), saved / "peft", gates="text")
    with pytest.raises(ValueError, match="is on the meta device, expected weights"):
        slidelora.import_peft(base, {"text": saved / "peft"})


def test_loading_onto_an_injected_model(make_model: Make, saved: Path) -> None:
    with pytest.raises(ValueError, match="expected a plain model"):
        slidelora.load_pretrained(make_model(), saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gate", ["sequence", "token", "given"])
def test_a_flipped_bit_is_noticed(
    make_model: Make, make_base: Make, tmp_path: Path, gate: str, dtype: torch.dtype
) -> None:
    model = make_model(gate=gate, adapter_dtype=str(dtype).removeprefix("torch."), target_modules=["q_proj"])
    slidelora.save_pretrained(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    slidelora.load_pretrained(make_base(), tmp_path)
    for offset in (1, 300, 1000):
        content = bytearray(whole)
        content[-offset] ^= 1
        path.write_bytes(content)
        fails(make_base, tmp_path, ValueError, "has base_model.* with other bytes than were saved, expected a file wi")


def test_weights_of_other_programs_have_no_digests(make_base: Make, saved: Path) -> None:
    slidelora.load_pretrained(make_base(), drop_metadata(saved))


def test_another_configuration_than_at_the_save_is_refused(make_model: Make, make_base: Make, saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    for content in (
        json.dumps(values | {"lora_alpha": 17}, indent=2),
        json.dumps(values | {"top_k": 1}, indent=2),
        json.dumps(values),
    ):
        path.write_text(content)
        fails(
            make_base, saved, ValueError, r"adapter_config\.json is not the one that .* copy or save the adapter again"
        )
    slidelora.save_pretrained(make_model(), saved)
    slidelora.load_pretrained(make_base(), saved)


def test_weights_of_another_adapter_are_refused(make_model: Make, make_base: Make, saved: Path, tmp_path: Path) -> None:
    slidelora.save_pretrained(make_model(lora_alpha=8), tmp_path / "other")  # the shapes are the same
    os.replace(tmp_path / "other" / "adapter_model.safetensors", saved / "adapter_model.safetensors")
    fails(
        make_base, saved, ValueError, r"adapter_config\.json is not the one that adapter_model\.safetensors was saved"
    )


def test_a_configuration_with_a_name_twice_is_refused(make_base: Make, saved: Path) -> None:
    path = drop_metadata(saved) / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"lora_alpha": 1,', 1))
    fails(make_base, saved, ValueError, "adapter_config.json is not JSON: 'lora_alpha' is there twice")


def test_flipped_metadata_are_refused(make_base: Make, saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    for old, new in ((b"sha256 base", b"sha257 base"), (b'"sha256":', b'"sha356":'), (b'"replaces"', b'"replacer"')):
        path.write_bytes(whole.replace(old, new, 1))
        fails(
            make_base, saved, ValueError, r"adapter_model\.safetensors has other metadata than were saved, expected a f"
        )


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(make_model: Make, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        slidelora.save_pretrained(make_model(), tmp_path / "own")
        slidelora.export_peft(make_model(), tmp_path / "peft", gates="text")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*/*")}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", ["sequence", "token", "given"])
def test_weights_that_are_not_finite_are_refused(
    make_model: Make, make_base: Make, tmp_path: Path, number: float, gate: str
) -> None:
    for part in ("lora_A", "lora_B", "gate"):
        model = make_model(gate=gate)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and part in name]
        if names:
            model.get_parameter(names[-1]).detach().flatten()[-1] = number
            slidelora.save_pretrained(model, tmp_path)
            fails(make_base, tmp_path, ValueError, f"has base_model.*{part}.* with NaN or infinite weights, expected")
