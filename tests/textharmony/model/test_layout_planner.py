import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.data.synthetic import FONTS, SyntheticWords
from textharmony.model.layout_planner import GlyphPainter, LayoutPlanner, Layouts, draft, ink_loss, region_features
from textharmony.prompts import Task

SLOTS, SIZE = 6, (32, 128)
BLANK = 36


@pytest.fixture(scope="module")
def layout_config() -> LayoutConfig:
    return LayoutConfig(width=16, depth=1, heads=2, steps=4)


@pytest.fixture
def planner(layout_config: LayoutConfig) -> LayoutPlanner:
    return LayoutPlanner(layout_config, 12, SIZE)


@pytest.fixture
def painter(layout_config: LayoutConfig) -> GlyphPainter:
    return GlyphPainter(layout_config, 12, SIZE)


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    """Of 16 rendered words."""
    data = SyntheticWords(0, "train", {Task.GENERATION: 1})
    found = [data[i] for i in range(16)]
    boxes = torch.zeros(16, SLOTS, 4)
    for row, sample in zip(boxes, found):
        assert sample.layout is not None
        row[: len(sample.text)] = torch.from_numpy(sample.layout.boxes)
    placed = [sample.layout for sample in found if sample.layout is not None]
    return Layouts(
        boxes,
        torch.tensor([[i < len(sample.text) for i in range(SLOTS)] for sample in found]),
        F.one_hot(torch.tensor([layout.font for layout in placed]), len(FONTS)),
        torch.stack([torch.from_numpy(layout.ink) for layout in placed]) / 127.5 - 1,
        torch.stack([torch.from_numpy(layout.ground) for layout in placed]) / 127.5 - 1,
    )


def test_decode_undoes_encode(planner: LayoutPlanner, layouts: Layouts) -> None:
    again = planner.decode(*planner.encode(layouts), layouts.present)
    torch.testing.assert_close(again.boxes[layouts.present], layouts.boxes[layouts.present], atol=1e-3, rtol=0)
    assert torch.equal(again.present, layouts.present) and torch.equal(again.fonts, layouts.fonts)
    torch.testing.assert_close(again.ink, layouts.ink.clamp(-1, 1))
    torch.testing.assert_close(again.ground, layouts.ground.clamp(-1, 1))


def test_values_are_of_about_unit_variance(planner: LayoutPlanner, layouts: Layouts) -> None:
    line, slots = planner.encode(layouts)
    for values in (line[:, :3], slots[layouts.present]):
        assert values.mean(0).abs().max() < 1.5 and (values.std(0) > 0.3).all() and (values.std(0) < 2).all()
    assert (slots[~layouts.present] == 0).all()


def perfect(monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts) -> None:
    """The planner says the layouts whatever it is given, repeated as often as asked."""
    line, slots = planner.encode(layouts)

    def denoise(noisy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        times = len(noisy) // len(line)
        return line.repeat(times, 1), slots.repeat(times, 1, 1)

    monkeypatch.setattr(planner, "denoise", denoise)


def test_a_perfect_planner_has_no_loss_but_spelling_and_colors(
    monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts
) -> None:
    perfect(monkeypatch, planner, layouts)
    characters = torch.where(layouts.present, 3, BLANK)
    context = torch.randn(16, 9, 12)
    region = torch.zeros(16, 5)
    probabilities = planner.character_head(context[:, :SLOTS]).double().softmax(-1)
    spelling = -probabilities.gather(-1, characters[..., None]).log().mean()
    colors = torch.cat([layouts.ink, layouts.ground], -1)
    palette = (planner.palette_head(context[:, SLOTS]) - colors).double().square().mean()
    found = planner.loss(layouts, characters, context, region)
    assert found.item() == pytest.approx((spelling + 4 * palette).item(), rel=1e-4)


def test_the_loss_counts_present_slots_only(planner: LayoutPlanner, layouts: Layouts) -> None:
    characters, context = torch.where(layouts.present, 3, BLANK), torch.randn(16, 9, 12)
    boxes = torch.where(layouts.present[..., None], layouts.boxes, 1e4)
    elsewhere = Layouts(boxes, layouts.present, layouts.fonts, layouts.ink, layouts.ground)
    found = []
    for plan in (layouts, elsewhere):
        torch.manual_seed(0)
        found.append(planner.loss(plan, characters, context, torch.zeros(16, 5)))
    torch.testing.assert_close(found[0], found[1])


def test_a_perfect_planner_samples_its_layouts_from_any_noise(
    monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts
) -> None:
    perfect(monkeypatch, planner, layouts)
    monkeypatch.setattr(planner, "spell", lambda context: torch.where(layouts.present, 3, BLANK))
    noise = torch.randn(16, planner.noise_size)
    found = planner.sample(torch.randn(16, 9, 12), torch.zeros(16, 5), noise)
    assert torch.equal(found.present, layouts.present) and torch.equal(found.fonts, layouts.fonts)
    torch.testing.assert_close(found.boxes[found.present], layouts.boxes[layouts.present], atol=1e-3, rtol=0)


def test_a_sample_depends_on_its_own_noise_alone(planner: LayoutPlanner) -> None:
    context, noise = torch.randn(3, 9, 12), torch.randn(3, planner.noise_size)
    region = torch.zeros(3, 5)
    together = planner.sample(context, region, noise)
    for i in range(3):
        alone = planner.sample(context[i : i + 1], region[:1], noise[i : i + 1])
        torch.testing.assert_close(alone.boxes[0], together.boxes[i], atol=1e-3, rtol=1e-4)
    other = planner.sample(context, region, noise + 1)
    assert not torch.allclose(other.boxes, together.boxes, atol=0.1)
    sizes = together.boxes[..., 2] - together.boxes[..., 0]
    assert (sizes >= 0.99).all()


def test_spelling_ends_at_the_first_blank(planner: LayoutPlanner) -> None:
    said = torch.tensor([[1, 2, BLANK, 3, BLANK, 4], [BLANK, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
    planner.character_head = nn.Linear(BLANK + 1, BLANK + 1)
    with torch.no_grad():
        planner.character_head.weight.copy_(torch.eye(BLANK + 1))
        planner.character_head.bias.zero_()
    context = torch.cat([F.one_hot(said, BLANK + 1).float(), torch.randn(3, 2, BLANK + 1)], 1)
    assert planner.spell(context).tolist() == [[1, 2] + [BLANK] * 4, [BLANK] * 6, [0, 1, 2, 3, 4, 5]]


def test_the_region_matters_to_the_plan(planner: LayoutPlanner) -> None:
    context, noise = torch.randn(1, 9, 12), torch.randn(1, planner.noise_size)
    plans = [
        planner.sample(context, region_features(torch.tensor([region]), 1, SIZE, torch.device("cpu")), noise)
        for region in ([0.0, 0, 60, 20], [60.0, 10, 120, 30])
    ]
    assert not torch.allclose(plans[0].boxes, plans[1].boxes)


def test_region_features() -> None:
    nowhere = [math.nan] * 4
    found = region_features(torch.tensor([[8.0, 16, 64, 32], nowhere]), 2, SIZE, torch.device("cpu"))
    assert found.tolist() == [[0.25, 0.5, 2, 1, 1], [0, 0, 0, 0, 0]]
    assert region_features(None, 3, SIZE, torch.device("cpu")).tolist() == [[0.0] * 5] * 3


def test_the_painting_moves_with_the_layout(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 9, 12)
    moved = replace(layouts, boxes=layouts.boxes + torch.tensor([3.0, 0, 3, 0]))
    before, after = painter(layouts, context), painter(moved, context)
    assert before.shape == (16, 1, *SIZE) and before.min() >= 0 and before.max() <= 1
    torch.testing.assert_close(after[..., 3:], before[..., :-3], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(after, before, atol=0.1)


def test_the_ink_is_at_the_boxes(painter: GlyphPainter, layouts: Layouts) -> None:
    painted = painter(layouts, torch.randn(16, 9, 12))[:, 0]
    for ink, boxes, present in zip(painted, layouts.boxes, layouts.present):
        near = torch.zeros(SIZE, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes[present].round().int().tolist():
            near[max(0, y1 - 3) : y2 + 3 + (y2 - y1) // 3, max(0, x1 - 3) : x2 + 3] = True
            assert ink[y1 + 1 : y2 - 1, x1:x2].min() > 0.1
        assert (ink[~near] == 0).all()


def test_absent_slots_are_not_painted(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 9, 12)
    boxes = torch.where(layouts.present[..., None], layouts.boxes, torch.tensor([5.0, 5, 60, 25]))
    assert torch.equal(painter(replace(layouts, boxes=boxes), context), painter(layouts, context))
    nothing = replace(layouts, present=torch.zeros_like(layouts.present))
    assert not painter(nothing, context).any()


def test_the_painting_tells_character_and_font(painter: GlyphPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 9, 12)
    base = painter(layouts, context)
    other = context.clone()
    other[:, 0] += 1
    fonts = replace(layouts, fonts=layouts.fonts.roll(1, -1))
    for changed in (painter(layouts, other), painter(fonts, context)):
        assert ((changed - base).abs().flatten(1).amax(1) > 0.005).all()


def test_a_draft_mixes_ink_and_ground(layouts: Layouts) -> None:
    share = torch.rand(16, 1, *SIZE)
    found = draft(share, layouts).double()
    mixed = share * layouts.ink[:, :, None, None] + (1 - share) * layouts.ground[:, :, None, None]
    torch.testing.assert_close(found, torch.cat([mixed, share], 1).double(), atol=1e-6, rtol=1e-6)


def test_ink_loss_is_none_for_the_right_ink(layouts: Layouts) -> None:
    share = torch.rand(16, 1, *SIZE)
    picture = draft(share, layouts)[:, :3]
    assert ink_loss(share, layouts, picture) < 1e-9
    # Half the ink missing everywhere: a quarter of its square, over its amount.
    expected = 0.25 * share.double().square().sum() / share.double().sum()
    assert ink_loss(share / 2, layouts, picture).item() == pytest.approx(expected.item(), rel=1e-4)
