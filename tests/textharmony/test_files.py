"""Files are replaced whole; an error names the file and leaves the earlier one."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from textharmony.files import naming, replace_file


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "a", b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


_FULL = """
import resource, signal, sys
from pathlib import Path
from textharmony.files import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file(Path(sys.argv[1]), b"x" * 5000)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is POSIX's")
def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"one")
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and str(path) in done.stdout
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["a.json"]


def test_an_error_in_the_middle_of_a_write_names_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/full/a\.csv'") as error, naming(Path("/full/a.csv")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
