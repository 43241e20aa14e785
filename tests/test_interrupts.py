"""Ctrl-C in a real process: during imports, training and clean-up, once and twice; one line, never a traceback."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pairs import write

from lowrank_probe.console import console

PROBE = [sys.executable, "-m", "lowrank_probe"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | {
    "COLUMNS": "160", "TERM": "xterm", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


def press_when(process, ready, deadline_s=60):
    """SIGINT as soon as ready() holds."""
    deadline = time.monotonic() + deadline_s
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is imported")
@pytest.mark.parametrize("arguments", [["spectrum", "a", "b"], ["report", "a"], ["demo"]], ids=lambda a: a[0])
def test_during_the_imports(arguments, tmp_path):
    environment = ENVIRONMENT | {"LOWRANK_PROBE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [*PROBE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    library = "libarrow" if arguments[0] == "report" else "libtorch"
    press_when(process, lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_while_the_command_line_itself_is_imported(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-v", *PROBE[1:], "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    os.set_blocking(process.stderr.fileno(), False)
    seen = b""

    def begun():
        nonlocal seen
        select.select([process.stderr], [], [], 1)
        seen += process.stderr.read() or b""
        return b"import 'lowrank_probe.interrupts'" in seen and b"typer" in seen

    press_when(process, begun)
    os.set_blocking(process.stderr.fileno(), True)
    stdout, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (seen + rest).endswith(b"interrupted\n")
    assert b"Traceback" not in seen + rest
    assert stdout == b""


def on_terminal(*arguments, at, presses=1, every_s=0.05, **environment):
    """(exit code, what the terminal showed): SIGINT `presses` times once `at` is seen in the progress."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*PROBE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=end, env=ENVIRONMENT | environment
    )
    os.close(end)
    shown, sent, last, deadline = "", 0, 0.0, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.01)[0]:
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the process has closed its side
                    break
            if sent < presses and (sent or re.search(at, shown)) and time.monotonic() > last + every_s:
                last, sent = time.monotonic(), sent + 1
                process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert sent or not presses, f"{at} was not seen: {shown}"
    return process.returncode, shown


def lines(shown):
    """What stays on the terminal: without the progress, which is drawn over."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    kept = [line.rsplit("\r", 1)[-1].strip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in kept if line and "%" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_during_the_demos_training(tmp_path, presses):
    code, shown = on_terminal(
        "demo", "--out", tmp_path / "out", at="pre-training", presses=presses, every_s=0.002,
        LOWRANK_PROBE_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert code in ((130,) if presses == 1 else (130, -signal.SIGINT))
    assert lines(shown) == ["interrupted"]
    if presses == 1:
        assert list(tmp_path.iterdir()) == []


def test_names_are_no_markup_and_no_emoji_on_a_terminal(tmp_path):
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    name = "model.[/red].0:smile:.weight"
    sides = [write(tmp_path / side, {name: W * factor}) for side, factor in (("base", 1.0), ("tuned", 1.01))]
    code, shown = on_terminal("spectrum", *sides, "--out", tmp_path / "run", at="", presses=0)
    assert code == 0, shown
    assert "note: no layer type is known for 0:smile:" in shown
    out = console()
    with out.capture() as table:
        out.print("0:smile:[/red]")
    assert table.get() == "0:smile:[/red]\n"


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """A large matrix and, with two threads beside each other, 16 smaller ones: a few seconds of work."""
    directory = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for i in range(17):
        n = 1024 if i else 1536
        W = 0.02 * torch.randn(n, n, generator=generator)
        base[f"model.layers.{i}.mlp.up_proj.weight"] = W.bfloat16()
        tuned[f"model.layers.{i}.mlp.up_proj.weight"] = (W + 1e-3 * torch.randn(n, n, generator=generator)).bfloat16()
    return write(directory / "base", base), write(directory / "tuned", tuned)


@pytest.mark.parametrize("every_s", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_again_and_again_while_it_stops(long_pair, tmp_path, every_s, threads):
    out = tmp_path / "a" / "run"
    code, shown = on_terminal(
        "spectrum", *long_pair, "--out", out, at=r"layers\.\d+\.mlp.*%", presses=30, every_s=every_s,
        OMP_NUM_THREADS=threads,
    )  # fmt: skip
    assert "Traceback" not in shown
    assert "ignored" not in shown
    (line,) = lines(shown)
    assert line.startswith("interrupted")
    assert code in (130, -signal.SIGINT)  # killed once there was nothing left to lose
    if "kept in" in line:
        assert (out / ".unfinished" / "log").stat().st_size > 0


# ---------------------------------------------------------------------------------------------- one_line itself


def process(body):
    """(exit code, stderr) of Python code within `one_line`; press() is Ctrl-C."""
    code = f"""
import os, signal, time
from lowrank_probe import interrupts
def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
with interrupts.one_line():
{body}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "    press()",
        "    try: press()\n    except KeyboardInterrupt as error: raise ImportError('failed') from error",
        "    try: press()\n    except KeyboardInterrupt: raise SystemExit(130)",
        "    try: press()\n    finally: press()",
        "    with interrupts.ending_at_once():\n        press()",
        "    with interrupts.ending_at_once(): pass\n    press()",
        "    raise interrupts.Stopped('interrupted')",
    ],
)
def test_one_line_and_130(body):
    assert process(body) == (130, "interrupted\n")


def test_what_is_no_ctrl_c_keeps_its_traceback_and_its_exit_code():
    code, stderr = process("    raise ImportError('no such thing')")
    assert code == 1
    assert stderr.splitlines()[-1] == "ImportError: no such thing"
    assert process("    raise SystemExit(3)") == (3, "")
    assert process("    pass") == (0, "")
