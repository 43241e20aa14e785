"""What `probe budget` says that a run needs, to put beside what it took."""

from typing import TYPE_CHECKING

from lowrank_probe.budgets import budget
from lowrank_probe.errors import ProbeError
from lowrank_probe.training_plan import FULL, Fit

if TYPE_CHECKING:
    from lowrank_probe.training_fits import Setting


def predicted_bytes(fit: Fit, setting: "Setting") -> int | None:
    """Bytes allocated at the peak, as torch.cuda.max_memory_allocated counts; None where there is no formula.

    LoRA's frozen weights are counted as reference runs hold them, in float32.
    """
    recipe = setting.recipe
    targets = fit.targets.split(",") if fit.targets else "all-linear"
    method = {FULL: "full", "dora": "dora", "rslora": "rslora"}.get(fit.method, "lora")
    precision = "mixed" if recipe.precision == "bf16" else "fp32"
    try:
        found = budget(
            setting.model, method=method, rank=max(1, fit.rank), targets=targets,
            precision=precision, batch=recipe.batch, seq=recipe.length, checkpointing=recipe.checkpointing,
        )  # fmt: skip
    except ProbeError:
        return None
    allocated = found.allocated_bytes
    if fit.method != FULL and precision == "mixed":
        # There frozen weights are bfloat16; here they are float32, and autocast keeps bfloat16 copies for backward.
        allocated += 4 * found.counts.total
    return allocated
