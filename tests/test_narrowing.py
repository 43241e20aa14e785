"""Rounding to what is stored: torch's own values, and an error where a finite one would get infinite."""

import math

import pytest
import torch

from lowrank_probe.errors import NumericsError, ProbeError
from lowrank_probe.narrowing import CODES, dtype_word, narrowed, stored_dtype
from lowrank_probe.options import STORED
from lowrank_probe.torch_dtypes import DTYPES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_largest_value_fits_and_the_next_is_refused(dtype):
    limit = torch.finfo(dtype).max
    mend = "use --dtype float32" if dtype == torch.float16 else "is the scale or weight of an adapter right"
    for sign in (1, -1):
        fits = torch.tensor([0.1, sign * limit], dtype=torch.float64)
        assert torch.equal(narrowed(fits, dtype, "x"), fits.to(dtype))
        with pytest.raises(NumericsError, match=rf"^a: reaches .*, beyond {dtype_word(dtype)}; {mend}"):
            narrowed(1.01 * fits, dtype, "a: reaches")


def test_what_is_not_finite_stays_and_does_not_hide_what_gets_lost():
    values = torch.tensor([math.nan, math.inf, -math.inf, 3.0])
    torch.testing.assert_close(narrowed(values, torch.float16, "x"), values.half(), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(NumericsError, match=r"reach 7e\+04, beyond float16"):
        narrowed(torch.tensor([math.inf, 7e4]), torch.float16, "x: its factors reach")
    assert narrowed(torch.empty(0, 3), torch.float16, "x").shape == (0, 3)


def test_words_and_codes_are_those_of_torch():
    for word, code in STORED.items():
        assert stored_dtype(word) == code
        assert CODES[DTYPES[code]] == code
        assert dtype_word(DTYPES[code]) == word
        assert getattr(torch, word) == DTYPES[code]
    with pytest.raises(ProbeError, match="dtype 'int8': expected one of float32, bfloat16, float16"):
        stored_dtype("int8")
