"""The log of records: whatever is cut off or damaged, every other record comes back as it was written."""

import os
import threading

import pytest

from lowrank_probe import record_log
from lowrank_probe.record_log import MAGIC, RecordLog


def written(file, count=5, size=300):
    """(head, body) of the records of a new log, the heads of different lengths."""
    log = RecordLog(file)
    told = [(f"head {i}".encode() * (i + 1), bytes([i]) * (size + i)) for i in range(count)]
    for head, body in told:
        log.append(head, [memoryview(body[:10]), memoryview(body[10:])])
    return told


def found(log):
    return [
        (bytes(log.read(one.at, one.head_bytes)), bytes(log.read(one.body_at, one.body_bytes))) for one in log.records
    ]


def starts(file):
    """Where each record of a log begins, and where the last one ends."""
    log = RecordLog(file)
    return [0, *(one.stop for one in log.records)]


@pytest.mark.parametrize("size", [0, 300, record_log._SMALL + 1])
def test_what_is_written_comes_back(tmp_path, size):
    told = written(tmp_path / "log", size=size + 10)
    log = RecordLog(tmp_path / "log")
    assert found(log) == told
    assert log.n_damaged == 0


def test_a_log_cut_anywhere_has_every_whole_record_and_goes_on(tmp_path):
    told = written(tmp_path / "log", count=3, size=20)
    whole, ends = (tmp_path / "log").read_bytes(), starts(tmp_path / "log")
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        log = RecordLog(tmp_path / "cut")
        n = sum(end <= size for end in ends[1:])
        assert found(log) == told[:n]
        assert log.n_damaged == 0
        assert os.path.getsize(tmp_path / "cut") == ends[n]
        log.append(b"next", [memoryview(b"body")])
        assert found(RecordLog(tmp_path / "cut")) == [*told[:n], (b"next", b"body")]


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_any_byte_that_changes_costs_its_record_alone(tmp_path, damaged):
    told = written(tmp_path / "log", size=20)
    whole, ends = (tmp_path / "log").read_bytes(), starts(tmp_path / "log")
    for at in range(ends[damaged], ends[damaged + 1]):
        (tmp_path / "bad").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        log = RecordLog(tmp_path / "bad")
        assert found(log) == told[:damaged] + told[damaged + 1 :]
        assert log.n_damaged == 1


def test_a_last_record_that_is_damaged_is_dropped(tmp_path):
    told = written(tmp_path / "log")
    with open(tmp_path / "log", "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"x")
    log = RecordLog(tmp_path / "log")
    assert found(log) == told[:-1]
    assert log.n_damaged == 0


@pytest.mark.parametrize("junk", [b"", b"\0" * 5000, MAGIC * 400, os.urandom(5000)], ids=["", "0", "magic", "random"])
def test_what_is_no_record_is_none(tmp_path, junk):
    (tmp_path / "log").write_bytes(junk)
    log = RecordLog(tmp_path / "log")
    assert log.records == []
    assert os.path.getsize(tmp_path / "log") == 0


def test_a_record_inside_a_record_stays_there(tmp_path):
    written(tmp_path / "inner", count=2)
    inner = (tmp_path / "inner").read_bytes()
    RecordLog(tmp_path / "log").append(b"outer", [memoryview(inner)])
    assert found(RecordLog(tmp_path / "log")) == [(b"outer", inner)]


def test_records_of_several_threads_are_whole(tmp_path):
    log = RecordLog(tmp_path / "log")

    def work(number):
        for i in range(50):
            log.append(f"{number} {i}".encode(), [memoryview(bytes([number]) * (1 << 10))])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = found(RecordLog(tmp_path / "log"))
    assert sorted(head for head, _ in there) == sorted(f"{n} {i}".encode() for n in range(4) for i in range(50))
    assert all(body == bytes([int(head[:1])]) * (1 << 10) for head, body in there)


def test_it_is_on_the_disk_at_once_and_then_from_time_to_time(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(record_log, "_sync", synced.append)
    written(tmp_path / "log", count=50)
    assert len(synced) == 1
    monkeypatch.setattr(record_log, "SYNC_S", 0.0)
    written(tmp_path / "other", count=50)
    assert len(synced) == 51


@pytest.mark.parametrize("size", [100, record_log._SMALL + 1])
def test_a_record_that_cannot_be_written_leaves_the_log_as_it_was(tmp_path, monkeypatch, size):
    told = written(tmp_path / "log")
    log, write, left = RecordLog(tmp_path / "log"), os.pwrite, [3]

    def full(fd, data, at):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(fd, data[:20], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        log.append(b"head", [memoryview(b"x" * size)])
    monkeypatch.undo()
    log.append(b"next", [memoryview(b"body")])
    assert found(RecordLog(tmp_path / "log")) == [*told, (b"next", b"body")]
