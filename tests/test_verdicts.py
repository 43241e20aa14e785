"""The rule at its boundaries, on tables made by hand."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_probe.columns import SUMMARY, TABLE
from lowrank_probe.verdicts import summarise, verdict

INF, NAN = math.inf, math.nan
STORAGE, EVIDENCE = "undecidable (storage noise)", "undecidable (not enough evidence)"


def table(*brackets, null=100.0, break_even=250.0, decidable=True, layer_type="q", **columns):
    """A table of one layer type: one (low, high) or (low, high, decidable) a matrix; what is not given is 1."""
    rows = []
    for i, (low, high, *flag) in enumerate(brackets):
        row = dict.fromkeys(TABLE, 1.0)
        row |= {
            "name": f"{layer_type}.{i}", "stack": "", "layer_type": layer_type, "null_r90": null,
            "break_even_rank": break_even, "r90_low": low, "r90_high": high,
            "decidable_r90": flag[0] if flag else decidable, "decidable_r50": True, "decidable_signal_rank": True,
            "unchanged_fraction": 0.1, "cosine": 0.99,
        }  # fmt: skip
        rows.append(row | columns)
    return pd.DataFrame(rows, columns=list(TABLE))


def says(*brackets, **columns):
    return verdict(table(*brackets, **columns))[0]


@pytest.mark.parametrize(
    ("bracket", "expected"),
    [
        ((10, 50), "low-rank at r=50"),  # at 0.5 × null
        ((50, 50), "low-rank at r=50"),
        ((10, 51), EVIDENCE),
        ((74, 100), EVIDENCE),
        ((75, 100), "not low-rank"),  # at 0.75 × null
        ((100, 100), "not low-rank"),
        ((120, INF), "not low-rank"),
        ((75, INF), "not low-rank"),
        ((10, INF), EVIDENCE),
        ((1, 1), "low-rank at r=1"),
        ((1, 33.4), "low-rank at r=34"),
    ],
)
def test_one_matrix(bracket, expected):
    assert says(bracket) == expected


def test_a_rank_as_large_as_break_even_is_no_low_rank():
    assert says((10, 40), break_even=41) == "low-rank at r=40"
    assert says((10, 40), break_even=40) == EVIDENCE
    assert says((10, 40), break_even=39) == EVIDENCE


def test_the_unreached_end_of_a_truncated_run():
    assert says((NAN, NAN)) == EVIDENCE
    assert says((10, 20), (10, 20), (10, 20), (NAN, NAN)) == EVIDENCE
    assert "--top" in verdict(table((NAN, NAN)))[1]


@pytest.mark.parametrize(
    ("brackets", "expected"),
    [
        ([(10, 20, False)], STORAGE),
        ([(10, 20, True), (10, 20, False)], "low-rank at r=20"),  # exactly half
        ([(10, 20, True), (10, 20, False), (10, 20, False)], STORAGE),
        ([(80, 90, True), (10, 20, False)], "not low-rank"),  # only the decidable ones are asked
        ([(NAN, NAN, False), (10, 20, True)], "low-rank at r=20"),
    ],
)
def test_half_of_the_matrices_must_be_decidable(brackets, expected):
    assert says(*brackets) == expected


@pytest.mark.parametrize(
    ("brackets", "expected"),
    [
        (3 * [(10, 20)] + [(60, 70)], "low-rank at r=20"),  # exactly three quarters
        (3 * [(10, 20)] + [(60, INF)], "low-rank at r=20"),
        (2 * [(10, 20)] + [(60, 70)], EVIDENCE),
        (3 * [(80, 90)] + [(10, 20)], "not low-rank"),
        (2 * [(80, 90)] + [(10, 20)], EVIDENCE),
        ([(10, 20), (80, 90)], EVIDENCE),
    ],
)
def test_three_quarters_must_agree(brackets, expected):
    assert says(*brackets) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=13), st.integers(0, 3))
def test_the_rank_that_is_named_holds_90_percent_in_three_of_four_matrices(highs, n_others):
    found = says(*((1, high) for high in highs), *(n_others * [(60, INF)]))
    total = len(highs) + n_others
    if len(highs) >= 0.75 * total:
        r = int(found.removeprefix("low-rank at r="))
        assert sum(high <= r for high in highs) >= 0.75 * total
        assert r in highs, "no larger than needed"
        assert sum(high < r for high in highs) < 0.75 * total
    else:
        assert found == EVIDENCE


def test_evidence_is_in_numbers():
    assert verdict(table((20, 40), (20, 40)))[1] == "r90 0.20–0.40 × null; holds in 2 of 2 matrices"
    assert verdict(table((10, 20, False), unchanged_fraction=0.87))[1] == (
        "r90 decidable in 0 of 1 matrices; 87 % of the entries unchanged in storage"
    )


# ---------------------------------------------------------------------------------------------- summary


def test_summary_has_one_row_a_type_in_the_order_of_the_block():
    parts = [table((10, 20), layer_type=name) for name in ("lm_head", "down", "odd", "q", "embedding")]
    summary = summarise(pd.concat([*parts, table((10, 30), layer_type="q")], ignore_index=True))
    assert list(summary.columns) == list(SUMMARY)
    assert summary["layer_type"].tolist() == ["embedding", "q", "down", "odd", "lm_head"]
    assert summary["n_matrices"].tolist() == [1, 2, 1, 1, 1]
    assert summary["r90_high"].tolist() == [20, 25, 20, 20, 20]


def test_every_tower_is_judged_by_itself():
    parts = [
        table((low, high), (low, high), layer_type=layer_type, stack=stack)
        for stack, layer_type, low, high in (
            ("", "embedding", 10, 20), ("text", "q", 10, 20), ("vision", "q", 80, 90), ("audio", "q", 50, 60),
        )
    ]  # fmt: skip
    summary = summarise(pd.concat(parts, ignore_index=True)).set_index("layer_type")["verdict"]
    assert list(summary.index) == ["embedding", "audio q", "text q", "vision q"]
    assert summary["text q"] == "low-rank at r=20"
    assert summary["vision q"] == "not low-rank"
    assert summary["audio q"] == EVIDENCE


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("encoder", "q"), ("decoder", "q"), ("decoder", "cross_q")], ["decoder q", "decoder cross_q", "encoder q"]),
        ([("encoder", "q"), ("", "embedding"), ("", "pooler")], ["embedding", "q", "pooler"]),  # BERT: one stack
        ([("", "q"), ("vision", "q"), ("", "down")], ["q", "down", "vision q"]),  # the language model has no tower
    ],
)
def test_a_stack_is_named_where_a_type_is_in_more_than_one(places, expected):
    parts = [table((10, 20), stack=stack, layer_type=layer_type) for stack, layer_type in places]
    assert summarise(pd.concat(parts, ignore_index=True))["layer_type"].tolist() == expected


def test_summary_of_nothing():
    assert list(summarise(table()).columns) == list(SUMMARY)
    assert summarise(table()).empty


def test_undecidable_numbers_are_missing_from_the_summary():
    frame = table((10, 20, False), (10, 20, False), (10, 20, True))
    frame["decidable_signal_rank"] = False
    (row,) = summarise(frame).to_dict("records")
    assert math.isnan(row["r90_low"])
    assert math.isnan(row["r90_high"])
    assert math.isnan(row["signal_rank"])
    assert row["r50_high"] == 1


def test_medians_are_of_the_decidable_matrices():
    frame = table((10, 20, True), (10, 30, True), (500, 900, False))
    (row,) = summarise(frame).to_dict("records")
    assert row["r90_high"] == 25


def test_an_open_end_stays_open_in_the_summary():
    (row,) = summarise(table((80, INF), (80, INF))).to_dict("records")
    assert row["r90_high"] == INF
    assert row["verdict"] == "not low-rank"


def test_unrelated_checkpoints_get_no_other_verdict():
    summary = summarise(pd.concat([table((10, 20)), table((80, 90), layer_type="k")]), related=False)
    assert set(summary["verdict"]) == {"unrelated weights"}
    assert "+0.99" in summary["evidence"][0]
