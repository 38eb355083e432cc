import copy
import math
from collections.abc import Sequence
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import relative_error
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from textharmony.config import MultiScaleConfig
from textharmony.model.multi_scale import MultiScaleFeatures, PictureAttention, VisiblePictures, deformable_attention

CONFIG = MultiScaleConfig(every=2, levels=(2.0, 1.0, 0.5), points=2, heads=2, width=8, pictures=2)
GRID = (2, 4)
VISION, WIDTH, LAYERS = 12, 16, 3


def shake(module: nn.Module) -> None:
    """Every weight at random, gates open: as if trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


def build(open_gates: bool = True, unet: Sequence[int] = ()) -> MultiScaleFeatures:
    made = MultiScaleFeatures(CONFIG, VISION, GRID, WIDTH, LAYERS, unet)
    if open_gates:
        shake(made)
    return made


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def denoise(unet: UNet2DConditionModel, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, context = (torch.randn(batch, *shape, generator=generator) for shape in ((4, 8, 6), (5, 8)))
    return unet(noisy, 7, encoder_hidden_states=context).sample


def patches(count: int) -> Tensor:
    return torch.randn(count, math.prod(GRID), VISION)


# Against loops, in float64


def sample(values: Tensor, x: float, y: float) -> Tensor:
    """values (D, h, w) at x, y in 0..1 from edge to edge, cell by cell with tent weights; nothing is outside."""
    channels, height, width = values.shape
    found = torch.zeros(channels, dtype=values.dtype)
    for row in range(height):
        for column in range(width):
            share = max(0.0, 1 - abs(x * width - (column + 0.5))) * max(0.0, 1 - abs(y * height - (row + 0.5)))
            found += share * values[:, row, column]
    return found


def test_deformable_attention_against_a_loop() -> None:
    batch, queries, heads, points = 2, 3, 2, 4
    values = [torch.randn(batch, heads, 5, *size).double() for size in ((4, 6), (2, 3), (1, 1))]
    locations = torch.rand(batch, queries, heads, 3, points, 2).double() * 1.6 - 0.3  # some are outside
    weights = torch.randn(batch, queries, heads, 3, points).double()
    found = deformable_attention(values, locations, weights)
    for n in range(batch):
        for q in range(queries):
            for h in range(heads):
                expected = torch.zeros(5).double()
                for level in range(3):
                    for p in range(points):
                        x, y = locations[n, q, h, level, p].tolist()
                        expected += weights[n, q, h, level, p] * sample(values[level][n, h], x, y)
                assert relative_error(found[n, q, h * 5 : h * 5 + 5], expected) < 1e-10


def test_deformable_attention_gradcheck() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 2, 2, *size).double().requires_grad_() for size in ((3, 4), (2, 2))]
    locations = (torch.rand(2, 2, 2, 2, 2, 2).double() * 1.2 - 0.1).requires_grad_()
    weights = torch.randn(2, 2, 2, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: deformable_attention(v[:2], *v[2:]), (*values, locations, weights))


def test_picture_attention_against_a_loop() -> None:
    """Rows with three, one and no pictures; a query attends to the two nearest before it."""
    attention = PictureAttention(CONFIG, WIDTH, [(1.0, 1.0)] * 3).double()
    shake(attention)
    maps = [torch.randn(4, 8, *size).double() for size in ((4, 8), (2, 4), (1, 2))]
    of_row = [[(2, 1), (3, 3), (5, 0)], [(1, 2)], []]  # (column, picture)
    never = torch.iinfo(torch.int64).max
    table = torch.tensor([row + [(never, 0)] * (3 - len(row)) for row in of_row])
    x, reference = torch.randn(3, 7, WIDTH).double(), torch.rand(7, 2).double()
    found = attention(x, VisiblePictures(maps, table[..., 1], table[..., 0]), reference, torch.arange(7))
    heads, _, points = attention.shape
    for b, row in enumerate(of_row):
        for q in range(7):
            nearest = [picture for column, picture in row if column <= q][::-1][:2]
            gathered = []
            for h in range(heads):
                total, mass = torch.zeros(4).double(), torch.ones(()).double()  # the entry for nothing: exp(0)
                for order, picture in enumerate(nearest):
                    predicted = attention.to_points(attention.norm(x[b, q])) + attention.order.weight[order]
                    predicted = predicted.reshape(heads, 3, points, 3)[h]
                    for level, values in enumerate(maps):
                        projected = attention.to_values(attention.norm_features(values[picture].permute(1, 2, 0)))
                        of_head = projected[..., 4 * h : 4 * h + 4].permute(2, 0, 1)
                        rows, columns = values.shape[-2:]
                        for dx, dy, logit in predicted[level]:
                            at_x, at_y = reference[q, 0] + dx / columns, reference[q, 1] + dy / rows
                            total += logit.exp() * sample(of_head, at_x.item(), at_y.item())
                            mass += logit.exp()
                gathered.append(total / mass)
            expected = attention.to_out(torch.cat(gathered)) * attention.gate.tanh()[0]
            if nearest:
                assert relative_error(found[b, q], expected) < 1e-10
            else:
                assert torch.equal(found[b, q], torch.zeros(WIDTH).double())


@pytest.mark.parametrize("level", [4.0, 2.0, 1.0, 0.5])
def test_a_patch_changes_the_features_around_it(level: float) -> None:
    made = MultiScaleFeatures(MultiScaleConfig(levels=(level,), width=8), VISION, (4, 6), WIDTH, 1)
    plain = torch.randn(1, 24, VISION)
    marked = plain.clone()
    row, column = 2, 5
    marked[0, row * 6 + column] += 9.0
    (before,), (after,) = made.pyramid(plain), made.pyramid(marked)
    assert before.shape == (1, 8, round(4 * level), round(6 * level))
    changed = (after != before).any(1)[0]
    expected = torch.zeros_like(changed)
    top, left, side = int(row * level), int(column * level), max(1, int(level))
    expected[max(0, top - 1) : top + side + 1, max(0, left - 1) : left + side + 1] = True  # a 3 x 3 kernel around it
    if level < 1:  # the largest of four: it may have been another
        assert changed.any() and not (changed & ~expected).any()
    else:
        assert torch.equal(changed, expected)


# In a language model


def test_fresh_features_change_no_bit(llama: LlamaForCausalLM, unet: UNet2DConditionModel) -> None:
    ids = torch.randint(3, 23, (3, 9))
    keys = set(llama.state_dict()), set(unet.state_dict())
    logits, drawn = llama(ids).logits, denoise(unet)
    made = build(open_gates=False, unet=(8, 16))
    made.attach_language(llama.model.layers)
    made.attach_unet(unet)
    pyramid = made.pyramid(patches(3))
    with (
        made.visible_to_language(pyramid, [0, 2, 2], [1, 2, 5], batch=3),
        made.visible_to_unet(pyramid, [0, 2, 2], batch=3),
    ):
        assert torch.equal(llama(ids).logits, logits)
        assert torch.equal(denoise(unet), drawn)
    assert (set(llama.state_dict()), set(unet.state_dict())) == keys


def test_a_token_attends_to_pictures_before_it_in_its_row(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 23, (3, 9))
    plain = llama(ids).logits
    made = build()
    made.attach_language(llama.model.layers)
    assert torch.equal(llama(ids).logits, plain)  # outside of the context
    with made.visible_to_language(made.pyramid(patches(3)), torch.tensor([2, 0, -1]), torch.tensor([4, 1, 0]), batch=3):
        seeing = llama(ids).logits
    differs = (seeing != plain).any(-1)
    assert differs.tolist() == [[t >= 1 for t in range(9)], [False] * 9, [t >= 4 for t in range(9)]]
    assert torch.equal(llama(ids).logits, plain)
    with made.visible_to_language(made.pyramid(patches(1)), [-1], [0], batch=3):
        assert torch.equal(llama(ids).logits, plain)


def test_the_order_of_rows_and_pictures_does_not_matter(llama: LlamaForCausalLM) -> None:
    made = build().double()
    made.attach_language(llama.double().model.layers)
    ids, seen = torch.randint(3, 23, (3, 9)), patches(4).double()
    rows, columns = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 4, 3])
    order, shuffled = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    with made.visible_to_language(made.pyramid(seen), rows, columns, batch=3):
        found = llama(ids).logits
    moved = order.argsort()[rows]
    with made.visible_to_language(made.pyramid(seen[shuffled]), moved[shuffled], columns[shuffled], batch=3):
        assert relative_error(llama(ids[order]).logits, found[order]) < 1e-10


def test_left_padded_rows_are_the_rows_alone(llama: LlamaForCausalLM) -> None:
    made = build().double()
    made.attach_language(llama.double().model.layers)
    seen = patches(3).double()
    lengths, columns, rows = [9, 6], [1, 2, 4], [0, 1, 1]
    ids = [torch.randint(3, 23, (1, length)) for length in lengths]
    padded = torch.cat([torch.cat([torch.zeros(1, 9 - i.shape[1], dtype=torch.long), i], 1) for i in ids])
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = [column + 9 - lengths[row] for row, column in zip(rows, columns, strict=True)]
    with made.visible_to_language(made.pyramid(seen), rows, shifted, batch=2):
        found = llama(padded, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        mine = [i for i in range(3) if rows[i] == row]
        with made.visible_to_language(made.pyramid(seen[mine]), [0] * len(mine), [columns[i] for i in mine], batch=1):
            assert relative_error(found[row, 9 - length :], llama(ids[row]).logits[0]) < 1e-10


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_a_cache_is_generate_without(llama: LlamaForCausalLM, beams: int, cache: str) -> None:
    torch.manual_seed(1)
    made = build().double()
    made.attach_language(llama.double().model.layers)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    pyramid = [level.detach() for level in made.pyramid(patches(3).double())]

    def write(rows: Sequence[int] = (0, 1, 1), **settings: Any) -> Any:
        with made.visible_to_language(pyramid, rows, [3, 1, 4], batch=2, repeats=beams):
            return llama.generate(
                ids,
                attention_mask=(ids != 0).long(),
                max_new_tokens=7,
                num_beams=beams,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **settings,
            )

    cached, plain = write(cache_implementation=cache), write(use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.scores, plain.scores, strict=True):
        ruled_out = other < -1e6  # beams that ended or have not begun
        assert torch.equal(one < -1e6, ruled_out)
        assert relative_error(one[~ruled_out], other[~ruled_out]) < 1e-9
    blind = write(rows=(-1, -1, -1))
    assert all(relative_error(a, b) > 1e-4 for a, b in zip(cached.scores[0], blind.scores[0], strict=True))


def test_features_are_projected_once_for_a_whole_answer(llama: LlamaForCausalLM) -> None:
    made = build()
    made.attach_language(llama.model.layers)
    calls: list[int] = []
    for attention in made.language:
        attention.to_values.register_forward_hook(lambda *_: calls.append(1))
    with made.visible_to_language(made.pyramid(patches(1)), [0], [1], batch=1):
        llama.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert len(calls) == len(made.language) * len(CONFIG.levels)


def gradients(llama: LlamaForCausalLM, made: MultiScaleFeatures, ids: Tensor, seen: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    llama.zero_grad()
    with made.visible_to_language(made.pyramid(seen), [0, 1, 1], [1, 0, 4], batch=2):
        loss = llama(ids, labels=ids).loss
    loss.backward()
    parameters = [*made.named_parameters(), *llama.named_parameters()]
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def test_gradients_reach_all_that_attends(llama: LlamaForCausalLM) -> None:
    made = build(open_gates=False)
    made.attach_language(llama.model.layers)
    ids, seen = torch.randint(3, 23, (2, 9)), patches(3).requires_grad_()
    fresh = gradients(llama, made, ids, seen)
    for i in range(len(made.language)):
        assert fresh[f"language.{i}.gate"].abs().sum() > 0
    with torch.no_grad():
        for attention in made.language:
            attention.gate.fill_(0.5)
    opened = gradients(llama, made, ids, seen)
    for i in range(len(made.language)):
        for name in ("to_points.weight", "order.weight", "to_values.weight", "to_out.weight"):
            assert opened[f"language.{i}.{name}"].abs().sum() > 0
    shake(made)
    seen.grad = None
    found = gradients(llama, made, ids, seen)
    for name, _ in made.named_parameters():
        assert found[name].abs().sum() > 0 and found[name].isfinite().all(), name
    assert seen.grad is not None and (seen.grad.abs().sum((1, 2)) > 0).all()


def test_gradient_checkpointing_keeps_gradients(llama: LlamaForCausalLM) -> None:
    made = build()
    made.attach_language(llama.train().model.layers)
    ids, seen = torch.randint(3, 23, (2, 9)), patches(3)
    expected = gradients(llama, made, ids, seen)
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(llama, made, ids, seen)
    assert found.keys() == expected.keys()
    assert (
        relative_error(*(torch.cat([some[name].flatten() for name in expected]) for some in (found, expected))) < 1e-5
    )
    with made.visible_to_language(made.pyramid(seen), [0, 1, 1], [1, 0, 4], batch=2):
        unused = llama(ids, past_key_values=DynamicCache()).logits  # a checkpointed layer leaves a cache alone
        assert torch.equal(unused, llama(ids).logits)


def test_nothing_uninitialised_is_read(llama: LlamaForCausalLM) -> None:
    """torch fills new memory with NaN while its algorithms must be deterministic."""
    ids, seen = torch.randint(3, 23, (2, 9)), patches(3)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        made = build()
        made.attach_language(llama.model.layers)
        found = gradients(llama, made, ids, seen)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = gradients(llama, made, ids, seen)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_host_keeps_its_dtype(llama: LlamaForCausalLM, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    made = build().to(dtypes[1])
    made.attach_language(llama.to(dtypes[0]).model.layers)
    ids = torch.randint(3, 23, (1, 5))
    with made.visible_to_language(made.pyramid(patches(1)), [0], [0], batch=1):
        found = llama(ids).logits
    assert found.dtype == dtypes[0] and found.isfinite().all()


def test_mixed_precision(llama: LlamaForCausalLM) -> None:
    made = build()
    made.attach_language(llama.model.layers)
    ids, seen = torch.randint(3, 23, (2, 9)), patches(3)
    expected = gradients(llama, made, ids, seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(llama, made, ids, seen)
    names = [name for name, _ in made.named_parameters()]
    assert {found[name].dtype for name in names} == {torch.float32}
    together = [torch.cat([some[name].flatten() for name in names]) for some in (found, expected)]
    assert F.cosine_similarity(*together, dim=0) > 0.95


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, vocab_size=99))
        made = MultiScaleFeatures(MultiScaleConfig(), 32, (16, 16), 64, 8)
        made.attach_language(llama.model.layers)
        ids, seen = torch.zeros(3, 20, dtype=torch.long), torch.zeros(2, 256, 32)
    with made.visible_to_language(made.pyramid(seen), [0, 2], [1, 4], batch=3):
        assert llama(ids).logits.shape == (3, 20, 99)
    assert len(made.language) == 2


def test_another_thread_sees_nothing(llama: LlamaForCausalLM) -> None:
    made = build()
    made.attach_language(llama.model.layers)
    ids = torch.randint(3, 23, (1, 5))
    plain = llama(ids).logits
    found: list[Tensor] = []
    with made.visible_to_language(made.pyramid(patches(1)), [0], [0], batch=1):
        thread = Thread(target=lambda: found.append(llama(ids).logits))
        thread.start()
        thread.join()
        assert not torch.equal(llama(ids).logits, plain)
    assert torch.equal(found[0], plain)


def test_a_copy_attends_by_itself(llama: LlamaForCausalLM) -> None:
    whole = nn.ModuleDict({"llama": llama, "made": build()})
    whole["made"].attach_language(llama.model.layers)
    other = copy.deepcopy(whole)
    ids, seen = torch.randint(3, 23, (1, 5)), patches(1)

    def logits(model: nn.ModuleDict, visible: nn.ModuleDict) -> Tensor:
        with visible["made"].visible_to_language(visible["made"].pyramid(seen), [0], [0], batch=1):
            return model["llama"](ids).logits

    plain = llama(ids).logits
    assert torch.equal(logits(other, other), logits(whole, whole))
    assert torch.equal(logits(other, whole), plain)
    shake(other["made"])
    assert relative_error(logits(other, other), logits(whole, whole)) > 1e-3


# In a UNet


def test_cells_see_the_pictures_of_their_row(unet: UNet2DConditionModel) -> None:
    plain = denoise(unet)
    made = build(unet=(8, 16))
    made.attach_unet(unet)
    assert torch.equal(denoise(unet), plain)
    with made.visible_to_unet(made.pyramid(patches(4)), [0, 2, 2, -1], batch=3):
        found = denoise(unet)
    assert (found != plain).flatten(1).any(1).tolist() == [True, False, True]
    assert torch.equal(denoise(unet), plain)


def test_a_block_is_changed_with_its_last_skip_connection(unet: UNet2DConditionModel) -> None:
    made = build(unet=(8, 16))
    made.attach_unet(unet)
    pyramid = made.pyramid(patches(2))
    block, x, time = unet.down_blocks[1], torch.randn(2, 8, 4, 3), torch.randn(2, 32)
    plain, skips = block(x, time)
    with made.visible_to_unet(pyramid, [0, 1], batch=2):
        found, found_skips = block(x, time)
    assert found is found_skips[-1] and all(map(torch.equal, found_skips[:-1], skips[:-1]))
    visible = VisiblePictures(pyramid, torch.tensor([[0], [1]]), torch.zeros(2, 1, dtype=torch.long))
    for row in range(4):
        for column in range(3):
            middle = torch.tensor([[(column + 0.5) / 3, (row + 0.5) / 4]])
            cell = plain[:, None, :, row, column]
            expected = cell + made.unet[1](cell, visible, middle, torch.zeros(1, dtype=torch.long))
            assert relative_error(found[:, None, :, row, column], expected) < 1e-5


def test_gradients_reach_what_attends_from_a_unet(unet: UNet2DConditionModel) -> None:
    made = build(unet=(8, 16))
    made.attach_unet(unet)
    unet.enable_gradient_checkpointing()
    with made.visible_to_unet(made.pyramid(patches(4)), [0, 1, 1, 2], batch=3):
        loss = denoise(unet).square().mean()
    loss.backward()
    for name, parameter in [*made.scales.named_parameters(), *made.unet.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Faults


def test_a_level_without_a_whole_size() -> None:
    with pytest.raises(ValueError, match="whole sizes"):
        MultiScaleFeatures(MultiScaleConfig(levels=(0.25,)), VISION, (2, 8), WIDTH, LAYERS)


def test_it_is_attached_once_and_to_what_fits(llama: LlamaForCausalLM, unet: UNet2DConditionModel) -> None:
    made = build()
    with pytest.raises(ValueError, match="has 2 layers or blocks, expected 3"):
        made.attach_language(llama.model.layers[:2])
    with pytest.raises(ValueError, match="has 3 layers or blocks, expected 0"):
        made.attach_unet(unet)
    made.attach_language(llama.model.layers)
    with pytest.raises(ValueError, match="a language model is attached already"):
        made.attach_language(llama.model.layers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": [0]}, "lengths"),
        ({"columns": [0, 1, 2]}, "lengths"),
        ({"rows": [0, 2]}, "expected rows below 2"),
        ({"rows": [-2, 0]}, "expected rows below 2"),
        ({"repeats": 0}, "at least 1"),
        ({"batch": 3}, "got 2 rows, expected 3"),
        ({"repeats": 2}, "got 2 rows, expected 4"),
    ],
)
def test_pictures_that_do_not_fit(llama: LlamaForCausalLM, values: dict[str, Any], message: str) -> None:
    made = build()
    made.attach_language(llama.model.layers)
    ids = torch.randint(3, 23, (2, 5))
    plain = llama(ids).logits
    arguments: dict[str, Any] = {"rows": [0, 1], "columns": [0, 1], "batch": 2} | values
    with pytest.raises(ValueError, match=message):
        with made.visible_to_language(made.pyramid(patches(2)), **arguments):
            llama(ids)
    with pytest.raises(ValueError, match="expected 8, a grid of"):
        made.pyramid(patches(1)[:, 1:])
    with pytest.raises(ValueError, match="3 levels"):
        with made.visible_to_language(made.pyramid(patches(1))[:2], [0], [0], batch=2):
            pass
    assert torch.equal(llama(ids).logits, plain)
