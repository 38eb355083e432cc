"""Two hundred ways to damage a model's folder: each is refused, and the file is named."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from textharmony.manifest import write_manifest
from textharmony.pipeline import TextHarmony

Make = Callable[..., TextHarmony]
FLIPS = 140


@pytest.fixture(scope="module")
def models(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of the same shapes, in shards."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        make_model(seed, guidance_scale=1.0 + seed).save_pretrained(folder / str(seed), max_shard_size="100KB")
    return folder / "0", folder / "1"


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def attacks(model: Path, other: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The file that an attack concerns, and what it does to that file."""
    names = sorted(file.name for file in model.iterdir())
    for name in rng.choices(names, k=FLIPS):
        yield name, lambda path: flip(path, rng)
    for name in names:
        yield name, lambda path: path.write_text("{}")
        yield name, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        yield name, lambda path: path.unlink()
        yield f"old-{name.removesuffix('.json')}.json", lambda path: path.write_text("{}")
    shards = [name for name in names if name.startswith("model-")]
    for name in shards:
        yield name, lambda path: shutil.copyfile(other / path.name, path)  # of the same size
    for name, another in pairwise(shards):
        yield name, lambda path, another=another: path.replace(path.with_name(another))
    yield "config.json", lambda path: shutil.copyfile(other / path.name, path)
    for half in (names[::2], names[1::2]):
        yield half[0], lambda path, half=half: [shutil.copyfile(other / name, path.parent / name) for name in half]


def test_two_hundred_damaged_models_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, other = models
    whole = {file.name: file.read_bytes() for file in model.iterdir()}
    copy = shutil.copytree(model, tmp_path / "copy")
    accepted, unnamed, count = [], [], 0
    for name, attack in attacks(model, other, random.Random(0)):
        attack(copy / name)
        found = {file.name: file.read_bytes() for file in copy.iterdir()}
        changed = [file for file in whole.keys() | found.keys() if whole.get(file) != found.get(file)]
        try:
            TextHarmony.from_pretrained(copy)
            accepted.append(name)
        except (ValueError, FileNotFoundError) as error:
            if not any(file in str(error) for file in changed) or "\n" in str(error):
                unnamed.append((name, str(error)))
        for file in changed:
            (copy / file).unlink(missing_ok=True)
            if file in whole:
                (copy / file).write_bytes(whole[file])
        count += 1
    TextHarmony.from_pretrained(copy)
    assert count >= 200 and not accepted and not unnamed


def test_a_model_that_was_edited_on_purpose_loads_with_a_new_manifest(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(models[0], tmp_path / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"guidance_scale": 1.0', '"guidance_scale": 2.0'))
    write_manifest(copy)
    assert TextHarmony.from_pretrained(copy).config.guidance_scale == 2.0


def forge(folder: Path, **entries: object) -> None:
    """Add entries to a manifest, with the right digest."""
    files = json.loads((folder / "manifest.json").read_text())["files"] | entries
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(
        json.dumps({"files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n"
    )


def test_a_manifest_cannot_make_a_load_or_a_save_touch_files_elsewhere(
    make_model: Make, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its names are a stranger's: they are compared with what is in the folder, and never opened, moved or deleted."""
    victim = tmp_path / "victim.json"
    victim.write_text("precious")
    copy = shutil.copytree(models[0], tmp_path / "copy")
    for name in ("../victim.json", str(victim)):
        shutil.copytree(models[1], copy / ".saving")
        for folder in (copy, copy / ".saving"):
            forge(folder, **{name: {"size": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}})
        with pytest.raises(ValueError, match=r"victim\.json is missing, expected the file that manifest\.json lists"):
            TextHarmony.from_pretrained(copy)
        make_model().save_pretrained(copy)
        TextHarmony.from_pretrained(copy)
        assert victim.read_text() == "precious"


def test_an_unfinished_save_that_is_a_link_is_passed_over(models: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(models[0], tmp_path / "copy")
    victim = shutil.copytree(models[1], tmp_path / "victim")
    (copy / ".saving").symlink_to(victim)
    TextHarmony.from_pretrained(copy)
    assert {file.name for file in victim.iterdir()} == {file.name for file in models[1].iterdir()}
