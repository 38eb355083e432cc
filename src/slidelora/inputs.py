"""What the arguments of a call say about its samples, tokens, prompt and pictures."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.scopes import Pictures

_MEDIA = re.compile(r"pixel|image|picture|video|audio|speech|input_features|patches")  # in names of arguments
PROMPT_KEY = "slidelora_prompt"  # the argument of a call that tells the prompt, a mask (B, T)


class PromptCollator:
    """A data collator that tells the gate the prompt: the tokens of each batch whose label is -100.

    It is for trainers that keep the labels of a causal language model to themselves, as that of transformers does with
    `label_smoothing_factor` or `compute_loss_func`: the gate of such a call could not tell the answer from the prompt.

    Args:
        collate: The collator that makes the batches, with input_ids and labels (B, T).
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, features: Any) -> Any:
        """Return the batch with slidelora_prompt (B, T), true on the prompt; ValueError without such labels."""
        batch = self.collate(features)
        tensors = batch.get("labels"), batch.get("input_ids")
        labels, ids = (tuple(one.shape) if isinstance(one, Tensor) else None for one in tensors)
        if labels is None or labels != ids:
            raise ValueError(f"labels are {labels}, expected {ids} as the input_ids of a causal language model")
        batch[PROMPT_KEY] = batch["labels"] == -100
        return batch


def told_prompt(mask: Any) -> Tensor | None:
    """Return the mask (B, T) that a call has as slidelora_prompt; raises ValueError if it is none."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return None if mask is None else mask.bool()
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"{PROMPT_KEY} is {shape}, expected a tensor (batch, time) that is true on the prompt")


def shifted_back(labels: Any) -> Any:
    """Return labels (B, T) of the tokens from those of the tokens that follow them."""
    return nn.functional.pad(labels[:, :-1], (1, 0), value=-100) if isinstance(labels, Tensor) else labels


def generation_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` by name, with the tokens and the attention mask (B, T) that it infers."""
    inputs, first = dict(kwargs), args[0] if args else kwargs.get("inputs")
    if first is not None:
        inputs[getattr(model, "main_input_name", "input_ids")] = first
    settings = inputs.get("generation_config") or getattr(model, "generation_config", None)
    pad, eos, bos = (
        inputs.get(name, getattr(settings, name, None)) for name in ("pad_token_id", "eos_token_id", "bos_token_id")
    )
    if batch_size(inputs) is None and isinstance(bos, int) and is_causal(model):
        inputs["input_ids"] = torch.full((1, 1), bos, device=next(model.parameters()).device)
    mask, shape, ids = inputs.get("attention_mask"), token_shape(inputs), inputs.get("input_ids")
    if shape is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return inputs
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if not isinstance(ids, Tensor) or inputs.get("inputs_embeds") is not None or pad is None or pad in ends:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)  # it is not clear what is padding
    else:
        inputs["attention_mask"] = ids.ne(pad).long()
    return inputs


def find_packed(inputs: Mapping[str, Any], mask: Tensor) -> tuple[Tensor, list[int]] | None:
    """Return for each token (B, T) the index of its sample, and the samples' lengths; None if a row is one sample.

    Samples that are packed into a row are told apart by seq_idx or cu_seq_lens_q, else by position_ids that begin
    again.
    """
    begins = _beginnings(inputs, mask)
    if begins is None or not bool(begins[:, 1:].any()):
        return None
    begins[:, 0] = True
    index = begins.flatten().cumsum(0) - 1
    return index.view(mask.shape), index.bincount().tolist()


def _beginnings(inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
    """Return (B, T), true where a sample begins, except perhaps in the first column; None if nothing tells it."""
    numbers, borders, positions = (inputs.get(name) for name in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    if isinstance(numbers, Tensor) and numbers.shape == mask.shape:
        return numbers != numbers.roll(1, 1)
    if isinstance(borders, Tensor):
        begins = torch.zeros(mask.numel() + 1, dtype=torch.bool, device=borders.device)
        begins[borders.long()] = True
        return begins[:-1].view(mask.shape)
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3) or positions.shape[-1] != mask.shape[-1]:
        return None
    # Multimodal positions are (3, B, T), in time, height and width, or (4, B, T) with those of the text before them.
    # All tokens of a picture have the same time.
    same = positions.ndim == 3 and len(positions) == 3
    positions = (positions[0] if positions.ndim == 3 else positions).expand(mask.shape)
    mask = mask.to(positions.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    before = torch.where(mask, columns, -1).cummax(1).values.roll(1, 1)  # (B, T) the last token that is no padding
    last = positions.gather(1, before.clamp(min=0))
    return mask & (before >= 0) & (columns > 0) & ((positions < last) if same else (positions <= last))


def begins_late(inputs: Mapping[str, Any], mask: Tensor) -> bool:
    """Say whether the position_ids (B, T) of a call go on from tokens that are not in it, in each row."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[-1] != mask.shape[-1]:
        return False
    first = mask.int().argmax(1, keepdim=True).to(positions.device)
    return bool((positions.expand(mask.shape).gather(1, first) > 0).all())


def find_pictures(host: nn.Module, inputs: Mapping[str, Any]) -> Pictures | None:
    """Tell which sample each picture of a call belongs to, from the positions that its tokens have in the text.

    None for a call whose samples are the pictures themselves, or without any.
    """
    media = [name for name, value in inputs.items() if isinstance(value, Tensor) and _MEDIA.search(name)]
    if token_shape(inputs) is None or not media:
        return None
    pixels, ids, grid = (inputs.get(name) for name in ("pixel_values", "input_ids", "image_grid_thw"))
    config = getattr(host, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    # image_sizes come with pictures of different numbers of tokens.
    others = set(media) - {"pixel_values", "image_grid_thw", "pixel_attention_mask"}
    if token is None or others or torch.compiler.is_compiling():
        return Pictures(0, None)
    if not isinstance(pixels, Tensor) or not isinstance(ids, Tensor):
        return Pictures(0, None)
    count = len(grid) if isinstance(grid, Tensor) else len(pixels)
    in_row = (ids == token).sum(1)  # (B,)
    sizes = grid.prod(-1) if isinstance(grid, Tensor) else torch.ones(count, dtype=torch.long, device=ids.device)
    each = sizes * in_row.sum() // sizes.sum()  # tokens of each picture
    rows = torch.searchsorted(in_row.cumsum(0), each.cumsum(0))
    found = torch.zeros_like(in_row).index_add(0, rows.clamp(max=len(ids) - 1), each)
    fits = bool((each > 0).all()) and torch.equal(found, in_row)
    return Pictures(count, rows if fits else None, sizes if isinstance(grid, Tensor) else None)


def is_causal(model: nn.Module) -> bool:
    """Say whether a model predicts the next token, so that its labels are tokens of its own input."""
    can_generate = getattr(model, "can_generate", None)
    generates = bool(can_generate()) if callable(can_generate) else hasattr(model, "generate")
    return generates and not _is_encoder_decoder(model)


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names that the model's forward has for them."""
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def batch_size(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of samples of a call, None if no argument shows it."""
    named = [inputs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values", "sample")]
    for value in (*named, *inputs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
    return None


def token_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (B, T) of the tokens of a call, None if its input is not tokens."""
    for value in (inputs.get("input_ids"), inputs.get("inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return None


def read_prompt(model: nn.Module, inputs: Mapping[str, Any], told: bool) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, T, D) and the mask (B, T) of the tokens that attention_mask keeps.

    If the prompt is told, attention_mask may be of any kind; all tokens are kept if it is not (B, T).
    """
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if embeds is None:
        if input_ids is None:
            raise ValueError(
                f"the call has {sorted(name for name in inputs if inputs[name] is not None)}, expected input_ids or "
                "inputs_embeds for a gate that reads the prompt, or `with slidelora.gates(model, ...):` around it"
            )
        embeds = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == embeds.shape[:2]:
        mask = mask.bool()
    elif mask is None or told:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    else:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}, expected {tuple(embeds.shape[:2])} for a gate that reads the prompt; tell it "
            "the prompt with slidelora.prompt(model, mask), or use gate='token'"
        )
    return embeds, mask.to(embeds.device)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def token_masks(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return masks (B, T), true on the tokens that count: of the model's input, and of its decoder's."""
    tokens = [inputs.get(name) for name in ("input_ids", "inputs_embeds")]
    own = _last_columns(inputs.get("attention_mask"), tokens)
    if not _is_encoder_decoder(model):
        return own, None
    tokens = [inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels")]
    decoder = _last_columns(inputs.get("decoder_attention_mask"), tokens)
    given = next((value for value in tokens if isinstance(value, Tensor) and value.ndim > 1), None)
    if decoder is None and given is not None:  # without a mask of its own, the decoder might get that of the encoder
        decoder = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return own, decoder


def _last_columns(mask: Any, tokens: Sequence[Any]) -> Tensor | None:
    """Return the columns of a mask for the tokens of this call; earlier columns are for the tokens in a cache."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    time = next((value.shape[1] for value in tokens if isinstance(value, Tensor) and value.ndim > 1), mask.shape[1])
    return mask[:, -time:].bool()


def find_embeddings(host: nn.Module) -> list[nn.Module]:
    """Return the modules that embed the tokens of a model and, if it has them, of its encoder and decoder."""
    parts: list[Any] = [host]
    if _is_encoder_decoder(host):
        parts += [get() for name in ("get_encoder", "get_decoder") if (get := getattr(host, name, None)) is not None]
    found: dict[int, nn.Module] = {}
    for part in parts:
        try:
            embeddings = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())
