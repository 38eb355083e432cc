"""LoRA files with kohya's names, loaded by diffusers and by the rules of ComfyUI's loader."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
import transformers
from closeness import assert_close, relative_error
from safetensors.torch import load_file
from tiny_hosts import IDS, TEXT
from torch import Tensor, nn

import slidelora
from slidelora.injection import slide_layers

diffusers = pytest.importorskip("diffusers")
GATES = {"text": 0.7, "shared": -0.45}
SIZES: dict[str, dict[str, Any]] = {
    "uniform": {"r": 2, "lora_alpha": 6},
    "differing": {
        "r": {"text": 2, "image": 3, "shared": 1},
        "lora_alpha": 5,
        "rank_pattern": {"to_q": 3, "time_emb_proj": 4, "k_proj": 4, r".*layers\.1\..*fc1": {"text": 5}},
        "alpha_pattern": {"to_v": {"text": 9}, "fc2": 2},
        "use_rslora": True,
    },
}


def make_unet(xl: bool) -> nn.Module:
    torch.manual_seed(1)
    added: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, use_linear_projection=True, **(added if xl else {}),
    ).eval()  # fmt: skip


def make_text_encoder(second: bool = False) -> nn.Module:
    torch.manual_seed(2)
    kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**TEXT, projection_dim=8)).eval()


def denoise(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
    return unet(latents, torch.tensor([3, 900]), encoder_hidden_states=context, added_cond_kwargs=added).sample


def encode(encoder: nn.Module) -> Tensor:
    return encoder(IDS).last_hidden_state


def inject(model: nn.Module, **fields: Any) -> nn.Module:
    slidelora.inject(model, **{"gate": "given", **fields})
    for layer in slide_layers(model).values():
        for name in layer.names:
            nn.init.normal_(layer.expert(name).B, std=0.2)
    return model


def under_gates(model: nn.Module, gates: Any = GATES) -> Tensor:
    with slidelora.gates(model, gates), torch.no_grad():
        return denoise(model) if hasattr(model, "conv_in") else encode(model)


@pytest.mark.parametrize("sizes", SIZES)
def test_diffusers_loads_all_parts_of_a_pipeline(tmp_path: Path, sizes: str) -> None:
    unet, encoder = inject(make_unet(False), **SIZES[sizes]), inject(make_text_encoder(), **SIZES[sizes])
    slidelora.export_kohya({"lora_unet": unet, "lora_te": encoder}, tmp_path / "lora.safetensors", GATES)
    parts = make_text_encoder(), None, make_unet(False)
    pipeline = diffusers.StableDiffusionPipeline(None, *parts, None, None, None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert relative_error(denoise(make_unet(False)), under_gates(unet)) > 0.01
    assert relative_error(encode(make_text_encoder()), under_gates(encoder)) > 0.01
    assert_close(denoise(pipeline.unet), under_gates(unet))
    assert_close(encode(pipeline.text_encoder), under_gates(encoder))


def test_diffusers_loads_sdxl(tmp_path: Path) -> None:
    fields = {**SIZES["differing"], "exclude_modules": ["text_projection"]}
    models = {"lora_unet": inject(make_unet(True), **fields), "lora_te1": inject(make_text_encoder(), **fields)}
    models["lora_te2"] = inject(make_text_encoder(True), **{**fields, "lora_alpha": 8})
    slidelora.export_kohya(models, tmp_path / "lora.safetensors", GATES)
    parts = make_text_encoder(), make_text_encoder(True), None, None, make_unet(True), None
    pipeline = diffusers.StableDiffusionXLPipeline(None, *parts, add_watermarker=False)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert relative_error(denoise(make_unet(True)), under_gates(models["lora_unet"])) > 0.01
    assert_close(denoise(pipeline.unet), under_gates(models["lora_unet"]))
    assert_close(encode(pipeline.text_encoder), under_gates(models["lora_te1"]))
    assert_close(encode(pipeline.text_encoder_2), under_gates(models["lora_te2"]))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "fc1"], ["fc2"], r"encoder\.layers\.1\..*v_proj"])
def test_diffusers_loads_some_layers_of_a_text_encoder(tmp_path: Path, targets: Any) -> None:
    encoder = inject(make_text_encoder(), r=3, target_modules=targets)
    slidelora.export_kohya({"lora_te": encoder}, tmp_path / "lora.safetensors", GATES)
    pipeline = diffusers.StableDiffusionPipeline(
        None, make_text_encoder(), None, make_unet(False), None, None, None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_close(encode(pipeline.text_encoder), under_gates(encoder))


# The rules by which ComfyUI (comfy/lora.py of 2026) finds the LoRA of a layer: the layer's name in diffusers or in
# transformers with underscores, behind a prefix; for other layers the name in the original UNet. It multiplies
# alpha / rank in, takes 1 where alpha is missing, and reports keys that it does not know in its log only.
COMFYUI_UNET = r"""
    (down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.(
        proj_in | proj_out | transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0) | ff\.net\.(0\.proj|2))
    ) | (down_blocks\.\d+|up_blocks\.\d+|mid_block)\.resnets\.\d+\.time_emb_proj | time_embedding\.linear_[12]
"""
COMFYUI_CLIP = r"encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)"
COMFYUI_ORIGINAL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}


def comfyui_key(prefix: str, name: str) -> str | None:
    if name in COMFYUI_ORIGINAL:
        return f"{prefix}_{COMFYUI_ORIGINAL[name]}"
    if prefix == "lora_unet":
        return f"{prefix}_{name.replace('.', '_')}" if re.fullmatch(COMFYUI_UNET, name, re.VERBOSE) else None
    name = name.removeprefix("text_model.")
    known = re.fullmatch(COMFYUI_CLIP, name)
    return f"{prefix}_text_model_{name.replace('.', '_')}" if known else None


def load_like_comfyui(models: dict[str, nn.Module], path: Path) -> None:
    """Add a LoRA file to plain models."""
    tensors = load_file(path)
    for prefix, model in models.items():
        for name, module in model.named_modules():
            key = comfyui_key(prefix, name)
            if isinstance(module, nn.Linear) and f"{key}.lora_up.weight" in tensors:
                up, down = tensors.pop(f"{key}.lora_up.weight"), tensors.pop(f"{key}.lora_down.weight")
                module.weight.data += up @ down * (tensors.pop(f"{key}.alpha").item() / down.shape[0])
    assert not tensors, f"not loaded: {list(tensors)}"


@pytest.mark.parametrize("sizes", SIZES)
def test_comfyui_finds_every_layer(tmp_path: Path, sizes: str) -> None:
    fields = {**SIZES[sizes], "exclude_modules": ["text_projection"]}
    models = {
        "lora_unet": inject(make_unet(True), **fields),
        "lora_te1": inject(make_text_encoder(), target_modules=["k_proj"], **SIZES[sizes]),
        "lora_te2": inject(make_text_encoder(True), **fields),
    }
    slidelora.export_kohya(models, tmp_path / "lora.safetensors", GATES)
    plain = {"lora_unet": make_unet(True), "lora_te1": make_text_encoder(), "lora_te2": make_text_encoder(True)}
    load_like_comfyui(plain, tmp_path / "lora.safetensors")
    for prefix, model in plain.items():
        with torch.no_grad():
            assert_close(denoise(model) if prefix == "lora_unet" else encode(model), under_gates(models[prefix]))


# ComfyUI knows the layers of these transformers by diffusers' own names, behind "transformer.", with lora_A and lora_B.
COMFYUI_TRANSFORMERS = {
    "sd3": r"""transformer_blocks\.\d+\.(
        attn\.(to_q | to_k | to_v | to_out\.0 | add_q_proj | add_k_proj | add_v_proj | to_add_out)
        | ff(_context)?\.net\.(0\.proj|2) | norm1(_context)?\.linear
    ) | context_embedder | proj_out | norm_out\.linear | time_text_embed\.(timestep|text)_embedder\.linear_[12]""",
    "flux": r"""transformer_blocks\.\d+\.(
        attn\.(to_q | to_k | to_v | to_out\.0 | add_q_proj | add_k_proj | add_v_proj | to_add_out)
        | ff(_context)?\.net\.(0\.proj|2) | norm1(_context)?\.linear
    ) | single_transformer_blocks\.\d+\.(attn\.to_[qkv] | proj_mlp | proj_out | norm\.linear)
    | x_embedder | context_embedder | proj_out | norm_out\.linear
    | time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]""",
}


@pytest.mark.parametrize("host", COMFYUI_TRANSFORMERS)
def test_comfyui_knows_the_exported_names_of_a_transformer(tmp_path: Path, host: str) -> None:
    torch.manual_seed(1)
    model = getattr(tiny_hosts, host)()[0]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    slidelora.export_peft(inject(model, r=2), tmp_path, GATES)
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    expected = {f"transformer.{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    assert set(stored) == expected
    unknown = [name for name in names if not re.fullmatch(COMFYUI_TRANSFORMERS[host], name, re.VERBOSE)]
    assert not unknown
    with pytest.raises(ValueError, match=r"of lora_unet has no name in kohya's format.*export_peft has names for all"):
        slidelora.export_kohya({"lora_unet": model}, tmp_path / "lora.safetensors", GATES)


@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({}, {}, r"no gates are given and the model's gate is 'given', .*expected constant gates"),
        ({}, {"gates": ["text", "image"]}, "gates of 2 samples differ"),
        ({}, {"gates": {"text": 0.0}}, "expected at least one expert with a weight other than 0"),
        (
            {"target_modules": ["text_projection"]},
            {"gates": "text"},
            "^text_projection of lora_te has no name in kohya's",
        ),
        ({}, {"gates": "text", "path": "lora.bin"}, r"lora\.bin, expected a file with the ending \.safetensors"),
        ({}, {"gates": "text", "prefix": "lora_te3"}, r"models are for \['lora_te3'\], expected some of \['lora_unet'"),
    ],
)
def test_what_cannot_be_exported_is_named(
    tmp_path: Path, fields: dict[str, Any], call: dict[str, Any], message: str
) -> None:
    model = inject(make_text_encoder(True), r=2, **{"target_modules": ["q_proj"], **fields})
    with pytest.raises(ValueError, match=message):
        slidelora.export_kohya(
            {call.get("prefix", "lora_te"): model}, tmp_path / call.get("path", "lora.safetensors"), call.get("gates")
        )
    assert not list(tmp_path.iterdir())


def test_a_learned_gate_needs_constant_gates(tmp_path: Path) -> None:
    model = inject(make_text_encoder(), r=2, gate="sequence")
    with pytest.raises(ValueError, match="the model's gate is 'sequence', which may differ between inputs"):
        slidelora.export_kohya({"lora_te": model}, tmp_path / "lora.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slidelora.export_kohya({"lora_te": model}, tmp_path / "lora.safetensors", "text")
    plain = make_text_encoder()
    load_like_comfyui({"lora_te": plain}, tmp_path / "lora.safetensors")
    assert_close(encode(plain), under_gates(model, "text"))


def test_default_gates_are_taken(tmp_path: Path) -> None:
    model = inject(make_text_encoder(), r=2, default_gates="image")
    slidelora.export_kohya({"lora_te": model}, tmp_path / "lora.safetensors")
    plain = make_text_encoder()
    load_like_comfyui({"lora_te": plain}, tmp_path / "lora.safetensors")
    assert_close(encode(plain), under_gates(model, "image"))
