"""The table of accelerators: complete, plausible, each number with its origin; names as users write them."""

import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from lowrank_probe.accelerators import accelerators, find_accelerator
from lowrank_probe.errors import ProbeError


def test_the_parts_that_training_runs_on_are_there():
    names = {one.name for one in accelerators()}
    assert names >= {
        "H100", "H200", "B200", "A100 80GB", "A100 40GB", "L40S", "L4", "RTX 3090", "RTX 4090", "RTX 5090", "T4",
        "V100 16GB", "V100 32GB", "MI210", "MI250X", "MI300X", "MI325X", "MI355X", "TPU v4", "TPU v5e", "TPU v5p",
        "TPU v6e", "Ironwood",
    }  # fmt: skip
    assert {one.vendor for one in accelerators()} == {"NVIDIA", "AMD", "Apple", "Google"}
    assert 8 <= sum(one.common for one in accelerators()) <= 14


@pytest.mark.parametrize("one", accelerators(), ids=lambda one: one.name)
def test_every_row_is_plausible_and_says_where_it_is_from(one):
    share = one.usable_bytes / (one.nominal_gb * 2**30)
    assert (0.65 if one.vendor == "Apple" else 0.90) < share <= 1.01
    assert re.match(r"PyTorch$|XLA$|estimate: ", one.usable_from)
    assert one.is_estimate == one.usable_from.startswith("estimate")
    assert find_accelerator(one.name) is one
    for alias in one.aliases:
        assert find_accelerator(alias) is one


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("h100", "H100"), ("NVIDIA H100 80GB", "H100"), ("a100", "A100 80GB"), ("A100-40GB", "A100 40GB"),
        ("4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"), ("mi300x", "MI300X"), ("AMD Instinct MI300X", "MI300X"), ("Tesla T4", "T4"),
        ("tpu-v5e", "TPU v5e"), ("apple 128gb", "Apple 128GB"),
    ],
)  # fmt: skip
def test_names_as_people_write_them(said, name):
    assert find_accelerator(said).name == name


def test_an_unknown_name_lists_its_neighbours():
    with pytest.raises(ProbeError) as refused:
        find_accelerator("RTX 4900")
    assert "GPU 'RTX 4900' is not known; nearest: " in str(refused.value)
    assert "RTX 4090" in str(refused.value)
    with pytest.raises(ProbeError, match="nearest: H100"):
        find_accelerator("")
    for said, nearest in (("rtx", "RTX PRO 6000"), ("TPU", "TPU v4"), ("amd", "MI355X"), ("h10", "H100")):
        with pytest.raises(ProbeError, match=f"nearest: {nearest}"):
            find_accelerator(said)
    with pytest.raises(ProbeError, match="'0GB' has no memory"):
        find_accelerator("0GB")


def test_a_size_is_a_card_too_and_says_that_it_is_an_estimate():
    card = find_accelerator("48 GB")
    assert card.label == "48 GB card"
    assert (card.plural, card.cards) == ("48 GB cards", "48 GB cards")
    assert find_accelerator("H100").cards == "H100 (80 GB) cards"
    assert card.is_estimate
    assert card.usable_bytes < find_accelerator("RTX A6000").usable_bytes < 48 * 2**30
    with pytest.raises(ProbeError):
        find_accelerator("0GB")


def test_the_label_says_the_size_once():
    assert find_accelerator("H100").label == "H100 (80 GB)"
    assert find_accelerator("A100 40").label == "A100 40GB"


def test_the_table_goes_into_the_package():
    declared = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert "*.csv" in declared["tool"]["setuptools"]["package-data"]["lowrank_probe"]
    assert resources.files("lowrank_probe").joinpath("accelerators.csv").is_file()
