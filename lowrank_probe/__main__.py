"""The command `probe`, and `python -m lowrank_probe`: light, so that Ctrl-C while the rest is imported is one line."""

import contextlib
import os
import sys

from lowrank_probe import interrupts


def main() -> None:
    """Entry point of `probe`: imports the command line, hands over to it, and leaves with its exit code.

    Without Python's own tear-down, which walks every object of torch and pandas: 0.3 s, and more with a GPU.
    """
    with interrupts.ending_at_once():
        from lowrank_probe import cli
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    if code is not None and not isinstance(code, int):  # a text, which Python itself would print
        raise SystemExit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a closed stream
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
