"""What a run that is not finished has kept so far, read beside the process that is at work."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from lowrank_probe.outputs import LOG, UNFINISHED
from lowrank_probe.record_log import scan


def heads(out):
    """The heads of the records but the first, which says what the run is; [] where there is no log."""
    try:
        log = os.open(Path(out) / UNFINISHED / LOG, os.O_RDONLY)
    except FileNotFoundError:
        return []
    try:
        return [json.loads(os.pread(log, record.head_bytes, record.at)) for record in scan(log)[0][1:]]
    finally:
        os.close(log)


def kept(out, start=""):
    """The keys under which something is kept, in the order in which it was finished."""
    return [head["key"] for head in heads(out) if head["key"].startswith(start)]


def killed_when(command, ready, environment=None, number=signal.SIGKILL, deadline_s=120):
    """Start a process and kill it as soon as ready() holds; returns its exit code."""
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + deadline_s
        while process.poll() is None and not ready():
            assert time.monotonic() < deadline
        process.send_signal(number)
        return process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
