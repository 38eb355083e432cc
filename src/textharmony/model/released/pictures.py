"""Which pictures a language model's layers and a UNet's blocks see, and the MMFS by which they attend to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from textharmony.model.released.deformable import MMFS, centres
from textharmony.model.released.visual_tokenizer import resize_table, sincos_grid

NEVER = torch.iinfo(torch.int64).max  # a column that no token reaches


@dataclass(frozen=True)
class Visible:
    """The pictures that the rows of a batch can see."""

    maps: Sequence[Tensor]  # (P, C, h, w) for each level
    pictures: Tensor  # (B, K) which pictures each row has, in their order
    begins: Tensor  # (B, K) the first column from which each is seen; NEVER for a row with fewer than K pictures
    ends: Tensor  # (B, K) the column from which it is not seen any more
    values: dict[nn.Module, list[Tensor]] = field(default_factory=dict)  # by MMFS, while no gradient is needed

    def values_of(self, mmfs: MMFS, norm: nn.Module, levels: int) -> list[Tensor]:
        """Normalise and project the last `levels` maps: (B * K, H, D, h, w) each."""
        values = self.values.get(mmfs)
        if values is None or torch.is_grad_enabled():
            weight = mmfs.value_proj.weight
            values = [mmfs.values(norm(level.to(weight).movedim(1, -1))) for level in self.maps[-levels:]]
            if not torch.is_grad_enabled():
                self.values[mmfs] = values
        return [value[self.pictures.flatten().to(value.device)] for value in values]


# What each host (a language model's layer, or a UNet) sees now: a ContextVar, so that threads and tasks are apart.
_VISIBLE: ContextVar[Mapping[nn.Module, Visible]] = ContextVar("_VISIBLE", default={})  # noqa: B039 (read-only)


@contextmanager
def seeing(hosts: Iterable[nn.Module], visible: Visible) -> Iterator[None]:
    """A context in which hosts see pictures: in this thread or task, during forward; backward may come after it."""
    token = _VISIBLE.set({**_VISIBLE.get(), **dict.fromkeys(hosts, visible)})
    try:
        yield
    finally:
        _VISIBLE.reset(token)


class PictureAttention(nn.Module):
    """MMFS from tokens around the middle of each picture, through a gate that starts closed."""

    def __init__(self, width: int, feature_width: int, ratios: Sequence[float]) -> None:
        super().__init__()
        self.attn = MMFS(width, feature_width, feature_width, ratios, pictures=50, spread=3.0)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(feature_width, eps=1e-6)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, visible: Visible, start: int) -> Tensor:
        """What to add to x (B, T, D), whose first token is in column `start`."""
        columns = start + torch.arange(x.shape[1], device=x.device)[:, None]  # (T, 1)
        begins, ends = visible.begins.to(x.device)[:, None], visible.ends.to(x.device)[:, None]  # (B, 1, K)
        seen = (begins <= columns) & (columns < ends)  # (B, T, K)
        if len(seen) != len(x):
            raise ValueError(f"got {len(x)} rows, expected {len(seen)}: the batch of the pictures times repeats")
        middle = torch.full((1, 2), 0.5, device=x.device)
        query = self.norm1(x).to(self.gate)
        found = self.attn(query, middle, visible.values_of(self.attn, self.norm2, len(self.attn.ratios)), seen)
        return (self.gate.tanh() * found).to(x)


class PictureLayer(LlamaDecoderLayer):
    """A decoder layer of Llama that attends to pictures between self-attention and MLP."""

    def __init__(self, layer: LlamaDecoderLayer, pictures: PictureAttention) -> None:
        """Take over the parts of a layer."""
        nn.Module.__init__(self)
        self.hidden_size = layer.hidden_size
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.pictures = pictures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the pictures that are visible now: a checkpointed layer runs again, when the context is gone."""
        return super().__call__(*args, **kwargs, visible=_VISIBLE.get().get(self))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, visible: Visible | None = None, **kwargs: Any
    ) -> Tensor:
        """Map hidden states (B, T, D) as LlamaDecoderLayer does; without visible pictures exactly so."""
        normalised = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normalised, **kwargs)
        hidden_states = hidden_states + attended
        if visible is not None:
            length, start = hidden_states.shape[1], 0
            cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers before 5.24 says the latter
            if cache is not None:  # it holds this layer's new tokens already
                start = int(cache.get_seq_length(self.self_attn.layer_idx)) - length
            hidden_states = hidden_states + self.pictures(hidden_states, visible, start)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ReleasedHead(nn.Linear):
    """Llama's frozen head with a bias, and a small head that trains and corrects the logits of the last tokens."""

    def __init__(self, base: nn.Linear, added: int) -> None:
        """Take over the weights of a head whose last `added` rows are new: their logits start at -5."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.bias = nn.Parameter(base.weight.new_zeros(base.out_features))
        self.new = nn.Linear(base.in_features, added, device=base.weight.device)  # in fp32, since it trains
        with torch.no_grad():
            self.weight[-added:] = 0
            self.bias[-added:] = -100
            nn.init.zeros_(self.new.weight)
            nn.init.constant_(self.new.bias, 95)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits, corrections = super().forward(hidden_states), self.new(hidden_states.to(self.new.weight))
        added = corrections.shape[-1]
        return torch.cat([logits[..., :-added], logits[..., -added:] + corrections.to(logits)], -1)


def attach_language(language: Any, feature_width: int, grid: int, every: int, added: int) -> None:
    """Give every Nth layer of a Llama, starting with the first, PictureAttention, and the model the released head.

    Args:
        language: A LlamaForCausalLM.
        feature_width: Channels of the maps.
        grid: The ViT's patches in a row.
        every: N.
        added: How many tokens the tokenizer has more than the original one, at the end.

    Raises:
        ValueError: The language model is no Llama.
    """
    if not isinstance(language, LlamaForCausalLM) or language.config.tie_word_embeddings:
        raise ValueError(f"the language model is {type(language).__name__}, expected a Llama without tied embeddings")
    layers: Any = language.model.layers
    for i in range(0, len(layers), every):
        attention = PictureAttention(language.config.hidden_size, feature_width, [grid / 8, grid / 16, grid / 32])
        weight = layers[i].input_layernorm.weight
        layers[i] = PictureLayer(layers[i], attention.to(weight.device, weight.dtype))
    language.set_output_embeddings(ReleasedHead(language.lm_head, added))


class PictureBlock(nn.Module):
    """MMFS from the cells of a UNet's map, each around its own position."""

    pos_embed: Tensor

    def __init__(self, width: int, feature_width: int, value_width: int, grid: int, base: float) -> None:
        """Build a block for a map of `width` channels; an offset of 1 moves a point by 1 / base of [64, 32, 16, 8]."""
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(feature_width, eps=1e-6)
        ratios = [side / base for side in (64, 32, 16, 8)]
        self.mmfs = MMFS(width, feature_width, value_width, ratios, pictures=10, spread=1.0)
        self.conv = nn.Conv2d(width, width, 1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("pos_embed", sincos_grid(grid, width))

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        """What to add to a map x (B, C, h, w)."""
        rows, columns = x.shape[-2:]
        query = self.query_norm(x.flatten(2).mT) + resize_table(self.pos_embed, (rows, columns))
        seen = (visible.begins < NEVER).to(x.device)[:, None].expand(-1, rows * columns, -1)  # (B, T, 1)
        values = visible.values_of(self.mmfs, self.feat_norm, len(self.mmfs.ratios))
        found = self.mmfs(query, centres(rows, columns, x.device), values, seen)
        return self.conv(found.mT.unflatten(-1, (rows, columns)))


class UNetPictures(nn.Module):
    """The blocks by which a UNet's skip connections and its mid block attend to the picture before the drawing.

    What flows down the UNet stays as it is. The blocks are attached once, by hooks.
    """

    def __init__(self, unet: Any, feature_width: int, value_width: int, grid: int) -> None:
        """Build blocks for a UNet of diffusers whose maps have at most `grid` rows; ValueError for another layout."""
        super().__init__()
        channels, layers = unet.config.block_out_channels, unet.config.layers_per_block
        if len(channels) != 4 or layers != 2:
            raise ValueError(
                f"the UNet has {layers} layers in each of {len(channels)} blocks, expected 2 in each of 4: that of "
                "Stable Diffusion 2"
            )
        widths = [channels[0]]
        for i, width in enumerate(channels):
            widths += [width] * (layers + (i < len(channels) - 1))
        sides = [grid / 2**i for i in range(len(channels))]
        self.down = nn.ModuleList(
            PictureBlock(width, feature_width, value_width, grid, sides[i // 3]) for i, width in enumerate(widths)
        )
        self.mid = PictureBlock(channels[-1], feature_width, value_width, grid, sides[-1])
        self._unet = (unet,)  # in a tuple: no submodule of this
        unet.mid_block.register_forward_hook(self._change_mid)
        for i, block in enumerate(unet.up_blocks):
            first = len(widths) - 3 * (i + 1)
            blocks = list(self.down)[first : first + 3]
            block.register_forward_pre_hook(self._changer(blocks), with_kwargs=True)

    def _add(self, block: nn.Module, x: Tensor) -> Tensor:
        (unet,) = self._unet
        visible = _VISIBLE.get().get(unet)
        if visible is None:
            return x
        if torch.is_grad_enabled() and unet.mid_block.gradient_checkpointing:
            return x + checkpoint(block, x, visible, use_reentrant=False)
        return x + block(x, visible)

    def _change_mid(self, block: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._add(self.mid, output)

    def _changer(self, blocks: Sequence[nn.Module]) -> Any:
        def change(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            skips = kwargs["res_hidden_states_tuple"]
            changed = tuple(self._add(own, skip) for own, skip in zip(blocks, skips, strict=True))
            return args, {**kwargs, "res_hidden_states_tuple": changed}

        return change
