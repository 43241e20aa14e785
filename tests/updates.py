"""Planted updates for tests of their kind: a small model, what is done to its matrices, what is said of the pair."""

import torch
from pairs import planted, write

import lowrank_probe as lp
from lowrank_probe import kinds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256),
}  # fmt: skip


def model(dtype=F32, layers=3, seed=0, head=False):
    """Llama's names, 128 wide, Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(300, 128, generator=generator) * 0.02}
    for layer in range(layers):
        for module, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{module}.weight"] = torch.randn(*shape, generator=generator) * 0.02
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(128)
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = 0.1 * torch.randn(128, generator=generator)
    tensors["model.norm.weight"] = torch.ones(128)
    if head:
        tensors["lm_head.weight"] = torch.randn(300, 128, generator=generator) * 0.02
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def change(tensors, how, where=lambda name: True):
    """The tensors with how(W, i) in place of every matrix that `where` selects; a float64 result is rounded once."""
    return {
        name: how(W.double(), i).to(W.dtype) if W.ndim == 2 and where(name) else W
        for i, (name, W) in enumerate(tensors.items())
    }


def findings(tmp_path, base, tuned):
    """kind → finding, in the order they were said."""
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    said = kinds.recognise(result)
    assert [f.statement for f in said] == [f["statement"] for f in result.facts["findings"]]
    assert all(f.statement.endswith(".") and "nan" not in f.statement for f in said)
    found = {f.kind: f for f in said}
    assert len(found) == len(said), said
    return found


def low_rank(rank, relative, seed=0, spread=(2, 1)):
    def how(W, i):
        delta = planted(tuple(W.shape), torch.linspace(*spread, rank), seed + i)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def full_rank(relative, seed=100):
    def how(W, i):
        delta = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def fine_tuned(relative, seed=100):
    """A full-rank update with the decaying spectrum of a real one."""

    def how(W, i):
        k = min(W.shape)
        delta = planted(tuple(W.shape), torch.arange(1, k + 1) ** -0.7, seed + i)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def of(*modules):
    return lambda name: any(module in name for module in modules)


IN_BLOCKS = of(*SHAPES)


def absmax(bits, group=None):
    """Symmetric round-to-nearest, one scale for every `group` entries of a row (None: the row)."""

    def how(W, i):
        grouped = W.reshape(-1, group or W.shape[1])
        step = grouped.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (grouped / step).round().mul(step).reshape(W.shape)

    return how


def zero_point(bits, group):
    """Asymmetric round-to-nearest with an integer zero point."""

    def how(W, i):
        grouped = W.reshape(-1, group)
        low = grouped.amin(1, keepdim=True)
        step = (grouped.amax(1, keepdim=True) - low) / (2**bits - 1)
        zero = (-low / step).round()
        return (((grouped / step).round() + zero).clamp(0, 2**bits - 1) - zero).mul(step).reshape(W.shape)

    return how


NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0], dtype=torch.float64,
)  # fmt: skip
FP4 = torch.tensor([0.0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0], dtype=torch.float64)
FP4 = torch.cat([-FP4.flip(0)[:-1], FP4])


def codebook(codes, scale_error=0.0):
    """Blocks of 64 to the nearest multiple of their absmax, which is then stored with an error of its own (QLoRA)."""

    def how(W, i):
        grouped = W.reshape(-1, 64)
        absmax = grouped.abs().amax(1, keepdim=True)
        nearest = codes[(grouped[..., None] / absmax[..., None] - codes).abs().argmin(-1)]
        error = torch.rand(absmax.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) - 0.5
        return (nearest * absmax * (1 + 2 * scale_error * error)).reshape(W.shape)

    return how


nf4, fp4 = codebook(NF4), codebook(FP4)


def along_columns(quantizer):
    """The same where the weight was stored transposed."""
    return lambda W, i: quantizer(W.T, i).T


def float8(W, i):
    scale = W.abs().max() / 448
    return (W / scale).to(torch.float8_e4m3fn).double() * scale


# ---------------------------------------------------------------------------------------------- ordinary directions


def adam(W, i):
    """Of every entry about the same size, whatever its gradient."""
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return noise.sign() + 0.5 * noise


def one_step_of_adam(W, i):
    return torch.randn(W.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).sign()


def sgd(W, i):
    """A sum of outer products of ever smaller size, as gradients are."""
    generator, k = torch.Generator().manual_seed(i), min(W.shape)
    left, right = (torch.randn(size, k, generator=generator, dtype=torch.float64) for size in W.shape)
    return (left * torch.arange(1, k + 1) ** -0.7) @ right.T


def sparse(W, i):
    return adam(W, i) * (torch.rand(W.shape, generator=torch.Generator().manual_seed(i + 1)) < 0.05)


def whole_rows(W, i):
    drawn = torch.rand(W.shape[0], 1, generator=torch.Generator().manual_seed(i + 1))
    return adam(W, i) * ((drawn < 0.1) | (drawn == drawn.min()))  # one at least


def multiplicative(W, i):
    """As weights move that are trained in proportion to their size."""
    return W * adam(W, i)


ORDINARY = [adam, one_step_of_adam, sgd, sparse, whole_rows, multiplicative]
