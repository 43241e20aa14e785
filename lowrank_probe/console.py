"""The terminal that tables are printed to."""

import shutil
import sys
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

# Columns that a name takes at most: one of a stranger's module must not push the numbers out.
LONGEST: Final = 32


def console() -> Console:
    """As wide as the terminal, at least 80; 120 where stdout is none. A name that holds ":x:" is printed as it is."""
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
    return Console(width=max(width, 80), highlight=False, markup=False, emoji=False, soft_wrap=False)


def plain_table() -> Table:
    """A table with one line under its head."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
