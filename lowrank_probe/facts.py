"""Run facts: what was compared, with what, on what. No arithmetic."""

import datetime
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from lowrank_probe import __version__
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.devices import Choice
from lowrank_probe.outputs import check_name
from lowrank_probe.remote_files import absolute, identity


def machine_facts(choice: Choice) -> dict[str, Any]:
    """Versions, device (with what its float64 was measured at) and time of a run."""
    device, threads = choice.device, torch.get_num_threads()
    if choice.cluster:
        name, threads = "Ray cluster", 1
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "versions": {
            "lowrank_probe": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": version("numpy"), "pandas": version("pandas"),
        },
        "device": {"type": str(device), "name": name, "n_threads": threads}
        | ({"n_devices": 1 + len(choice.others)} if choice.others else {}),
        "float64_s": choice.float64_s,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def same_machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must share of the facts of the one that was killed: versions and device, but not its
    number of threads, which moves no more than the last digits, nor of cards, which moves nothing."""
    device = {key: value for key, value in facts["device"].items() if key not in ("n_threads", "n_devices")}
    return {"versions": facts["versions"], "device": device}


def side_facts(side: Checkpoint | None) -> dict[str, Any] | None:
    """Path or address, model type, tensors, bytes, and name, size and time of every file of one side.

    header: a checksum of the config and of every tensor's name, dtype, shape and place. By all this together a side is
    known again by a run that goes on where another one was killed.
    """
    if side is None:
        return None
    files = [identity(file) for file in side.files]
    path = absolute(side.path) if files else str(side.path)
    check_name(path)
    return {
        "path": path,
        "kind": "adapter" if side.is_adapter else "model",
        "model_type": side.config.get("model_type"),
        "architectures": side.config.get("architectures"),
        "n_labels": len(side.config.get("id2label") or ()) or None,
        "n_tensors": len(side.tensors),
        "n_bytes": sum(info.n_bytes for info in side.tensors.values()),
        "header": _digest(side),
        "files": files,
    }


def _digest(side: Checkpoint) -> str:
    """16 digits that change with the config, or any tensor's name, dtype, shape or place in its file."""
    told = [(name, info.dtype, info.shape, info.file.name, info.start) for name, info in side.tensors.items()]
    return hashlib.sha256(repr([told, dict(side.config)]).encode()).hexdigest()[:16]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
