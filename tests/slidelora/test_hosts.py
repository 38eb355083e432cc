"""Every family of host: the same at the start, one step of training, saved and loaded bit for bit, and plain again."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from torch import Tensor, nn

import slidelora
from slidelora.injection import slide_layers

Host = tuple[nn.Module, dict[str, Any]]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 3]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}


def causal(family: str, **changes: Any) -> Callable[[], Host]:
    def make() -> Host:
        config = getattr(transformers, f"{family}Config")(**{**LLAMA, **changes})
        return getattr(transformers, f"{family}ForCausalLM")(config), {"input_ids": IDS, "labels": IDS}

    return make


def gpt2() -> Host:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


def opt() -> Host:
    config = transformers.OPTConfig(**TEXT, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16)
    return transformers.OPTForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def mamba() -> Host:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def t5() -> Host:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def bert() -> Host:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)), {"input_ids": IDS, "labels": IDS}


def vit() -> Host:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), {"pixel_values": PIXELS}


def clip() -> Host:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config), {"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True}


def siglip() -> Host:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config), {"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True}


def whisper() -> Host:
    config = transformers.WhisperConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20), "labels": IDS}


def unet() -> Host:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return model, {"sample": PIXELS, "timestep": 3, "encoder_hidden_states": torch.linspace(-1, 1, 48).view(2, 3, 8)}


def dit() -> Host:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    return model, {"hidden_states": PIXELS, "timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])}


def sd3() -> Host:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=3,
    )
    return model, {
        "hidden_states": PIXELS,
        "encoder_hidden_states": torch.linspace(-1, 1, 48).view(2, 3, 8),
        "pooled_projections": torch.linspace(-1, 1, 16).view(2, 8),
        "timestep": torch.tensor([3, 4]),
    }


def flux() -> Host:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    return model, {
        "hidden_states": torch.linspace(-1, 1, 32).view(2, 4, 4),
        "encoder_hidden_states": torch.linspace(-1, 1, 48).view(2, 3, 8),
        "pooled_projections": torch.linspace(-1, 1, 16).view(2, 8),
        "timestep": torch.tensor([0.3, 0.4]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def mlp() -> Host:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), {"input": torch.linspace(-1, 1, 12).view(2, 6)}


def torch_transformer() -> Host:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return model, {"src": torch.linspace(-1, 1, 48).view(2, 3, 8)}


MOE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HOSTS: dict[str, Callable[[], Host]] = {
    "llama": causal("Llama"),
    "qwen2": causal("Qwen2"),
    "mistral": causal("Mistral"),
    "gemma": causal("Gemma", head_dim=8),
    "phi": causal("Phi"),
    "gpt_neox": causal("GPTNeoX"),
    "mixtral": causal("Mixtral", **MOE),
    "qwen2_moe": causal("Qwen2Moe", **MOE, shared_expert_intermediate_size=8),
    "gpt2": gpt2,
    "opt": opt,
    "mamba": mamba,
    "t5": t5,
    "bert": bert,
    "vit": vit,
    "clip": clip,
    "siglip": siglip,
    "whisper": whisper,
    "unet": unet,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
    "mlp": mlp,
    "torch_transformer": torch_transformer,
}
LANGUAGE = {
    "llama",
    "qwen2",
    "mistral",
    "gemma",
    "phi",
    "gpt_neox",
    "mixtral",
    "qwen2_moe",
    "gpt2",
    "opt",
    "mamba",
    "t5",
    "bert",
}
# Mamba multiplies with dt_proj's weight itself.
OPTIONS: dict[str, dict[str, Any]] = {"mamba": {"exclude_modules": ["dt_proj"]}}


def make_host(name: str) -> Host:
    """The same weights at each call, frozen: torch.matmul chooses its way to round by what requires a gradient."""
    torch.manual_seed(1)
    model, inputs = HOSTS[name]()
    return model.eval().requires_grad_(False), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The loss where there is one, else the output, as one tensor."""
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    return output if isinstance(output, Tensor) else output[0]


def at_rest(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """As `run`, without gradients."""
    with torch.no_grad():
        return run(model, inputs)


@pytest.fixture(autouse=True)
def no_fast_path() -> Iterator[None]:
    """TransformerEncoderLayer's fast path rounds otherwise, and injected layers cannot take it."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_host(name: str, tmp_path: Path) -> None:
    model, inputs = make_host(name)
    base = at_rest(model, inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    options = {"gate": "sequence" if name in LANGUAGE else "given", **OPTIONS.get(name, {})}
    slidelora.inject(model, r=2, **options)
    given: Any = torch.tensor([[0.5, 0.2, 0.3]])
    with slidelora.gates(model, given):
        assert torch.equal(at_rest(model, inputs), base)

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 0.02)
    for _ in range(2):  # lora_A has no gradient before lora_B's first step
        optimizer.zero_grad()
        with nullcontext() if options["gate"] == "sequence" else slidelora.gates(model, given):
            run(model, inputs).square().mean().backward()
        optimizer.step()
    idle = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle
    layers = slide_layers(model)
    assert sum(bool(layer.lora_B.any()) for layer in layers.values()) >= 0.9 * len(layers)

    with slidelora.gates(model, given):
        trained = at_rest(model, inputs)
    assert not torch.equal(trained, base)
    slidelora.save_pretrained(model, tmp_path)
    other, inputs = make_host(name)
    slidelora.load_pretrained(other, tmp_path)
    with slidelora.gates(other, given):
        assert torch.equal(at_rest(other, inputs), trained)

    slidelora.remove(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(at_rest(model, inputs), base)


@pytest.mark.parametrize("gate", [["text", "image"], "learned"])
@pytest.mark.parametrize("name", ["opt", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_flattened_tokens_have_the_gates_of_their_samples(name: str, gate: Any) -> None:
    model, _ = make_host(name)
    slidelora.inject(model, r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    with nullcontext() if gate == "learned" else slidelora.gates(model, gate):
        together = model(input_ids=IDS).logits
    weights = slidelora.routing(model).weights
    assert not torch.allclose(weights[0], weights[1])
    for row in range(2):
        with slidelora.gates(model, weights[row : row + 1].detach()):
            alone = model(input_ids=IDS[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_the_fast_path_is_not_taken() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    model, inputs = make_host("torch_transformer")
    slidelora.inject(model, r=2, gate="given")
    for layer in slide_layers(model).values():
        nn.init.ones_(layer.lora_B)
    with slidelora.gates(model, "text"):
        mixture = at_rest(model, inputs)
    with slidelora.disabled(model):
        assert not torch.allclose(mixture, at_rest(model, inputs))
    assert all("out_proj" not in name for name in slide_layers(model))
    slidelora.remove(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


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


@pytest.mark.parametrize("place", ["dispatched", "offloaded"])
def test_device_maps(place: str) -> None:
    model, inputs = make_host("llama")
    base = at_rest(model, inputs)
    expected, _ = make_host("llama")
    slidelora.inject(expected, r=2)
    if place == "dispatched":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        cpu_offload(model, torch.device("cpu"))
    slidelora.inject(model, r=2)
    assert torch.equal(at_rest(model, inputs), base)
    for module in (model, expected):
        torch.manual_seed(2)
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.device.type == "cpu", key
                nn.init.normal_(parameter, std=0.2)
    assert torch.equal(at_rest(model, inputs), at_rest(expected, inputs))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    names = [name for name in ("logits", "sample", "logits_per_image") if hasattr(output, name)]
    return output if isinstance(output, Tensor) else getattr(output, names[0]) if names else output[0]


# PEFT refuses Mamba's out_proj by its name.
EXPORT_OPTIONS: dict[str, dict[str, Any]] = {"mamba": {"exclude_modules": ["dt_proj", "out_proj"]}}


PIPELINES: dict[str, Callable[[nn.Module], Any]] = {
    "unet": lambda unet: diffusers.StableDiffusionPipeline(None, None, None, unet, *[None] * 3, None, False),
    "sd3": lambda transformer: diffusers.StableDiffusion3Pipeline(transformer, *[None] * 8),
    "flux": lambda transformer: diffusers.FluxPipeline(*[None] * 6, transformer),
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_host_merged_exported_and_imported(name: str, tmp_path: Path) -> None:
    def difference(one: Tensor) -> float:
        return float((one - mixture).norm() / mixture.norm())

    model, inputs = make_host(name)
    base = outputs(model, inputs)
    slidelora.inject(model, r=2, lora_alpha=6, gate="given", **EXPORT_OPTIONS.get(name, {}))
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    gates = {"text": 0.7, "shared": -0.45}
    with slidelora.gates(model, gates):
        mixture = outputs(model, inputs)
    assert difference(base) > 0.05
    slidelora.merge(model, gates)
    assert difference(outputs(model, inputs)) < 1e-5
    with slidelora.gates(slidelora.unmerge(model), gates):
        assert torch.equal(outputs(model, inputs), mixture)

    slidelora.export_peft(model, tmp_path, gates=gates)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a key that is missing
        loaded = PeftModel.from_pretrained(make_host(name)[0], tmp_path)
    assert difference(outputs(loaded.base_model.model, inputs)) < 1e-5
    if name in PIPELINES:
        pipeline = PIPELINES[name](make_host(name)[0])
        pipeline.load_lora_weights(tmp_path)
        assert difference(outputs(pipeline.unet if name == "unet" else pipeline.transformer, inputs)) < 1e-5
    other = slidelora.import_peft(make_host(name)[0], {"all": tmp_path}, gate="given")
    with slidelora.gates(other, "all"):
        assert difference(outputs(other, inputs)) < 1e-5


@pytest.mark.parametrize(
    "name", ["qwen2_moe", "gpt2", "mamba", "t5", "clip", "whisper", "unet", "flux", "torch_transformer"]
)
@pytest.mark.filterwarnings("ignore:no linear layer holds")
def test_token_gates_in_a_host(name: str, tmp_path: Path) -> None:
    model, inputs = make_host(name)
    base = at_rest(model, inputs)
    options = {"gate": "token", "top_k": 1, "balance_coef": 0.1, "z_coef": 0.1, **OPTIONS.get(name, {})}
    slidelora.inject(model, r=2, **options)
    assert torch.equal(at_rest(model, inputs), base)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 0.02)
    for _ in range(2):
        optimizer.zero_grad()
        (run(model, inputs).square().mean() + slidelora.aux_loss(model)).backward()
        optimizer.step()
    layers = slide_layers(model)
    learning = [bool(layer.gate.weight.grad.any()) for layer in layers.values()]
    assert sum(learning) >= 0.9 * len(layers)
    trained = at_rest(model, inputs)
    weights = slidelora.routing(model).weights
    assert set(weights) == set(layers) and all(value.shape[-1] == 3 for value in weights.values())
    slidelora.save_pretrained(model, tmp_path)
    other, inputs = make_host(name)
    slidelora.load_pretrained(other, tmp_path)
    assert not torch.equal(trained, base) and torch.equal(at_rest(other, inputs), trained)
    slidelora.remove(model)
    assert torch.equal(at_rest(model, inputs), base)
