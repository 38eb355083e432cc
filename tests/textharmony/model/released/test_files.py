"""Pieces of a released checkpoint: read exactly, or refused by name and with nothing executed."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from released_miniature import write_pieces
from torch import Tensor, nn

from textharmony.model.released.files import ReleasedFiles

TENSORS: dict[str, Tensor] = {
    "a.weight": torch.randn(300, 40),
    "half": torch.randn(5, 7).half(),
    "brain": torch.randn(3).bfloat16(),
    "ids": torch.arange(12)[None],
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def pieces(tmp_path: Path) -> list[Path]:
    return write_pieces(tmp_path / "released", TENSORS)


def assert_same(files: ReleasedFiles, tensors: dict[str, Tensor] = TENSORS) -> None:
    files.require({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    files.check()
    for name, tensor in tensors.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_pieces_joined_pieces_and_files_of_their_own_are_the_same(pieces: list[Path], tmp_path: Path) -> None:
    folder = pieces[0].parent
    assert_same(ReleasedFiles(folder))
    assert_same(ReleasedFiles(pieces))
    joined = b"".join(file.read_bytes() for file in pieces)
    (folder / "pytorch_model.bin").write_bytes(joined)
    assert_same(ReleasedFiles(folder))
    assert_same(ReleasedFiles(folder / "pytorch_model.bin"))
    names = list(TENSORS)
    (tmp_path / "files").mkdir()
    for i in range(3):
        part = {name: TENSORS[name] for name in names[2 * i : 2 * i + 2]}
        torch.save(part, tmp_path / "files" / f"pytorch_model-0000{i + 1}-of-00003.bin")
    assert_same(ReleasedFiles(tmp_path / "files"))
    (tmp_path / "files" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        ReleasedFiles(tmp_path / "files")


def test_tensors_that_share_memory_state_dicts_and_parameters(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    module = nn.Linear(4, 2)
    tensors = {"rows": whole[2:4], "columns": whole[:, 3], "turned": whole.T, "parameter": module.weight}
    write_pieces(tmp_path / "shared", tensors)
    assert_same(ReleasedFiles(tmp_path / "shared"), {name: t.detach() for name, t in tensors.items()})
    write_pieces(tmp_path / "state", module.state_dict())
    assert_same(ReleasedFiles(tmp_path / "state"), module.state_dict())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_piece_is_named(pieces: list[Path], which: int) -> None:
    pieces[which].unlink()
    messages = [
        r"pytorch_model\.binaa is missing",
        r"pytorch_model\.binab is missing",
        r"pytorch_model\.binab does not end an archive of torch\.save, expected another piece after it",
    ]
    with pytest.raises((FileNotFoundError, ValueError), match=messages[which]):
        ReleasedFiles(pieces[0].parent)


def test_a_piece_that_is_cut_short_is_refused(pieces: list[Path]) -> None:
    content = pieces[1].read_bytes()
    pieces[1].write_bytes(content[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model\.binab.* is (no complete checkpoint|damaged)"):
        ReleasedFiles(pieces[0].parent).check()


def test_every_flipped_bit_of_a_tensor_is_named_by_the_tensor(pieces: list[Path]) -> None:
    joined = bytearray(b"".join(file.read_bytes() for file in pieces))
    for name in ("a.weight", "ids", "brain"):
        at = joined.find(TENSORS[name].flatten().view(torch.uint8).numpy().tobytes())
        flipped = bytearray(joined)
        flipped[at + 1] ^= 4
        whole = pieces[0].parent / "pytorch_model.bin"
        whole.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin is damaged at {re.escape(name)}: Bad CRC-32"):
            ReleasedFiles(whole).check()


def test_flipped_bits_anywhere_else_are_refused_or_harmless(pieces: list[Path]) -> None:
    """Names, shapes, headers and padding: what is read is right, or it is an error that names the file."""
    joined = b"".join(file.read_bytes() for file in pieces)
    whole = pieces[0].parent / "pytorch_model.bin"
    generator, refused = torch.Generator().manual_seed(0), 0
    start = joined.find(b"data.pkl")
    places = [*range(start, start + 700, 7), *range(len(joined) - 1200, len(joined), 11)]
    for at in [*places, *torch.randint(len(joined), (60,), generator=generator).tolist()]:
        flipped = bytearray(joined)
        flipped[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        whole.write_bytes(flipped)
        try:
            assert_same(ReleasedFiles(whole))
        except ValueError as error:
            assert "pytorch_model.bin" in str(error)
            refused += 1
    assert refused > 100


def test_missing_surplus_and_misshapen_tensors_are_listed(pieces: list[Path]) -> None:
    files = ReleasedFiles(pieces[0].parent)
    wanted = {name: shape for name, shape in SHAPES.items() if name not in ("half", "brain")}
    message = r"lacks other, one; has surplus half, brain; has a\.weight of shape \(300, 40\), expected \(40, 300\)$"
    with pytest.raises(ValueError, match=message):
        files.require(wanted | {"a.weight": (40, 300), "other": (1,), "one": ()})
    with pytest.raises(ValueError, match=r"lacks n0, n1, .*, n49 and 11 more$"):
        files.require(SHAPES | {f"n{i}": (1,) for i in range(61)})


class Executes:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


class Sets:
    """Is refused, too, although nothing runs when it is unpickled."""


@pytest.mark.parametrize("where", ["value", "key of a dictionary within", "attribute"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path, where: str) -> None:
    ran, code = tmp_path / "ran", Executes(tmp_path / "ran")
    tensors: object = {**TENSORS, "code": code}
    if where == "key of a dictionary within":
        tensors = {**TENSORS, "inner": {"code": code}}
    elif where == "attribute":
        tensors = OrderedDict(TENSORS)
        vars(tensors)["_metadata"] = code  # where state dicts keep versions
    write_pieces(tmp_path / "released", tensors)
    with pytest.raises(ValueError, match=r"pytorch_model\.binaa.*it names posix\.mkdir.* nothing of it was executed"):
        ReleasedFiles(tmp_path / "released")
    assert not ran.exists()


def test_what_is_no_archive_of_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Executes(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not begin an archive .* of which nothing was read"):
        ReleasedFiles(tmp_path)
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"does not begin an archive"):
        ReleasedFiles(tmp_path)
    torch.save([TENSORS["half"]], file)
    with pytest.raises(ValueError, match="it is no dictionary of tensors"):
        ReleasedFiles(tmp_path)
    torch.save({"model": TENSORS}, file)
    with pytest.raises(ValueError, match="it is no dictionary of tensors"):
        ReleasedFiles(tmp_path)
    torch.save({"sets": Sets()}, file)
    with pytest.raises(ValueError, match=r"it names .*Sets, expected only tensors"):
        ReleasedFiles(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("else", "x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is no complete checkpoint"):
        ReleasedFiles(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    write_pieces(tmp_path / "nan", {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])})
    files = ReleasedFiles(tmp_path / "nan")
    assert torch.equal(files.read("a"), torch.ones(3))
    with pytest.raises(ValueError, match="has numbers under b that are not finite"):
        files.read("b")


def test_an_empty_folder_a_missing_file_and_a_tensor_twice(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no pytorch_model\.bin and no pieces of it"):
        ReleasedFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.bin is not a file"):
        ReleasedFiles(tmp_path / "x.bin")
    for name in ("a.bin", "b.bin"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.bin has a\.weight, which another file has, too"):
        ReleasedFiles(tmp_path)
