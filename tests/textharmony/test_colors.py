"""Colours by name."""

import pytest

from textharmony.colors import BASIC, CSS, basic_name, contrast


def test_css_has_its_148_names() -> None:
    assert len(CSS) == 148 and CSS["rebeccapurple"] == (102, 51, 153) and CSS["lightgoldenrodyellow"] == (250, 250, 210)


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "gray"), ((220, 30, 30), "red"),
        ((30, 140, 60), "green"), ((40, 70, 200), "blue"), ((250, 220, 50), "yellow"), ((245, 130, 20), "orange"),
        ((120, 40, 160), "purple"), ((255, 182, 193), "pink"), ((120, 70, 30), "brown"),
    ],
)  # fmt: skip
def test_a_colour_has_the_name_that_people_give_it(color: tuple[int, int, int], name: str) -> None:
    assert basic_name(color) == name


def test_a_colour_between_two_names_has_none() -> None:
    assert basic_name((190, 75, 25), clear=0.5) == ""
    assert all(basic_name(CSS[name]) == name for name in BASIC)


def test_contrast_is_the_difference_in_luma() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(255)
    assert contrast((255, 0, 0), (0, 130, 0)) < 1
