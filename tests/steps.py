"""What the tests of trajectories share beside their fixtures (`conftest`): planted angles, and equality."""

import numpy as np
import pandas as pd
import torch
from pairs import orthonormal

from lowrank_probe import runs

Q = "model.layers.0.self_attn.q_proj.weight"


def rotated(shape, angles, seed=0):
    """(U_A, U_B, V_A, V_B): orthonormal, U_Aᵀ U_B = V_Aᵀ V_B = diag(cos angles)."""
    generator = torch.Generator().manual_seed(seed)
    r = len(angles)
    sides = []
    for rows in shape:
        both = orthonormal(rows, 2 * r, generator)
        sides += [both[:, :r], both[:, :r] * torch.cos(angles) + both[:, r:] * torch.sin(angles)]
    return sides


def same(a, b):
    """Two trajectories with the same tables, spectra and facts."""
    assert list(a.results) == list(b.results)
    for name in ("table", "similarity", "similarity_by_type", "amplification", "amplification_by_type"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    for label, result in a.results.items():
        other = b.results[label]
        pd.testing.assert_frame_equal(result.table, other.table)
        pd.testing.assert_frame_equal(result.ledger, other.ledger)
        assert list(result.singular_values) == list(other.singular_values)
        for name, s in result.singular_values.items():
            np.testing.assert_array_equal(s, other.singular_values[name])
    assert runs.plain(a.facts) == runs.plain(b.facts)
    assert a.to_json() == b.to_json()
