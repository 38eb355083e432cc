import json
import os
import resource
import threading
from pathlib import Path

import pytest

from textharmony.journal import Journal, claim, release


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"id": "a\nb", "text": "Größe 漢字 \u2028 \x85"}, {"id": "b", "text": None}]
    with Journal(tmp_path / "new" / "rows.jsonl") as journal:
        assert journal.rows == []
        for row in rows:
            journal.append(row)
    with Journal(tmp_path / "new" / "rows.jsonl") as journal:
        assert journal.rows == rows


def test_half_a_surrogate_pair_is_written_and_comes_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"text": "cut \ud83d"})
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.rows == [{"text": "cut \ud83d"}]


@pytest.mark.parametrize("cut", [b'{"id": "c', b"{", '{"text": "é'.encode()[:-1]])
def test_a_cut_last_line_is_dropped_and_the_next_row_stands_alone(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b"}\n' + cut)
    with Journal(path) as journal:
        assert journal.rows == [{"id": "a"}, {"id": "b"}]
        journal.append({"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize("line", ["garbage", "[1]", ""])
def test_a_whole_line_that_is_no_object_is_named_and_left(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "a"}}\n{line}\n{{"id": "b"}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        Journal(path)
    assert path.read_bytes() == before


def test_rows_of_many_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        threads = [
            threading.Thread(target=lambda i=i: [journal.append({"i": i, "text": "x" * 9000}) for _ in range(20)])
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(path) as journal:
        assert sorted(row["i"] for row in journal.rows) == sorted(list(range(8)) * 20)


def test_a_file_is_written_by_one_journal_at_a_time(tmp_path: Path) -> None:
    """flock tells open files apart, whoever opened them: a second opening here is what another process would do."""
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="being written by another run"):
            Journal(path)
        journal.append({"id": "a"})
    with Journal(path) as journal:
        assert journal.rows == [{"id": "a"}]


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is POSIX's")
def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part_and_names_the_file(tmp_path: Path) -> None:
    """A limit on the size of files acts like a disk that is full in the middle of a row."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"id": "a"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            with pytest.raises(OSError, match=r"too large: '.*rows\.jsonl'"):
                journal.append({"id": "b" * 1000})
            journal.append({"id": "c"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"id": "a"}\n{"id": "c"}\n'


def test_a_deep_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"[" * 1_000_000 + b"\n")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 1 is b'\[+'\.\.\. \(1000000 long\), expected a JSON object"
    ):
        Journal(tmp_path / "rows.jsonl")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_forked_worker_does_not_hold_the_lock_of_a_run_that_ended(tmp_path: Path) -> None:
    """A killed run's workers live on for some seconds, and the run may be started again at once."""
    file = claim(tmp_path / ".lock")
    (read, write), (begun, begin) = os.pipe(), os.pipe()
    worker = os.fork()
    if not worker:
        os.close(write)
        os.write(begin, b"x")
        os.read(read, 1)  # until the pipe is closed
        os._exit(0)
    try:
        os.read(begun, 1)  # now it has closed what it should not hold
        with pytest.raises(ValueError, match="being written by another run"):
            claim(tmp_path / ".lock")
        release(file)
        release(claim(tmp_path / ".lock"))
    finally:
        os.close(write)
        os.waitpid(worker, 0)
