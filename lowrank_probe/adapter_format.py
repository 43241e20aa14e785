"""PEFT's file format as both writers need it: names of the files, how factors are packed, which modules are named.

Legend: m out, n in, r rank, E experts; B (m, r), A (r, n), or (E, m, r), (E, r, n).
Source: PEFT 0.21, `LoraConfig`, `get_peft_model_state_dict`, `ParamWrapper`, `check_target_module_exists`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"


def packed(
    B: "Tensor", A: "Tensor", *, embedding: bool = False, kernel: tuple[int, ...] = ()
) -> "tuple[Tensor, Tensor]":
    """(lora_A, lora_B) as PEFT stores them: the way back of `LoraModule.of`.

    A stack of experts: (E·r, n), the expert slowest, and (m, r·E), the expert fastest. A table (m rows, n wide):
    (r, m) and (n, r). A convolution, n = in·kernel: (r, in, *kernel) and (m, r, 1, …).
    """
    if embedding:
        return B.reshape(B.shape[-2:]).T, A.reshape(A.shape[-2:]).T
    m, r = B.shape[-2:]
    if kernel:
        return A.reshape(r, -1, *kernel), B.reshape(m, r, *(1 for _ in kernel))
    if B.ndim > 2:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def target_modules(names: Iterable[str], others: Collection[str] | None) -> list[str] | str:
    """`target_modules` of these full names, sorted; as one regular expression where PEFT would find more by them.

    PEFT adapts every module whose name ends in a listed one at a dot. others: the model's other modules; None: unknown.
    """
    listed = sorted(names)
    ends = tuple(f".{name}" for name in listed)
    if ends and (others is None or any(name.endswith(ends) for name in others)):
        return "|".join(map(re.escape, listed))
    return listed


def ranks_and_patterns(modules: Mapping[str, int], parameters: Mapping[str, int]) -> dict[str, Any]:
    """The settings for modules and bare parameters (`target_parameters`) of these ranks: alpha = rank, scaling 1.

    Pattern keys are regular expressions that PEFT matches as `(.*\\.)?(key)$`: escaped, and anchored at the start.
    """
    # PEFT warns of a pattern that matches no module, and forgets the parameters there: they get the common rank.
    common = Counter((parameters or modules).values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in (*modules.items(), *parameters.items()) if r != common}
    return {
        "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "use_rslora": False, "target_parameters": sorted(parameters) or None,
    }  # fmt: skip
