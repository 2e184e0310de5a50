"""Shards: each item is in one of them, one process makes each, and locks go with their processes."""

import fcntl
import os
import subprocess
import sys

import pytest

from qwenedit.shards import Shard, only_one, record_file, shard_files, shard_of

HOLD = """
import sys
from pathlib import Path
from qwenedit.shards import only_one, shard_of
with only_one(Path(sys.argv[1]), "sweep", shard_of(sys.argv[2]) if sys.argv[2] else None):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 16])
def test_shards_are_all_items_each_once_and_none_is_larger_by_two(length, count):
    items = [f"item {k}" for k in range(length)]
    parts = [shard_of(f"{index}/{count}").part_of(items) for index in range(count)]
    assert sorted(item for part in parts for item in part) == sorted(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("4/4", "the shard is 4/4, wanted 0/4 to 3/4: the first is 0"), ("1/1", "wanted 0/1 to 0/1"),
        ("0/0", "wanted i/n, like 0/4"), ("-1/4", "wanted i/n"), ("1", "wanted i/n"), ("1/2/3", "wanted i/n"),
        ("", "wanted i/n"), ("1/ 2", "wanted i/n"), ("١/٢", "wanted i/n"), (None, "the shard is None"),
        (3, "wanted i/n"),
    ],
)  # fmt: skip
def test_other_shards_are_refused_with_the_range(text, message):
    with pytest.raises(ValueError) as error:
        shard_of(text)
    assert message in str(error.value)


def test_records_of_shards_are_files_beside_the_whole_one(tmp_path):
    for shard in (None, Shard(0, 4), Shard(11, 12)):
        record_file(tmp_path, "results", shard).touch()
    (tmp_path / "results-mine.jsonl").touch()
    assert sorted(os.listdir(tmp_path)) == [
        "results-0-of-4.jsonl", "results-11-of-12.jsonl", "results-mine.jsonl", "results.jsonl",
    ]  # fmt: skip
    assert [path.name for path in shard_files(tmp_path, "results")] == [
        "results-0-of-4.jsonl", "results-11-of-12.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "held, refused, free",
    [
        (None, [None, Shard(0, 2), Shard(1, 2)], []),
        (Shard(0, 2), [None, Shard(0, 2)], [Shard(1, 2), Shard(0, 3)]),
    ],
)
def test_shards_run_side_by_side_and_a_whole_run_alone(tmp_path, held, refused, free):
    with only_one(tmp_path, "sweep", held) as alone:
        assert alone == (held is None)
        for shard in refused:
            with pytest.raises(ValueError, match=r"another (sweep runs|process makes shard 0/2) in"):
                with only_one(tmp_path, "sweep", shard):
                    pass
        for shard in free:
            with only_one(tmp_path, "sweep", shard):
                pass
    with only_one(tmp_path, "sweep") as alone:
        assert alone
    assert not os.listdir(tmp_path)


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), "0/2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process makes shard 0/2"):
            with only_one(tmp_path, "sweep", Shard(0, 2)):
                pass
        process.kill()
        process.wait()
    with only_one(tmp_path, "sweep", Shard(0, 2)):
        pass
    with only_one(tmp_path, "sweep") as alone:
        assert alone


def test_without_locks_nothing_is_locked_and_nothing_is_alone(tmp_path, monkeypatch):

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_one(tmp_path, "sweep") as alone, only_one(tmp_path, "sweep") as other:
        assert not alone and not other
