"""Parts of stored tensors from files to the table: fused, stacked, convolutions, and what the ledger says of them."""

import numpy as np
import pytest
import torch
import transformers as hf
from pairs import planted, write
from results import same_tables
from safetensors.torch import save_file

import lowrank_probe as lp


def test_fused_qkv_is_split_or_kept_and_the_ledger_has_one_line(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=16)
    base, tuned = hf.GPT2LMHeadModel(config), hf.GPT2LMHeadModel(config)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for block in tuned.transformer.h:
            block.attn.c_attn.weight[:, :48] += 0.01 * planted((48, 48), torch.ones(2), 1).float()  # q only
    base.save_pretrained(tmp_path / "a")
    tuned.save_pretrained(tmp_path / "b")
    split = lp.spectrum(tmp_path / "a", tmp_path / "b")
    assert set(split.table["name"]) == {f"transformer.h.{i}.attn.c_attn.weight[q]" for i in range(2)}
    assert set(split.table["layer_type"]) == {"q"}
    assert set(zip(split.table["rows"], split.table["cols"], strict=True)) == {(48, 48)}
    line = split.ledger.set_index("name").loc["transformer.h.0.attn.c_attn.weight"]
    assert line["status"] == "analysed"
    assert "split into q, k, v" in line["note"]
    assert "1 analysed; 2 unchanged" in line["note"]
    whole = lp.spectrum(tmp_path / "a", tmp_path / "b", split=False)
    assert set(whole.table["name"]) == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    assert set(whole.table["rows"]) == {144}
    np.testing.assert_allclose(
        whole.singular_values["transformer.h.0.attn.c_attn.weight"][:2],
        split.singular_values["transformer.h.0.attn.c_attn.weight[q]"][:2], rtol=1e-6,
    )  # fmt: skip
    assert line["fro_norm"] == pytest.approx(whole.table["fro_norm"][0])
    assert line["relative_update"] == pytest.approx(
        whole.table["fro_norm"][0] / float(base.transformer.h[0].attn.c_attn.weight[:, :48].detach().norm()), rel=1e-5
    )
    chosen = lp.spectrum(tmp_path / "a", tmp_path / "b", include=["q"])
    assert set(chosen.table["name"]) == set(split.table["name"])
    assert len(chosen.ledger) == len(split.ledger)


def test_experts_are_one_row_each_and_convolutions_are_flattened(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 40, 24, generator=generator),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 24, 20, generator=generator),
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "empty.weight": torch.zeros(0, 4),
    }
    tuned = {name: W + 0.01 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    tuned["model.layers.0.mlp.experts.down_proj"][1] = base["model.layers.0.mlp.experts.down_proj"][1]
    config = {"model_type": "qwen3_moe", "hidden_size": 24, "moe_intermediate_size": 20, "num_experts": 3}
    result = lp.spectrum(write(tmp_path / "a", base, config), write(tmp_path / "b", tuned, config))
    assert set(result.table["name"].str.removeprefix("model.layers.0.mlp.experts.")) == {
        *(f"gate_up_proj[{e}.{part}]" for part in ("gate", "up") for e in range(3)),
        "down_proj[0]", "down_proj[2]", "conv.weight",
    }  # fmt: skip
    for row in result.table.itertuples():
        name, _, label = row.name.partition("[")
        D = (tuned[name] - base[name]).double()
        if label:
            expert, _, part = label.rstrip("]").partition(".")
            D = D[int(expert)]
            D = D[:20] if part == "gate" else D[20:] if part == "up" else D
        expected = torch.linalg.svdvals(D.flatten(1)).numpy()
        np.testing.assert_allclose(result.singular_values[row.name], expected, rtol=1e-6)
    ledger = result.ledger.set_index("name")
    assert ledger.loc["empty.weight", "status"] == "not a matrix"
    assert "2 analysed; 1 unchanged" in ledger.loc["model.layers.0.mlp.experts.down_proj", "note"]
    assert len(ledger) == 4


def test_an_unknown_architecture_falls_back_and_says_so(tmp_path):
    base = {"net.0.mystery.weight": torch.randn(16, 12), "net.1.mystery.weight": torch.randn(16, 12)}
    tuned = {name: W + 0.01 for name, W in base.items()}
    result = lp.spectrum(write(tmp_path / "a", base, {"model_type": "nobody_knows"}), write(tmp_path / "b", tuned))
    assert set(result.table["layer_type"]) == {"mystery"}
    assert any("mystery" in note and "nobody_knows" in note for note in result.facts["notes"])


def test_a_tensor_name_with_html_in_it(tmp_path):
    name = "layers.0.<img src=x onerror=alert(1)>.weight"
    base = {name: torch.randn(16, 12)}
    result = lp.spectrum(write(tmp_path / "a", base), write(tmp_path / "b", {name: base[name] + 0.01}))
    page = (result.save(tmp_path / "run") / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page


def test_an_interrupted_split_tensor_resumes_to_the_same_table(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=48, n_layer=1, n_head=4, n_positions=16)
    base = hf.GPT2LMHeadModel(config).state_dict()
    tuned = {name: W + 0.01 * torch.randn(W.shape) for name, W in base.items()}
    sides = [write(tmp_path / side, {n: t.clone() for n, t in tensors.items()}, config.to_dict())
             for side, tensors in (("a", base), ("b", tuned))]  # fmt: skip
    whole = lp.spectrum(*sides)
    seen = []

    def stop(name, done, total):
        seen.append(name)
        if name.endswith("[k]"):
            raise KeyboardInterrupt

    with pytest.raises(lp.Interrupted):
        lp.spectrum(*sides, out=tmp_path / "run", on_progress=stop)
    again = []
    resumed = lp.spectrum(*sides, out=tmp_path / "run", on_progress=lambda name, done, total: again.append(name))
    same_tables(resumed, whole)
    assert not {name for name in seen if "[" in name} & set(again)
    assert list(resumed.ledger["note"].fillna("")) == list(whole.ledger["note"].fillna(""))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_without_a_scale_are_refused_from_the_header(tmp_path, dtype):
    save_file({"a.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(lp.CheckpointError, match=r"a\.weight .*dtype"):
        lp.spectrum(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
