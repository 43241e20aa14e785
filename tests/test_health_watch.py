"""Real runs of Trainer on tiny models: what the watch sees, at which step, and what it leaves alone."""

import math
import warnings

import pytest
import torch
from adapting import llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from lowrank_probe.errors import ProbeError
from lowrank_probe.health_watch import HealthWatch

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
# What is not finite here is not finite in the loss; in q or k it depends on the kernel of the attention.
V0 = Q0.replace("q_proj", "v_proj")


# Of peft and Trainer, about names of transformers that will go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def rows(n=64, seed=0):
    ids = torch.randint(0, 8, (n, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def adapted(**config):
    torch.manual_seed(0)
    return get_peft_model(
        llama(), LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | config)
    )


def fit(tmp_path, model, data=None, watch=None, trainer=Trainer, **options):
    watch = watch or HealthWatch()
    defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 3}
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer's own
        args = TrainingArguments(str(tmp_path / "out"), **defaults | settings | options)
        trainer(model, args, train_dataset=data or rows(), callbacks=[watch]).train()
    return watch


class Poison(HealthWatch):
    """Writes Inf into one weight once `at` steps are done: what a huge step leaves behind, at a known step."""

    def __init__(self, name, at, **options):
        super().__init__(**options)
        self.name, self.at = name, at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control, model=model, **kwargs)
        if state.global_step == self.at:
            model.get_parameter(self.name).data[0, 0] = math.inf


def test_a_sound_run(tmp_path):
    watch = fit(tmp_path, adapted())
    assert watch.findings() == []
    assert watch.facts() == {
        "rank": 2, "alpha": 4, "use_rslora": False, "method": "lora", "dtype": "float32", "n_adapters": 4, "n_moved": 4,
        "not_moved": (), "n_trained": 2 * (2 * (16 + 16) + 2 * (16 + 8)), "base_weights_with_grad": (), "n_steps": 12,
        "n_skipped_steps": 0, "nan_step": None, "nan_source": None, "nan_parameter": None, "nan_dtype": None,
    }  # fmt: skip
    assert watch.history["step"].tolist() == [3, 6, 9, 12]
    assert watch.history[["loss", "grad_norm", "learning_rate"]].notna().all(axis=None)


def test_the_watch_changes_nothing(tmp_path):
    with_watch, without = adapted(), adapted()
    fit(tmp_path, with_watch)
    fit(tmp_path, without, trainer=lambda *a, callbacks, **k: Trainer(*a, **k))
    for (name, p), q in zip(with_watch.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not with_watch._forward_hooks


@pytest.mark.parametrize(
    "options",
    [{}, {"logging_nan_inf_filter": False}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True},
     {"max_grad_norm": 0.0}, {"bf16": True}],
    ids=str,
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_seen_at_its_step(tmp_path, options):
    watch = fit(tmp_path, adapted(), watch=Poison(f"{V0}.lora_A.default.weight", 4), **options)
    facts = watch.facts()
    assert (facts["nan_step"], facts["nan_source"]) == (5, "loss")
    assert facts["nan_parameter"].endswith("default.weight")
    assert watch.history["loss"].isna().tolist() == [False, True, True, True]
    (found,) = [f for f in watch.findings() if f.name == "nan"]
    assert "the loss is NaN or Inf at step 5" in found.evidence


def test_a_huge_learning_rate_ends_in_nan_which_trainer_hides(tmp_path):
    torch.manual_seed(0)
    watch = fit(tmp_path, llama(), learning_rate=1e30, max_grad_norm=0.0, max_steps=8, logging_steps=4)
    assert watch.facts()["nan_step"] in (2, 3)
    assert "nan" in [f.name for f in watch.findings()]
    assert watch.facts()["method"] == "full"


def test_labels_that_are_all_masked_are_named_as_the_cause(tmp_path):
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows(4)]
    watch = fit(tmp_path, adapted(), data)
    (found,) = [f for f in watch.findings() if f.name == "nan"]
    assert found.step == 1
    assert "-100" in found.mend


def test_the_first_gradient_to_overflow_is_named(tmp_path):
    """The loss is finite; the gradient overflows at the output of one v, and all below it follows."""
    model, v1 = adapted(), Q0.replace("layers.0", "layers.1").replace("q_proj", "v_proj")
    model.get_submodule(v1).register_forward_hook(
        lambda m, i, output: output.register_hook(lambda g: g * math.inf) and None
    )
    watch = fit(tmp_path, model, logging_steps=12)
    facts = watch.facts()
    assert (facts["nan_step"], facts["nan_source"], facts["nan_dtype"]) == (1, "gradient", "float32")
    assert facts["nan_parameter"] == f"{v1}.lora_B.default.weight"


def test_float16_overflows_and_says_so(tmp_path):
    torch.manual_seed(0)
    model = llama().to(torch.float16)
    watch = fit(tmp_path, model, learning_rate=1e3, max_steps=6, logging_steps=6)
    facts = watch.facts()
    assert facts["nan_dtype"] == "float16"
    assert "bf16" in next(f for f in watch.findings() if f.name == "nan").mend


@pytest.mark.parametrize("stop", [True, False])
def test_stop_on_nan(tmp_path, stop):
    watch = Poison(f"{Q0}.lora_A.default.weight", 3, stop_on_nan=stop)
    fit(tmp_path, adapted(), watch=watch, logging_steps=100, max_steps=20)
    assert watch.facts()["n_steps"] == (4 if stop else 20)
    assert watch.facts()["nan_step"] == 4


def test_base_weights_that_were_not_frozen(tmp_path):
    model = adapted()
    model.get_parameter(f"{Q0}.base_layer.weight").requires_grad_(True)
    watch = fit(tmp_path, model)
    (found,) = watch.findings()
    assert found.name == "base weights receive gradients"
    assert watch.facts()["base_weights_with_grad"] == (f"{Q0}.base_layer.weight",)


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"use_dora": True},
     {"init_lora_weights": "gaussian"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": False}],
    ids=str,
)  # fmt: skip
def test_what_peft_trains_is_no_base_weight(tmp_path, config):
    watch = fit(tmp_path, adapted(**config))
    assert watch.findings() == []
    assert watch.facts()["n_moved"] == watch.facts()["n_adapters"] == 4


def test_adapters_that_stay(tmp_path):
    still = fit(tmp_path, adapted(), learning_rate=0.0)
    assert "adapter did not move" in [f.name for f in still.findings()]
    assert still.facts()["n_moved"] == 0

    class Half(Trainer):
        def create_optimizer(self, *args, **kwargs):
            model = self.model
            self.optimizer = torch.optim.SGD(
                [p for n, p in model.named_parameters() if "layers.1" in n and "lora" in n], 0.1
            )
            return self.optimizer

    half = fit(tmp_path, adapted(init_lora_weights="gaussian"), trainer=Half)
    assert half.facts()["not_moved"] == tuple(f"model.layers.0.self_attn.{m}_proj" for m in "qv")


def test_a_second_adapter_that_is_not_trained_is_not_counted(tmp_path):
    adapted().save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    facts = fit(tmp_path, model).facts()
    assert (facts["rank"], facts["n_adapters"], facts["n_moved"]) == (4, 2, 2)


def test_without_a_loss_in_the_output_the_gradients_tell(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    watch = fit(tmp_path, adapted(), trainer=Own, watch=Poison(f"{Q0}.lora_A.default.weight", 4))
    assert (watch.facts()["nan_step"], watch.facts()["nan_source"]) == (5, "gradient")


def test_evaluation_is_in_the_history_and_not_taken_for_training(tmp_path):
    class Evaluating(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=rows(8, 1), **kwargs)

    watch = fit(tmp_path, adapted(), trainer=Evaluating, eval_strategy="steps", eval_steps=6)
    assert watch.history.set_index("step")["eval_loss"].notna().to_dict() == {3: False, 6: True, 9: False, 12: True}
    assert watch.facts()["nan_step"] is None


def test_one_watch_is_for_one_run(tmp_path):
    watch = fit(tmp_path, adapted())
    with pytest.raises(ProbeError, match="one watch a run"):
        fit(tmp_path, adapted(), watch=watch)
