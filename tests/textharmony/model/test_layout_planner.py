import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from closeness import relative_error
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.data.synthetic import SyntheticWords
from textharmony.data.word_labels import label_words
from textharmony.model.layout_planner import (
    EMPTY,
    GlyphPainter,
    LayoutPlanner,
    Layouts,
    crop_to_words,
    draft,
    ink_loss,
    region_features,
    take_colors,
)
from textharmony.presets import TINY
from textharmony.prompts import Task

SLOTS, SIZE = 12, (32, 128)
BLANK = 95  # the planner's class of an empty slot


@pytest.fixture(scope="module")
def layout_config() -> LayoutConfig:
    return replace(TINY.layout or LayoutConfig(), width=16, depth=1, heads=2, steps=4, least_height=0.0)


@pytest.fixture
def planner(layout_config: LayoutConfig) -> LayoutPlanner:
    return LayoutPlanner(layout_config, 12, SIZE)


@pytest.fixture
def painter(layout_config: LayoutConfig) -> GlyphPainter:
    return GlyphPainter(layout_config, 12, SIZE)


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    """Of 16 rendered words."""
    data = SyntheticWords(0, "train", {Task.DRAW: 1})
    labels = label_words(TINY, [], [data[i].layout for i in range(16)])
    assert labels is not None and labels.layouts is not None
    return labels.layouts


def test_a_slot_holds_a_character_or_none(layouts: Layouts) -> None:
    lengths = layouts.present.sum(1)
    assert torch.equal(layouts.present, torch.arange(SLOTS) < lengths[:, None])
    assert lengths.min() >= 1 and lengths.max() > lengths.min()
    assert (layouts.characters[~layouts.present] == EMPTY).all() and (layouts.characters[layouts.present] >= 0).all()


def test_decode_undoes_encode(planner: LayoutPlanner, layouts: Layouts) -> None:
    again = planner.decode(*planner.encode(layouts), layouts.characters)
    assert relative_error(again.boxes[layouts.present], layouts.boxes[layouts.present]) < 1e-6
    assert torch.equal(again.characters, layouts.characters) and torch.equal(again.fonts, layouts.fonts)
    assert relative_error(again.ink, layouts.ink.clamp(-1, 1)) < 1e-6
    assert relative_error(again.ground, layouts.ground.clamp(-1, 1)) < 1e-6


def test_values_are_of_about_unit_variance(planner: LayoutPlanner, layouts: Layouts) -> None:
    line, slots = planner.encode(layouts)
    for values in (line[:, :3], slots[layouts.present]):
        assert values.mean(0).abs().max() < 1.5 and (values.std(0) > 0.3).all() and (values.std(0) < 2).all()
    assert (slots[~layouts.present] == 0).all()


def predict_perfectly(monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts) -> None:
    """The planner predicts the layouts from any input, repeated as often as asked; in empty slots it is wrong."""
    line, slots = planner.encode(layouts)
    slots = torch.where(layouts.present[..., None], slots, 9.0)

    def denoise(noisy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        times = len(noisy) // len(line)
        return line.repeat(times, 1), slots.repeat(times, 1, 1)

    monkeypatch.setattr(planner, "denoise", denoise)


def test_a_perfect_planner_has_no_loss_but_spelling_and_colors(
    monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts
) -> None:
    predict_perfectly(monkeypatch, planner, layouts)
    characters = layouts.characters.masked_fill(~layouts.present, BLANK)
    context = torch.randn(16, 14, 12)
    region = torch.zeros(16, 5)
    probabilities = planner.character_head(context[:, :SLOTS]).double().softmax(-1)
    spelling = -probabilities.gather(-1, characters[..., None]).log().mean()
    colors = torch.cat([layouts.ink, layouts.ground], -1)
    palette = (planner.palette_head(context[:, SLOTS]) - colors).double().square().mean()
    found = planner.loss(layouts, context, region)
    assert found.item() == pytest.approx((spelling + 4 * palette).item(), rel=1e-4)


def test_the_loss_counts_present_slots_only(planner: LayoutPlanner, layouts: Layouts) -> None:
    context = torch.randn(16, 14, 12)
    elsewhere = layouts._replace(boxes=torch.where(layouts.present[..., None], layouts.boxes, 1e4))
    found = []
    for given in (layouts, elsewhere):
        torch.manual_seed(0)
        found.append(planner.loss(given, context, torch.zeros(16, 5)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_perfect_planner_samples_its_layouts_from_any_noise(
    monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts
) -> None:
    predict_perfectly(monkeypatch, planner, layouts)
    monkeypatch.setattr(planner, "spell", lambda context: layouts.characters)
    noise = torch.randn(16, planner.noise_size)
    found = planner.sample(torch.randn(16, 14, 12), torch.zeros(16, 5), noise)
    assert torch.equal(found.characters, layouts.characters) and torch.equal(found.fonts, layouts.fonts)
    assert relative_error(found.boxes[found.present], layouts.boxes[layouts.present]) < 1e-5


def test_a_sample_depends_on_its_own_noise_alone(planner: LayoutPlanner) -> None:
    context, noise = torch.randn(3, 14, 12), torch.randn(3, planner.noise_size)
    region = torch.zeros(3, 5)
    together = planner.sample(context, region, noise)
    for i in range(3):
        alone = planner.sample(context[i : i + 1], region[:1], noise[i : i + 1])
        assert relative_error(alone.boxes[0], together.boxes[i]) < 1e-5
    other = planner.sample(context, region, noise + 1)
    assert relative_error(other.boxes, together.boxes) > 1e-3
    sizes = together.boxes[..., 2] - together.boxes[..., 0]
    assert (sizes >= 0.99).all()


def test_spelling_ends_at_the_first_empty_slot(layout_config: LayoutConfig) -> None:
    planner = LayoutPlanner(replace(layout_config, slots=6), 12, SIZE)
    classes = torch.tensor([[1, 2, BLANK, 3, BLANK, 4], [BLANK, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
    planner.character_head = nn.Linear(BLANK + 1, BLANK + 1)
    with torch.no_grad():
        planner.character_head.weight.copy_(torch.eye(BLANK + 1))
        planner.character_head.bias.zero_()
    context = torch.cat([F.one_hot(classes, BLANK + 1).float(), torch.randn(3, 2, BLANK + 1)], 1)
    assert planner.spell(context).tolist() == [[1, 2] + [EMPTY] * 4, [EMPTY] * 6, [0, 1, 2, 3, 4, 5]]


def test_the_region_matters_to_the_layout(planner: LayoutPlanner) -> None:
    context, noise = torch.randn(1, 14, 12), torch.randn(1, planner.noise_size)
    found = [
        planner.sample(context, region_features(torch.tensor([region]), 1, SIZE, torch.device("cpu")), noise)
        for region in ([0.0, 0, 60, 20], [60.0, 10, 120, 30])
    ]
    assert relative_error(found[1].boxes, found[0].boxes) > 1e-2


@pytest.mark.parametrize("region", [(40.0, 4.0, 70.0, 20.0), (math.nan,) * 4])
def test_layouts_are_fitted_into_their_region(
    layout_config: LayoutConfig, layouts: Layouts, region: tuple[float, ...]
) -> None:
    """Those that fit are moved alone; those that are too large are squeezed; the order of the characters stays."""
    planner = LayoutPlanner(replace(layout_config, overshoot=0, descent=0), 12, SIZE)
    where = region_features(torch.tensor([region] * 16), 16, SIZE, torch.device("cpu"))
    low_x, low_y, high_x, high_y = (1, 1, 127, 31) if math.isnan(region[0]) else region
    for factor in (1.0, 9.0):
        given = layouts._replace(boxes=layouts.boxes * factor - torch.tensor([20.0, 30, 20, 30]))
        found = planner.fit(given, where)
        for before, after, present in zip(given.boxes, found.boxes, given.present, strict=True):
            old, new = before[present], after[present]
            assert new[:, 0].min() >= low_x + 0.99 and new[:, 2].max() <= high_x - 0.99
            assert new[:, 1].min() >= low_y + 0.99 and new[:, 3].max() <= high_y - 0.99
            for axis, room in ((0, high_x - low_x - 2), (1, high_y - low_y - 2)):
                sides = old[:, [axis, axis + 2]]
                span = float(sides.max() - sides[0, 0])
                squeeze = min(1.0, room / span)
                moved = (sides - sides[0, 0]) * squeeze
                assert relative_error(new[:, [axis, axis + 2]] - new[0, axis], moved) < 1e-4


def test_small_layouts_are_enlarged_where_there_is_room(layout_config: LayoutConfig, layouts: Layouts) -> None:
    planner = LayoutPlanner(replace(layout_config, overshoot=0, descent=0, least_height=14.0), 12, SIZE)
    small = layouts._replace(boxes=layouts.boxes * 0.4 + 10)
    nowhere = region_features(None, 16, SIZE, torch.device("cpu"))
    for before, after, present in zip(small.boxes, planner.fit(small, nowhere).boxes, layouts.present, strict=True):
        old, new = before[present], after[present]
        height, width = float(old[0, 3] - old[0, 1]), float(old[:, 2].max() - old[0, 0])
        factor = max(1.0, min(14 / height, 124 / width, 28 / height))
        assert relative_error(new - new[0, :2].repeat(2), (old - old[0, :2].repeat(2)) * factor) < 1e-4
        assert new[:, 0].min() >= 1 and new[:, 2].max() <= 127 and new[:, 3].max() <= 31
    # What an edit fills has the size of its box.
    boxed = region_features(torch.tensor([[4.0, 2, 120, 30]] * 16), 16, SIZE, torch.device("cpu"))
    heights = (planner.fit(small, boxed).boxes - small.boxes)[..., [1, 3]]
    assert (heights[..., 1] - heights[..., 0])[layouts.present].abs().max() < 1e-3


def test_region_features() -> None:
    nowhere = [math.nan] * 4
    found = region_features(torch.tensor([[8.0, 16, 64, 32], nowhere]), 2, SIZE, torch.device("cpu"))
    assert found.tolist() == [[0.25, 0.5, 2, 1, 1], [0, 0, 0, 0, 0]]
    assert region_features(None, 3, SIZE, torch.device("cpu")).tolist() == [[0.0] * 5] * 3


# The painter


def test_the_painting_moves_with_the_layout(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 14, 12)
    moved = layouts._replace(boxes=layouts.boxes + torch.tensor([3.0, 0, 3, 0]))
    before, after = painter(layouts, context), painter(moved, context)
    assert before.shape == (16, 1, *SIZE) and before.min() >= 0 and before.max() <= 1
    assert relative_error(after[..., 3:], before[..., :-3]) < 1e-4
    assert relative_error(after, before) > 0.1


def test_the_ink_is_at_the_boxes(painter: GlyphPainter, layouts: Layouts) -> None:
    painted = painter(layouts, torch.randn(16, 14, 12))[:, 0]
    for ink, boxes, present in zip(painted, layouts.boxes, layouts.present):
        near = torch.zeros(SIZE, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes[present].round().int().tolist():
            tall = y2 - y1
            near[max(0, y1 - 4 - tall // 3) : y2 + 4 + tall // 2, max(0, x1 - 3) : x2 + 3] = True
            assert ink[y1 + 1 : y2 - 1, x1:x2].min() > 0.1
        assert (ink[~near] == 0).all()


def test_empty_slots_are_not_painted(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 14, 12)
    boxes = torch.where(layouts.present[..., None], layouts.boxes, torch.tensor([5.0, 5, 60, 25]))
    assert torch.equal(painter(layouts._replace(boxes=boxes), context), painter(layouts, context))
    nothing = layouts._replace(characters=torch.full_like(layouts.characters, EMPTY))
    assert not painter(nothing, context).any()


def test_the_painting_depends_on_character_and_font(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 14, 12)
    base = painter(layouts, context)
    other = context.clone()
    other[:, 0] += 1
    fonts = layouts._replace(fonts=layouts.fonts.roll(1, -1))
    for changed in (painter(layouts, other), painter(fonts, context)):
        assert all(relative_error(row, before) > 1e-3 for row, before in zip(changed, base, strict=True))


def test_a_draft_mixes_ink_and_ground(layouts: Layouts) -> None:
    share = torch.rand(16, 1, *SIZE)
    ink, ground = layouts.ink[:, :, None, None].double(), layouts.ground[:, :, None, None].double()
    expected = torch.cat([share * ink + (1 - share) * ground, share.double()], 1)
    assert relative_error(draft(share, layouts), expected) < 1e-6


def test_ink_loss_is_none_for_the_right_ink(layouts: Layouts) -> None:
    share = torch.rand(16, 1, *SIZE)
    picture = draft(share, layouts)[:, :3]
    assert ink_loss(share, layouts, picture) < 1e-9
    # Half of the ink is missing everywhere: a quarter of its square, over its amount.
    expected = 0.25 * share.double().square().sum() / share.double().sum()
    assert ink_loss(share / 2, layouts, picture).item() == pytest.approx(expected.item(), rel=1e-4)


# Crops for the autoencoder


def test_a_crop_has_its_middle_on_the_word(layouts: Layouts) -> None:
    """Each pixel's value is its column, so that a crop tells where it was taken; its weights are those of that part."""
    columns = torch.arange(128.0).expand(16, 3, *SIZE)
    starts = []
    for seed in range(8):
        torch.manual_seed(seed)
        crops, weights = crop_to_words(columns, layouts)
        assert crops.shape == (16, 3, 32, 48) and weights.shape == (16, 1, 32, 48)
        starts.append(crops[:, 0, 0, 0])
        for crop, weight, boxes, present in zip(crops, weights, layouts.boxes, layouts.present, strict=True):
            start = int(crop[0, 0, 0])
            assert torch.equal(crop, columns[0, :, :, start : start + 48])
            x1, y1 = boxes[present][:, :2].amin(0).int().tolist()
            x2, y2 = boxes[present][:, 2:].amax(0).int().tolist()
            near = torch.zeros(SIZE, dtype=torch.bool)
            near[max(0, y1 - 2) : y2 + 3, max(0, x1 - 2) : x2 + 2] = True
            assert torch.equal(weight[0], torch.where(near, 4.0, 1.0)[:, start : start + 48])
            assert min(max(x1 - 24, 0), 80) <= start <= min(max(x2 - 24, 0), 80)
    assert (torch.stack(starts).std(0) > 0).any()  # at random


def test_crops_stay_in_the_picture() -> None:
    boxes = torch.tensor([[[0.0, 4, 10, 20]], [[118.0, 4, 128, 20]]])
    layouts = Layouts(boxes, torch.zeros(2, 1).long(), torch.eye(2), torch.ones(2, 3), -torch.ones(2, 3))
    crops, _ = crop_to_words(torch.arange(128.0).expand(2, 3, *SIZE), layouts)
    assert crops[0, 0, 0, 0] == 0 and crops[1, 0, 0, -1] == 127


@pytest.mark.parametrize(
    ("ink", "ground"), [(-1.0, -0.9), (1.0, 0.9), (0.0, 0.1), (0.0, -0.1), (0.2, 0.2), (-1.0, 1.0)]
)
def test_ink_and_ground_stand_apart(ink: float, ground: float) -> None:
    """By 60 of 255 in luma: the ground moves where they do not, and stays where they do."""
    planner = LayoutPlanner(LayoutConfig(width=16, depth=1, heads=2, legible=60), 12, SIZE)
    line = torch.zeros(2, 9 + 12)
    line[:, 3:6] = ink
    line[:, 6:9] = ground
    line[1, 3:6] = torch.tensor([0.9, ink, -0.9])
    layouts = planner.decode(line, torch.zeros(2, SLOTS, 2), torch.zeros(2, SLOTS, dtype=torch.long))
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert ((layouts.ink - layouts.ground) @ luma * 127.5).abs().min() > 59.9
    assert layouts.ground.abs().max() <= 1 and torch.equal(layouts.ink, line[:, 3:6])
    apart = ((line[:, 3:6] - line[:, 6:9]) @ luma * 127.5).abs() >= 60
    assert torch.equal(layouts.ground[apart], line[apart, 6:9])


def test_a_word_with_descenders_is_moved_up(planner: LayoutPlanner) -> None:
    config = LayoutConfig(slots=SLOTS, characters="Ag", overshoot=0.2, descent=0.4)
    planner = LayoutPlanner(config, 12, SIZE)
    boxes = torch.tensor([10.0, 20.0, 30.0, 31.0]).expand(2, SLOTS, 4)
    characters = torch.tensor([[0] + [EMPTY] * (SLOTS - 1), [1] + [EMPTY] * (SLOTS - 1)])
    layouts = Layouts(boxes, characters, torch.eye(12)[[0, 0]], torch.ones(2, 3), -torch.ones(2, 3))
    found = planner.fit(layouts, region_features(None, 2, SIZE, torch.device("cpu"))).boxes[:, 0]
    assert found[0, 3] == 30  # it ends a pixel above the margin
    assert found[1, 3] == pytest.approx(30 - 0.8 * 0.4 * 11, abs=0.2)


def test_layouts_take_the_colours_that_are_named(layouts: Layouts) -> None:
    four = Layouts(*(tensor[:4] for tensor in layouts))
    red, white, none = [1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [math.nan] * 3
    named = torch.tensor([[none, none], [red, none], [none, white], [red, white]])
    taken = take_colors(four, named, 60 / 127.5)
    assert torch.equal(taken.ink[0], four.ink[0]) and torch.equal(taken.ground[0], four.ground[0])
    assert torch.equal(taken.ink[[1, 3]], named[[1, 3], 0]) and torch.equal(taken.ground[2:], named[2:, 1])
    luma = torch.tensor([0.299, 0.587, 0.114])
    apart = ((taken.ink - taken.ground) @ luma).abs()
    assert (apart >= 60 / 127.5 - 1e-3).all() and not taken.ink.isnan().any() and not taken.ground.isnan().any()
    same = take_colors(four, torch.tensor([[red, none]] * 4), 0)
    assert torch.equal(same.ground, four.ground)  # what is far enough away stays
