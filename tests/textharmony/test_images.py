"""Pictures: decoded as people see them, fitted to a model, and pasted back."""

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from textharmony import images
from textharmony.boxes import Box, covered_pixels, to_pixels
from textharmony.images import (
    HIDDEN,
    check_picture,
    contact_sheet,
    fit_image,
    hide,
    image_size,
    open_image,
    outline,
    pad_square,
    restore_transparency,
    save_picture,
    shorten,
    to_pil,
)

SIZE = (32, 128)
sides = st.integers(1, 400)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x1, x2 = sorted(draw(st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True)))
    return x1, y1, x2, y2


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


# Decoding

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # from the stored pixels, by EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_pictures_are_turned_upright(format: str, orientation: int, tmp_path: Path) -> None:
    """Whether they come as a path, as bytes or as an open picture; the size is known without decoding."""
    stored = noise(3, 5)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / "picture"
    file.write_bytes(
        encoded(Image.fromarray(stored), format, exif=exif, **{"lossless": True} if format == "WEBP" else {})
    )
    loaded = Image.open(file)
    loaded.load()
    for source in (file, str(file), file.read_bytes(), Image.open(file), loaded):
        found = open_image(source)
        assert np.array_equal(found, ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        if format != "JPEG":
            assert np.array_equal(found, UPRIGHT[orientation](stored))
        assert image_size(source) == found.size == ((3, 5) if orientation > 4 else (5, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    """The left half of a black picture is transparent; three modes tell so by a colour."""
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (4, 2), (0,) * len(mode))
        picture.paste(Image.new(mode, (2, 2), (0,) * (len(mode) - 1) + (255,)), (2, 0))
        file = encoded(picture, "PNG")
    else:
        black, key = {"P": (0, 1), "RGB": ((0, 0, 0), (9, 9, 9)), "L": (0, 9)}[mode]
        picture = Image.new(mode, (4, 2), black)
        picture.paste(key, (0, 0, 2, 2))
        if mode == "P":
            picture.putpalette([0, 0, 0, 50, 60, 70])
        file = encoded(picture, "PNG", transparency=key)
    expected = np.zeros((2, 4, 3), np.uint8)
    expected[:, :2] = 255
    for source in (file, Image.open(io.BytesIO(file))):
        assert np.array_equal(open_image(source), expected)


@given(st.tuples(*[st.integers(0, 255)] * 4))
def test_what_is_half_transparent_is_mixed_with_white(color: tuple[int, ...]) -> None:
    (found,) = np.asarray(open_image(Image.new("RGBA", (1, 1), color)), float)[0]
    share = color[3] / 255
    assert np.abs(found - [share * c + (1 - share) * 255 for c in color[:3]]).max() <= 1  # Pillow rounds


def test_open_image_leaves_the_picture_alone() -> None:
    picture = Image.new("LA", (3, 3), (9, 9))
    found = open_image(picture)
    found.paste("red", (0, 0, 2, 2))
    assert picture.mode == "LA" and picture.getpixel((0, 0)) == (9, 9)
    same = Image.new("RGB", (3, 3))
    open_image(same).paste("red", (0, 0, 2, 2))
    assert same.getpixel((0, 0)) == (0, 0, 0)


def test_masks_are_opened_grey(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (255, 255, 255)).save(tmp_path / "mask.png")
    mask = open_image(tmp_path / "mask.png", "L")
    assert mask.mode == "L" and mask.getpixel((0, 0)) == 255


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    array = noise(50, 90)
    file = tmp_path / "picture.png"
    Image.fromarray(array).save(file)
    sources = (array, Image.fromarray(array), file, str(file), file.read_bytes(), Image.open(file))
    for source in sources:
        assert np.array_equal(open_image(source), array) and image_size(source) == (90, 50)
    fitted = [fit_image(source, SIZE) for source in sources]
    assert all(torch.equal(picture.pixels, fitted[0].pixels) for picture in fitted)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_is_read_as_color(mode: str) -> None:
    fitted = fit_image(Image.new(mode, (40, 20)), SIZE)
    assert fitted.pixels.shape == (3, *SIZE) and fitted.pixels.isfinite().all()


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not a picture")
    Image.effect_noise((200, 200), 90).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for call in (open_image, lambda source: fit_image(source, SIZE)):
        with pytest.raises(ValueError, match=r"note\.txt is not a picture"):
            call(tmp_path / "note.txt")
        with pytest.raises(ValueError, match=r"cut\.png is not a picture"):
            call(tmp_path / "cut.png")
        with pytest.raises(ValueError, match=f"an image of {len(whole) // 2} bytes is not a picture"):
            call(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="a PIL image of 200 x 200 is not a picture"):
            call(Image.open(tmp_path / "cut.png"))
        with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
            call(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"note\.txt is not a picture"):
        image_size(tmp_path / "note.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        image_size(tmp_path / "nowhere.png")


def test_the_same_fault_has_the_same_words() -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            open_image(b"no picture")
        messages.add(str(error.value))
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("array", "remedy"),
    [
        (np.zeros((4, 4)), "multiply numbers in 0..1 by 255"),
        (np.zeros((4, 4, 3), np.float32), "multiply numbers in 0..1 by 255"),
        (np.zeros((3, 4, 5), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((0, 4, 3), np.uint8), "channels last$"),
        (np.zeros((4, 4, 2), np.uint8), "channels last$"),
        (np.zeros((2, 4, 4, 3), np.uint8), "channels last$"),
        (np.zeros((4, 4), np.int64), "channels last$"),
    ],
)
def test_arrays_of_another_form_are_named(array: np.ndarray, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"picture is {array.dtype} .* expected uint8 .*{remedy}"):
        fit_image(array, SIZE)


def test_arrays_are_grey_coloured_transparent_or_of_truth_values() -> None:
    grey = noise(4, 6)[..., 0]
    colored = np.repeat(grey[..., None], 3, 2)
    opaque = np.concatenate([colored, np.full((4, 6, 1), 255, np.uint8)], 2)
    for array in (grey, grey[..., None], colored, opaque, opaque[::-1][::-1]):
        assert np.array_equal(fit_image(array, (4, 6)).original, colored)
    for array in (grey > 127, (grey > 127)[..., None], colored > 127):
        assert np.array_equal(fit_image(array, (4, 6)).original, np.where(colored > 127, 255, 0))
    assert (np.asarray(open_image(np.zeros((4, 6, 4), np.uint8))) == 255).all()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes to it
    for source, reason in ((tmp_path, "a folder"), (tmp_path / "pipe.png", "a pipe"), ("/dev/zero", "a pipe or")):
        for call in (open_image, image_size):
            with pytest.raises(ValueError, match=f"it is {reason}"):
                call(source)
    with pytest.raises(ValueError, match="a PIL image of 0 x 3 is not a picture that Pillow reads: it has no pixels"):
        open_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "HSV", "La", "RGBa", "PA", "RGBX"])
@pytest.mark.parametrize("wanted", ["RGB", "L", "RGBA"])
def test_rare_modes_are_opened(mode: str, wanted: str) -> None:
    picture = Image.new("RGBA", (4, 3), "white").convert("LA" if mode == "La" else "RGBA")
    if mode == "LAB":
        picture = ImageCms.profileToProfile(
            picture.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode == "PA":
        picture = picture.convert("RGB").convert("P").convert("PA")
    else:
        picture = picture.convert("RGB").convert(mode) if mode in ("YCbCr", "HSV", "RGBX") else picture.convert(mode)
    found = open_image(picture, wanted)
    assert found.mode == wanted and (np.asarray(found) >= 254).all()


def test_a_grey_that_stands_for_transparency_has_16_bits_too() -> None:
    numbers = np.array([[0, 30000]], np.uint16)
    file = encoded(Image.fromarray(numbers), "PNG", transparency=0)
    assert Image.open(io.BytesIO(file)).info["transparency"] == 0
    assert np.asarray(open_image(file))[0, :, 0].tolist() == [255, round(30000 / 257)]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_pictures_is_opened(format: str) -> None:
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    file = encoded(
        first, format, save_all=True, append_images=[second], **({"lossless": True} if format == "WEBP" else {})
    )
    assert Image.open(io.BytesIO(file)).n_frames == 2
    assert np.array_equal(open_image(file), first)


def test_nothing_of_a_file_is_left_but_its_profile_of_colours() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, kept in (("RGB", {"icc_profile": profile}), ("CMYK", {}), ("L", {})):  # one of CMYK does not fit RGB
        found = open_image(encoded(Image.new(mode, (4, 3)), "JPEG", exif=exif, icc_profile=profile, dpi=(72, 72)))
        assert found.info == kept and dict(found.getexif()) == {}


def test_only_one_module_opens_pictures() -> None:
    """So captions, training, reading and evaluation see the same."""
    package = Path(images.__file__).parent
    opening = {path.name for path in package.rglob("*.py") if re.search(r"Image\.open\(|imread", path.read_text())}
    assert opening == {"images.py"}


# Transparency of edits


def edited(source: Image.Image | np.ndarray, box: Box) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A red square is drawn into the box on white."""
    picture = open_image(source)
    x1, y1, x2, y2 = covered_pixels(box, picture.size)
    picture.paste("white", (x1, y1, x2, y2))
    picture.paste("red", (x1 + 2, y1 + 2, x2 - 2, y2 - 2))
    return np.asarray(restore_transparency(picture, source, box)), (x1, y1, x2, y2)


BOX = (200, 200, 700, 800)


def test_outside_of_an_edit_every_pixel_stays() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] > 127, pixels[..., 3], 0)  # colours below what is transparent stay, too
    found, (x1, y1, x2, y2) = edited(pixels, BOX)
    outside = np.ones((30, 40), bool)
    outside[y1:y2, x1:x2] = False
    assert np.array_equal(found[outside], pixels[outside])
    assert found[y1 + 3, x1 + 3].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize(("alpha", "ground"), [(0, 0), (255, 255)])
def test_the_ground_of_an_edit_goes_on_around_it(alpha: int, ground: int) -> None:
    source = np.zeros((30, 40, 4), np.uint8)
    source[..., 3] = alpha
    source[14:16, 18:22, 3] = 255  # the old word
    found, (x1, y1, x2, y2) = edited(source, BOX)
    assert (found[y1 : y1 + 2, x1:x2, 3] == ground).all() and (found[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2, 3] == 255).all()


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_white_that_becomes_transparent_looks_the_same_on_white(color: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (9, 9), color)
    found = open_image(restore_transparency(picture, Image.new("RGBA", (9, 9)), (0, 0, 999, 999)))
    assert np.abs(np.asarray(found, int) - color).max() <= 8


def test_a_picture_without_transparency_stays_one() -> None:
    for mode in ("RGB", "L", "P", "CMYK"):
        picture = Image.new("RGB", (9, 9))
        assert restore_transparency(picture, Image.new(mode, (9, 9)), BOX) is picture


# Files that are written


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif", "bmp", "ppm"])
def test_what_is_written_is_upright(ending: str, tmp_path: Path) -> None:
    """It looks like what is read, and has no orientation that would turn it again; a folder for it is made."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = open_image(encoded(Image.new("RGB", (8, 4), "white"), "JPEG", exif=exif))
    picture.paste("black", (0, 0, 4, 4))
    save_picture(picture, path := tmp_path / "new" / "folder" / f"a.{ending}")
    written = Image.open(path)
    assert written.size == (4, 8) and written.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert np.abs(np.asarray(open_image(path), int) - np.asarray(picture, int)).max() < 40


def test_what_a_format_cannot_hold_is_on_white(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = open_image(encoded(Image.new("RGBA", (8, 4)), "PNG", icc_profile=profile), "RGBA")
    for ending, mode in (("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGBA"), ("bmp", "RGB"), ("tif", "RGBA")):
        save_picture(picture, path := tmp_path / f"a.{ending}")
        assert Image.open(path).mode == mode and (np.asarray(open_image(path)) > 250).all()
        assert ending == "bmp" or Image.open(path).info["icc_profile"] == profile


@pytest.mark.parametrize("name", ["a", "a.txt", "a.pdf", "a.PNG2", ".png"])
def test_endings_of_no_picture_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(name)} ends in '.*', expected the ending of a picture"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("thing", [3, None, ["picture.png"], object])
def test_what_is_no_picture_is_named(thing: object) -> None:
    with pytest.raises(ValueError, match="expected a PIL image, a numpy array, bytes or a path"):
        check_picture(thing)


# Fitted pictures


def test_a_picture_of_the_models_size_is_taken_as_it_is() -> None:
    picture = noise(*SIZE)
    fitted = fit_image(picture, SIZE)
    assert fitted.scale == 1 and fitted.offset == (0, 0) and fitted.size == (128, 32)
    assert np.array_equal(to_pil(fitted.pixels), picture)
    assert fitted.pixels.dtype == torch.float32


def test_pixels_span_minus_one_to_one() -> None:
    pixels = fit_image(np.array([[[0, 255, 51]]], np.uint8), (1, 1)).pixels
    assert pixels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_the_whole_picture_fits_centred_and_the_rest_has_its_border_color(width: int, height: int) -> None:
    picture = Image.new("RGB", (width, height), (10, 200, 90))
    fitted = fit_image(picture, SIZE)
    assert fitted.pixels.shape == (3, *SIZE)
    assert (np.asarray(to_pil(fitted.pixels)) == (10, 200, 90)).all()
    scaled = width * fitted.scale, height * fitted.scale
    assert scaled[0] <= 128 + 1e-6 and scaled[1] <= 32 + 1e-6
    assert scaled[0] == pytest.approx(128) or scaled[1] == pytest.approx(32)
    for offset, side, whole in zip(fitted.offset, scaled, (128, 32)):
        assert abs(offset - (whole - side) / 2) <= 1


@settings(max_examples=60, deadline=None)
@given(sides, sides, boxes())
def test_boxes_go_to_the_model_and_back(width: int, height: int, box: Box) -> None:
    fitted = fit_image(Image.new("RGB", (width, height)), SIZE)
    assert fitted.to_original(fitted.to_model(box)) == pytest.approx(box, abs=0.051)  # a tenth of a thousandth


@settings(max_examples=100, deadline=None)
@given(sides, sides, boxes())
def test_regions_go_back_within_rounding(width: int, height: int, box: Box) -> None:
    fitted = fit_image(Image.new("RGB", (width, height)), SIZE)
    region = fitted.region(box)
    x1, y1, x2, y2 = region
    assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 32
    again = fitted.to_original((x1 / 128 * 999, y1 / 32 * 999, x2 / 128 * 999, y2 / 32 * 999))
    for axis, side in enumerate([width, height]):
        pixel = 999 / (side * fitted.scale)  # thousandths of the original in a pixel of the model's
        narrow = box[axis + 2] - box[axis] < 1.5 * pixel
        for i in (axis, axis + 2):
            assert abs(again[i] - box[i]) <= (1.6 if narrow else 0.5) * pixel + 0.06, (region, again)


@pytest.mark.parametrize("box", [(998, 0, 999, 999), (0, 998, 999, 999), (998, 998, 999, 999), (0, 0, 1, 1)])
def test_a_region_at_the_edge_is_not_empty(box: Box) -> None:
    x1, y1, x2, y2 = fit_image(Image.new("RGB", (640, 160)), SIZE).region(box)
    assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 32


@settings(max_examples=60, deadline=None)
@given(sides, sides, boxes())
def test_boxes_of_the_model_stay_in_the_picture(width: int, height: int, box: Box) -> None:
    x1, y1, x2, y2 = fit_image(Image.new("RGB", (width, height)), SIZE).to_original(box)
    assert 0 <= x1 <= x2 <= 999 and 0 <= y1 <= y2 <= 999


@pytest.mark.parametrize("size", [(128, 32), (640, 160), (300, 300), (64, 16), (200, 31), (90, 200)])
def test_a_region_holds_what_stands_in_the_box(size: tuple[int, int]) -> None:
    """A white rectangle on black, found in the model's own pixels."""
    box = (250, 300, 700, 800)
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    x1, y1, x2, y2 = map(round, to_pixels(box, size))
    picture[y1:y2, x1:x2] = 255
    fitted = fit_image(picture, SIZE)
    x1, y1, x2, y2 = fitted.region(box)
    assert fitted.pixels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 0.8
    outside = fitted.pixels.clone()
    outside[:, max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = -1
    assert outside.max() < -0.8


@settings(max_examples=60, deadline=None)
@given(sides, sides, boxes())
def test_paste_fills_the_box_and_nothing_else(width: int, height: int, box: Box) -> None:
    original = np.random.default_rng(width * height).integers(0, 100, (height, width, 3), np.uint8)
    pasted = np.asarray(fit_image(original, SIZE).paste(torch.ones(3, *SIZE), box))
    assert pasted.shape == original.shape
    x1, y1, x2, y2 = to_pixels(box, (width, height))
    x, y = np.arange(width), np.arange(height)
    outside = ((x + 1 <= x1) | (x >= x2))[None] | ((y + 1 <= y1) | (y >= y2))[:, None]
    assert np.array_equal(pasted[outside], original[outside])
    inside = ((x >= x1) & (x + 1 <= x2))[None] & ((y >= y1) & (y + 1 <= y2))[:, None]
    assert (pasted[inside] == 255).all()


def test_paste_at_the_models_size_copies_pixels() -> None:
    original, painted = noise(*SIZE), noise(*SIZE, seed=1)
    fitted = fit_image(original, SIZE)
    box = (10 / 128 * 999, 4 / 32 * 999, 60 / 128 * 999, 30 / 32 * 999)
    assert fitted.region(box) == (10, 4, 60, 30)
    expected = original.copy()
    expected[4:30, 10:60] = painted[4:30, 10:60]
    assert np.array_equal(fitted.paste(fit_image(painted, SIZE).pixels, box), expected)


def test_paste_takes_from_the_same_position() -> None:
    """What stands in the box of the model's picture lands in the box of the original."""
    original = np.zeros((120, 500, 3), np.uint8)
    changed = original.copy()
    changed[40:80, 200:300] = 255
    box = (190 / 500 * 999, 30 / 120 * 999, 310 / 500 * 999, 90 / 120 * 999)
    pasted = np.asarray(fit_image(original, SIZE).paste(fit_image(changed, SIZE).pixels, box))[..., 0] > 127
    overlap = (pasted & (changed[..., 0] > 127)).sum() / (pasted | (changed[..., 0] > 127)).sum()
    assert overlap > 0.85


def test_to_pil_rounds_and_clamps() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 51 / 127.5 - 1, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(to_pil(pixels))[0, :, 0].tolist() == [0, 0, 128, 51, 255, 255]


def test_what_is_hidden_is_as_grey_as_a_grey_picture() -> None:
    picture = fit_image(noise(4, 6), (4, 6)).pixels
    before = picture.clone()
    hidden = hide(picture, (1, 2, 3, 4))
    assert torch.equal(picture, before)
    grey = fit_image(Image.new("RGB", (6, 4), (127, 127, 127)), (4, 6)).pixels
    assert (grey == HIDDEN).all() and torch.equal(hidden[:, 2:4, 1:3], grey[:, 2:4, 1:3])
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[2:4, 1:3] = False
    assert torch.equal(hidden[:, kept], before[:, kept])


# Sheets


def test_an_outline_runs_along_the_edges_of_its_box() -> None:
    picture = Image.new("RGB", (21, 11), "white")
    found = np.asarray(outline(picture, [(0, 0, 999, 999), (499.5, 499.5, 999, 999)], "red")) == (255, 0, 0)
    expected = np.zeros((11, 21), bool)
    expected[[0, -1]] = expected[:, [0, -1]] = True
    expected[5, 10:] = expected[5:, 10] = True
    assert np.array_equal(found.all(-1), expected)
    assert np.array_equal(picture, np.full((11, 21, 3), 255))
    wide = np.asarray(outline(picture, [(0, 0, 999, 999)], "blue", width=2))
    assert (wide[1, 1:-1] == (0, 0, 255)).all() and (wide[2, 2:-2] == 255).all()


@pytest.mark.parametrize("size", [(40, 20), (15, 30), (16, 16)])
def test_pad_square_centres_the_whole_picture(size: tuple[int, int]) -> None:
    found = np.asarray(pad_square(Image.new("RGB", size, "black"), 32))
    expected = np.full((32, 32, 3), Image.new("RGB", (1, 1), "lightgray").getpixel((0, 0)), np.uint8)
    width, height = (round(32 * side / max(size)) for side in size)
    top, left = (32 - height) // 2, (32 - width) // 2
    expected[top : top + height, left : left + width] = 0
    assert np.array_equal(found, expected)


@given(st.text("ab \n…", max_size=12), st.integers(1, 12))
def test_shorten_cuts_what_is_too_long(text: str, length: int) -> None:
    found = shorten(text, length)
    if len(text) <= length:
        assert found == text
    else:
        assert len(found) == length and found[-1] == "…" and text.startswith(found[:-1])


def test_a_sheet_holds_every_picture_enlarged() -> None:
    cells = [(Image.new("RGB", (10, 6), color), color) for color in ("red", "lime", "blue")]
    sheets = [np.asarray(contact_sheet(cells, 2, title, zoom=3)) for title in ("", "title")]
    for sheet in sheets:
        starts = []
        for color in np.eye(3) * 255:
            rows, columns = (sheet == color).all(-1).nonzero()
            assert len(rows) == 30 * 18 == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # one rectangle
            starts.append((int(rows.min()), int(columns.min())))
        first, right, below = starts
        assert right[0] == first[0] and right[1] >= first[1] + 30
        assert below[1] == first[1] and below[0] >= first[0] + 18
    assert sheets[0].shape[1] == sheets[1].shape[1] and sheets[0].shape[0] < sheets[1].shape[0]


@pytest.mark.parametrize(
    ("numbers", "white"),
    [
        (np.array([[0, 30000, 65535]], np.uint16), 65535),
        (np.array([[0, 30000, 65535]], np.int32), 65535),
        (np.array([[0, 100, 255]], np.int32), 255),
        (np.array([[0, 100, 255]], np.float32), 255),
        (np.array([[0, 0.25, 1]], np.float32), 1),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled(numbers: np.ndarray, white: float) -> None:
    """Pillow alone cuts them off at 255."""
    for kind in ("TIFF", "PNG") if numbers.dtype == np.uint16 else ("TIFF",):
        Image.fromarray(numbers).save(file := io.BytesIO(), kind)
        expected = (numbers.astype(np.float64) * 255 / white).round()
        assert np.array_equal(np.asarray(open_image(file.getvalue()))[..., 1], expected)
        assert np.array_equal(np.asarray(open_image(file.getvalue(), "L")), expected)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (np.nan, "1 of its pixels are NaN or infinite"),
        (np.inf, "1 of its pixels are NaN or infinite"),
        (300, "its pixels are 0 to 300, expected 0 to 255"),
        (-1, "its pixels are -1 to 0, expected 0 to 1"),
    ],
)
def test_pixels_that_are_no_colours_are_refused(number: float, reason: str) -> None:
    numbers = np.zeros((4, 6), np.float32)
    numbers[1, 2] = number
    Image.fromarray(numbers).save(file := io.BytesIO(), "TIFF")
    for picture in (file.getvalue(), Image.fromarray(numbers), numbers):
        with pytest.raises(ValueError, match=reason):
            open_image(picture)


def test_arrays_that_are_no_pictures_are_named_without_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"an array float32 \(4, 6, 3\) is not a picture"):
        open_image(np.full((4, 6, 3), np.nan, np.float32))


@pytest.mark.parametrize("side", [9_000, 90_000])
def test_pictures_of_too_many_pixels_are_refused_by_our_limit(side: int) -> None:
    """From 179 million pixels on, Pillow refuses first, by a limit of its own."""
    size = side.to_bytes(4, "little") * 2
    header = b"BM" + bytes(12) + bytes([40, 0, 0, 0]) + size + bytes([1, 0, 24, 0]) + bytes(24)
    with pytest.raises(ValueError, match=r"an image of 54 bytes .*pixels.*, expected at most 67108864"):
        open_image(header)
