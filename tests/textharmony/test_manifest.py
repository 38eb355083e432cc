"""A manifest tells which file of a folder is damaged, missing, surplus, or another's."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from textharmony.manifest import check_manifest, write_manifest

FILES = {
    "model.safetensors": b"weights" * 500,
    "config.json": b"{}",
    "state/.metadata": b"",
    "state/__0_0.distcp": b"0",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    write_manifest(path)
    return path


def test_a_whole_folder_passes(folder: Path) -> None:
    check_manifest(folder)
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(FILES)
    write_manifest(folder)  # its own manifest is none of its files
    check_manifest(folder)


def test_documents_may_be_added_changed_and_deleted(folder: Path) -> None:
    (folder / "README.md").write_text("a model card")
    write_manifest(folder)
    (folder / "README.md").unlink()
    for name in (".gitattributes", "LICENSE", "samples.PNG", ".cache/huggingface/download/config.json.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("added")
    check_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(
        ValueError, match=f"{name} is missing, expected the file that manifest.json lists: copy or save"
    ):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["optimizer.bin", "state/__1_0.distcp", "tokenizer.model", "modeling.py"])
def test_a_surplus_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=f"{name} is not in manifest.json, expected no other file: move it, copy or save"
    ):
        check_manifest(folder)


def test_a_file_of_another_length_is_named(folder: Path) -> None:
    for content in (b"", FILES["model.safetensors"][:-1], FILES["model.safetensors"] + b"0"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors has {len(content)} bytes, expected 3500 as in mani"):
            check_manifest(folder)


def test_a_folder_without_a_manifest_is_incomplete(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"model has no manifest\.json, .* call textharmony\.manifest\.write_manifest"):
        check_manifest(folder)


def damaged(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def test_every_flipped_bit_is_found_and_its_file_named(folder: Path) -> None:
    rng = random.Random(0)
    for name in ("model.safetensors", "config.json", "state/__0_0.distcp", "manifest.json"):
        whole = (folder / name).read_bytes()
        for _ in range(100):
            (folder / name).write_bytes(damaged(whole, rng))
            with pytest.raises(ValueError, match=f"model/{name} (has other bytes|is damaged)"):
                check_manifest(folder)
        (folder / name).write_bytes(whole)
    check_manifest(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"files": {}}', b'{"files": [], "sha256": ""}',
        b'{"files": {"config.json": 1}}', b'{"files": {"config.json": {"size": 1e999, "sha256": null}}}',
    ],
)  # fmt: skip
def test_a_manifest_of_another_form_is_named(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, expected the bytes that write_manifest wrote"):
        check_manifest(folder)


def test_another_folders_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text("[]")
    write_manifest(other)
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=r"config\.json has other bytes|is not in manifest\.json"):
        check_manifest(folder)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()])
def test_what_is_no_file_counts_as_missing(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "config.json").unlink()
    make(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        check_manifest(folder)


def test_links_to_files_are_followed(folder: Path, tmp_path: Path) -> None:
    """As in the cache of huggingface_hub."""
    os.replace(folder / "config.json", tmp_path / "blob")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    check_manifest(folder)


def test_a_manifest_is_written_last_and_an_error_keeps_the_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "manifest.json").read_bytes()
    (folder / "config.json").write_text("[]")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{folder}"):
        write_manifest(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.startswith(".manifest")]
