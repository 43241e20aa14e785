"""The model card: exact numbers, what is left out, safe with strangers' names, silent about the machine."""

import re
import shlex
from itertools import takewhile

import pytest
import typer
import yaml
from extractions import ROOT, build_extraction, checks

from lowrank_probe.allocation import parse_budget
from lowrank_probe.cli_extract import _ranks, extract
from lowrank_probe.cli_shared import layer_span
from lowrank_probe.model_card import card, code, command, model_name
from lowrank_probe.options import Options
from lowrank_probe.rank_choice import RankChoice

HOSTILE = "](x) `a` |b| <img src=x onerror=alert(1)>\n# head\n```\n\x1b[31m{{7*7}}"


@pytest.fixture(scope="module")
def found():
    return build_extraction()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip("`*"): line[1:] for line in lines[2:]}


def test_the_front_matter_is_what_the_hub_reads(found):
    told = front_matter(card(found))
    assert told["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert told["library_name"] == "peft"
    assert {"lora", "peft", "lowrank_probe"} <= set(told["tags"])


def test_a_base_that_is_no_repositorys_name_is_left_out_of_it(found):
    found.facts["base"]["path"], kept = "/data/my models (old)", found.facts["base"]["path"]
    try:
        assert "base_model" not in front_matter(card(found))
        assert 'from_pretrained("my models (old)")' in card(found)
    finally:
        found.facts["base"]["path"] = kept


def test_the_numbers_are_the_ledgers(found):
    table = rows(card(found))
    for row in found.summary[found.summary["n_adapted"] > 0].itertuples():
        n, rank, kept, error, optimum, parameters = table[row.layer_type]
        assert int(n) == row.n_adapted
        assert rank == "8"
        assert float(kept.rstrip(" %")) == pytest.approx(100 * row.energy, rel=1e-3)
        assert float(error.rstrip(" %")) == pytest.approx(100 * row.relative_error, rel=1e-3)
        assert float(optimum.rstrip(" %")) == pytest.approx(100 * row.optimal_error_low, rel=1e-3)
        assert int(parameters.replace(",", "")) == row.parameters
    told = found.facts["adapters"][""]
    assert float(table["all"][2].rstrip(" %")) == pytest.approx(100 * told["kept_of_adapted"], rel=1e-3)
    assert f"carries {100 * told['carried']:.2f} % of" in card(found)


def test_what_is_left_out_is_named_with_its_size(found):
    text = card(found)
    told = found.facts["adapters"][""]
    assert f"**Not carried at all: {100 * told['not_carried']:.2f} % of ‖ΔW‖²**" in text
    assert "`model.embed_tokens.weight`, `model.layers.0.input_layernorm.weight`" in text
    assert "`model.rotary.scale` (size unknown)" in text
    assert "Carried whole, as in the fine-tune (3.764 % of ‖ΔW‖²): `lm_head`" in text


def test_loading_resizes_a_grown_vocabulary_and_is_python(found):
    block = re.search(r"```python\n(.*?)```", card(found), re.S)[1]
    compile(block, "card", "exec")
    assert block.index("base.resize_token_embeddings(49160)") < block.index("PeftModel.from_pretrained(")
    assert "LlamaForCausalLM.from_pretrained" in block
    found.facts["vocabulary"], kept = None, found.facts["vocabulary"]
    assert "resize_token_embeddings" not in card(found)
    found.facts["vocabulary"] = kept


def test_no_path_of_the_machine_is_told(found):
    for made in (found, build_extraction((4, 8))):
        for label in made.adapters:
            text = card(made, label)
            assert "/home" not in text
            assert "someone" not in text
            assert "/models" not in text


def test_one_of_several_adapters_tells_its_own_numbers():
    made = build_extraction((2, 8))
    assert rows(card(made, "r2"))["q"][1] == "2"
    assert rows(card(made, "r8"))["q"][1] == "8"
    assert "# r8" in card(made, "r8")
    assert "--rank 2,8 --dtype bfloat16 --out adapter" in card(made, "r8")
    assert "`../probe/ledger.csv`" in card(made, "r8")


def test_hostile_names_stay_text():
    text = card(build_extraction(hostile=HOSTILE, root=ROOT / HOSTILE))
    blocks = re.findall(r"^(`{3,})(python|sh)\n(.*?)^\1$", text, re.S | re.M)
    assert [(fence, language) for fence, language, _ in blocks] == [("````", "python"), ("````", "sh")]  # ``` is inside
    compile(blocks[0][2], "card", "exec")
    assert shlex.split(blocks[1][2])[3] == HOSTILE.rpartition("/")[2].replace("\x1b", "\ufffd")
    outside = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.S | re.M)
    assert "<img" not in outside
    assert "`a`" not in outside
    assert not re.search(r"^# head", outside, re.M)
    assert "onerror" in outside
    assert "\x1b" not in text
    assert len(rows(text)) == 7  # six types and all


def test_a_surrogate_from_a_file_name_can_be_written(found, tmp_path):
    found.facts["tuned"]["path"], kept = "/data/caf\udce9", found.facts["tuned"]["path"]
    (tmp_path / "README.md").write_text(card(found), encoding="utf-8")
    found.facts["tuned"]["path"] = kept


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("model.layers.0.self_attn.q_proj", "`model.layers.0.self_attn.q_proj`"),
        ("a`b", "<code>a&#96;b</code>"),
        ("<b>", "<code>&#60;b&#62;</code>"),
        ("a|b\nc", "<code>a&#124;b&#65533;c</code>"),
        ("", "<code></code>"),
    ],
)
def test_a_name_as_code(name, written):
    assert code(name) == written


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/.cache/huggingface/hub/models--org--some-model/snapshots/0123abc", "org/some-model"),
        ("/data/llama", "llama"),
        ("/data/llama/", "llama"),
        ("/", "model"),
    ],
)
def test_what_a_path_is_called(path, name):
    assert model_name(path) == name


@pytest.mark.parametrize(
    "choice",
    [
        RankChoice(ranks=(4, 8, 16)),
        RankChoice(energy=0.9, denoised=True, max_rank=64, rank_multiple=8),
        RankChoice(auto=True),
        RankChoice(budget={"parameters": 40_000_000}),
        RankChoice(budget={"parameters": 1234}),
        RankChoice(budget={"budget_bytes": 80_000_000}),
        RankChoice(budget={"budget_bytes": 83_886_080}),
        RankChoice(budget={"budget_bytes": 4097}),
    ],
    ids=lambda choice: str(choice.facts()),
)
def test_the_command_asks_for_the_same_again(found, choice):
    """The command, read by the real command line, has the options that the facts were told of."""
    options = Options(include=("layers.1 x",), exclude=("q_proj", "lm_head"), layers=(0, 3), seed=5)
    asked = {"ranks": choice.facts(), "options": options.facts(), "targets": ["q", "*mlp*"], "servable": True}
    asked["tied_lora"] = True
    words = shlex.split(command(found.facts | asked, "out dir"))
    assert words[:2] == ["probe", "extract"]
    app = typer.Typer()
    app.command()(extract)
    given = typer.main.get_command(app).make_context("extract", words[2:]).params
    assert (given["base"], given["tuned"], str(given["out"])) == ("HuggingFaceTB/SmolLM2-135M", "man-pages", "out dir")
    ranks, auto = _ranks(given["rank"], default=False)
    budget = parse_budget(given["budget"]) if given["budget"] else None
    same = {key: given[key] for key in ("energy", "denoised", "max_rank", "rank_multiple")}
    assert RankChoice(ranks=ranks, auto=auto, budget=budget, **same) == choice
    assert given["targets"] == ["q,*mlp*"]
    assert (given["dtype"], given["servable"], given["tied_lora"], given["seed"]) == ("bfloat16", True, True, 5)
    assert (tuple(given["include"]), tuple(given["exclude"])) == (options.include, options.exclude)
    assert layer_span(given["layers"]) == options.layers


def table_after(text, heading):
    """(heads, rows) of the first table after a heading."""
    lines = text[text.index(f"{heading}\n\n|") :].splitlines()[2:]
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in takewhile(bool, lines)]
    return table[0], table[2:]


def test_what_was_tried_and_what_was_verified_is_told_with_its_numbers():
    made = build_extraction((2, 8))
    made.facts.update(checks(("r2", "r8")))
    text = card(made, "r8")
    heads, tried = table_after(text, "## Chosen on text")
    assert heads == ["weighted by", "ridge", "", "to choose by", "95 %", "to report", "95 %"]
    assert tried == [
        ["base alone", "", "", "0.987", "", "0.876", ""],
        ["plain SVD", "", "", "0.0379", "", "0.0973", ""],
        ["inputs", "0.1", "", "0.0256", "-35.7 to -29.2 %", "0.0652", "-36.3 to -29.7 %"],
        ["inputs and gradients", "1.0", "chosen", "0.0133", "-71.4 to -58.4 %", "0.0331", "-72.6 to -59.4 %"],
    ]
    assert "32,768 tokens for moments, 4,096 tokens for choice, 4,000 tokens for report" in text
    heads, verified = table_after(text, "## Against the fine-tune, on text")
    assert heads == ["model", "kl nats", "top1 agreement", "mean abs logit error", "n tokens"]
    assert verified[1] == ["base+adapter", "0.07143", "0.8", "0.06", "1895"]
    assert "merged and unmerged differ by 0.00313; allowed: 0.0115 (2 % of the base's distance" in text
    assert "makes): holds." in text
    assert "/home" not in text
    plain = card(build_extraction((2, 8)), "r8")
    assert "Chosen on text" not in plain
    assert "Against the fine-tune" not in plain


def test_a_verification_that_did_not_hold_says_so_as_text():
    made = build_extraction()
    made.facts["verification"] = checks(hostile=HOSTILE)["verification"]
    text = card(made)
    assert "makes): does NOT hold." in text
    assert "<img" not in text
    assert not re.search(r"^# head", text, re.M)


def test_a_calibrated_adapter_says_by_what_it_is_weighted():
    made = build_extraction((4, 8))
    made.facts.update(checks(("r4", "r8")))
    for row in made.facts["calibration"]["tried"]:
        row["chosen"] = row["weighted_by"] == {"r4": "plain SVD", "r8": "inputs and gradients"}[row["adapter"]]
    assert "in a fine-tune: the truncated SVD of ΔW" in card(made, "r4")
    assert "the truncated SVD, weighted by the inputs and gradients of a calibration text (ridge 1.0), of ΔW" in card(
        made, "r8"
    )
    assert "--calibration text.jsonl" in card(made, "r8")
    assert "/home" not in card(made, "r8")
