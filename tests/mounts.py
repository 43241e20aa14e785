"""A file system of its own for a test, in memory; the test is skipped where none can be mounted."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(directory, options):
    """The directory, with a tmpfs on it that has these mount options."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a tmpfs here")
    except FileNotFoundError:
        pytest.skip("no mount here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
