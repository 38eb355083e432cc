"""A tiny random model of every family of hosts, with inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

Host = tuple[nn.Module, dict[str, Any]]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 3]])
TEXTS = {"input_ids": IDS, "labels": IDS}
BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = {**BLOCKS, "vocab_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**BLOCKS, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


PIXELS = ramp(2, 3, 8, 8)


def causal(family: str, **changes: Any) -> Callable[[], Host]:
    def make() -> Host:
        config = getattr(transformers, f"{family}Config")(**{**TEXT, "num_key_value_heads": 2, **changes})
        return getattr(transformers, f"{family}ForCausalLM")(config), TEXTS

    return make


def gpt2() -> Host:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)), TEXTS


def opt() -> Host:
    config = transformers.OPTConfig(**TEXT, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16)
    return transformers.OPTForCausalLM(config), TEXTS


def mamba() -> Host:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config), TEXTS


def t5() -> Host:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), TEXTS


def bert() -> Host:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)), TEXTS


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
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config), {"input_features": ramp(2, 8, 20), "labels": IDS}


def unet() -> Host:
    model = pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": PIXELS, "timestep": 3, "encoder_hidden_states": ramp(2, 3, 8)}


def dit() -> Host:
    model = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=1, sample_size=8, patch_size=4,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {"hidden_states": PIXELS, "timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])}


def sd3() -> Host:
    model = pytest.importorskip("diffusers").SD3Transformer2DModel(
        sample_size=8, patch_size=4, in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=3,
    )  # fmt: skip
    inputs = {"hidden_states": PIXELS, "encoder_hidden_states": ramp(2, 3, 8), "timestep": torch.tensor([3, 4])}
    return model, {**inputs, "pooled_projections": ramp(2, 8)}


def flux() -> Host:
    model = pytest.importorskip("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    inputs = {"hidden_states": ramp(2, 4, 4), "encoder_hidden_states": ramp(2, 3, 8), "pooled_projections": ramp(2, 8)}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    return model, {**inputs, **ids, "timestep": torch.tensor([0.3, 0.4])}


def mlp() -> Host:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), {"input": ramp(2, 6)}


def torch_transformer() -> Host:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), {"src": ramp(2, 3, 8)}


class Words(nn.Module):
    """Embeddings and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.embed(input_ids)))
