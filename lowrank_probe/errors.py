"""The exceptions of lowrank_probe.

    ProbeError              every failure that is not a bug; one line: what, expected against found, the mend
    ├── CheckpointError     a file or directory that cannot be read as a checkpoint
    ├── MatchError          two checkpoints that cannot be compared
    ├── NumericsError       NaN or Inf, or an algorithm that did not deliver what it certifies
    ├── NoFormulaError      activations that have no closed form; they can be measured
    ├── UnchangedError      two checkpoints without a difference, where one was wanted; exit code 3
    ├── OutputError         a run directory that cannot be written
    ├── WorkerDiedError     a process that worked for this one was killed; what is finished is kept
    └── Interrupted         Ctrl-C; it carries what was finished (in `spectra`)

Library code raises them with the bare fact; only `lowrank_probe.cli.main` turns them into text and exit code 1.
"""


class ProbeError(Exception):
    """A failure with one clear line for the user: names the thing, expected against found, and the mend."""


class CheckpointError(ProbeError):
    """A file or directory that cannot be read as a checkpoint or adapter."""


class MatchError(ProbeError):
    """Two checkpoints that cannot be compared: no common tensor, or an adapter that fits nothing."""


class NumericsError(ProbeError):
    """NaN or Inf in a tensor, or a kernel that could not certify its result."""


class NoFormulaError(ProbeError):
    """Activations of a training step that have no closed form here; `--measure` can tell them."""


class UnchangedError(ProbeError):
    """Two checkpoints that do not differ: there is no adapter to extract."""


class OutputError(ProbeError):
    """A run directory or file that cannot be written: in use, no space, not permitted."""


class WorkerDiedError(ProbeError):
    """A worker process was killed, by someone or for want of memory: another run may go on from what is finished."""


def printable(text: object) -> str:
    """The text, one line without control characters: names come from strangers' files and must not drive a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))
