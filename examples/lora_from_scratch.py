"""A LoRA layer from scratch: y = W x + b + (α/r)·B A x. The same forward pass, gradients and merge as PEFT's.

python examples/lora_from_scratch.py
"""

import torch
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update of rank r. lora_A (r, in), lora_B (out, r); B = 0 at the start."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (B A) x as B (A x): r·(in + out) multiplications a token instead of in·out, and no matrix of W's size.
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += self.scaling * (self.lora_B @ self.lora_A)
        return self.base


def adapt(model: nn.Module, names: tuple[str, ...], rank: int, alpha: float) -> nn.Module:
    """Replace the linear layers whose last name is in `names`, and freeze everything else."""
    # The step that tutorials forget: freezing the wrapped layers alone leaves embeddings, norms and all other layers
    # training, and what is saved as "the adapter" is then not what was trained.
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in names and isinstance(layer, nn.Linear):
            setattr(model.get_submodule(parent), last, LoRALinear(layer, rank, alpha))
    check_frozen(model)
    return model


def check_frozen(model: nn.Module) -> None:
    """Only A and B may train; call it once more after the first backward pass, when .grad tells the same."""
    for name, p in model.named_parameters():
        is_factor = name.endswith((".lora_A", ".lora_B"))
        if p.requires_grad != is_factor or (p.grad is not None and not is_factor):
            raise RuntimeError(f"{name}: {'does not train' if is_factor else 'trains, and is no factor of LoRA'}")


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


if __name__ == "__main__":
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 50))
    peers = get_peft_model(deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["1", "3"]))
    ours = adapt(deepcopy(base), ("1", "3"), rank=4, alpha=8)
    for name in ("1", "3"):  # the same factors in both; B random, or nothing would be compared
        layer, peer = ours.get_submodule(name), peers.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B)
        peer.lora_A.default.weight.data.copy_(layer.lora_A)
        peer.lora_B.default.weight.data.copy_(layer.lora_B)
    ids = torch.randint(0, 50, (8, 16))
    print(f"forward, largest difference to PEFT:   {largest_gap(ours(ids), peers(ids)):.1e}")
    for model in (ours, peers):
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    check_frozen(ours)
    gaps = [
        largest_gap(getattr(ours.get_submodule(n), f).grad, peers.get_parameter(f"base_model.model.{n}.{f}.default.weight").grad)
        for n in ("1", "3") for f in ("lora_A", "lora_B")
    ]  # fmt: skip
    print(f"gradients of A and B:                  {max(gaps):.1e}")
    merged, theirs = ours.get_submodule("3").merged(), peers.merge_and_unload().get_submodule("3")
    print(f"merged weight:                         {largest_gap(merged.weight, theirs.weight):.1e}")
    ours.get_submodule("0").weight.requires_grad_(True)
    try:
        check_frozen(ours)
    except RuntimeError as error:
        print(f"an embedding left to train is found:   {error}")
