"""Train two PEFT adapters on one frozen base, save them, switch between them, weight them, and see what a mix does.

python examples/several_adapters.py
"""

import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_probe as lp

warnings.simplefilter("ignore")  # peft's and transformers' about each other
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
TASKS = {"up": 1, "down": -1}  # count upwards, or downwards, modulo 64


def batch(step: int, n: int = 16) -> torch.Tensor:
    return (torch.randint(0, 64, (n, 1)) + step * torch.arange(12)) % 64


@torch.no_grad()
def loss(model: torch.nn.Module, task: str) -> float:
    torch.manual_seed(1)
    ids = batch(TASKS[task], 64)
    return float(model(input_ids=ids, labels=ids).loss)


def train(model: torch.nn.Module, task: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        ids = batch(TASKS[task])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as out:
    base = LlamaForCausalLM(CONFIG)
    base.save_pretrained(f"{out}/base")
    for task in TASKS:  # each from the same base, which stays as it is
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(f"{out}/base"),
            LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        train(model, task)
        model.save_pretrained(f"{out}/{task}")  # the adapter alone: some hundred kB beside the base

    # One base in memory, both adapters on it: switching costs nothing.
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{out}/base"), f"{out}/up", adapter_name="up")
    model.load_adapter(f"{out}/down", adapter_name="down")
    # "cat" puts the factors side by side (rank 16): the weighted sum of the updates, exactly. "linear" adds A to A and
    # B to B, which is another matrix: (B₁ + B₂)(A₁ + A₂) has cross terms.
    for how in ("cat", "linear"):
        model.add_weighted_adapter(["up", "down"], [0.7, 0.3], combination_type=how, adapter_name=how)

    print("loss                up    down")
    with model.disable_adapter():
        print(f"  base            {loss(model, 'up'):.3f}   {loss(model, 'down'):.3f}")
    for name in ("up", "down", "cat", "linear"):
        model.set_adapter(name)
        print(f"  {name:15} {loss(model, 'up'):.3f}   {loss(model, 'down'):.3f}")

    # The same sum written into the base; before that: do the two adapters write to the same directions?
    merged = lp.merge(f"{out}/base", [f"{out}/up", f"{out}/down"], f"{out}/merged", weights=[0.7, 0.3])
    summed = LlamaForCausalLM.from_pretrained(f"{out}/merged")
    print(f"  merged          {loss(summed, 'up'):.3f}   {loss(summed, 'down'):.3f}")
    print(merged.overlap[["name", "cosine"]].head(3).to_string(index=False))
