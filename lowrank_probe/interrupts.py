"""Ctrl-C on the command line: one line and exit code 130, whatever it hits. The standard library only."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

LINE = "interrupted"


class Stopped(BaseException):
    """Ctrl-C was seen to; the text is the line to end with. No KeyboardInterrupt: typer would swallow that."""


@contextmanager
def one_line() -> Iterator[None]:
    """Within it the first Ctrl-C raises KeyboardInterrupt, the next one ends the process; either way after one line.

    At its end the process has nothing left to lose: from there on Ctrl-C kills it as it does a program in C.
    """
    pressed = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            _end_now()
        pressed = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except Stopped as stopped:
        _end(str(stopped))
    except KeyboardInterrupt:
        _end(LINE)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of a KeyboardInterrupt
            _end(LINE)
        raise
    except Exception:  # extension modules turn a KeyboardInterrupt into errors of their own
        if pressed:
            _end(LINE)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it Ctrl-C ends the process there and then: for imports, which cannot be unwound and leave nothing behind.

    An exception raised inside an import may be swallowed, or printed as "ignored", by whoever runs the import.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: _end_now())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(line: str) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `one_line` ends this: neither a second line nor none
    print(line, file=sys.stderr, flush=True)  # noqa: T201
    raise SystemExit(130) from None


def _end_now() -> NoReturn:
    show_cursor = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    os.write(2, f"{show_cursor}{LINE}\n".encode())
    os._exit(130)
