"""Full fine-tunes of SmolLM2-135M on German manual pages, to have real updates whose fp32 truth is known.

    python benchmarks/smollm2_finetune.py OUT --lr 1e-5 5e-5 2e-4

The base is stored in bf16 and read into fp32 master weights; AdamW (betas 0.9, 0.999, no weight decay) keeps its state
in fp32; on a GPU the forward and backward products run in bf16 (autocast). 200 steps of 16 × 512 tokens, a linear
warmup of 10 steps, then a cosine down to 0 (`--schedule constant` keeps the rate), gradient norm clipped to 1. The
last 64 × 512 tokens are held out.
Each rate leaves OUT/lr_<rate>/: `tuned_fp32.safetensors`, the exact result; `config.json` and `model.safetensors`, the
same rounded to bf16, which is what people share. Losses are in nats a token.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

Tokens = NDArray[np.uint16]
HELD_OUT = 64  # sequences


def manpage_tokens(base: Path) -> Tokens:
    """German manual pages as one line of tokens, every page ended by the tokenizer's token 0, `<|endoftext|>`."""
    from real_models import german_manpages
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    pages = german_manpages().read_text(encoding="utf-8").split("\f")
    ids = tokenizer(pages, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray([*page, 0], dtype=np.uint16) for page in ids])


def split(tokens: Tokens, length: int = 512) -> tuple[Tensor, Tensor]:
    """Training and held-out sequences, (n, length) int64 each: the text in order, its last 64 sequences held out."""
    n = len(tokens) // length
    rows = torch.from_numpy(tokens[: n * length].astype(np.int64)).view(n, length)
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def load_model(base: Path, device: str) -> Any:
    """The model of directory `base` with fp32 parameters on `device`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)


def token_loss(model: Any, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over `rows` (b, length), nats; bf16 autocast on a GPU only."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(input_ids=rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, rows: Tensor, batch: int = 16) -> float:
    """Mean loss of `model` over all of `rows` (n, length), n a multiple of `batch`, nats a token."""
    device = next(model.parameters()).device
    model.eval()
    parts = [rows[i : i + batch].to(device) for i in range(0, len(rows), batch)]
    return float(np.mean([token_loss(model, part).item() for part in parts]))


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of `step` = 0, 1, …: linear up to `peak` over `warmup` steps, then a cosine down to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def finetune(
    base: Path,
    tokens: Tokens,
    lr: float,
    steps: int = 200,
    batch: int = 16,
    length: int = 512,
    *,
    warmup: int = 10,
    schedule: str = "cosine",
    seed: int = 0,
    device: str = "cpu",
    losses: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Full fine-tune of `base` → its state dict in fp32 on the CPU, named as in the base, tied `lm_head` left out.

    Sequences are drawn without replacement in an order fixed by `seed`. `losses`, if given, receives the held-out loss
    under "before" and "after" (nats a token). Raises ValueError if the text is too short for one pass.
    """
    train, held_out = split(tokens, length)
    if len(train) < steps * batch:
        raise ValueError(f"{steps} steps of {batch} sequences of {length} tokens; the text has {len(train)} of them")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = load_model(base, device)
    report = {} if losses is None else losses
    report["before"] = held_out_loss(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, schedule)
        loss = token_loss(model, train[order[step * batch : (step + 1) * batch]].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    report["after"] = held_out_loss(model, held_out)
    return {name: value.detach().cpu() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def unchanged_fractions(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> dict[str, float]:
    """Share of entries whose bf16 value is the base's own, by projection: the median over the layers."""
    by_type: dict[str, list[float]] = {}
    for name, value in tuned.items():
        if name.endswith("_proj.weight"):
            same = value.bfloat16() == base[name].bfloat16()
            by_type.setdefault(name.split(".")[-2], []).append(same.double().mean().item())
    return {kind: float(np.median(values)) for kind, values in by_type.items()}


def save(base: Path, tuned: dict[str, Tensor], folder: Path) -> None:
    """Write `folder`/tuned_fp32.safetensors, and the same in bf16 as a transformers directory like `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tuned.items()}, folder / "tuned_fp32.safetensors")
    stored = {name: value.bfloat16().contiguous() for name, value in tuned.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")


def rate_name(lr: float) -> str:
    """A learning rate as a folder's name: 1e-5 → `lr_1e-05`, 2e-4 → `lr_2e-04`."""
    return f"lr_{np.format_float_scientific(lr, trim='-', exp_digits=2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 5e-5, 2e-4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base", type=Path, help="model directory; without it, SmolLM2 is fetched")
    parser.add_argument("--tokens", type=Path, help="uint16 .npy; without it, the manual pages are fetched")
    parser.add_argument("--no-save", action="store_true", help="print the losses only")
    options = parser.parse_args()

    base: Path = options.base
    if base is None:
        from real_models import smollm2

        base = smollm2()
    tokens = np.load(options.tokens) if options.tokens else manpage_tokens(base)
    base_state = load_file(base / "model.safetensors")
    for lr in options.lr:
        start, losses = time.perf_counter(), dict[str, float]()
        tuned = finetune(
            base, tokens, lr, options.steps, options.batch, options.length,
            warmup=options.warmup, schedule=options.schedule, seed=options.seed, device=options.device, losses=losses,
        )  # fmt: skip
        facts = {
            "lr": lr, "steps": options.steps, "schedule": options.schedule, "device": options.device,
            "loss_before": losses["before"], "loss_after": losses["after"],
            "unchanged_fraction": unchanged_fractions(base_state, tuned), "train_s": time.perf_counter() - start,
        }  # fmt: skip
        print(json.dumps(facts), flush=True)
        if not options.no_save:
            save(base, tuned, options.out / rate_name(lr))
            (options.out / rate_name(lr) / "run.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
