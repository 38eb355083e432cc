from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]
KEY = "mm_decoder.layers.0.self_attn.q_proj.lora_moe_A.default"


def released(base: LlamaForCausalLM, r: int = 5) -> dict[str, Tensor]:
    """Make a checkpoint in the released layout for a tiny Llama, with keys of other parts of the system."""
    generator = torch.Generator().manual_seed(7)
    tensors = {"text_decoder.head.weight": torch.zeros(2, 2), "soi_token": torch.zeros(1, 32)}
    for index, layer in enumerate(base.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, key = layer.self_attn.get_submodule(name), f"mm_decoder.layers.{index}.self_attn.{name}"
            tensors[f"{key}.weight"] = linear.weight.detach().clone()
            for factor, shape in (("A", (3, linear.in_features, r)), ("B", (3, r, linear.out_features))):
                tensors[f"{key}.lora_moe_{factor}.default"] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def write_released(tensors: dict[str, Tensor], directory: Path, kind: str) -> Path | list[Path]:
    names = sorted(tensors)
    if kind == "safetensors":
        save_file(tensors, directory / "model.safetensors")
        return directory / "model.safetensors"
    if kind == "three files":
        paths = [directory / f"model-{part}.bin" for part in range(3)]
        for part, path in enumerate(paths):
            torch.save({name: tensors[name] for name in names[part::3]}, path)
        return paths
    torch.save(tensors, directory / "model.pt", _use_new_zipfile_serialization=kind == "pickle")
    return directory / "model.pt"


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "three files", "safetensors"])
@pytest.mark.parametrize("part", ["LlamaForCausalLM", "LlamaModel"])
def test_import_equals_the_released_formula(
    make_base: Make, input_ids: Tensor, tmp_path: Path, kind: str, part: str
) -> None:
    tensors = released(make_base())
    model = make_base() if part == "LlamaForCausalLM" else make_base().model
    report = slidelora.import_textharmony(model, write_released(tensors, tmp_path, kind))
    assert not report.missing
    assert sorted(report.unexpected) == sorted(key for key in tensors if "lora_moe" not in key)
    # The released code: y = W x + sum_e g_e x A_e B_e, with the experts in the order image, text, shared.
    for modality, gates in (("image", (0.5, 0, 0.5)), ("text", (0, 0.5, 0.5))):
        truth = make_base().model
        for index, layer in enumerate(truth.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                key = f"mm_decoder.layers.{index}.self_attn.{name}.lora_moe_"
                delta = torch.einsum(
                    "e,eir,ero->oi", torch.tensor(gates), tensors[f"{key}A.default"], tensors[f"{key}B.default"]
                )
                layer.self_attn.get_submodule(name).weight.data += delta
        with slidelora.gates(model, modality):
            hidden = getattr(model, "model", model)(input_ids).last_hidden_state
        assert relative_error(hidden, truth(input_ids).last_hidden_state) < 1e-5
        assert relative_error(make_base().model(input_ids).last_hidden_state, hidden) > 0.1


def test_missing_keys_are_reported(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    tensors = released(make_base())
    missing = [f"mm_decoder.layers.1.self_attn.q_proj.lora_moe_{factor}.default" for factor in "AB"]
    single = "mm_decoder.layers.0.self_attn.v_proj.lora_moe_B.default"
    torch.save({key: tensor for key, tensor in tensors.items() if key not in (*missing, single)}, tmp_path / "model.pt")
    model = make_base()
    assert slidelora.import_textharmony(model, tmp_path / "model.pt").missing == [single, *missing]
    plain = make_base()
    x = torch.randn(2, 3, 32)
    with slidelora.gates(model, "text"):
        for name in ("layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj"):
            assert torch.equal(model.model.get_submodule(name)(x), plain.model.get_submodule(name)(x))


class Opens:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "has none of mm_decoder.* and 15 more"),
        (lambda tensors: tensors.update(Q=Opens()), "is not a complete checkpoint"),
        (lambda tensors: tensors.update({KEY: [1]}), r"has \[1\] under mm_decoder"),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 2)}), r"has torch.float32 of shape \(3, 2\) under"),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 32, 5, dtype=torch.long)}), "has torch.int64 of shape"),
        (lambda tensors: tensors.update({KEY: torch.ones(2, 32, 5)}), r"\(2, 32, 5\), expected \(3, 32, 5\)"),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 5, 32)}), r"\(3, 5, 32\), expected \(3, 32, 5\)"),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 32, 6)}), r"\(3, 32, 6\), expected \(3, 32, 5\)"),
    ],
)
def test_a_file_that_does_not_fit(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = released(make_base())
    change(tensors)
    torch.save(tensors, tmp_path / "model.pt")
    model = make_base()
    with pytest.raises(ValueError, match=f"model.pt.*{message}"):
        slidelora.import_textharmony(model, tmp_path / "model.pt")
    assert not slide_layers(model) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "safetensors"])
def test_a_truncated_file(make_base: Make, tmp_path: Path, kind: str) -> None:
    path = write_released(released(make_base()), tmp_path, kind)
    assert isinstance(path, Path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path.name} is not a complete checkpoint"):
            slidelora.import_textharmony(make_base(), path)


def test_other_bad_imports_are_named(make_base: Make, tmp_path: Path) -> None:
    torch.save(released(make_base()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"has mm_decoder.*, which another file has, too"):
        slidelora.import_textharmony(make_base(), [tmp_path / "model.pt"] * 2)
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        slidelora.import_textharmony(make_base(), tmp_path / "nowhere")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has .* under \[\], expected them under one name"):
        slidelora.import_textharmony(gpt2, tmp_path / "model.pt")
    towers = nn.ModuleDict({"one": make_base(), "two": make_base()})
    with pytest.raises(ValueError, match=r"under \['one.model.', 'two.model.'\], expected them under one name"):
        slidelora.import_textharmony(towers, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"of shape \(3, 32, 5\), expected \(3, 64, 5\)"):
        slidelora.import_textharmony(make_base(hidden_size=64), tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(make_base: Make, tmp_path: Path, kind: str, number: float) -> None:
    tensors = released(make_base())
    name = sorted(tensors)[3]
    tensors[name].flatten()[-1] = number
    with pytest.raises(ValueError, match=f"has {name} with NaN or infinite weights, expected finite ones"):
        slidelora.import_textharmony(make_base(), write_released(tensors, tmp_path, kind))
