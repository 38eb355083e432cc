"""Export a mixture as one LoRA with the names of kohya's trainers, which ComfyUI, diffusers and others load."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from slidelora.files.native import replace_files
from slidelora.files.peft_lora import mixture_loras, tensors_writer
from slidelora.gating import GateValue
from slidelora.layers import Expert, linear_features

# The layers that have a name both in ComfyUI (comfy/lora.py) and in diffusers (loaders/lora_conversion_utils.py).
_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
_INSIDE = rf"attentions\.\d+\.(proj_in|proj_out|{_BLOCK})|resnets\.\d+\.time_emb_proj"
_UNET = rf"((down_blocks|up_blocks)\.\d+|mid_block)\.({_INSIDE})|(time|add)_embedding\.linear_[12]"
_CLIP = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_LAYERS = {"lora_unet": _UNET, **dict.fromkeys(("lora_te", "lora_te1", "lora_te2"), _CLIP)}
# diffusers has no name for these layers of SDXL but that of the original UNet, which ComfyUI knows, too.
_ORIGINAL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def export_kohya(models: Mapping[str, nn.Module], path: str | Path, gates: GateValue | None = None) -> None:
    """Write the mixtures of a pipeline's models under constant gates as one LoRA file with kohya's names.

    The LoRA loaders of ComfyUI load it, and `load_lora_weights` of diffusers' pipelines. The output is that of the
    mixtures.

    Args:
        models: Injected models by kohya's prefixes: "lora_unet" for a UNet2DConditionModel, "lora_te" for the CLIP text
            encoder of Stable Diffusion 1 and 2, "lora_te1" and "lora_te2" for those of SDXL.
        path: The file to write, with the ending .safetensors.
        gates: Constant gates, the same for each model, as in `slidelora.merge`. None takes each model's
            `default_gates`.

    Raises:
        ValueError: If gates are not constant or give no expert any weight, a prefix is unknown, the ending is another
            one, or a layer with experts has no name in this format. Nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {path}, expected a file with the ending .safetensors")
    if not models or set(models) - set(_LAYERS):
        raise ValueError(f"models are for {list(models)}, expected some of {list(_LAYERS)}")
    tensors: dict[str, Tensor] = {}
    for prefix, model in models.items():
        host, loras = mixture_loras(model, gates)
        if nameless := [name for name in loras if not re.fullmatch(_LAYERS[prefix], name)]:
            raise ValueError(
                f"{nameless[0]} of {prefix} has no name in kohya's format, and {len(nameless) - 1} more, expected "
                "layers of a UNet2DConditionModel or of a CLIP text encoder: choose others with target_modules or "
                "exclude_modules; slidelora.export_peft has names for all, and ComfyUI loads its file of a transformer"
            )
        if prefix != "lora_unet" and not any(name.endswith("out_proj") for name in loras):
            loras |= _zeros(host, f"{next(iter(loras)).partition('.layers.')[0]}.layers.0.self_attn.out_proj")
        # diffusers reads no alpha of a single layer: all of them get that of the most frequent rank.
        alpha = Counter(len(lora.A) for lora in loras.values()).most_common(1)[0][0]
        for name, lora in loras.items():
            key = _key(prefix, name)
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            tensors[f"{key}.lora_down.weight"] = lora.A  # (r, d_in)
            tensors[f"{key}.lora_up.weight"] = lora.B.T * (len(lora.A) / alpha)  # (d_out, r)
    replace_files(path.parent, {path.name: tensors_writer(tensors)})


def _key(prefix: str, name: str) -> str:
    if prefix == "lora_unet":
        path = _ORIGINAL.get(name, name)
    else:
        path = f"text_model.{name.removeprefix('text_model.')}"
    return f"{prefix}_{path.replace('.', '_')}"


def _zeros(host: nn.Module, name: str) -> dict[str, Expert]:
    """Return a LoRA without effect: diffusers knows the names of a text encoder by one of an out_proj."""
    d_in, d_out = linear_features(host.get_submodule(name)) or (0, 0)
    return {name: Expert(torch.zeros(1, d_in), torch.zeros(1, d_out), 1.0)}
