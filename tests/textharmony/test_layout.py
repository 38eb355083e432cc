import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.data.synthetic import FONTS, SyntheticWords
from textharmony.layout import LayoutPainter, LayoutPlanner, Layouts, region_features
from textharmony.tokens import Task

SLOTS, CELL, GRID = 6, 4, (8, 32)
BLANK = 36


@pytest.fixture(scope="module")
def layout_config() -> LayoutConfig:
    return LayoutConfig(width=16, depth=1, heads=2, map_channels=5, steps=4)


@pytest.fixture
def planner(layout_config: LayoutConfig) -> LayoutPlanner:
    return LayoutPlanner(layout_config, 12, (32, 128))


@pytest.fixture
def painter(layout_config: LayoutConfig) -> LayoutPainter:
    return LayoutPainter(layout_config, 12, GRID, CELL)


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


def rows(layouts: Layouts, index: Tensor) -> Layouts:
    return Layouts(*(getattr(layouts, name)[index] for name in ("boxes", "present", "fonts", "ink", "ground")))


def test_decode_undoes_encode(planner: LayoutPlanner, layouts: Layouts) -> None:
    again = planner.decode(*planner.encode(layouts), layouts.present)
    torch.testing.assert_close(again.boxes[layouts.present], layouts.boxes[layouts.present], atol=1e-3, rtol=0)
    assert torch.equal(again.present, layouts.present) and torch.equal(again.fonts, layouts.fonts)
    torch.testing.assert_close(again.ink, layouts.ink.clamp(-1, 1))
    torch.testing.assert_close(again.ground, layouts.ground.clamp(-1, 1))


def test_values_are_of_about_unit_variance(planner: LayoutPlanner, layouts: Layouts) -> None:
    line, slots = planner.encode(layouts)
    for values in (line[:, :3], slots[layouts.present]):
        assert values.mean(0).abs().max() < 1.2 and (values.std(0) > 0.3).all() and (values.std(0) < 2).all()
    assert (slots[~layouts.present] == 0).all()


def perfect(monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts) -> None:
    """The planner says the layouts whatever it is given, repeated as often as asked."""
    line, slots = planner.encode(layouts)

    def denoise(noisy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        times = len(noisy) // len(line)
        return line.repeat(times, 1), slots.repeat(times, 1, 1)

    monkeypatch.setattr(planner, "denoise", denoise)


def test_a_perfect_planner_has_no_loss_but_the_spelling(
    monkeypatch: pytest.MonkeyPatch, planner: LayoutPlanner, layouts: Layouts
) -> None:
    perfect(monkeypatch, planner, layouts)
    characters = torch.where(layouts.present, 3, BLANK)
    context = torch.randn(16, 9, 12)
    region = torch.zeros(16, 5)
    probabilities = planner.character_head(context[:, :SLOTS]).double().softmax(-1)
    spelling = -probabilities.gather(-1, characters[..., None]).log().mean()
    found = planner.loss(layouts, characters, context, region)
    assert found.item() == pytest.approx(spelling.item(), rel=1e-4)


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
        planner.sample(context, region_features(torch.tensor([region]), 1, (32, 128), torch.device("cpu")), noise)
        for region in ([0.0, 0, 60, 20], [60.0, 10, 120, 30])
    ]
    assert not torch.allclose(plans[0].boxes, plans[1].boxes)


def test_region_features() -> None:
    nowhere = [math.nan] * 4
    found = region_features(torch.tensor([[8.0, 16, 64, 32], nowhere]), 2, (32, 128), torch.device("cpu"))
    assert found.tolist() == [[0.25, 0.5, 2, 1, 1], [0, 0, 0, 0, 0]]
    assert region_features(None, 3, (32, 128), torch.device("cpu")).tolist() == [[0.0] * 5] * 3


def test_the_painting_moves_with_the_layout(painter: LayoutPainter, layouts: Layouts) -> None:
    with torch.no_grad():
        painter.places.zero_()
    context = torch.randn(16, 9, 12)
    boxes = layouts.boxes.clone()
    boxes[..., [0, 2]] += CELL
    moved = Layouts(boxes, layouts.present, layouts.fonts, layouts.ink, layouts.ground)
    before, after = painter(layouts, context), painter(moved, context)
    assert before.shape == (16, 5, *GRID)
    torch.testing.assert_close(after[..., 1:], before[..., :-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_absent_slots_are_not_painted(painter: LayoutPainter, layouts: Layouts) -> None:
    context = torch.randn(16, 9, 12)
    boxes = torch.where(layouts.present[..., None], layouts.boxes, torch.tensor([5.0, 5, 60, 25]))
    elsewhere = Layouts(boxes, layouts.present, layouts.fonts, layouts.ink, layouts.ground)
    torch.testing.assert_close(painter(elsewhere, context), painter(layouts, context))


def test_the_painting_tells_character_font_and_color(painter: LayoutPainter, layouts: Layouts) -> None:
    one = rows(layouts, torch.tensor([0]))
    context = torch.randn(1, 9, 12)
    base = painter(one, context)
    far = base[..., -1].clone()
    other = context.clone()
    other[:, 0] += 1
    changed = painter(one, other)
    x1, x2 = one.boxes[0, 0, 0], one.boxes[0, 0, 2]
    columns = slice(int(x1 // CELL), int(-(-x2 // CELL)))
    assert not torch.allclose(changed[..., columns], base[..., columns], atol=1e-3)
    if x2 < 90:
        torch.testing.assert_close(changed[..., -1], far, atol=1e-3, rtol=0)
    fonts = one.fonts.roll(1, -1)
    assert not torch.allclose(painter(Layouts(one.boxes, one.present, fonts, one.ink, one.ground), context), base)
    assert not torch.allclose(painter(Layouts(one.boxes, one.present, one.fonts, -one.ink, one.ground), context), base)
