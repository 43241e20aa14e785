"""What is captured from running models against hooks, autograd and a replay of the experts."""

import pickle
import subprocess
import sys

import pytest
import torch
import transformers as hf
from logs import kept
from test_verification import IDS, SMALL, bert_config, gpt2, llama, t5

from lowrank_probe import moments as module
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.errors import OutputError
from lowrank_probe.extraction_jobs import pieces_of
from lowrank_probe.model_weights import put_back, stored_matrix, view_of
from lowrank_probe.moments import Moments, collect
from lowrank_probe.selection import select
from lowrank_probe.unfinished import Unfinished
from lowrank_probe.weighting import root

CPU = torch.device("cpu")


def mixtral():
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **SMALL, **IDS, hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt_oss():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SMALL, **IDS, hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        )
    )  # fmt: skip


MODELS = {
    "llama": llama, "gpt2": gpt2, "bert": lambda: hf.BertForMaskedLM(bert_config()), "t5": t5, "mixtral": mixtral,
}  # fmt: skip


def built(tmp_path, make):
    """(tuned model, base checkpoint, tuned checkpoint, selection of everything)."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    model = type(model).from_pretrained(tmp_path / "tuned", dtype=torch.float32).eval()
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")
    return model, base, tuned, select(base, tuned, ["everything"])


def sequences(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 300, (20,), generator=generator) for _ in range(count)]


def forward(model, ids):
    more = {"decoder_input_ids": ids[None]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids[None], **more)


def loss_of(model):
    def loss(number, ids):
        out = forward(model, ids).logits.double()
        return (out * torch.linspace(-1, 1, out.shape[-1])).sin().sum()

    return loss


def collected(model, selection, tmp_path, **more):
    pieces = [piece for target in selection.chosen for piece in pieces_of(target)]
    found = Moments(Unfinished(tmp_path / "out", {"a": 1}), "text")
    collect(model, loss_of(model), sequences(), pieces, found, **more)
    return found, pieces


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_that_hooks_see(tmp_path, name):
    model, _, _, selection = built(tmp_path, MODELS[name])
    found, pieces = collected(model, selection, tmp_path)
    modules = dict(model.named_modules())
    plain = [p for p in pieces if p.target.module in modules and p.target.copies == 1 and p.target.kind in module.SEEN]
    assert len(plain) >= 8
    tables = {piece.target.name: piece.target.shape[0] for piece in plain if piece.target.kind == "embedding"}
    assert tables
    C, G = {}, {}

    def before(key):
        def hook(_, args):
            if key in tables:
                rows = torch.nn.functional.one_hot(args[0].flatten(), tables[key]).double()
                C[key] = C.get(key, 0) + rows.sum(0)
                return
            x = args[0].detach().double().flatten(0, -2)
            C[key] = C.get(key, 0) + x.T @ x

        return hook

    def after(key):
        def hook(_, args, y):
            def back(g):
                g = g.double().flatten(0, -2)
                G[key] = G.get(key, 0) + g.T @ g

            (y[0] if isinstance(y, tuple) else y.requires_grad_()).register_hook(back)

        return hook

    for piece in plain:
        one = modules[piece.target.module]
        one.register_forward_pre_hook(before(piece.target.name))
        one.register_forward_hook(after(piece.target.name))
    for ids in sequences():
        loss_of(model)(0, ids).backward()
    for piece in plain:
        key = piece.target.name
        assert torch.allclose(found.inputs(piece, CPU).double(), C[key], rtol=1e-5, atol=1e-6), key
        assert found.n_tokens(piece) == (C[key].sum() if key in tables else 60)
        if "router" in key or key.endswith("gate.weight"):
            continue  # its module returns more than the product
        wanted = G[key]
        assert torch.allclose(
            found.gradients(piece, CPU).double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max())
        ), key
        assert found.mean_gradient(piece) == pytest.approx(float(wanted.trace()) / len(wanted), rel=1e-4)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_are_seen_with_the_tokens_routed_to_them(tmp_path, make):
    model, _, _, selection = built(tmp_path, make)
    found, pieces = collected(model, selection, tmp_path)
    experts = [piece for piece in pieces if piece.target.copies == 4]
    assert len(experts) >= 2 * 4
    layers = {piece.target.module for piece in experts}
    seen = {}
    for name in layers:

        def hook(one, args, kwargs, name=name):
            values = [*args, *kwargs.values()]
            seen.setdefault(name, []).append((values[0].reshape(-1, 32).double(), values[1]))

        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for ids in sequences():
            forward(model, ids)
    for piece in experts:
        rows = [x[(index == piece.copy).any(-1)] for x, index in seen[piece.target.module]]
        x = torch.cat(rows)
        assert found.n_tokens(piece) == len(x)
        if "down" in piece.target.name:
            C = found.inputs(piece, CPU)
            assert C is None or C.shape == (16, 16)
        elif len(x):
            assert torch.allclose(found.inputs(piece, CPU).double(), x.T @ x, rtol=1e-5, atol=1e-6)
    routed = [found.n_tokens(p) for p in experts if "gate_up" in p.target.name]
    assert sum(routed) == 60 * 2 * 2  # two experts a token, two layers


def test_matrices_that_read_the_same_rows_share_one_file(tmp_path):
    model, _, _, selection = built(tmp_path, llama)
    found, pieces = collected(model, selection, tmp_path)
    layer = [piece for piece in pieces if ".layers.1." in piece.target.name]
    shared = {}
    for piece in layer:
        shared.setdefault(found.store.facts(found._key(piece))["shared"], []).append(
            piece.target.name.rpartition(".")[2]
        )
    assert sorted(map(sorted, shared.values())) == [
        ["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"],
    ]  # fmt: skip
    held = [key for key in kept(tmp_path / "out", "moments-") if "C" in found.store.names(key)]
    assert len(held) == 4 * 2 + 2  # and the output head, and the table


def test_a_small_limit_takes_several_passes_and_changes_nothing(tmp_path):
    model, _, _, selection = built(tmp_path, llama)
    found, pieces = collected(model, selection, tmp_path)
    passes = []
    small = Moments(Unfinished(tmp_path / "small", {"a": 1}), "text")
    loss = loss_of(model)

    def counted(number, ids):
        passes.append(len(ids))
        return loss(number, ids)

    collect(model, counted, sequences(), pieces, small, limit_bytes=2 * 8 * 48**2)
    assert len(passes) > 4 * 3
    for piece in pieces:
        if piece.target.kind == "linear" and "lm_head" not in piece.target.name:
            assert torch.equal(small.inputs(piece, CPU), found.inputs(piece, CPU))
            assert torch.equal(small.gradients(piece, CPU), found.gradients(piece, CPU))
    head = next(piece for piece in pieces if piece.target.name == "lm_head")
    assert small.gradients(head, CPU) is None  # 300 rows: more than half of the limit
    assert small.mean_gradient(head) == pytest.approx(found.mean_gradient(head))
    # What is there is not run again.
    passes.clear()
    collect(model, counted, sequences(), pieces, small)
    assert not passes


def test_what_is_drawn_at_random_is_by_the_sequence_whichever_pass_it_is_in(tmp_path):
    model, _, _, selection = built(tmp_path, llama)
    pieces = [piece for target in selection.chosen for piece in pieces_of(target)]

    def drawn(number, ids):
        out = forward(model, ids).logits.double()
        return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(number))).sum()

    one, several, resumed = (Moments(Unfinished(tmp_path / name, {"a": 1}), "text") for name in ("a", "b", "c"))
    collect(model, drawn, sequences(), pieces, one)
    collect(model, drawn, sequences(), pieces, several, limit_bytes=2 * 8 * 48**2)
    collect(model, drawn, sequences(), pieces[5:9], resumed)
    collect(model, drawn, sequences(), pieces, resumed)
    for piece in pieces:
        if piece.target.kind in module.SEEN:
            assert torch.equal(one.inputs(piece, CPU), resumed.inputs(piece, CPU))
            assert torch.equal(one.gradients(piece, CPU), resumed.gradients(piece, CPU))
            if several.gradients(piece, CPU) is not None:
                assert torch.equal(one.gradients(piece, CPU), several.gradients(piece, CPU))


def test_a_triangle_on_disk_is_the_matrix_rounded_to_float32():
    x = torch.randn(40, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = x.T @ x
    lower = module.packed_triangle(M)
    assert lower.shape == (23 * 24 // 2,)
    assert lower.dtype == torch.float32
    assert torch.equal(module.full_matrix(lower), M.float())
    for n in (1, 2, 1000):
        assert module.full_matrix(torch.ones(n * (n + 1) // 2)).shape == (n, n)


def test_the_least_ridge_outweighs_the_rounding_on_disk():
    n = 600  # inputs nearly all along one direction, as of real models: tr C/n is far below the largest eigenvalue
    x = torch.randn(8, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e4
    C = x.T @ x
    stored = module.full_matrix(module.packed_triangle(C))
    assert float(torch.linalg.matrix_norm(stored - C, 2)) <= 2.0**-24 * float(torch.trace(C))
    assert module.LEAST_RIDGE > 14_336 * 2.0**-24
    root(stored, module.LEAST_RIDGE)


def test_no_room_on_the_disk_is_said_before_any_pass(tmp_path, monkeypatch):
    model, _, _, selection = built(tmp_path, llama)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"the second moments take 0\.\d GB, 0\.0 GB are free"):
        collected(model, selection, tmp_path)


@pytest.mark.parametrize("name", [*MODELS, "gpt_oss"])
def test_views_hold_the_tuned_weights_and_take_the_base_s(tmp_path, name):
    model, base, tuned, selection = built(tmp_path, MODELS.get(name, gpt_oss))
    for target in selection.chosen:
        for piece in pieces_of(target):
            delta = target.delta(piece.copy, base, tuned, CPU)
            view, W = view_of(model, target, piece.copy), stored_matrix(target, piece.copy, base, CPU)
            assert torch.allclose(view.double() - W.double(), delta.dense.double(), atol=1e-7), piece
            view.copy_(W)
    put_back(model, selection, base, CPU)
    # What is carried whole stays; all else is the base's.
    before = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    whole = {f"{one.module}.{leaf}" for one in selection.whole for leaf in one.tensors}
    for (key, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(a, b) == (key not in whole), key


def test_what_is_left_out_is_put_back(tmp_path):
    for name in ("mixtral", "gpt2"):
        model, base, tuned, _ = built(tmp_path / name, MODELS[name])
        selection = select(base, tuned, ["embedding", "o"])
        for target in selection.chosen:
            view_of(model, target, 0).copy_(stored_matrix(target, 0, base, CPU))
        assert put_back(model, selection, base, CPU) == []
        before = type(model).from_pretrained(tmp_path / name / "base", dtype=torch.float32)
        whole = {f"{one.module}.{leaf}" for one in selection.whole for leaf in one.tensors}
        for (key, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
            assert torch.equal(a, b) == (key not in whole), key


def test_a_table_is_seen_where_it_is_looked_up_and_not_where_the_head_it_is_tied_to_multiplies_with_it(tmp_path):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **IDS, hidden_size=32, intermediate_size=48)).eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.02 * torch.randn_like(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "tuned")
    sides = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")
    selection = select(*sides, ["everything"], tied_lora=True)
    found, pieces = collected(model, selection, tmp_path)
    (table,) = [piece for piece in pieces if piece.target.kind == "embedding"]
    assert found.n_tokens(table) == 60
    assert torch.equal(found.inputs(table, CPU), torch.bincount(torch.cat(sequences()), minlength=300).float())


def test_pieces_that_are_no_products_are_left_to_the_plain_svd(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model, _, _, selection = built(
        tmp_path, lambda: hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))
    )
    pieces = [piece for target in selection.chosen for piece in pieces_of(target)]
    found = Moments(Unfinished(tmp_path / "out", {"a": 1}), "text")
    pixels = [torch.randn(3, 8, 8, requires_grad=True) for _ in range(2)]
    collect(model, lambda number, x: model(pixel_values=x[None]).logits.square().sum(), pixels, pieces, found)
    (patches,) = [piece for piece in pieces if piece.target.kind == "conv"]
    assert not found.has(patches)
    assert found.n_tokens(patches) == 0
    assert all(found.n_tokens(piece) for piece in pieces if piece.target.kind == "linear")


@pytest.mark.slow
def test_other_processes_read_the_moments_where_they_lie(tmp_path):
    model, _, _, selection = built(tmp_path, llama)
    found, pieces = collected(model, selection, tmp_path)
    sent = pickle.dumps(found.to_read())
    assert len(sent) < 1000 * len(pieces)  # no matrix is in it
    (tmp_path / "pickled").write_bytes(sent)
    code = """
import pickle, sys, torch
from lowrank_probe.moments import Moments
moments = pickle.loads(open(sys.argv[1], "rb").read())
piece = pickle.loads(sys.stdin.buffer.read())
cpu = torch.device("cpu")
torch.save([moments.inputs(piece, cpu), moments.gradients(piece, cpu), moments.n_tokens(piece)], sys.argv[2])
"""
    for piece in pieces:
        if piece.target.name in ("lm_head", "model.embed_tokens", "model.layers.1.self_attn.v_proj"):
            command = [sys.executable, "-c", code, tmp_path / "pickled", tmp_path / "read"]
            subprocess.run(command, input=pickle.dumps(piece), check=True, cwd="/")
            C, G, n_tokens = torch.load(tmp_path / "read")
            assert torch.equal(C, found.inputs(piece, CPU))
            assert torch.equal(G, found.gradients(piece, CPU))
            assert n_tokens == 60
    reader = found.to_read()
    found.store.remove()
    with pytest.raises(OutputError, match=r"/log: cannot be read on .*; choose an --out that every node sees"):
        reader.inputs(pieces[0], CPU)
