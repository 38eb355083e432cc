"""Pictures and sound in a call, each under the three gates: whose gates a tower applies; rows of docs/calls.md."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close
from torch import Tensor, nn
from ways import GATES, GIVEN, alone, injected, weights_of

import slidelora

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
    "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **VISION}
QWEN = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_heads": 2}
TOKEN, VIDEO = 31, 30  # of a picture or sound, and of a video
every_gate = pytest.mark.parametrize("gate", GATES)


def llava() -> nn.Module:
    options = {"image_token_index": TOKEN, "image_token_id": TOKEN, "vision_feature_layer": -1}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=CLIP, text_config=LLAMA, **options)
    )


def llava_next() -> nn.Module:
    options = {"image_token_index": TOKEN, "image_token_id": TOKEN, "vision_feature_layer": -1}
    pins = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(vision_config=CLIP, text_config=LLAMA, **options, **pins)
    )


def idefics3() -> nn.Module:
    options = {"vision_config": VISION, "text_config": LLAMA, "image_token_id": TOKEN, "scale_factor": 2}
    return transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**options))


def qwen(kind: str, **vision: Any) -> nn.Module:
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    tokens = {"image_token_id": TOKEN, "video_token_id": VIDEO, "vision_start_token_id": 27, "vision_end_token_id": 28}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, **rope}, vision_config={"depth": 1, **QWEN, **vision}, **tokens
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def qwen2() -> nn.Module:
    return qwen("Qwen2VL", embed_dim=16, hidden_size=16, mlp_ratio=2)


def qwen2_5() -> nn.Module:
    sizes = {"hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24}
    return qwen("Qwen2_5_VL", **sizes, window_size=16, fullatt_block_indexes=[0])


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24}
    return qwen("Qwen3VL", **sizes, deepstack_visual_indexes=[0], num_position_embeddings=16)


def qwen2_audio() -> nn.Module:
    sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    text = {"model_type": "qwen2", **TEXT}
    config = transformers.Qwen2AudioConfig(
        audio_config={**sound, "num_mel_bins": 8, "max_source_positions": 8}, text_config=text,
        audio_token_index=TOKEN, audio_token_id=TOKEN,
    )  # fmt: skip
    return transformers.Qwen2AudioForConditionalGeneration(config)


Inputs = tuple[dict[str, Tensor], list[dict[str, Tensor]]]  # of a batch, and of its samples alone


def texts(rows: Sequence[Sequence[int]], **options: Any) -> Inputs:
    """Token ids and masks, padded on the left in the batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    whole, samples = (
        [ids, *(torch.tensor([row]) for row in rows)],
        [mask, *(torch.ones(1, len(row)).long() for row in rows)],
    )
    both = [{"input_ids": one, "attention_mask": other} for one, other in zip(whole, samples)]
    return both[0], both[1:]


def spread(counts: Sequence[int], tokens: Sequence[int] | int, token: int = TOKEN) -> list[list[int]]:
    """A row for each sample, with the tokens of its pictures between words."""
    sizes = iter([tokens] * sum(counts) if isinstance(tokens, int) else tokens)
    return [
        [5 + index, *(x for _ in range(count) for x in (*[token] * next(sizes), 9 + index))]
        for index, count in enumerate(counts)
    ]


def with_media(rows: list[list[int]], counts: Sequence[int], **media: Tensor) -> Inputs:
    """Add tensors that have a row for each picture."""
    batch, samples = texts(rows)
    for name, value in media.items():
        batch[name] = value
        for sample, own in zip(samples, value.split(list(counts))):
            if len(own):
                sample[name] = own
    return batch, samples


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def llava_inputs(counts: Sequence[int]) -> Inputs:
    return with_media(spread(counts, 4), counts, pixel_values=random(sum(counts), 3, 8, 8))


def qwen_inputs(counts: Sequence[int], small: bool = False, video: bool = False) -> Inputs:
    """Pictures of several sizes, or if `small` of a single token."""
    grids = torch.tensor([[1, 2, 2] if small or index % 2 else [1, 4, 6] for index in range(sum(counts))])
    token, names = (
        (VIDEO, ("pixel_values_videos", "video_grid_thw")) if video else (TOKEN, ("pixel_values", "image_grid_thw"))
    )
    patches = grids.prod(1)
    rows = [[27 if x == token else x for x in row] for row in spread(counts, 1, token)]
    sizes = iter((patches // 4).tolist())
    rows = [[y for x in row for y in ([27, *[token] * next(sizes), 28] if x == 27 else [x])] for row in rows]
    batch, samples = with_media(rows, counts, **{names[1]: grids})
    pixels, begin = random(int(patches.sum()), 96), 0
    for sample in samples:
        count = int(sample[names[1]].prod(1).sum()) if names[1] in sample else 0
        if count:
            sample[names[0]] = pixels[begin : begin + count]
        begin += count
    batch[names[0]] = pixels
    for one in (batch, *samples):
        one["mm_token_type_ids"] = (one["input_ids"] == TOKEN).int() + 2 * (one["input_ids"] == VIDEO).int()
    return batch, samples


def idefics_inputs(counts: Sequence[int]) -> Inputs:
    """(B, n, C, H, W), with empty pictures for samples that have fewer than others."""
    batch, samples = texts(spread(counts, 1))
    batch["pixel_values"] = torch.zeros(len(counts), max(counts), 3, 8, 8)
    for index, (count, pixels) in enumerate(zip(counts, random(sum(counts), 3, 8, 8).split(list(counts)))):
        batch["pixel_values"][index, :count] = pixels
        if count:
            samples[index]["pixel_values"] = pixels[None]
    return batch, samples


def check(make: Callable[[], nn.Module], inputs: Inputs, gate: str, refused: bool = False, **generate: Any) -> None:
    """Compare a batch with its samples alone, in a forward or in generate."""
    torch.manual_seed(1)
    model, (batch, samples) = injected(make(), gate), inputs
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            if generate:
                return model.generate(**inputs, do_sample=False, **generate)[:, -generate["max_new_tokens"] :]
            if "mm_token_type_ids" not in inputs:
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                inputs = {**inputs, "position_ids": positions}
            return model(**inputs).logits

    with slidelora.gates(model, GIVEN[: len(ids)]) if gate == "given" else nullcontext():
        if refused and gate != "token":
            with pytest.raises(
                ValueError, match=r"the input of \S+ is .*which of the \d samples .* exclude_modules.*'token'"
            ):
                call(model, batch)
            return
        found = call(model, batch)
    for plain, sample, output in zip(alone(model, ids, gate, mask), samples, found.chunk(len(samples))):
        expected = call(plain, sample)
        if generate:
            assert torch.equal(output, expected)
        else:
            assert_close(output[:, -expected.shape[1] :], expected, 1e-4)


COUNTS = [(1, 1), (1, 2), (2, 0), (0, 2), (0, 2, 1)]


@every_gate
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("way", ["forward", "generate", "beams"])
def test_llava(way: str, counts: tuple[int, ...], gate: str) -> None:
    options: dict[str, Any] = {} if way == "forward" else {"max_new_tokens": 2, "num_beams": 2 if way == "beams" else 1}
    check(llava, llava_inputs(counts), gate, **options)


def test_gates_that_are_repeated_for_beams() -> None:
    torch.manual_seed(1)
    model, (batch, _) = injected(llava(), "given"), llava_inputs((0, 2))
    options = {**batch, "max_new_tokens": 2, "num_beams": 2, "do_sample": False}
    with slidelora.gates(model, GIVEN[:2]):
        expected = model.generate(**options)
    with slidelora.gates(model, GIVEN[:2], repeats=2):
        assert torch.equal(model.generate(**options), expected)


@every_gate
@pytest.mark.parametrize("counts", [(1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("make", [qwen2, qwen2_5, qwen3])
def test_qwen(make: Callable[[], nn.Module], counts: tuple[int, ...], gate: str) -> None:
    check(make, qwen_inputs(counts), gate)
    if make is qwen2:
        check(make, qwen_inputs(counts), gate, max_new_tokens=2, num_beams=2)


@every_gate
@pytest.mark.parametrize("counts", COUNTS[:4], ids=str)
def test_idefics(counts: tuple[int, ...], gate: str) -> None:
    check(idefics3, idefics_inputs(counts), gate, refused=sum(counts) != len(counts))


# As many pictures as samples say nothing about whose they are.
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "videos": (qwen2, qwen_inputs((2, 0), small=True, video=True)),
    "sound": (qwen2_audio, with_media(
        spread((2, 0), 4), (2, 0), input_features=random(2, 8, 16), feature_attention_mask=torch.ones(2, 16).long())),
    "pictures with image_sizes": (llava_next, with_media(
        spread((2, 0), 14), (2, 0), pixel_values=random(2, 3, 3, 8, 8), image_sizes=torch.tensor([[8, 16], [8, 16]]))),
}  # fmt: skip


@every_gate
@pytest.mark.parametrize("media", UNKNOWN)
def test_media_whose_samples_are_not_known(media: str, gate: str) -> None:
    make, inputs = UNKNOWN[media]
    check(make, inputs, gate, refused=True)


@every_gate
def test_pictures_beside_embeddings(gate: str) -> None:
    torch.manual_seed(1)
    model, (batch, _) = injected(llava(), gate), llava_inputs((2, 0))
    expected = None
    with torch.no_grad():
        if gate == "token":
            expected = model(**batch).logits
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
        if gate == "token":
            assert_close(model(**batch).logits, expected)
            return
        with slidelora.gates(model, GIVEN[:2]) if gate == "given" else nullcontext():
            with pytest.raises(ValueError, match="which of the 2 samples each of its rows belongs to is not known"):
                model(**batch)


def test_a_picture_model_has_a_sample_for_each_picture() -> None:
    torch.manual_seed(1)
    model = injected(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), "given")
    pixels = random(2, 3, 8, 8)
    with torch.no_grad(), slidelora.gates(model, GIVEN[:2]):
        found = model(pixels).logits
    for row, weights, output in zip(pixels, GIVEN, found):
        with torch.no_grad(), slidelora.gates(model, weights[None]):
            assert_close(output[None], model(row[None]).logits)


def test_the_weights_are_those_of_the_prompts() -> None:
    torch.manual_seed(1)
    model, (batch, _) = injected(llava(), "sequence"), llava_inputs((1, 2))
    model(**batch)
    expected = weights_of(model, batch["input_ids"], "sequence", batch["attention_mask"])
    assert_close(slidelora.routing(model).weights, expected)
