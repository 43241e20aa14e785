"""How PEFT names and packs: the way back of the reader, and names as peft itself matches them."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lowrank_probe.adapter_format import packed, ranks_and_patterns, target_modules
from lowrank_probe.adapters import LoraModule


@pytest.mark.parametrize(
    ("copies", "n", "how", "shapes"),
    [
        (1, 12, {}, [(3, 12), (7, 3)]),
        (1, 12, {"embedding": True}, [(3, 7), (12, 3)]),
        (1, 12, {"kernel": (2, 3)}, [(3, 2, 2, 3), (7, 3, 1, 1)]),
        (4, 12, {}, [(12, 12), (7, 12)]),
    ],
)
def test_what_is_packed_is_read_back(copies, n, how, shapes):
    torch.manual_seed(0)
    B, A = torch.randn(copies, 7, 3), torch.randn(copies, 3, n)
    lora_A, lora_B = packed(B, A, **how)
    assert [tuple(lora_A.shape), tuple(lora_B.shape)] == shapes
    for i in range(copies):
        module = LoraModule(
            "x", (7, n), 3, 1.0, "A", "B", how.get("embedding", False), how.get("kernel", ()),
            expert=i if copies > 1 else None, copies=copies,
        )  # fmt: skip
        found_B, found_A = module.of(lora_A, lora_B)
        assert torch.equal(found_B, B[i])
        assert torch.equal(found_A, A[i])
    if copies == 1:
        assert all(torch.equal(x, y) for x, y in zip(packed(B[0], A[0], **how), (lora_A, lora_B), strict=True))


NAMES = {"layers.1.fc", "layers.10.fc"}


@pytest.mark.parametrize(
    ("others", "listed"),
    [({"layers.2.fc", "xlayers.1.fc", "fc"}, True), ({"visual.layers.1.fc"}, False), (None, False), (set(), True)],
)
def test_peft_finds_these_modules_and_no_other(others, listed):
    named = target_modules(NAMES, others)
    assert isinstance(named, list) == listed
    config = LoraConfig(target_modules=named)
    others = {"visual.layers.1.fc", "layersx1.fc"} if others is None else others
    assert {name for name in NAMES | others if check_target_module_exists(config, name)} == NAMES


def test_no_name_is_an_empty_list():
    assert target_modules([], None) == target_modules([], {"fc"}) == []


def test_the_common_rank_is_that_of_the_parameters():
    made = ranks_and_patterns({"a.fc": 4, "b.fc": 4, "c.fc": 2}, {"mlp.up": 2})
    assert (made["r"], made["lora_alpha"], made["target_parameters"]) == (2, 2, ["mlp.up"])
    assert made["rank_pattern"] == made["alpha_pattern"] == {r"^a\.fc": 4, r"^b\.fc": 4}
