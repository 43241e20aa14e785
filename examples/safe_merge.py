"""Merge an adapter, and check what is written: NaN, dtype, tied weights, and that merged and unmerged agree.

python examples/safe_merge.py
"""

import json
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_probe as lp

warnings.simplefilter("ignore")  # peft's and transformers' about each other
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
)  # fmt: skip
IDS = torch.arange(60).view(4, 15)


def make(out: Path, targets: list[str]) -> None:
    """A bfloat16 base whose head is its embedding, and an adapter that does something."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(out / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(out / "base"), LoraConfig(r=4, target_modules=targets))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(out / "adapter")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def check(out: Path) -> None:
    """Every tensor of the merged checkpoint against the base's, then the two ways to run it."""
    base, merged = (load_file(out / side / "model.safetensors") for side in ("base", "merged"))
    bad = [name for name, W in merged.items() if not torch.isfinite(W).all()]
    print(f"  NaN or Inf: {bad or 'none'}")
    print(f"  dtypes: {sorted({str(W.dtype) for W in merged.values()})}, the base's")
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    print(f"  changed: {len(changed)} of {len(base)} tensors; new: {sorted(set(merged) - set(base)) or 'none'}")
    print(f"  tie_word_embeddings: {json.loads((out / 'merged' / 'config.json').read_text())['tie_word_embeddings']}")
    start = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    before = logits(start)
    unmerged = logits(PeftModel.from_pretrained(start, out / "adapter"))
    gap = (logits(LlamaForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)) - unmerged).abs().max()
    moved = (unmerged - before).abs().max()
    # Rounding to bfloat16 moves an entry by up to 1/256 of itself: far less than what the adapter does, or stop here.
    print(f"  logits: merged and unmerged differ by {gap:.4f}, the adapter moves them by {moved:.3f}")
    if not gap < 0.1 * moved:
        raise SystemExit("merged and unmerged disagree")


with tempfile.TemporaryDirectory() as folder:
    for targets in (["q_proj", "v_proj", "down_proj"], ["q_proj", "embed_tokens"]):
        out = Path(folder, targets[-1])
        print(f"an adapter on {', '.join(targets)}; the head is tied to the embedding")
        make(out, targets)
        # Sums in float64, rounded once, checked on the way. An adapter on one side of a tied pair unties it.
        lp.merge(out / "base", [out / "adapter"], out / "merged")
        check(out)
    broken = load_file(out / "adapter" / "adapter_model.safetensors")
    next(iter(broken.values()))[0, 0] = torch.nan
    save_file(broken, out / "adapter" / "adapter_model.safetensors")
    print("an adapter with one NaN")
    try:
        lp.merge(out / "base", [out / "adapter"], out / "never")
    except lp.ProbeError as error:
        print(f"  refused: {str(error).replace(folder, '…')}")
    print(f"  written: {'something' if (out / 'never').exists() else 'nothing'}")
