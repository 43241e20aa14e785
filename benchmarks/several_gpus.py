"""Every card of a host against one of them: exact spectra of 8192-wide matrices, and the same bits.

    python benchmarks/several_gpus.py            # about 3 minutes on two H200, 6 GB of disk
    python benchmarks/several_gpus.py --tiny     # small shapes, on whatever device there is; judges nothing

`probe spectrum` with `--device cuda:0` and with `--device auto` as whole processes in turns, and the start of a process
alone, which no number of cards makes shorter. Writes docs/benchmarks-several-gpus.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from accuracy import publish
from gpu import prepare, probe_s, start_s

from lowrank_probe.runs import load_result

WIDTH: Final = 8192
N_MATRICES: Final = 16
BAR: Final = 1.8  # of two cards; of more: 0.9 each


def make_pair(root: Path, device: torch.device, width: int, n: int) -> tuple[Path, Path]:
    """(base, tuned) directories: n square bf16 matrices of a Llama's `o_proj`, ΔW with σ_i ∝ 1/i."""
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(0)
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for layer in range(n):
        W = (0.02 * torch.randn(width, width, generator=generator, device=device)).bfloat16()
        B, A = (torch.randn(width, 64, generator=generator, device=device) for _ in range(2))
        D = (B / torch.arange(1, 65, device=device)) @ A.T
        D *= 2e-2 * torch.linalg.norm(W.float()) / torch.linalg.norm(D)
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        sides["base"][name], sides["tuned"][name] = W.cpu(), (W.float() + D).bfloat16().cpu()
    for side, tensors in sides.items():
        (root / side).mkdir()
        save_file(tensors, root / side / "model.safetensors")
        config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": n}
        (root / side / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root / "base", root / "tuned"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever device there is")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    cards = torch.cuda.device_count()
    if cards < 2 and not options.tiny:
        parser.error(f"found {cards} CUDA devices, expected at least 2")
    one = "cuda:0" if cards else "cpu"
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        width, n = (128, 4) if options.tiny else (WIDTH, N_MATRICES)
        sides = make_pair(root, torch.device(one), width, n)
        if cards:
            torch.cuda.empty_cache()
        prepare(torch.device(one))
        for i in range(options.rounds):
            outs = [root / f"{name}-{i}" for name in ("one", "all")]
            start = start_s(torch.device(one))
            alone = probe_s("spectrum", *sides, "--device", one, "--out", outs[0])
            all_of_them = probe_s("spectrum", *sides, "--device", "auto", "--out", outs[1])
            rows.append((start, alone, all_of_them))
            print(f"round {i + 1}: {start:.2f} {alone:.2f} {all_of_them:.2f}", file=sys.stderr)
        found = [load_result(root / f"{name}-0") for name in ("one", "all")]
    same = all(
        (found[0].singular_values[name] == values).all() for name, values in found[1].singular_values.items()
    ) and found[0].table.drop(columns="seconds").equals(found[1].table.drop(columns="seconds"))
    start, alone, all_of_them = (statistics.median(column) for column in zip(*rows, strict=True))
    faster = (alone - start) / max(1e-9, all_of_them - start)
    bar = BAR * max(cards, 2) / 2
    bars = [("table and singular values are the same to the last bit", same)]
    if not options.tiny:
        bars.append((f"{cards} cards: {faster:.2f} × one beyond the start, bar {bar:g}", faster >= bar))
    seconds = [
        ("start of Python, the command's imports and the device", f"{start:.2f}"),
        ("`probe spectrum --device cuda:0`", f"{alone:.2f}"),
        ("`probe spectrum --device auto`", f"{all_of_them:.2f}"),
    ]
    note = (
        f"{n} matrices {width} × {width}, bf16; medians of {options.rounds} rounds. "
        f"Cards: {cards} × {torch.cuda.get_device_name(0) if cards else 'none'}."
    )
    write = not options.tiny
    publish("several_gpus", "Every card of a host", note, [("", ("what", "seconds"), seconds)], bars, write=write,
            page="benchmarks-several-gpus")  # fmt: skip
    return 0 if options.tiny or all(ok for _, ok in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
