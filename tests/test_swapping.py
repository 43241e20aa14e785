"""Weights swapped in place: the best of each rank where it belongs, nothing else touched, and back to the bit."""

import copy

import pytest
import torch
from evaluated import gpt2, llama, mixtral, moved, neox, phi3, t5

import lowrank_probe as lp
from lowrank_probe.evaluation_models import parameters
from lowrank_probe.swapping import Swapper, factorise, find_update

CPU = torch.device("cpu")


def opened(make):
    base, tuned = moved(make)
    before, after = parameters(base), {name: W.clone() for name, W in parameters(tuned).items()}
    update = find_update(before, after, tuned.config.to_dict())
    factors = [factorise(piece, before, after, piece.k, CPU, 0) for piece in update.pieces]
    return tuned, before, after, update, Swapper(tuned, update.pieces, factors, before, after)


def best(delta, r):
    """By numpy's way, in float64."""
    U, s, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vh[:r]


@pytest.mark.parametrize("make", [llama, gpt2, phi3, neox, mixtral, t5])
def test_full_rank_is_tuned_rank_0_is_base_and_back_is_exact(make):
    model, before, after, update, swapper = opened(make)
    swapper.put({i: piece.k for i, piece in enumerate(update.pieces)})
    for name, W in parameters(model).items():
        torch.testing.assert_close(W, after[name], rtol=0, atol=2e-6)
    swapper.put(dict.fromkeys(range(len(update.pieces)), 0))
    for name, W in parameters(model).items():
        assert torch.equal(W, before[name]), name
    swapper.put({})
    for name, W in parameters(model).items():
        assert torch.equal(W, after[name]), name
    assert not update.vectors
    assert not update.kept


CASES = {
    "gpt2": (gpt2, "transformer.h.1.attn.c_attn.weight", lambda W: W[:, 32:64].T, "k"),
    "phi3": (phi3, "model.layers.0.self_attn.qkv_proj.weight", lambda W: W[:32], "q"),
    "phi3-gate": (phi3, "model.layers.1.mlp.gate_up_proj.weight", lambda W: W[:48], "gate"),
    # Head by head: q, k, v of head 0, then of head 1.
    "neox": (neox, "gpt_neox.layers.0.attention.query_key_value.weight",
             lambda W: torch.cat([W[16:32], W[64:80]]), "k"),
    "mixtral": (mixtral, "model.layers.1.mlp.experts.gate_up_proj", lambda W: W[2, 24:], "expert_up"),
    "mixtral-down": (mixtral, "model.layers.0.mlp.experts.down_proj", lambda W: W[1], "expert_down"),
    "llama": (llama, "model.embed_tokens.weight", lambda W: W, "embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_piece_at_rank_2_is_the_best_of_rank_2_there_and_nothing_elsewhere(case):
    make, name, part, label = CASES[case]
    model, before, after, update, swapper = opened(make)
    expected = part(before[name]) + best(part(after[name]) - part(before[name]), 2)
    chosen = [
        i for i, piece in enumerate(update.pieces)
        if piece.parameter == name and piece.label == label and piece.shape == tuple(expected.shape)
    ]  # fmt: skip
    if case.startswith("mixtral"):  # one piece an expert
        assert len(chosen) == 3
        chosen = [i for i in chosen if update.pieces[i].part.expert == (2 if case == "mixtral" else 1)]
    (i,) = chosen
    swapper.put({i: 2})
    now = parameters(model)
    torch.testing.assert_close(part(now[name]).double(), expected, rtol=0, atol=2e-6)
    rest = after[name].clone()
    part(rest).copy_(part(now[name])) if case != "neox" else None
    if case == "neox":
        rest[16:32], rest[64:80] = now[name][16:32], now[name][64:80]
    assert torch.equal(now[name], rest)
    assert all(torch.equal(W, after[other]) for other, W in now.items() if other != name)


def test_only_what_differs_is_a_piece_and_vectors_are_told():
    base, tuned = moved(llama)
    before, after = parameters(base), parameters(tuned)
    for name in after:
        if "q_proj" not in name:
            after[name].copy_(before[name])
    after["model.norm.weight"].add_(1)
    found = find_update(before, after, tuned.config.to_dict())
    assert [piece.name for piece in found.pieces] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert found.vectors == ("model.norm.weight",)


def test_a_type_in_two_stacks_is_told_apart():
    labels = {piece.label for piece in opened(t5)[3].pieces}
    assert {"encoder q", "decoder q", "decoder cross_q"} <= labels


def test_models_of_other_shapes_and_nan_are_refused():
    base, tuned = moved(llama)
    before = parameters(base)
    grown = {**parameters(tuned), "model.embed_tokens.weight": torch.zeros(310, 32)}
    with pytest.raises(lp.MatchError, match=r"embed_tokens\.weight: base is \(300, 32\), tuned is \(310, 32\)"):
        find_update(before, grown, {})
    with pytest.raises(lp.MatchError, match=r"lm_head\.weight: is in the tuned model, not in the base"):
        find_update(before, {**parameters(tuned), "lm_head.weight": torch.zeros(300, 32)}, {})
    broken = copy.deepcopy(tuned)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(lp.NumericsError, match=r"layers\.0\.mlp\.up_proj\.weight of the tuned model: contains NaN"):
        find_update(before, parameters(broken), {})
