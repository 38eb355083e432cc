"""The released checkpoint on disk: one pickle in torch's zip form, in one file or cut into pieces.

Nothing in it is executed: what the pickle may name are dictionaries and tensors, which is less than torch's
weights-only unpickler allows. Tensors are read one at a time, so that no piece is ever in memory as a whole.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

_ZIP = b"PK\x03\x04"
_CHUNK = 2**22  # bytes
_SHOWN = 50  # names in a message
_DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
    }.items()
}


class _Entry(NamedTuple):
    """Where a tensor is in an archive."""

    dtype: torch.dtype
    record: str
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one."""
        return 0 if 0 in self.shape else 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))

    @property
    def end(self) -> int:
        """Bytes from the beginning of the record."""
        return (self.offset + self.span) * self.dtype.itemsize


def _rebuild(storage: tuple[torch.dtype, str], offset: int, size: Any, stride: Any, *rest: Any) -> _Entry:
    dtype, record = storage
    return _Entry(dtype, record, offset, tuple(size), tuple(stride))


class _Joined(io.RawIOBase):
    """Files that are read as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [file.open("rb") for file in files]
        sizes = [file.stat().st_size for file in files]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        for file, start, end in zip(self._files, self._starts, self._starts[1:]):
            if start <= self._at < end:
                file.seek(self._at - start)
                count = file.readinto(memoryview(buffer)[: end - self._at])
                self._at += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class _Unpickler(pickle.Unpickler):
    """Finds out where tensors are; a pickle that names anything else is refused before it gets it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda entry, *rest: entry
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, expected only tensors: nothing of it was executed")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, record, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it has a {kind} of {dtype}, expected storages of tensors")
        return dtype, str(record)


class _Archive:
    """One pickle of torch's, in one file or several."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read where tensors are; raise ValueError for files that are damaged, or that hold anything else."""
        self.files = ", ".join(map(str, files))
        try:
            if not zipfile.is_zipfile(files[-1]):
                raise ValueError(f"{files[-1]} does not end an archive of torch.save, expected another piece after it")
            self._zip = zipfile.ZipFile(io.BufferedReader(_Joined(files)))
            (pickled,) = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            self._prefix = pickled.removesuffix("data.pkl")
            order = f"{self._prefix}byteorder"
            if order in self._zip.namelist() and self._zip.read(order) != b"little":
                raise ValueError("its numbers are big-endian, expected little-endian ones")
            found = _Unpickler(io.BytesIO(self._zip.read(pickled))).load()
            if not isinstance(found, dict) or not all(isinstance(entry, _Entry) for entry in found.values()):
                raise ValueError("it is no dictionary of tensors")
            for name, entry in found.items():
                if self._zip.getinfo(f"{self._prefix}data/{entry.record}").file_size < entry.end:
                    raise ValueError(f"it is cut short at {name}, expected {entry.shape}")
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{self.files} is no complete checkpoint, expected tensors by name: {error}") from None
        self.entries: dict[str, _Entry] = {str(name): entry for name, entry in found.items()}

    def check(self, bar: Any) -> None:
        """Read every byte and compare checksums; raise ValueError naming the tensor where one differs."""
        for info in self._zip.infolist():
            try:
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed, expected it as torch.save writes it")
                with self._zip.open(info) as file:
                    while chunk := file.read(_CHUNK):
                        bar.update(len(chunk))
            except Exception as error:
                record = info.filename.removeprefix(f"{self._prefix}data/")
                names = [name for name, entry in self.entries.items() if entry.record == record] or [info.filename]
                raise ValueError(f"{self.files} is damaged at {', '.join(names)}: {error}") from None

    def read(self, name: str) -> Tensor:
        """Read one tensor; raise ValueError for numbers that are not finite."""
        entry = self.entries[name]
        with self._zip.open(f"{self._prefix}data/{entry.record}") as file:
            file.seek(entry.offset * entry.dtype.itemsize)
            # Memory that goes back to the system at once; and in parts: no second copy of a large tensor.
            content = mmap.mmap(-1, max(1, entry.span * entry.dtype.itemsize))
            for start in range(0, entry.span * entry.dtype.itemsize, _CHUNK):
                content.write(file.read(min(_CHUNK, len(content) - start)))
        flat = (
            torch.frombuffer(content, dtype=entry.dtype, count=entry.span)
            if entry.span
            else torch.empty(0, dtype=entry.dtype)
        )
        if not flat.isfinite().all():
            raise ValueError(f"{self.files} has numbers under {name} that are not finite")
        return flat.as_strided(entry.shape, entry.stride)


class ReleasedFiles:
    """The tensors of a released checkpoint, by their released names."""

    def __init__(self, path: str | Path | Sequence[str | Path]) -> None:
        """Find the pieces, and read where tensors are.

        Args:
            path: A folder with pytorch_model.bin, with its pieces (pytorch_model.binaa, binab, ...) or with several
                such files that divide the tensors; or one file; or a list of pieces in their order.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A piece is missing, damaged, or holds anything but tensors, or two files have the same tensor.
        """
        files = _find(path)
        self.largest = max(file.stat().st_size for file in files)  # bytes
        self._size = sum(file.stat().st_size for file in files)
        archives: list[list[Path]] = []
        for file in files:
            with file.open("rb") as opened:
                starts = opened.read(len(_ZIP)) == _ZIP
            if starts:
                archives.append([])
            elif not archives:
                raise ValueError(
                    f"{file} does not begin an archive of torch.save, expected the first piece: it is missing, or this "
                    "is a pickle of another form, of which nothing was read"
                )
            archives[-1].append(file)
        self._archives = [_Archive(group) for group in archives]
        self._where: dict[str, _Archive] = {}
        for archive in self._archives:
            if twice := sorted(self._where.keys() & archive.entries.keys()):
                raise ValueError(f"{archive.files} has {twice[0]}, which another file has, too, expected it once")
            self._where |= dict.fromkeys(archive.entries, archive)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError, naming them, unless the tensors are exactly these."""
        own = {name: archive.entries[name].shape for name, archive in self._where.items()}
        wrong = [
            f"has {name} of shape {own[name]}, expected {shape}"
            for name, shape in shapes.items()
            if name in own and own[name] != shape
        ]
        problems = [
            _list("lacks", [name for name in shapes if name not in own]),
            _list("has surplus", [name for name in own if name not in shapes]),
            _list("", wrong),
        ]
        if any(problems):
            raise ValueError(f"{self._archives[0].files} {'; '.join(filter(None, problems))}")

    def check(self) -> None:
        """Compare the checksums of everything, with a bar; raise ValueError naming the tensor where one differs."""
        with tqdm(total=self._size, desc="check", unit="B", unit_scale=True, leave=False) as bar:
            for archive in self._archives:
                archive.check(bar)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._where[name].read(name)


def _list(what: str, names: Collection[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join([*names][:_SHOWN])}{more}".strip()


def _find(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a checkpoint in their order; raise FileNotFoundError or ValueError if one is missing."""
    if not isinstance(path, (str, Path)):
        files = [Path(file) for file in path]
    elif not (folder := Path(path)).is_dir():
        files = [folder]
    elif (folder / "pytorch_model.bin").is_file():  # what the pieces are joined to
        files = [folder / "pytorch_model.bin"]
    else:
        files = sorted(file for file in folder.iterdir() if re.search(r"\.(bin|pt|pth)([a-z]{2})?$", file.name))
        if not files:
            raise FileNotFoundError(
                f"{folder} has no pytorch_model.bin and no pieces of it (pytorch_model.binaa, ...), expected the "
                "released checkpoint"
            )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not a file, expected a piece of the released checkpoint")
    names = {file.name for file in files}
    for name in sorted(names):
        if cut := re.fullmatch(r"(.*\.bin)([a-z])([a-z])", name):
            number = (ord(cut[2]) - 97) * 26 + ord(cut[3]) - 97
            before = {f"{cut[1]}{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(number)}
        elif part := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
            width = len(part[2])
            before = {f"{part[1]}{i:0{width}}-of-{part[3]}{part[4]}" for i in range(1, int(part[3]) + 1)}
        else:
            continue
        if missing := sorted(before - names):
            raise FileNotFoundError(f"{files[0].parent / missing[0]} is missing, expected it next to {name}")
    return files
