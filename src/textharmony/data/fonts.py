"""The fonts of a machine: found, checked, classified by style, and split by family into known and held-out ones.

The shipped weights and their tables were made with the fonts in matplotlib's wheel and with these packages of Debian
12, whose names all begin with "fonts-":

3270, adf-accanthis, adf-baskervald, adf-gillius, adf-libris, adf-mekanus, adf-oldania, adf-romande, adf-switzera,
adf-tribun, adf-universalis, adf-verana, agave, allerta, anonymous-pro, arapey, averia-gwf, averia-sans-gwf,
averia-serif-gwf, b612, bebas-neue, breip, cabin, cabinsketch, cantarell, cardo, cherrybomb, clear-sans, cmu,
comfortaa, comic-neue, courier-prime, croscore, crosextra-caladea, crosextra-carlito, dancingscript, dejavu-core,
dejavu-extra, dkg-handwriting, dosis, dustin, ebgaramond, ecolier-court, essays1743, eurofurence, fantasque-sans,
fanwood, femkeklaver, firacode, freefont-ttf, georgewilliams, gfs-artemisia, gfs-didot, gfs-neohellenic, go,
goudybookletter, hack-ttf, havana, hermit, humor-sans, inconsolata, inter, isabella, jetbrains-mono, joscelyn,
junction, junicode, jura, karla, kaushanscript, klaudia-berenika, kristi, lato, league-mono, league-spartan,
leckerli-one, lemonada, liberation, lindenhill, linuxlibertine, lmodern, lobster, lobstertwo, manrope, monofur,
monoid, mononoki, noto-core, noto-mono, ocr-a, ocr-b, okolaks, oldstandard, open-sans, opendyslexic, oxygen, paratype,
play, prociono, quattrocento, quicksand, roboto-slab, roboto-unhinted, routed-gothic, rufscript, sil-andika,
sil-charis, sil-doulos, sil-gentium-basic, sil-gentiumplus, sjfonts, sora, staypuft, stix, summersby, texgyre,
thai-tlwg-ttf, tiresias, tomsontalks, triod-postnaja, tuffy, ubuntu-title, urw-base35, vollkorn, yanone-kaffeesatz,
yrsa-rasa.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

STYLES = ("serif", "sans", "mono", "display", "handwriting")
PRINTABLE = string.printable[:94]  # ASCII without the space


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# fmt: off
# No model is trained on these families: an evaluation reads them as unseen ones. A name covers the names that begin
# with it ("Lato" covers "Lato Black"). Families of one design, such as Lato and Carlito, are held out together.
HELD_OUT_FAMILIES = {
    "serif": _names("""
        EB Garamond, Vollkorn, Linux Libertine, Gentium, Caladea, Roboto Slab
    """),
    "sans": _names("""
        Lato, Carlito, Roboto, Cantarell, PT Sans, Karla, Clear Sans
    """),
    "mono": _names("""
        JetBrains Mono, Inconsolata, Anonymous Pro, Go Mono, Courier Prime
    """),
    "display": _names("""
        Bebas Neue, Comfortaa, Lobster, Cherry Bomb, Yanone Kaffeesatz
    """),
    "handwriting": _names("""
        Dancing Script, DkgHandwriting, Breip, Kaushan Script, Great Vibes
    """),
}
_KNOWN_FAMILIES = {
    "serif": _names("""
        Accanthis ADF, Arapey, Baskervald ADF, Berenika, Bitstream Vera Serif, C059, CMU Serif, CMU Concrete, Cardo,
        Caslon, Charis SIL, DejaVu Serif, Doulos SIL, Dustismo Roman, Essays1743, Fanwood, FreeSerif, GFS Artemisia,
        GFS Didot, Goudy Bookletter 1911, IM FELL, IndUni-P, IndUni-T, Junicode, Kinnari, Latin Modern Roman,
        Liberation Serif, Linden Hill, Nimbus Roman, Norasi, Noto Serif, Old Standard TT, P052, PT Serif, Prociono,
        Quattrocento, Rasa, Romande ADF, STIX, STIXGeneral, TeX Gyre Bonum, TeX Gyre Pagella, TeX Gyre Schola, TeX
        Gyre Termes, Tinos, Tribun ADF, URW Bookman, Verana, Yrsa, cmr10, cmb10, cmti10
    """),
    "sans": _names("""
        Allerta, Andika, Arimo, Averia Sans GWF, B612, Bitstream Vera Sans, CMU Bright, CMU Sans Serif, Cabin,
        DejaVu Sans, Dosis, Dustismo, FreeSans, GFS Neohellenic, Garuda, Gillius ADF, Go, IndUni-H, Inter, Junction,
        Jura, Klaudia, Laksaman, Latin Modern Sans, League Spartan, Liberation Sans, Libris ADF, Linux Biolinum,
        Loma, Manrope, Nimbus Sans, Noto Sans, Open Sans, OpenDyslexic, Oxygen-Sans, Play, Quicksand, Routed Gothic,
        Sawasdee, Sora, Switzera ADF, TeX Gyre Adventor, TeX Gyre Heros, Tiresias, Tuffy, URW Gothic, Umpush,
        Universalis ADF, Verana Sans, Waree, cmss10, eurofurence, okolaks
    """),
    "mono": _names("""
        Agave, B612 Mono, Bitstream Vera Sans Mono, CMU Typewriter Text, Cousine, DejaVu Sans Mono, Fantasque Sans
        Mono, Fira Code, FreeMono, GWMonospace, Hack, Hermit, IBM 3270, IndUni-C, Latin Modern Mono, League Mono,
        Liberation Mono, Monoid, Nimbus Mono PS, Noto Mono, Noto Sans Mono, OCR B, OCRA, Oxygen Mono, PT Mono, TeX
        Gyre Cursor, Tlwg Mono, Tlwg Typewriter, Tlwg Typist, Tlwg Typo, cmtt10, monofur, mononoki
    """),
    "display": _names("""
        Averia GWF, Averia Serif GWF, Cabin Sketch, CabinSketch, Caliban, Cupola, DejaVu Sans Display, Delphine,
        Junkyard, Leckerli One, Lemonada, Mekanus ADF, Oldania ADF, Penguin Attack, StayPuft, Summersby,
        TriodPostnaja, Ubuntu-Title, El Abogado Loco
    """),
    "handwriting": _names("""
        Comic Neue, Domestic Manners, Ecolier, Humor Sans, Isabella, Joscelyn, Kristi, Purisa, Romande ADF Script,
        Rufscript, SteveHand, Steve, TeX Gyre Chorus, TomsonTalks, Tomson Talks, Z003, femkeklaver
    """),
}
# fmt: on
# Fonts of other signs, of small capitals, or with the Latin letters of another family.
_EXCLUDED = (
    *("FutharkAdapted", "Go Smallcaps", "Klingon", "Last Resort", "Latin Modern Mono Caps", "Latin Modern Roman Caps"),
    *("Linux Biolinum Keyboard", "Linux Biolinum Keyboard O", "Mekanus ADF Titling", "Noto", "Romande ADF Style"),
    *("cmex10", "cmmi10", "cmsy10"),
)
_NOTO = ("Noto Sans", "Noto Serif", "Noto Mono", "Noto Sans Mono", "Noto Sans Display", "Noto Serif Display")
_SYMBOLS = ("Math", "Symbol", "Dingbat", "Emoji", "Fraktur", "Music", "Barcode")
_FAINT = ("Hairline", "Thin", "Outline", "Inverted")  # faces that few people can read in small sizes


@dataclass(frozen=True)
class FontFile:
    """A font that draws all printable ASCII characters."""

    path: Path
    family: str
    face: str  # such as "Bold Italic"
    style: str  # one of STYLES
    cased: bool  # whether its lower-case letters differ from its capitals by more than their size


def held_out(family: str) -> bool:
    """Whether a family is kept from training."""
    return any(_covers(name, family) for names in HELD_OUT_FAMILIES.values() for name in names)


def find_fonts(folders: Sequence[Path] | None = None) -> list[FontFile]:
    """Find the fonts that draw all printable ASCII characters, sorted by family and face.

    Args:
        folders: Where to search, with the folders inside them; None: where the system keeps its fonts. The fonts of
            matplotlib are found in both cases.

    Raises:
        FileNotFoundError: A folder does not exist.
    """
    import matplotlib

    places = [Path(matplotlib.get_data_path()) / "fonts" / "ttf", *(folders or ())]
    for folder in places:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder, expected one with fonts")
    files = [file for folder in places for file in sorted(folder.rglob("*"))]
    if folders is None:
        from matplotlib.font_manager import findSystemFonts

        files += map(Path, sorted(findSystemFonts()))
    found: dict[tuple[str, str], FontFile] = {}
    for file in files:
        font = _examine(file.resolve()) if file.suffix.lower() in (".ttf", ".otf") else None
        if font is not None:
            found.setdefault((font.family, font.face), font)  # one file of each face
    return [found[name] for name in sorted(found)]


def _covers(name: str, family: str) -> bool:
    return family == name or family.startswith(f"{name} ")


def _style(family: str, panose: bytes) -> str | None:
    """The style that the tables know, or that the font's own classification says; None where neither does."""
    if any(word in family for word in _SYMBOLS) or (family.startswith("Noto ") and family not in _NOTO):
        return None
    tables: list[tuple[str | None, tuple[str, ...]]] = [
        *_KNOWN_FAMILIES.items(),
        *HELD_OUT_FAMILIES.items(),
        (None, _EXCLUDED),
    ]
    named = [(len(name), style) for style, names in tables for name in names if _covers(name, family)]
    if named:
        return max(named, key=lambda match: match[0])[1]  # the longest name knows best
    kind, serif, _, proportion = panose[:4]
    if kind != 2:
        return {3: "handwriting", 4: "display"}.get(kind)
    if proportion == 9:
        return "mono"
    return "serif" if 2 <= serif <= 10 else "sans" if 11 <= serif <= 15 else None


@cache
def _examine(path: Path) -> FontFile | None:
    """A file as a font; None if it cannot be read, is of no style, or lacks a printable ASCII character."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(path))
        names = font.get_sfnt()
        family, face = _name(names, 16, 1) or "", _name(names, 17, 2) or "Regular"
        style = _style(family, font.get_sfnt_table("OS/2")["panose"]) if family else None  # type: ignore[index]
        if style is None or any(word in face or word in family for word in _FAINT):
            return None
        if not all(font.get_char_index(ord(character)) for character in PRINTABLE):
            return None
        pen = ImageFont.truetype(str(path), 32, layout_engine=ImageFont.Layout.BASIC)
        if any(pen.getmask(character).getbbox() is None for character in "aegrAEGR08@~"):  # drawn blank
            return None
        return FontFile(path, family, face, style, any(_differ(pen, letter) for letter in "aegr"))
    except (OSError, RuntimeError, ValueError, TypeError):  # a corrupt file, or one without a table
        return None


def _name(names: dict[tuple[int, int, int, int], bytes], *kinds: int) -> str | None:
    """The first of some kinds of names in a font's table, in English where it has several languages."""
    for kind in kinds:
        for platform, encoding, language in ((3, 1, 0x409), (3, 10, 0x409), (3, 0, 0x409), (1, 0, 0)):
            if name := names.get((platform, encoding, language, kind)):
                return name.decode("mac_roman" if platform == 1 else "utf_16_be", "replace").strip("\0 ")
    return None


def _differ(pen: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a letter, scaled to a common size, has another form than its capital."""
    forms = []
    for character in (letter, letter.upper()):
        mask = pen.getmask(character)
        picture = Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())
        forms.append(np.asarray(picture.resize((16, 16)), np.float32))
    return float(np.abs(forms[0] - forms[1]).mean()) > 16


@cache
def training_fonts(folders: tuple[str, ...] | None) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The files that words are rendered in, by style and family, without those held out; folders as in `find_fonts`."""
    by_style: dict[str, dict[str, list[str]]] = {style: {} for style in STYLES}
    for font in find_fonts(None if folders is None else [Path(folder) for folder in folders]):
        if font.cased and not held_out(font.family):
            by_style[font.style].setdefault(font.family, []).append(str(font.path))
    return tuple(tuple(tuple(files) for files in families.values()) for families in by_style.values() if families)
