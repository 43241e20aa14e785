"""Reading the ledger of a result, and what every ledger must hold: nothing vanishes."""

from lowrank_probe.checkpoints import open_checkpoint


def check_complete(result, base, tuned):
    """Each tensor of each side is in exactly one ledger line, and each analysed line is a row of the table."""
    ledger = result.ledger
    for side, column, shape in ((base, "name", "base_shape"), (tuned, "tuned_name", "tuned_shape")):
        assert sorted(ledger[column][ledger[shape] != ""]) == sorted(open_checkpoint(side).tensors)
    assert {name.partition("[")[0] for name in result.table["name"]} == set(
        ledger["name"][ledger["status"] == "analysed"]
    )
    assert set(result.singular_values) == set(result.table["name"])
    assert result.facts["counts"] == ledger["status"].value_counts().to_dict()


def statuses(result):
    return dict(zip(result.ledger["name"], result.ledger["status"], strict=True))


def one(result, name):
    lines = result.ledger[(result.ledger["name"] == name) | (result.ledger["tuned_name"] == name)]
    assert len(lines) == 1
    return lines.iloc[0]
