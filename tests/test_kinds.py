"""What kind of update it is: related or not, where it is said, and real fine-tunes, never called anything simpler."""

import json
import re

import numpy as np
import pytest
from builders import build
from pairs import add_update, llama_tensors, write
from updates import BF16, F16, F32, absmax, change, findings, fine_tuned, full_rank, low_rank, model, nf4, of

import lowrank_probe as lp
from lowrank_probe import kinds, reports


def test_a_layer_that_was_initialised_anew(tmp_path):
    base, other = model(BF16), model(BF16, seed=9)
    tuned = change(base, fine_tuned(2e-2))
    fresh = [name for name in base if "layers.1." in name and "_proj.weight" in name]
    tuned |= {name: other[name] for name in fresh}
    found = findings(tmp_path, base, tuned)
    assert next(iter(found)) == "re-initialised"
    assert set(found["re-initialised"].scope) == set(fresh)
    assert abs(found["re-initialised"].evidence["median_cosine"]) < 0.05
    assert found["re-initialised"].evidence["median_cosine_elsewhere"] > 0.99
    assert "fine-tune" in found


def test_unrelated_models(tmp_path):
    found = findings(tmp_path, model(), model(seed=9))
    assert list(found) == ["unrelated"]
    assert "19 of 19" in found["unrelated"].statement


@pytest.mark.parametrize("negated", [of("weight"), of("q_proj", "o_proj", "up_proj", "embed"), of("layers.0.")])
def test_negated_weights_are_related(tmp_path, negated):
    """Half of the cosines −1 and half +1 have a median of 0."""
    base = model(BF16)
    tuned = change(base, lambda W, i: -W, negated)
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert result.facts["related"] is True
    assert "warnings" not in result.facts
    assert "unrelated weights" not in set(result.summary["verdict"])
    assert result.table["cosine"].to_numpy() == pytest.approx(-1)
    (scaled,) = (f for f in kinds.recognise(result) if f.kind == "scaled")
    assert scaled.evidence["factor_max"] == pytest.approx(-1, rel=1e-5)


def test_unrelated_models_with_some_weights_negated_stay_unrelated(tmp_path):
    base, other = model(BF16), model(BF16, seed=9)
    tuned = other | {name: -base[name] for name in base if "layers.0.self_attn" in name}
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert result.facts["related"] is False


def test_findings_are_stored_and_in_json_and_in_the_report(tmp_path):
    base = model(BF16)
    tuned = change(base, low_rank(8, 3e-2), of("q_proj", "v_proj"))
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    (stored,) = lp.load(result.save(tmp_path / "run")).facts["findings"]
    assert stored["kind"] == "merged LoRA"
    assert json.loads(result.to_json())["facts"]["findings"] == [stored]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert stored["statement"] in page.partition("<main>")[0]
    assert "findings.1" not in page


def test_findings_follow_the_table_on_a_terminal(tmp_path, capsys):
    from lowrank_probe.terminal import print_summary

    base = model()
    print_summary(lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", change(base, full_rank(0.1)))))
    assert capsys.readouterr().out.rstrip().rpartition("kind: ")[2].startswith("Noise: in all 19 changed matrices")


def test_hostile_names_and_older_runs():
    result = build(layers=1)
    result.facts["findings"] = [{"kind": "x", "statement": "<script>alert(1)</script>", "evidence": {}, "scope": []}]
    assert "<script>alert" not in reports.render(result)
    assert 'id="findings"' not in reports.render(build(layers=1))


def test_an_interrupted_run_says_nothing(tmp_path):
    result = lp.spectrum(write(tmp_path / "a", llama_tensors()), write(tmp_path / "b", add_update(llama_tensors())))
    result.facts["status"] = "interrupted"
    assert kinds.recognise(result) == []


@pytest.mark.slow
@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("pair", ["tcr", "shark", "tcr-small", "bert_ft_10k_25s"])
def test_a_real_full_fine_tune_is_called_one(tmp_path, pair, share, stored):
    """As it is, and a tenth of the update, in three storage types."""
    import real_models
    from safetensors.torch import load_file

    if pair.startswith("bert"):
        folders, base = real_models.rxnfp(), "bert_pretrained"
    else:
        folders, base = real_models.anarcii(), "antibody-small" if pair.endswith("small") else "antibody"
    before, after = (load_file(folders[name] / "model.safetensors") for name in (base, pair))
    before = {name: W.to(stored) if W.is_floating_point() else W for name, W in before.items()}
    tuned = {
        name: (before[name].float() + share * (W - before[name].float())).to(stored)
        if name in before and before[name].shape == W.shape and W.is_floating_point()
        else W
        for name, W in after.items()
    }
    assert list(findings(tmp_path, before, tuned)) == ["full fine-tune"]


@pytest.mark.slow
def test_real_unrelated_models():
    import real_models

    models = real_models.sapiens()
    (finding,) = kinds.recognise(lp.spectrum(models["VH"], models["VL"]))
    assert finding.kind == "unrelated"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "nf4", "lora", "qlora"])
def test_kinds_on_real_weights(tmp_path, how):
    import real_models

    from lowrank_probe.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(real_models.smollm2())
    base = {name: checkpoint.read(name) for name in checkpoint.tensors if re.search(r"layers\.(3|25)\.", name)}
    if how == "lora":
        tuned = change(base, low_rank(8, 1e-2), of("q_proj", "v_proj", "up_proj"))
        expected = ("merged LoRA", {"rank": 8, "n_at_rank": 6})
    elif how == "qlora":
        train = low_rank(8, 5e-2)
        tuned = change(base, lambda W, i: nf4(W, i) + (train(W, i) - W))
        expected = ("merged QLoRA", {"rank_at_least": 8, "n_at_rank": 14, "rounded_side": "tuned"})
    else:
        tuned = change(base, absmax(8) if how == "int8" else nf4)
        expected = ("quantized", {"bits": 8 if how == "int8" else 4})
    found = findings(tmp_path, base, tuned)
    assert list(found) == [expected[0]]
    assert expected[1].items() <= found[expected[0]].evidence.items()
    assert np.isfinite([v for v in found[expected[0]].evidence.values() if isinstance(v, float)]).all()
