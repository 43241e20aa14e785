"""Architectures at the edges: what a LoRA of each keeps, by mergekit-extract-lora 0.1.5 and by `probe extract`.

Tiny random models of transformers, every trainable parameter perturbed (matrices and experts by rank 4, vectors freely),
saved by save_pretrained; both tools at rank 8, so that whatever is missing afterwards was lost, not truncated. Each
adapter is loaded by PEFT, run unmerged and merged, and compared with the fine-tune: logits, and every weight.
Writes docs/extract-edges.md. Exit 1 where ours loses anything.

    python benchmarks/extract_edges.py --peer PATH/bin/mergekit-extract-lora    # about 3 minutes on 2 cores
    python benchmarks/extract_edges.py --peer … --only qwen2 bert               # without writing the page
"""

import argparse
import copy
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from accuracy import publish
from edge_models import CASES, Case, perturb
from extract import PEER, PEER_COMMAND
from speed import install_peer
from torch import Tensor

RANK: Final = 8
# Beyond this share of a parameter's update, or of the logits' change, it counts as lost.
LOST: Final = 1e-2
OURS: Final = "everything"
DEFAULT: Final = "all-linear"
THEIRS: Final = "mergekit"


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    logits, merged: ‖logits − tuned's‖/‖base's − tuned's‖ unmerged and merged (NaN where it came to none). lost: parameters of
    the merged model of whose update more than LOST is missing; share: their missing ‖·‖² over all ‖ΔW‖². failed: what broke.
    """

    exit: int
    failed: str = ""
    logits: float = math.nan
    merged: float = math.nan
    share: float = math.nan
    lost: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.failed and not self.lost and max(self.logits, self.merged) <= LOST

    @property
    def consistent(self) -> bool:
        return abs(self.logits - self.merged) <= LOST

    @property
    def words(self) -> str:
        if self.failed:
            return self.failed
        if self.complete:
            return "everything carried"
        figures = f"{_percent(self.merged)}, {_percent(self.logits)}"
        differ = "" if self.consistent else f"merged and unmerged differ ({figures})"
        lost = f"lost, exit {self.exit}: {', '.join(self.lost)}" if self.lost else ""
        return "; ".join(filter(None, (f"{_percent(self.logits)} of the logits' change missing", lost, differ)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the mergekit-extract-lora executable of another venv; without it one is made")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these models only; no page")
    parser.add_argument("--peer-only", action="store_true", help="mergekit's side only; no page")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tools = (THEIRS,) if options.peer_only else (THEIRS, OURS, DEFAULT)
    found: dict[str, dict[str, Outcome]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        peer = options.peer or str(install_peer(Path(scratch) / "peer", PEER, PEER_COMMAND))
        for name in options.only or CASES:
            root = Path(scratch) / name
            models = make_pair(CASES[name], root)
            found[name] = {tool: examine(CASES[name], root, tool, peer, *models) for tool in tools}
            for tool, outcome in found[name].items():
                print(f"{name}, {tool}: {outcome.words}", file=sys.stderr, flush=True)
    heads = [
        "model",
        "what is special",
        "mergekit-extract-lora 0.1.5",
        *([] if options.peer_only else ["`probe extract --targets everything`"]),
    ]
    short = [[CASES[name].title, CASES[name].special, *(by[tool].words for tool in tools if tool != DEFAULT)]
             for name, by in found.items()]  # fmt: skip
    detail_heads = ["model", "tool", "exit", "logits unmerged", "logits merged", "‖ΔW‖² lost", "which"]
    titles = {THEIRS: "mergekit 0.1.5", OURS: "`probe … --targets everything`", DEFAULT: "`probe …` (all-linear)"}
    details = [
        [CASES[name].title, titles[tool], str(one.exit), _percent(one.logits), _percent(one.merged), _percent(one.share),
         one.failed or ", ".join(one.lost) or "–"]
        for name, by in found.items() for tool, one in by.items()
    ]  # fmt: skip
    verdicts = [
        (f"{CASES[name].title}: {by[OURS].words}", by[OURS].complete) for name, by in found.items() if OURS in by
    ] + [
        (f"{CASES[name].title}, all-linear: loads, merged as unmerged", not by[DEFAULT].failed and by[DEFAULT].consistent)
        for name, by in found.items() if DEFAULT in by
    ]  # fmt: skip
    note = (
        f"Tiny random models (transformers {transformers.__version__}, PEFT {peft.__version__}), every trainable parameter "
        "perturbed by a tenth of its norm (vectors that start at zero start at 0.16 a component, the size of W·x there): matrices and each expert by rank 4, vectors (biases, norms) freely; fp32. Both tools "
        f"extract rank {RANK}, so what is missing was lost, not truncated; mergekit by its defaults, which mean to carry "
        "embeddings, norms and biases too, as `--targets everything` does. Lost: more than 1 % of a parameter's update. "
        "Logits: ‖adapter's − tuned's‖/‖base's − tuned's‖ on random tokens, 0 % is the fine-tune, 100 % as far off as the base. "
        "‖ΔW‖² lost: over the parameters of the merged model. `all-linear`, the default, leaves embeddings, "
        "norms and biases out by intent and says how much that is. A grown table is resized before loading (all tools)."
    )
    publish("extract_edges", "Extraction at the edges", note, [("", heads, short), ("In figures", detail_heads, details)],
            verdicts, write=not options.only and not options.peer_only, page="extract-edges")  # fmt: skip
    return 0 if all(ok for _, ok in verdicts) else 1


def make_pair(case: Case, root: Path) -> tuple[Any, Any]:
    """(base, tuned) in memory as loaded again from `root`/base and `root`/tuned."""
    torch.manual_seed(0)
    base = case.build().eval()
    tuned = copy.deepcopy(base)
    if case.grown:
        tuned.resize_token_embeddings(case.grown, mean_resizing=False)
    perturb(tuned, torch.Generator().manual_seed(1))
    for side, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(root / side)
    return _load(case, root / "base"), _load(case, root / "tuned")


def _load(case: Case, path: Path) -> Any:
    """A model from disk, its table grown where the fine-tune's is: the step before an adapter is loaded."""
    model = case.cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    if case.grown and model.get_input_embeddings().weight.shape[0] != case.grown:
        torch.manual_seed(2)
        model.resize_token_embeddings(case.grown, mean_resizing=False)
    return model


def examine(case: Case, root: Path, tool: str, peer: str, base: Any, tuned: Any) -> Outcome:
    """Run one tool on the pair at `root`, load what it wrote through PEFT, and compare with the fine-tune."""
    out, sides = root / tool, (str(root / "base"), str(root / "tuned"))
    if tool == THEIRS:
        command = [peer, "--base-model", sides[0], "--model", sides[1], "--max-rank", str(RANK), "--out-path", str(out)]
    else:
        probe = str(Path(sys.executable).with_name("probe"))
        command = [probe, "extract", *sides, "--rank", str(RANK), "--targets", tool, "--out", str(out), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        left = ", ".join(sorted(file.name for file in out.rglob("*") if file.is_file()))
        words = f"exit {done.returncode}: {_last_words(done.stderr, root)}"
        return Outcome(done.returncode, words + (f" (leaves {left})" if left else ""))
    inputs = case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(_load(case, root / "base"), str(out)).eval()
            unmerged = _logits(model, inputs)
            whole = model.merge_and_unload()
            merged = _logits(whole, inputs)
        except Exception as problem:  # whatever PEFT says of it is the outcome
            return Outcome(0, f"exit 0, then PEFT: {type(problem).__name__}: {_last_words(str(problem), root)}")
    goal, start = _logits(tuned, inputs), _logits(base, inputs)
    distance = float(torch.linalg.norm(start - goal))
    logits, after = (float(torch.linalg.norm(x - goal)) / distance for x in (unmerged, merged))
    lost, share = missing(base, tuned, whole)
    return Outcome(0, "", logits, after, share, lost)


@torch.no_grad()
def missing(base: Any, tuned: Any, found: Any) -> tuple[tuple[str, ...], float]:
    """(parameters of whose update more than LOST is missing, "n of" where not in all layers; Σ missing² / Σ‖ΔW‖²).

    A tied parameter counts once, by the name that carries most of it: the logits tell which name the model uses.
    """
    old, new, got = (dict(model.named_parameters(remove_duplicate=False)) for model in (base, tuned, found))
    tied: dict[int, list[str]] = {}
    for name, W in new.items():
        tied.setdefault(id(W), []).append(name)
    kinds: dict[str, list[int]] = {}
    total = gone = 0.0
    for names in tied.values():
        goal = new[names[0]]
        step = float(torch.linalg.norm((goal - old[names[0]]).double()))
        left = min(
            (float(torch.linalg.norm((goal - got[name]).double())) for name in names if name in got), default=step
        )
        total, gone = total + step**2, gone + left**2
        kind = kinds.setdefault(_kind(names[0]), [0, 0])
        kind[0] += left > LOST * step
        kind[1] += 1
    lost = tuple(f"{kind} ({n} of {of})" if n < of else kind for kind, (n, of) in kinds.items() if n)
    return lost, gone / total


def _kind(name: str) -> str:
    """A parameter's name without the number of its layer and what all share: `q_proj.bias`."""
    parts = [
        part
        for part in re.sub(r"\b\d+\.", "", name).split(".")
        if part not in ("model", "transformer", "layer", "layers", "h")
    ]
    return ".".join(parts[-2:]).removesuffix(".weight")


@torch.no_grad()
def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits.double()


def _last_words(text: str, root: Path) -> str:
    """The last line of what was said, at most 160 characters, without the scratch paths."""
    lines = [line.strip() for line in text.replace(f"{root}/", "").splitlines() if line.strip()]
    words = re.sub(r"\s+", " ", lines[-1] if lines else "no word").replace("|", "∣")
    return words if len(words) <= 160 else words[:157] + "…"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else "0 %" if value < 5e-4 else f"{100 * value:.3g} %"


if __name__ == "__main__":
    raise SystemExit(main())
