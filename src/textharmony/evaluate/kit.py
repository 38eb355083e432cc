"""Pictures from outside of the training renderer: whole strings, any font, colours, grounds, sizes, warps and photos.

Nothing here is shared with `textharmony.data.synthetic`, which draws what a model is trained on, except for the words
that it holds out. A picture is a pure function of its condition, its number, and the fonts and photos of the machine.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from textharmony.data.fonts import FontFile, held_out
from textharmony.data.words import is_held_out
from textharmony.images import open_image

LONGEST = 12  # characters of a word
_STRIP = (128, 32)
_TWINS = frozenset("cosuvwxzCOSUVWXZ0")  # alone, they may be of either case
_LOOK_ALIKE = frozenset("0OoIl1|5S2Z8B")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENGLISH = """
able about above accept across action active actor add address adult advice after again age agree air album alive all
almost alone along already also always amber amount ancient and angle animal answer apple april arch area arm army
around arrive art article ask autumn away baby back bad bag bake bakery ball band bank bar barber base basic basket
bath beach bean bear beauty bed bee before begin bell below bench best better between big bike bird birth black blade
blank block blood blue board boat body bold bone book border both bottle bottom bowl box boy brain branch brave bread
break brick bridge bright bring broad brother brown brush budget build bus bush busy butter button buy cabin cable cafe
cake call calm camera camp candle canvas captain car card care cargo carpet carry case castle cat cause cave ceiling
cell center chain chair chalk chance change charge cheap check cheese chef cherry chest chicken child choice church
cinema circle city class clean clear clerk clever climb clock close cloud club coach coast coat coffee coin cold color
common cook cool copper copy coral corn corner cost cotton count country couple course cousin cover cow craft cream
credit crew crop cross crowd crown cup current curve custom cycle dairy damage dance danger dark date daughter day deal
dear debate december deep deer degree delay deliver dentist depth desert design desk detail diamond diary dinner direct
dish doctor dog dollar door double down dozen draft dragon dream dress drink drive drop drum dry duck dust duty eager
eagle early earth east easy echo edge editor egg eight elbow electric empty energy engine enjoy enter equal error
escape evening event exact example exit expert extra eye fabric face fact factory fair family famous farm fashion fast
father feather february fence festival field fifty figure film final finger fire first fish five flag flame flat flavor
flight floor flour flower fly focus fog follow food foot forest fork form forty forward four fox frame free fresh
friday friend front frost fruit fuel full fun future gallery game garage garden gas gate gentle ghost giant gift ginger
girl give glad glass globe glove goat gold good grain grand grape grass gravel great green grey grocery ground group
guard guest guide guitar habit hair half hall hammer hand happy harbor hard harvest hat have hazel head health heart
heat heavy hello help herb hero high hill history hobby holiday hollow home honest honey hope horse hospital hotel hour
house human hundred hungry ice idea important inch income indoor insect inside iron island item ivory jacket january
jazz jewel job join joke journey judge juice july jump june jungle junior just keep kettle key kind king kiosk kitchen
kite knee knife knock ladder lady lake lamp land language large last late laugh laundry lawn layer lead leaf learn
leather left lemon letter level library life lift light lime limit line lion list little live local lock long look loud
love low luck lunch machine magic mail main make mango many map maple marble march margin market master match matter
meadow meal medal meet melon member memory menu metal meter middle midnight mile milk mill mind mint minute mirror
mixed model modern moment monday money monkey month moon morning mother motor mountain mouse mouth move movie much
museum music name narrow nation nature near neck needle nephew nest network never new news next nice night nine noble
noise noon north nose note november number nurse oak ocean october office often oil old olive onion only open orange
orbit order organ other oven over owl owner oxygen page paint pair palace paper parade parcel parent park parking part
party pass past path pattern peace peach pear pencil people pepper perfect period person phone photo piano picnic
picture piece pilot pink pipe pizza place plain planet plant plastic plate play please pocket poem point polite pond
pool poor popular port post potato pound powder power present press price prince print prize problem profit project
public pull pump purple purse push quick quiet rabbit race radio rail rain random range rapid reach read ready real
reason recipe record red region rent repair rest result return rice rich ride right ring rise river road robot rock
roof room root rope rose rough round route royal rubber rule run safe sail salad sale salt same sand saturday sauce
save school science sea search season seat second secret seed seven shade shadow shape share sharp sheep shelf shell
shine ship shirt shoe shop short show shower side sign silent silk silver simple single sister site six size skill skin
sky sleep slice slow small smart smile smoke smooth snack snow soap soccer social sock soft soil song sorry soup south
space spare special speed spice spider spoon sport spring square stable staff stage stairs stamp star start station
stay steam steel step stone stop store storm story straight strange street strong student studio style sugar summer sun
sunday supper surface sweet swim system table tall tape taste taxi tea teacher team tennis tent test thank theater
thick thin third thunder thursday ticket tiger time tiny title toast today together tomato tone tool tooth topic total
tower town toy track trade train travel tree trick trip truck true tuesday tunnel turn twelve twenty twin uncle under
union unique update upper urban useful valley value vanilla velvet very victory video view village violet visit voice
volume voyage wagon wait walk wall walnut warm wash waste watch water wave weather wedding week welcome west wheat
wheel white whole wide wild win wind window wine wing winter wise wolf wonder wood wool word work world wrist writer
yard year yellow yoga young zebra zero zone
""".split()


# Words


def draw_word(rng: np.random.Generator, kind: str = "mixed", shortest: int = 1, longest: int = LONGEST) -> str:
    """Draw a text that a picture determines, of printable ASCII characters without spaces.

    Words of two characters and more are held out from training by their hash. Left out are texts that a careful
    person cannot be sure of: random strings with characters of several kinds that look alike (0 and O, l and 1), and
    texts of lower-case letters alone that have the forms of their capitals ("sox").

    Args:
        rng: Draws the text.
        kind: "mixed", "lower", "case" (capitals and lower case), "upper" or "punctuation".
        shortest: Characters at least.
        longest: Characters at most.
    """
    while True:
        source = _SOURCES[kind][int(rng.integers(len(_SOURCES[kind])))]
        text = source(
            rng, int(rng.integers(shortest, min(longest, 9 if longest > 9 and shortest < 7 else longest) + 1))
        )
        kept = is_held_out(text) if len(text) > 1 else rng.random() < 0.1  # of characters as many as of words
        if shortest <= len(text) <= longest and _determined(text) and kept:
            return text


def _determined(text: str) -> bool:
    if len(text) == 1:
        return text.isalnum() and text not in _TWINS | _LOOK_ALIKE
    letters = [character for character in text if character.isalpha()]
    return not letters or not set(letters) <= _TWINS or (text.isupper() and len(text) > 2)


def _english(rng: np.random.Generator, length: int) -> str:
    return _ENGLISH[int(rng.integers(len(_ENGLISH)))]


def _upper(rng: np.random.Generator, length: int) -> str:
    return _english(rng, length).upper()


def _title(rng: np.random.Generator, length: int) -> str:
    return _english(rng, length).title()


def _pick(rng: np.random.Generator, alphabet: Sequence[str], length: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def _capitals(rng: np.random.Generator, length: int) -> str:
    return _pick(rng, _LETTERS, length)


def _small(rng: np.random.Generator, length: int) -> str:
    return _pick(rng, "abcdefghijkmnpqrstuvwxyz", length)


def _both_cases(rng: np.random.Generator, length: int) -> str:
    return _pick(rng, "ABDEFGHJKLMNPQRTYabdefghijkmnpqrty", length)


def _digits(rng: np.random.Generator, length: int) -> str:
    return _pick(rng, "0123456789", length)


def _codes(rng: np.random.Generator, length: int) -> str:
    return _pick(rng, "ACDEFGHJKLMNPQRTUVWXY34679", length)


def _price(rng: np.random.Generator, length: int) -> str:
    return ("$", "", "")[
        int(rng.integers(3))
    ] + f"{int(rng.integers(1, 10 ** int(rng.integers(1, 4))))}.{_digits(rng, 2)}"


def _time(rng: np.random.Generator, length: int) -> str:
    return f"{int(rng.integers(24))}:{int(rng.integers(60)):02d}"


def _date(rng: np.random.Generator, length: int) -> str:
    a, b, c = int(rng.integers(1, 29)), int(rng.integers(1, 13)), int(rng.integers(10, 60))
    return (f"{a}/{b}/{c}", f"20{c}-{b:02d}-{a:02d}", f"{a:02d}.{b:02d}.{c}")[int(rng.integers(3))]


def _mail(rng: np.random.Generator, length: int) -> str:
    return f"{_english(rng, 0)[:5]}@{_small(rng, 2)}.{('com', 'org', 'net', 'de', 'fr')[int(rng.integers(5))]}"


def _marked(rng: np.random.Generator, length: int) -> str:
    word = (_upper, _title, _english)[int(rng.integers(3))](rng, length)
    form = ("{}!", "{}?", "{}.", "{}:", "({})", "#{}", "{}+", "{}%", "&{}", "{}*", "{}-", "<{}>", "[{}]", "{};", "{}=")
    return form[int(rng.integers(len(form)))].format(word)


def _share(rng: np.random.Generator, length: int) -> str:
    return f"{int(rng.integers(1, 100))}%" if rng.random() < 0.5 else f"-{int(rng.integers(1, 100))}%"


Source = Callable[[np.random.Generator, int], str]
_SOURCES: dict[str, tuple[Source, ...]] = {
    "mixed": (_english, _upper, _title, _upper, _capitals, _capitals, _digits, _codes, _price, _time, _mail, _marked),
    "plain": (_upper, _upper, _capitals, _digits, _codes, _title, _english),
    "upper": (_upper, _capitals, _digits, _codes),
    "lower": (_english, _english, _small),
    "case": (_title, _title, _both_cases),
    "punctuation": (_price, _time, _date, _mail, _marked, _marked, _share),
}


# Colours


def contrast(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The contrast ratio of two colours (..., 3) in 0..255 by WCAG 2: 1 (none) to 21 (black on white)."""
    lighter, darker = np.maximum(_luminance(a), _luminance(b)), np.minimum(_luminance(a), _luminance(b))
    ratio: np.ndarray = (lighter + 0.05) / (darker + 0.05)
    return ratio


def _luminance(color: np.ndarray) -> np.ndarray:
    share = np.asarray(color, np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.asarray([0.2126, 0.7152, 0.0722])


def draw_colors(rng: np.random.Generator, lowest: float, highest: float = 21.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw an ink and a ground (3,) whose contrast ratio lies between two bounds."""
    while True:
        colors = [_color(rng) for _ in range(2)]
        if highest < 3:  # two shades of one colour, which chance alone seldom draws
            colors[1] = np.clip(colors[0] + rng.uniform(-90, 90) + rng.uniform(-20, 20, 3), 0, 255)
        if lowest <= contrast(colors[0], colors[1]) <= highest:
            return colors[0], colors[1]


def _color(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.3:
        return np.full(3, (8.0, 250.0)[int(rng.integers(2))])
    return rng.uniform(0, 255, 3)


# Grounds


def _noise(rng: np.random.Generator, height: int, width: int, power: float = 1.0) -> np.ndarray:
    """(H, W) float noise in 0..1 whose amplitudes fall with frequency: 1/f**power."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**power
    field = np.fft.irfft2(spectrum, (height, width))
    low, high = np.quantile(field, [0.01, 0.99])
    return np.clip((field - low) / max(high - low, 1e-9), 0, 1)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) float in 0..1, rising in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    field = np.cos(angle) * np.arange(width) / width + np.sin(angle) * np.arange(height)[:, None] / height
    return (field - field.min()) / (field.max() - field.min())


def _mixed(field: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + field[..., None] * (b - a)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return _mixed(_noise(rng, height, width, rng.uniform(0.9, 1.6)), _color(rng), _color(rng))


def _wood(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    bend = _noise(rng, height, width, 1.6)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (np.arange(height)[:, None] / rng.uniform(5, 14) + 3 * bend))
    dark = np.asarray([92, 58, 30]) * rng.uniform(0.6, 1.6)
    return np.clip(
        _mixed(0.7 * rings + 0.3 * _noise(rng, height, width, 0.5), dark, dark * rng.uniform(1.3, 1.9)), 0, 255
    )


def _fabric(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = rng.uniform(2.5, 6)
    weave = np.sin(2 * np.pi * np.arange(width) / period) * np.sin(2 * np.pi * np.arange(height)[:, None] / period)
    base = _color(rng)
    return np.clip(base + (14 * weave + 40 * (_noise(rng, height, width, 0.8) - 0.5))[..., None], 0, 255)


def _shapes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = Image.new("RGB", (width, height), tuple(map(int, _color(rng))))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 12))):
        x, y = rng.uniform(-0.2, 1.0, 2) * (width, height)
        w, h = rng.uniform(0.1, 0.6, 2) * (width, height)
        draw = (pen.ellipse, pen.rectangle)[int(rng.integers(2))]
        draw((x, y, x + w, y + h), fill=tuple(map(int, _color(rng))))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 0.06 * height + 1))), np.float64)
    return np.clip(blurred + 24 * (_noise(rng, height, width, 0.7)[..., None] - 0.5), 0, 255)


def _shadow(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    light = 1 / (1 + np.exp(-(_ramp(rng, height, width) - rng.uniform(0.3, 0.7)) * rng.uniform(6, 30)))
    return np.clip(
        _color(rng) * (0.45 + 0.55 * light[..., None]) + 20 * (_noise(rng, height, width)[..., None] - 0.5), 0, 255
    )


_TEXTURES = (_clouds, _wood, _fabric, _shapes, _shadow)
_PHOTOS = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": (
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/chelsea.png", "data/coffee.png"),
        *("data/coins.png", "data/grass.png", "data/gravel.png", "data/hubble_deep_field.jpg", "data/rocket.jpg"),
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


@cache
def find_photos() -> tuple[Path, ...]:
    """The photos without text in matplotlib, scikit-image and scikit-learn, as far as these are installed."""
    found = []
    for package, names in _PHOTOS.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += [Path(folder) / name for name in names if (Path(folder) / name).exists()]
    return tuple(found)


@cache
def _photo(path: Path) -> Image.Image:
    return open_image(path)


def _crop_of_photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    photos = find_photos()
    photo = _photo(photos[int(rng.integers(len(photos)))])
    scale = max(width / photo.width, height / photo.height)
    wide = int(width / rng.uniform(scale, max(1.2, 2 * scale)))  # pixels of the photo that the crop spans
    tall = max(1, min(photo.height, round(wide * height / width)))
    wide = max(1, min(photo.width, round(tall * width / height)))
    x, y = int(rng.integers(photo.width - wide + 1)), int(rng.integers(photo.height - tall + 1))
    crop = photo.crop((x, y, x + wide, y + tall)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, np.float64)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


# Pictures


@dataclass(frozen=True)
class Condition:
    """What the pictures of one line of the table have in common."""

    name: str
    bar: float  # the share that should be read exactly
    group: str = "grounds"  # the family of conditions that it belongs to, for the sheets of failures
    styles: tuple[str, ...] = ("serif", "sans", "mono")  # of the fonts
    unseen: bool | None = False  # fonts of families that are held out; None: of all families
    words: str = "mixed"  # the kind of draw_word; "none" for pictures without text
    lengths: tuple[int, int] = (1, LONGEST)
    size: tuple[int, int] = _STRIP  # (width, height)
    cap: tuple[float, float] = (11, 21)  # height of capitals in pixels, or less where the word would not fit
    place: str = "free"  # "fill", "edge" and "tight" say how the word stands in the picture
    ground: str = "plain"  # or "gradient", "texture", "photo" or "any"
    contrast: tuple[float, float] = (3.0, 21.0)  # of ink and ground
    noise: float = 0.0  # standard deviation of 255
    jpeg: int = 0  # quality; 0: none
    blur: tuple[float, float] = (0.0, 0.0)  # standard deviation in pixels
    rotation: float = 0.0  # degrees to either side
    perspective: float = 0.0  # how far corners move, of the word's height
    wild: bool = False  # some of the above at random


@dataclass(frozen=True)
class Sample:
    """A picture of one word, or of none."""

    picture: Image.Image
    word: str
    box: tuple[int, int, int, int]  # around the word's ink, in pixels: x1, y1, x2, y2
    family: str = ""  # of the font


def fonts_of(condition: Condition, fonts: Sequence[FontFile]) -> dict[str, list[FontFile]]:
    """The fonts that a condition draws with, by family; empty where a machine has none."""
    found: dict[str, list[FontFile]] = {}
    for font in fonts:
        if font.style in condition.styles and condition.unseen in (None, held_out(font.family)):
            found.setdefault(font.family, []).append(font)
    return found


def make(
    condition: Condition,
    index: int,
    fonts: Mapping[str, Sequence[FontFile]],
    colors: tuple[np.ndarray, np.ndarray] | None = None,
) -> Sample:
    """Make the picture of a condition with a number.

    Args:
        condition: The kind of picture.
        index: Its number.
        fonts: By family, as `fonts_of` lists them.
        colors: Of ink and plain ground (RGB, 0..255); None: they are drawn.
    """
    rng = np.random.default_rng((zlib.crc32(condition.name.encode()), index))
    if condition.words == "none":
        return Sample(_textless(rng, condition), "", (0, 0, 0, 0))
    while True:
        family = sorted(fonts)[int(rng.integers(len(fonts)))]
        font = fonts[family][int(rng.integers(len(fonts[family])))]
        word = draw_word(rng, condition.words, *condition.lengths)
        if not font.cased:
            word = word.upper()
            if len(word) > 1 and not is_held_out(word):
                continue
        mask = _place(rng, condition, font, word)
        if mask is not None:
            break
    rows, columns = np.nonzero(mask > 0.25)
    box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    ink, ground = _colored(rng, condition, mask.shape, box) if colors is None else map(np.asarray, colors)
    picture = _degrade(rng, condition, ground + mask[..., None] * (ink - ground))
    return Sample(picture, word, box, family)


@cache
def _cap_ratio(path: Path) -> float:
    """The height of a capital, of the font's size."""
    return float(-ImageFont.truetype(str(path), 200).getbbox("H", anchor="ls")[1]) / 200


def _write(font: FontFile, word: str, cap: float) -> Image.Image:
    """The coverage ("L") of a word in one line, cropped to its ink, by Pillow's own layout with kerning."""
    pen = ImageFont.truetype(str(font.path), max(2.0, cap / _cap_ratio(font.path)))
    # Without these, fonts for programmers draw "!=" as one sign.
    plain = ["-liga", "-calt", "-clig"] if features.check("raqm") else None
    left, top, right, bottom = (int(v) for v in pen.getbbox(word, anchor="ls", features=plain))
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), word, fill=255, font=pen, anchor="ls", features=plain)
    return mask.crop(mask.getbbox())


def _bend(rng: np.random.Generator, condition: Condition, mask: Image.Image) -> Image.Image:
    """Turn a word and move its corners."""
    if condition.perspective:
        w, h = mask.size
        reach = condition.perspective * h
        margin = math.ceil(reach) + 1
        canvas = Image.new("L", (w + 2 * margin, h + 2 * margin))
        canvas.paste(mask, (margin, margin))
        source = [(margin, margin), (w + margin, margin), (w + margin, h + margin), (margin, h + margin)]
        target = [(x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)) for x, y in source]
        canvas = canvas.transform(
            canvas.size, Image.Transform.PERSPECTIVE, _homography(target, source), Image.Resampling.BICUBIC
        )
        mask = canvas.crop(canvas.getbbox())
    if condition.rotation:
        angle = rng.uniform(-condition.rotation, condition.rotation)
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        mask = mask.crop(mask.getbbox())
    return mask


def _homography(source: Sequence[tuple[float, float]], target: Sequence[tuple[float, float]]) -> list[float]:
    """The eight coefficients by which Pillow maps source points to target points."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.asarray(rows), np.asarray(values))]


_SMALLEST = 5.0  # pixels of a capital: fewer cannot be read


def _place(rng: np.random.Generator, condition: Condition, font: FontFile, word: str) -> np.ndarray | None:
    """The word's coverage (H, W) in 0..1 in a picture; None if the word would be too small."""
    width, height = condition.size
    cap = rng.uniform(*condition.cap)
    scale = int(rng.choice([1, 2, 4])) if height <= 64 else 1
    if condition.rotation or condition.perspective:
        scale = max(scale, 2)
    seed = int(rng.integers(2**32))  # the same turn after the word was made smaller
    margin = 0 if condition.place in ("edge", "fill") else 2
    for _ in range(6):
        mask = _bend(np.random.default_rng(seed), condition, _write(font, word, cap * scale))
        if condition.place == "tight":
            break
        room = (width - 2 * margin) / (mask.width / scale), (height - 2 * margin) / (mask.height / scale)
        if min(room) >= 1 and not (condition.place == "fill" and min(room) > 1.06):
            break
        cap *= min(room) * 0.985
    else:
        return None
    if cap < min(_SMALLEST, condition.cap[0]):
        return None
    wide, tall = math.ceil(mask.width / scale), math.ceil(mask.height / scale)
    if condition.place == "tight":
        width, height = wide + int(rng.integers(1, 5)), tall + int(rng.integers(1, 5))
        margin = 0
    slack_x, slack_y = max(0, width - wide - 2 * margin), max(0, height - tall - 2 * margin)
    x, y = margin + rng.uniform(0, slack_x), margin + rng.uniform(0, slack_y)
    if condition.place == "edge":
        side = int(rng.integers(4))
        x = (0, slack_x, x, x)[side]
        y = (y, y, 0, slack_y)[side]
    canvas = Image.new("L", (width * scale, height * scale))
    left, top = min(round(x * scale), canvas.width - mask.width), min(round(y * scale), canvas.height - mask.height)
    canvas.paste(mask, (left, top))
    return np.asarray(canvas.reduce(scale), np.float64) / 255


def _colored(
    rng: np.random.Generator, condition: Condition, size: tuple[int, ...], box: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """An ink (3,), and a ground (H, W, 3) or (3,) from which the ink stands out behind the word."""
    height, width = size
    kind = condition.ground
    if kind == "any":
        kind = ("plain", "gradient", "texture", "photo")[int(rng.integers(4))]
    x1, y1, x2, y2 = box
    while True:
        ink, color = draw_colors(rng, *condition.contrast)
        if kind == "plain":
            return ink, color
        if kind == "gradient":
            ground = _mixed(_ramp(rng, height, width), color, _color(rng))
        else:
            ground = _scene(rng, height, width, kind)
        for _ in range(30):
            ratios = contrast(ink, ground[y1:y2, x1:x2])
            if np.quantile(ratios, 0.1) >= min(condition.contrast[0], 3.0):
                return ink, ground
            ink = _color(rng)


def _scene(rng: np.random.Generator, height: int, width: int, kind: str) -> np.ndarray:
    if kind == "photo" and find_photos() and rng.random() < 0.6:
        return _crop_of_photo(rng, height, width)
    return _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng, height, width)


def _degrade(rng: np.random.Generator, condition: Condition, pixels: np.ndarray) -> Image.Image:
    noise, jpeg, blur = condition.noise, condition.jpeg, rng.uniform(*condition.blur)
    if condition.wild:
        noise = rng.uniform(0, 25) if rng.random() < 0.4 else 0.0
        jpeg = int(rng.integers(30, 80)) if rng.random() < 0.4 else 0
        blur = rng.uniform(0.4, 1.0) if rng.random() < 0.3 else 0.0
    picture = Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    if noise:
        noisy = np.asarray(picture, np.float64) + rng.normal(0, noise, (picture.height, picture.width, 3))
        picture = Image.fromarray(np.clip(noisy, 0, 255).round().astype(np.uint8))
    if jpeg:
        picture.save(encoded := io.BytesIO(), "JPEG", quality=jpeg)
        picture = open_image(encoded.getvalue())
    return picture


def _textless(rng: np.random.Generator, condition: Condition) -> Image.Image:
    sizes = (_STRIP, _STRIP, _STRIP, (200, 120), (240, 240), (600, 200), (640, 480))
    width, height = sizes[int(rng.integers(len(sizes)))]
    kind = int(rng.integers(5))
    if kind == 0:
        pixels = np.broadcast_to(_color(rng), (height, width, 3))
    elif kind == 1:
        pixels = _mixed(_ramp(rng, height, width), _color(rng), _color(rng))
    else:
        pixels = _scene(rng, height, width, "photo")
    noisy = pixels + rng.normal(0, rng.uniform(0, 20) if rng.random() < 0.4 else 0.0, pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).round().astype(np.uint8))


_LARGE = (640, 480)
# fmt: off
CONDITIONS = (
    Condition("known fonts, any colours", 0.98, "fonts", words="plain", lengths=(1, 8)),
    Condition("unseen serif families", 0.92, "fonts", ("serif",), True, words="plain", lengths=(1, 8)),
    Condition("unseen sans families", 0.92, "fonts", ("sans",), True, words="plain", lengths=(1, 8)),
    Condition("unseen mono families", 0.92, "fonts", ("mono",), True, words="plain", lengths=(1, 8)),
    Condition("unseen display families", 0.55, "fonts", ("display",), True, words="plain", lengths=(1, 8)),
    Condition("unseen handwriting families", 0.35, "fonts", ("handwriting",), True, words="plain", lengths=(1, 8)),
    Condition("low contrast", 0.93, words="plain", lengths=(1, 8), contrast=(1.4, 2.0)),
    Condition("noise 25", 0.93, words="plain", lengths=(1, 8), noise=25),
    Condition("JPEG 30", 0.93, words="plain", lengths=(1, 8), jpeg=30),
    Condition("gradient", 0.93, words="plain", lengths=(1, 8), ground="gradient"),
    Condition("photo grounds", 0.60, words="plain", lengths=(1, 8), ground="photo", contrast=(3.0, 21)),
    Condition("wild mixture", 0.60, unseen=None, ground="any", rotation=5, wild=True),
    Condition("small, capitals of 7 to 11 pixels", 0.90, "sizes", words="plain", lengths=(1, 8), cap=(7, 11)),
    Condition("the word fills the picture", 0.90, "sizes", words="plain", lengths=(2, 8), cap=(20, 30), place="fill"),
    Condition("the word touches a side", 0.90, "sizes", words="plain", lengths=(1, 8), place="edge"),
    Condition("tight crop", 0.90, "sizes", words="plain", lengths=(2, 8), cap=(11, 40), place="tight"),
    Condition("600 x 200", 0.90, "sizes", words="plain", lengths=(1, 8), size=(600, 200), cap=(24, 100)),
    Condition("640 x 480, large", 0.90, "sizes", words="plain", lengths=(1, 8), size=_LARGE, cap=(50, 150)),
    Condition("640 x 480, small", 0.90, "sizes", words="plain", lengths=(2, 8), size=_LARGE, cap=(12, 28)),
    Condition("blur", 0.82, "lenses", words="plain", lengths=(1, 8), blur=(0.8, 1.5)),
    Condition("perspective", 0.85, "lenses", words="plain", lengths=(1, 8), perspective=0.25),
    Condition("rotation to 10 degrees", 0.90, "lenses", words="plain", lengths=(1, 8), rotation=10),
    Condition("lower case", 0.85, "characters", words="lower"),
    Condition("capitals and lower case", 0.85, "characters", words="case"),
    Condition("punctuation", 0.85, "characters", words="punctuation"),
    Condition("7 to 12 characters", 0.85, "characters", lengths=(7, 12)),
    Condition("blank or textless", 0.95, "textless", words="none"),
)
# fmt: on
