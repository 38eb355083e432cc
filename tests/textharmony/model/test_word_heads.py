"""What the word heads say of pictures, and their loss in float64."""

import pytest
import torch
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.data.synthetic import SyntheticWords
from textharmony.data.word_labels import label_words
from textharmony.model.layout_planner import Layouts
from textharmony.model.word_heads import BOX_BINS, IGNORE, WordHeads, WordLabels, WordLogits, word_loss
from textharmony.presets import TINY
from textharmony.prompts import Task

N, COLUMNS = 4, 6
LAYOUT = LayoutConfig(slots=3, characters="ABCDE", colors=("black", "white", "red"))


@pytest.fixture
def logits() -> WordLogits:
    return WordHeads(LAYOUT, 10, 8, 2)(torch.randn(N, 2, COLUMNS // 2, 10), torch.randn(N, COLUMNS, 8))


@pytest.fixture
def labels() -> WordLabels:
    return WordLabels(
        torch.randint(6, (N, COLUMNS)),
        torch.randint(4, (N, COLUMNS)),
        torch.randint(3, (N, 2)),
        torch.randint(BOX_BINS, (N, 4)),
    )


def select(values: WordLogits | WordLabels, rows: list[int]) -> list[Tensor]:
    return [tensor[rows] for tensor in values[:4]]


def surprise(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log likelihood of labels (...) under logits (..., classes)."""
    return float(-logits.detach().double().log_softmax(-1).gather(-1, labels[..., None]).mean())


def test_shapes(logits: WordLogits) -> None:
    assert logits.characters.shape == (N, 2, COLUMNS, 5 + 1) and logits.positions.shape == (N, COLUMNS, 3 + 1)
    assert logits.colors.shape == (N, COLUMNS, 2, 3) and logits.box.shape == (N, COLUMNS, 4, BOX_BINS)


def test_two_columns_to_a_patch_in_their_order() -> None:
    heads = WordHeads(LAYOUT, 10, 8, 2)
    patches, tokens = torch.randn(1, 2, 3, 10), torch.randn(1, 6, 8)
    with torch.no_grad():
        before = heads(patches, tokens)
        patches[:, 1, 1] += 1
        after = heads(patches, tokens)
        assert (after.characters != before.characters).any(-1)[0, 0].tolist() == [False] * 2 + [True] * 2 + [False] * 2
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
        tokens[:, 4] += 1
        moved = heads(patches, tokens)
    for new, old in zip((moved.characters[:, 1], *moved[1:]), (after.characters[:, 1], *after[1:]), strict=True):
        assert (new != old).flatten(2).any(-1)[0].tolist() == [False] * 4 + [True, False]


def test_the_loss_is_the_sum_of_four_cross_entropies(logits: WordLogits, labels: WordLabels) -> None:
    """Colours and box are asked of every column."""
    expected = (
        surprise(logits.characters, labels.characters[:, None].expand(-1, 2, -1))
        + surprise(logits.positions, labels.positions)
        + surprise(logits.colors, labels.colors[:, None].expand(-1, COLUMNS, -1))
        + surprise(logits.box, labels.box[:, None].expand(-1, COLUMNS, -1))
    )
    assert word_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_leaves_out_pictures_in_which_something_is_hidden(logits: WordLogits, labels: WordLabels) -> None:
    expected = word_loss(WordLogits(*select(logits, [0, 3])), WordLabels(*select(labels, [0, 3])))
    labels.characters[1], labels.positions[2, 4] = IGNORE, IGNORE
    assert word_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_hidden_pictures_is_zero_and_trains_nothing(labels: WordLabels) -> None:
    heads = WordHeads(LAYOUT, 10, 8, 2)
    logits = heads(torch.randn(N, 2, COLUMNS // 2, 10), torch.randn(N, COLUMNS, 8))
    hidden = labels._replace(characters=torch.full_like(labels.characters, IGNORE))
    assert word_loss(logits, hidden) == 0
    nothing = WordLogits(*(tensor[:0] for tensor in logits))
    assert word_loss(nothing, WordLabels(*select(labels, []))) == 0


def test_a_color_without_a_name_is_left_out(logits: WordLogits, labels: WordLabels) -> None:
    """Also where no picture of the batch has a colour with a name."""
    plain = word_loss(logits, labels).item() - surprise(logits.colors, labels.colors[:, None].expand(-1, COLUMNS, -1))
    one = labels.colors.clone()
    one[1:] = IGNORE
    some = surprise(logits.colors[:1], labels.colors[:1, None].expand(-1, COLUMNS, -1))
    assert word_loss(logits, labels._replace(colors=one)).item() == pytest.approx(plain + some, rel=1e-5)
    none = torch.full_like(one, IGNORE)
    assert word_loss(logits, labels._replace(colors=none)).item() == pytest.approx(plain, rel=1e-5)


def test_a_picture_without_a_word_has_no_box(logits: WordLogits, labels: WordLabels) -> None:
    """Also where no picture of the batch has one."""
    plain = word_loss(logits, labels).item() - surprise(logits.box, labels.box[:, None].expand(-1, COLUMNS, -1))
    one = labels.box.clone()
    one[1:] = IGNORE
    some = surprise(logits.box[:1], labels.box[:1, None].expand(-1, COLUMNS, -1))
    assert word_loss(logits, labels._replace(box=one)).item() == pytest.approx(plain + some, rel=1e-5)
    none = torch.full_like(one, IGNORE)
    assert word_loss(logits, labels._replace(box=none)).item() == pytest.approx(plain, rel=1e-5)


def test_every_head_learns(labels: WordLabels) -> None:
    heads = WordHeads(LAYOUT, 10, 8, 2)
    word_loss(heads(torch.randn(N, 2, COLUMNS // 2, 10), torch.randn(N, COLUMNS, 8)), labels).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_heads_that_know_have_a_loss_of_zero() -> None:
    """Of rendered words, whose labels lie within the classes of the heads."""
    data = SyntheticWords(0, "train", {Task.READ: 1})
    labels = label_words(TINY, [(data[i].layout, False) for i in range(N)], [])
    assert labels is not None and TINY.layout is not None

    def sure(classes: int, wanted: Tensor) -> Tensor:
        return 1e3 * nn.functional.one_hot(wanted.clamp(min=0), classes).float()  # any class where there is no label

    columns = labels.characters.shape[1]
    known = WordLogits(
        sure(len(TINY.layout.characters) + 1, labels.characters[:, None].expand(-1, 2, -1)),
        sure(TINY.layout.slots + 1, labels.positions),
        sure(len(TINY.layout.colors), labels.colors[:, None].expand(-1, columns, -1)),
        sure(BOX_BINS, labels.box[:, None].expand(-1, columns, -1)),
    )
    assert word_loss(known, labels) == 0


def test_labels_move_with_their_layouts(labels: WordLabels) -> None:
    layouts = Layouts(
        torch.ones(1, 3, 4), torch.ones(1, 3).long(), torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3)
    )
    for given in (labels, labels._replace(layouts=layouts)):
        moved = given.to(torch.device("meta"))
        assert all(tensor.device.type == "meta" for tensor in moved[:4])
        assert (moved.layouts is None) == (given.layouts is None)
        assert moved.layouts is None or all(tensor.device.type == "meta" for tensor in moved.layouts)
