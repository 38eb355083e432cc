from pathlib import Path

import pytest
from fontTools.ttLib import TTFont

from textharmony.data.fonts import HELD_OUT_FAMILIES, STYLES, find_fonts, held_out
from textharmony.data.typesetting import font_path


def test_the_fonts_of_matplotlib() -> None:
    fonts = find_fonts([])
    styles = {font.family: font.style for font in fonts}
    assert styles["DejaVu Sans"] == "sans" and styles["DejaVu Serif"] == styles["STIXGeneral"] == "serif"
    assert styles["DejaVu Sans Mono"] == styles["cmtt10"] == "mono"
    assert not {"cmsy10", "cmex10", "cmmi10", "STIXNonUnicode", "STIXSizeOneSym"} & styles.keys()
    assert all(font.cased and font.path.exists() and not held_out(font.family) for font in fonts)
    assert [(font.family, font.face) for font in fonts] == sorted({(font.family, font.face) for font in fonts})


def test_families_that_are_held_out() -> None:
    assert set(HELD_OUT_FAMILIES) == set(STYLES) and all(len(names) >= 3 for names in HELD_OUT_FAMILIES.values())
    for family in ("Lato", "Lato Black", "Linux Libertine O", "Gentium Basic", "PT Sans Narrow", "Roboto Condensed"):
        assert held_out(family)
    for family in ("Latobius", "PT Serif", "Go", "Courier", "DejaVu Sans"):
        assert not held_out(family)


def test_other_fonts_than_usual_ones(tmp_path: Path) -> None:
    """One whose lower case draws capitals, one without a character, and a file that is no font."""
    _change(tmp_path / "capitals.ttf", "Capitals", {ord(c): ord(c.upper()) for c in "abcdefghijklmnopqrstuvwxyz"})
    _change(tmp_path / "no_q.ttf", "Incomplete", {ord("q"): None})
    (tmp_path / "broken.ttf").write_bytes(b"\0\1\0\0 no font")
    found = {font.family: font for font in find_fonts([tmp_path])}
    assert not found["Capitals"].cased and found["DejaVu Sans"].cased and "Incomplete" not in found
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder, expected one with fonts"):
        find_fonts([tmp_path / "nowhere"])


def _change(path: Path, family: str, characters: dict[int, int | None]) -> None:
    """Write a copy of a font in which some characters draw others, or nothing."""
    font = TTFont(font_path("DejaVuSansMono.ttf"))
    for table in font["cmap"].tables:
        glyphs = dict(table.cmap)
        for character, other in characters.items():
            if other is None:
                table.cmap.pop(character, None)
            elif other in glyphs:
                table.cmap[character] = glyphs[other]
    for record in font["name"].names:
        if record.nameID in (1, 16):
            record.string = family
    font.save(path)
