"""Reading ahead for a device, on the CPU: what comes is what the file holds, and buffers go round."""

from collections import deque
from contextlib import closing

import pytest
import torch

from lowrank_probe import staged_reads
from lowrank_probe.remote_files import open_span
from lowrank_probe.staged_reads import staged_runs

CPU = torch.device("cpu")
SIZES = (1, 64, 0, 200, 63, 1000)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_reads, "STAGE_BYTES", 64)
    monkeypatch.setattr(staged_reads, "_free", {})
    path = tmp_path / "file"
    path.write_bytes(bytes(i * i % 251 for i in range(2000)))
    return path


class Network:
    """A span that is no file here, and gives little at a time."""

    def __init__(self, content, start):
        self.content, self.at = content, start

    def readinto(self, view):
        got = self.content[self.at : self.at + min(len(view), 7)]
        view[: len(got)] = got
        self.at += len(got)
        return len(got)

    def close(self):
        pass


@pytest.mark.parametrize("network", [False, True])
def test_runs_hold_what_the_file_holds(file, network):
    content = file.read_bytes()
    with closing(Network(content, 5) if network else open_span(file, 5, 2000)) as span:
        runs = [run.numpy().tobytes() for run in staged_runs(span, 5, SIZES, CPU)]
    assert [len(run) for run in runs] == list(SIZES)
    assert b"".join(runs) == content[5 : 5 + sum(SIZES)]


def test_no_more_buffers_than_are_read_ahead(file):
    for _ in range(3):
        with closing(open_span(file, 0, 2000)) as span:
            for run in staged_runs(span, 0, [2000], CPU):
                assert len(run) == 2000
    assert 1 <= len(staged_reads._free[CPU]) <= staged_reads.AHEAD


def test_one_that_is_left_early_gives_its_buffers_back(file):
    with closing(open_span(file, 0, 2000)) as span:
        runs = staged_runs(span, 0, [64] * 20, CPU)
        next(runs)
        runs.close()
        # The file may be closed now: nobody reads from it any more.
    made = len(staged_reads._free[CPU])
    assert 1 <= made <= staged_reads.AHEAD
    staged_reads._pool(CPU).submit(int).result()
    assert len(staged_reads._free[CPU]) == made


def test_a_file_that_ends_before(file):
    with closing(open_span(file, 1900, 2300)) as span, pytest.raises(EOFError):
        deque(staged_runs(span, 1900, [50, 350], CPU))
