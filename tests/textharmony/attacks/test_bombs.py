"""Small files that claim or unpack to gigabytes are refused, in bounded memory."""

import gzip
import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

from textharmony.images import MOST_BYTES, image_size, open_image

PEAK = 400  # MiB that reading bombs may add to a process: a sample has up to 128
_READ = """
import resource, sys
from pathlib import Path
from textharmony.data.readers.own import read_shard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print(sum(1 for sample in read_shard(Path(path))), "samples")
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def gzipped(start: bytes, zeros: int, end: bytes = b"") -> bytes:
    """A gzip file of some bytes, gigabytes of zeros, and some bytes: gzip files may follow each other."""
    chunk = gzip.compress(bytes(2**24))
    return gzip.compress(start) + chunk * (zeros >> 24) + gzip.compress(bytes(zeros % 2**24) + end)


def sparse() -> bytes:
    """A file whose zeros are not in the tar file, but its reader would make them."""
    content = bytearray(header("0.txt", 512, tarfile.GNUTYPE_SPARSE))
    content[386:410] = b"00000000000\x0000000001000\x00"  # 512 bytes at 0
    content[483:495] = b"\x80" + (5 << 30).to_bytes(11, "big")  # the size that it claims
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\x00 " % sum(content)
    return bytes(content) + bytes(512) + bytes(1024)


def long_name() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x" * 500_000 + ".txt"))
    return file.getvalue()


_100 = gzip.compress(bytes(2**20)) * 100  # MiB
SHARDS = {
    "0 samples": gzip.compress(bytes(1024)),
    "'0.txt' has 6442450944 bytes, expected at most 134217728 for a sample": gzipped(header("0.txt", 6 << 30), 6 << 30),
    "'0.txt' has 134217729 bytes": gzipped(header("0.txt", 2**27 + 1), 2**27 + 1),
    "'0.txt' has 4611686018427387904 bytes": header("0.txt", 2**62),
    "'0.txt' has 5368709120 bytes": sparse(),
    "'0.b' has 104857600 bytes": b"".join(gzip.compress(header(f"0.{name}", 100 << 20)) + _100 for name in "ab"),
    "a header has more than 1048576 bytes": gzipped(header("x", 4 << 30, tarfile.XHDTYPE), 4 << 30),
    "a header has more than 1048576": gzipped(header("x", 4 << 30, tarfile.GNUTYPE_LONGNAME), 4 << 30),
    "a file's name is 'xxx": long_name(),
    "bad checksum": gzip.compress(gzipped(header("0.txt", 6 << 30), 64 << 20)),  # compressed twice
    "it is compressed by bzip2 or xz": b"BZh91AY&SY" + bytes(50),
    "it is compressed by bzip2": b"\xfd7zXZ\x00" + bytes(50),
}


def test_shards_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar.gz" for i in range(len(SHARDS))]
    for path, content in zip(paths, SHARDS.values(), strict=True):
        assert len(content) < 8 << 20
        path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", _READ, *paths], capture_output=True, text=True, check=True)
    *messages, peak = done.stdout.splitlines()
    for message, expected in zip(messages, SHARDS, strict=True):
        assert expected in message and len(message) < 500
    assert int(peak) < PEAK


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")
    )


PICTURES = {
    "png": png(60_000, 60_000),
    "a little too large": png(8192, 8193),
    "ppm": b"P6 100000 100000 255\n" + bytes(100),
    "bmp": b"BM"
    + struct.pack("<IHHI", 100, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 10**6, 10**6, 1, 24, *[0] * 6)
    + bytes(50),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_billions_of_pixels(tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb").write_bytes(PICTURES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (open_image, image_size):
        for source in (tmp_path / "bomb", PICTURES[name]):
            with pytest.raises(ValueError, match=r"(pixels|exceeds limit)"):
                read(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_file_that_is_too_long_for_a_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long.png").open("wb") as file:
        file.write(png(4, 4))
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"long\.png is not .* it has 268435457 bytes, expected at most 268435456"):
        open_image(tmp_path / "long.png")


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    os.chmod(tmp_path / "gs", 0o755)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="is not a picture that Pillow reads"):
        open_image(content)
    assert not (tmp_path / "ran").exists()
