"""Comparing results."""

import numpy as np


def same_tables(a, b):
    """Two results with the same rows and singular values, whatever they were read from."""
    assert set(a.table["name"]) == set(b.table["name"])
    for name, values in a.singular_values.items():
        np.testing.assert_array_equal(values, b.singular_values[name])
    for one, other, column in ((a.table, b.table, "r90"), (a.ledger, b.ledger, "status")):
        assert one.set_index("name")[column].to_dict() == other.set_index("name")[column].to_dict()
