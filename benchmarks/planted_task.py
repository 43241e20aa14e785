"""Does `probe train` find the rank of a task that is known to be of low rank, and none where there is none?

    python benchmarks/planted_task.py

The teacher is a small random Llama whose MLP weights got an update of a planted rank r (orthonormal factors of one
size), or full-rank Gaussian noise of the same norm. The student starts from the base and learns from what the teacher
writes. Bars: the update itself and the student's task are judged low-rank at r to 2 r, the noise not low-rank. What a
student learns of the noise is shown without a bar: text tells of a few of its directions only. Writes docs/planted-task.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from accuracy import publish

import lowrank_probe as lp
from lowrank_probe.hypothesis import judge

VOCABULARY = 64
WIDTH = 64
INNER = 128
LENGTH = 64
PLANTED = (2, 4, 8)
RANKS = (1, 2, 4, 8, 16, 32)
SIZE = 1.0
SEQUENCES = 4000
HEADS = ("planted", "nats gained", "teacher's update", "student's task", "decided by", "evidence on the task")


def tokenizer():
    """One token a word, w0 w1 …, so that what the teacher writes is read as the very same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"</s>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def pair(directory: Path, rank: int | None, seed: int = 0):
    """The teacher, saved beside its base: `rank` planted in every MLP matrix, noise of the norm of rank 4 for None."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = VOCABULARY - 2
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # sharp outputs, so that there is something to learn
        for name, W in model.named_parameters():
            if W.ndim == 2:
                W.normal_(0, 1.0 if "embed" in name else (4.0 if "lm_head" in name else 1.0) / W.shape[1] ** 0.5)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    with torch.no_grad():
        for name, W in model.named_parameters():
            if ".mlp." in name:
                if rank is None:
                    W += torch.randn(W.shape) * SIZE * (4 / W.numel()) ** 0.5
                else:
                    U, V = (torch.linalg.qr(torch.randn(side, rank)).Q for side in W.shape)
                    W += SIZE * U @ V.T
    model.save_pretrained(directory / "teacher")
    return model.eval()


@torch.no_grad()
def write_text(teacher, file: Path, n: int, seed: int = 1) -> None:
    """n documents sampled from the teacher, each from a word of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY - 2, (n, 1), generator=generator)
    for _ in range(LENGTH - 2):
        weights = teacher(input_ids=ids).logits[:, -1, : VOCABULARY - 2].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(weights, 1, generator=generator)], 1)
    rows = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids.tolist())
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def task(root: Path, rank: int | None, ranks=RANKS, steps: int = 300, n: int = SEQUENCES) -> lp.Training:
    """The training of a student on what the teacher of one planted rank wrote."""
    write_text(pair(root, rank), root / "text.jsonl", n)
    recipe = lp.Recipe(steps=steps, batch=32, length=LENGTH, evaluations=2)
    return lp.train(
        root / "base", root / "text.jsonl", root / "run", ranks=ranks, targets=["mlp"], seeds=2,
        lr={"full": 1e-3, "lora": 1e-2}, recipe=recipe, device="cpu",
    )  # fmt: skip


def teachers_own(root: Path) -> pd.Series:
    """The verdict on the teacher's own update, from its spectrum and its functional rank."""
    sides = root / "base", root / "teacher"
    found = lp.evaluate(*sides, root / "text.jsonl", groups=["mlp"], length=LENGTH, device="cpu")
    return judge(lp.spectrum(*sides, device="cpu"), found).set_index("layer_type").loc["mlp"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    cells, verdicts = [], []
    for rank in (*PLANTED, None):
        with tempfile.TemporaryDirectory() as folder:
            found = task(Path(folder), rank, steps=steps)
            own = teachers_own(Path(folder))
        row = found.verdict.set_index("layer_type").loc["mlp"]
        name = "noise" if rank is None else f"rank {rank}"
        gain = found.base_loss - found.full_loss
        cells.append((name, f"{gain:.3f}", own["verdict"], row["verdict"], row["decided_by"], row["evidence"]))
        print(*cells[-1], sep=" | ", flush=True)
        judged = {"teacher's update": own["verdict"], "student's task": row["verdict"]}
        for what, told in judged.items():
            if rank is not None:
                verdicts.append((f"{name}: the {what} is judged {told}", _rank(told) in range(rank, 2 * rank + 1)))
            elif what == "teacher's update":
                verdicts.append((f"{name}: the {what} is judged {told}", told == "not low-rank"))
    note = (
        f"A small random Llama (2 layers, width {WIDTH}, MLP {INNER}); the teacher's MLP weights have the planted "
        f"update; {SEQUENCES} documents of {LENGTH - 1} tokens sampled from it; full fine-tunes and LoRA at ranks "
        f"{', '.join(map(str, RANKS))} on the MLP, {steps} steps of 32 sequences, two seeds."
    )
    publish("planted_task", "Tasks of a planted rank", note, [("", HEADS, cells)], verdicts, page="planted-task")
    return 0 if all(ok for _, ok in verdicts) else 1


def _rank(verdict: str) -> int:
    return int(verdict.removeprefix("low-rank at r=")) if verdict.startswith("low-rank") else 0


if __name__ == "__main__":
    sys.exit(main())
