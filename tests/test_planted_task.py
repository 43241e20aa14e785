"""The verdict where the truth is known: a task of a planted rank, and an update of noise."""

import planted_task
import pytest


@pytest.mark.slow
def test_a_student_of_a_teacher_of_rank_4_is_judged_about_4(tmp_path):
    row = planted_task.task(tmp_path, 4, ranks=(1, 6), steps=100, n=2000).verdict.set_index("layer_type").loc["mlp"]
    assert row["decided_by"] == "trained"
    assert row["verdict"] == "low-rank at r=6"
    assert (row["trained_rank"], row["trained_low"]) == (6, 2)  # rank 1 falls short, none between was trained


@pytest.mark.parametrize(("rank", "verdict"), [(4, "low-rank at r=4"), (None, "not low-rank")])
def test_the_update_itself(rank, verdict, tmp_path):
    planted_task.write_text(planted_task.pair(tmp_path, rank), tmp_path / "text.jsonl", 64)
    row = planted_task.teachers_own(tmp_path)
    assert (row["verdict"], row["decided_by"]) == (verdict, "functional")
    assert row["r90_high"] <= 4 if rank else row["r90_low"] > 32
