import io
import tarfile
from pathlib import Path

import pytest

from textharmony.data.shards import read_shard


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_files_that_share_a_key_are_one_sample(tmp_path: Path, name: str, mode: str) -> None:
    files = [("x/1.JPG", b"a"), ("x/1.seg.png", b"b"), ("x/2.jpg", b"c"), ("y/2.jpg", b"d"), ("plain", b"e")]
    assert list(read_shard(write_tar(tmp_path / name, files, mode))) == [
        ("x/1", {"jpg": b"a", "seg.png": b"b"}),
        ("x/2", {"jpg": b"c"}),
        ("y/2", {"jpg": b"d"}),
    ]


def test_dots_in_folders_are_no_extensions(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("v1.0/1.txt", b"a")])
    assert list(read_shard(shard)) == [("v1.0/1", {"txt": b"a"})]


def test_it_streams(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.bin", bytes(20000)) for i in range(3)])
    shard.write_bytes(shard.read_bytes()[:50000])  # cut off in the third sample
    samples = read_shard(shard)
    assert next(samples)[0] == "0"
    assert next(samples)[0] == "1"
    with pytest.raises(ValueError, match=r"a\.tar is not a whole tar file"):
        next(samples)


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("x/1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(read_shard(tmp_path / "a.tar")) == []


def test_an_absent_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_shard(tmp_path / "a.tar"))
