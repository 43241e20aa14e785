"""What a step holds: sums of storages that can be written down, real models on fake tensors against real tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lowrank_probe import measuring
from lowrank_probe.as_on_cuda import AsOnCuda
from lowrank_probe.errors import ProbeError
from lowrank_probe.measuring import measure_cuda, measure_fake
from lowrank_probe.model_shapes import shape_of_config
from lowrank_probe.storages import LiveStorages
from lowrank_probe.trainable_models import trainable_model
from lowrank_probe.training_steps import PHASES, Step

LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


def test_linear_layer_and_square_are_the_sum_that_can_be_written_down():
    with FakeTensorMode():
        layer, x = nn.Linear(20, 30, bias=False), torch.empty(7, 20)
        tracker = LiveStorages({"forward": "activations", "backward": "working"})
        tracker.hold(layer.weight, "weights")
        tracker.hold(x, "inputs")
        layer.weight.register_post_accumulate_grad_hook(lambda p: tracker.hold(p.grad, "gradients"))
        with tracker:
            tracker.enter("forward")
            loss = (layer(x) ** 2).sum()
            tracker.enter("backward")
            loss.backward()
    weights, inputs, out = 4 * 20 * 30, 4 * 7 * 20, 4 * 7 * 30
    # y and y² live together; then y² is gone, and Σ is there.
    assert tracker.peaks["forward"].parts == {"weights": weights, "inputs": inputs, "activations": 2 * out + 4}
    assert tracker.peaks["forward"].n_bytes == weights + inputs + 2 * out + 4
    # x stays for ∂W; y and what stands in for 2y, its product and the gradient of y; or ∂y and ∂W: whichever is more.
    parts = tracker.peaks["backward"].parts
    assert tracker.peaks["backward"].n_bytes == sum(parts.values())
    assert parts["gradients"] in (0, weights)
    assert tracker.peaks["backward"].n_bytes >= weights + inputs + weights


def test_views_count_once_and_what_is_gone_counts_no_more():
    tracker = LiveStorages({})
    with tracker:
        tracker.enter("one")
        x = torch.zeros(100)
        y = x.view(10, 10).t()
        assert y.shape == (10, 10)
        del x, y
        z = torch.zeros(50)
        tracker.enter("two")
        del z
        torch.zeros(10)
    assert tracker.peaks["one"].n_bytes == 400
    assert tracker.peaks["two"].n_bytes == 200


def test_gradients_of_one_weight_used_twice_are_added_in_place():
    with FakeTensorMode():
        weight, x = nn.Parameter(torch.empty(1000, 1000)), torch.empty(1, 1000)
        tracker = LiveStorages({})
        tracker.hold(weight, "weights")
        with tracker:
            loss = (x @ weight).sum() + (x @ weight).sum()
            tracker.enter("backward")
            loss.backward()
    assert 3 * 4_000_000 <= tracker.peaks["backward"].n_bytes < 3.1 * 4_000_000


def test_attention_saves_what_flash_saves():
    b, n, k, s, d = 2, 4, 2, 48, 16
    q = torch.empty(b, n, s, d, dtype=torch.bfloat16, requires_grad=True)
    kv = torch.empty(b, k, s, d, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(q, kv, kv, is_causal=True, enable_gqa=True) == 2 * b * s * d * (2 * n + k) + 4 * b * n * s
    mask = torch.ones(b, 1, s, s, dtype=torch.bool)
    expected = 2 * b * s * d * n * 3 + 2 * b * s * s + 4 * b * n * 64  # rows of the log-sum-exp in steps of 32
    assert saved_bytes(q, q, q, attn_mask=mask) == expected - 2 * b * s * d * n
    # No fused kernel for grouped queries in float32: (s, s) matrices.
    wide = saved_bytes(q.detach().float().requires_grad_(), kv.float(), kv.float(), is_causal=True, enable_gqa=True)
    assert wide > 4 * b * n * s * s


def saved_bytes(*args: torch.Tensor, **kwargs: object) -> int:
    """Bytes that attention saves for its backward pass, each storage once."""
    found: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with AsOnCuda(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = functional.scaled_dot_product_attention(*args, **kwargs)
    assert out.shape == args[0].shape
    # Every one of them is still alive, so that no storage was counted under the address of another.
    assert out.grad_fn is not None
    return sum(found.values())


def test_dropout_keeps_one_byte_an_entry():
    x = torch.ones(8, 16, requires_grad=True)
    sizes: list[int] = []
    with AsOnCuda(), torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
        functional.dropout(x, 0.5)
        assert functional.dropout(x, 0.5, training=False) is x
    assert sizes == [8 * 16]


@pytest.mark.parametrize("method", ["full", "lora", "dora", "rslora"])
def test_states_are_exact_and_parts_are_the_whole(method):
    step = Step(batch=2, seq=32, method=method, rank=4)
    found = measure_fake(LLAMA, step)
    shape = shape_of_config(LLAMA)
    adapter = 0 if method == "full" else shape.lora_parameters(4, "all-linear", method == "dora")
    trained, each = (adapter, 4) if adapter else (shape.n_parameters, 2)
    assert (found.n_trainable, found.n_parameters) == (trained, shape.n_parameters + adapter)
    for phase in PHASES:
        parts = found.components[phase]
        assert sum(parts.values()) == found.peaks[phase]
        assert parts.get("adapter", 0) == 4 * adapter
        assert 0 < parts["optimizer"] - 2 * each * trained < 1000  # and step counters
        assert 0 <= parts["weights"] - 2 * shape.n_parameters < 1000  # and rotary frequencies
    assert found.components["step"]["gradients"] == each * trained
    assert found.peak == max(found.peaks.values()) == found.peaks[found.phase]


@pytest.mark.parametrize(
    ("config", "more"),
    [(LLAMA, {}), (LLAMA, {"checkpointing": True}), (LLAMA, {"method": "full", "flash": False}), (GPT2, {})],
)
def test_fake_tensors_hold_what_real_ones_hold(config, more):
    step = Step(**{"batch": 2, "seq": 32, "method": "lora", "rank": 4, **more})
    fake, peaks = measure_fake(config, step), real_peaks(config, step)
    for phase in PHASES:
        assert peaks[phase] == pytest.approx(fake.peaks[phase], rel=2e-3), phase


def real_peaks(config, step):
    """The same step with real tensors in the computer's memory."""
    tracker = LiveStorages({})
    device = torch.device("cpu")
    with AsOnCuda():
        run = measuring._Run(trainable_model(config, step, device), step, device)
        for tensor in (*run.model.parameters(), *run.model.buffers(), *measuring._states(run.optimizer), run.ids):
            tracker.hold(tensor, "held")
        with tracker:
            run.step(tracker.enter)
    return {phase: peak.n_bytes for phase, peak in tracker.peaks.items()}


def test_checkpointing_keeps_the_input_of_each_block_alone():
    step = Step(batch=2, seq=64, method="full", checkpointing=True)
    found = measure_fake(LLAMA, step)
    saved = found.components["loss"]["activations"]
    tokens, hidden = 128, 64
    blocks = 2 * tokens * hidden * 3
    ends = tokens * (8 * hidden + 4)
    small = 3 * 64 * 64  # cosines, sines, positions
    assert blocks + ends <= saved <= blocks + ends + small


def test_logits_are_twelve_bytes_an_entry_and_two_more_if_the_caller_keeps_them():
    tokens, vocab = 4 * 64, 1000
    for held, each in ((False, 12), (True, 14)):
        found = measure_fake(LLAMA, Step(batch=4, seq=64, method="lora", held_outputs=held))
        logits = found.components["loss"]["logits"]
        assert each * tokens * vocab <= logits < (each + 0.1) * tokens * vocab
    for decoder in (LLAMA, GPT2):
        chunked = measure_fake(decoder, Step(batch=4, seq=64, method="lora", chunked_loss=True))
        assert chunked.components["loss"]["logits"] < 2.5 * tokens * vocab


def test_foreach_adam_needs_a_copy_of_what_is_trained_while_it_runs():
    fused, foreach = (
        measure_fake(LLAMA, Step(batch=1, seq=16, method="full", optimizer=name)) for name in ("adamw", "adamw-foreach")
    )
    n = shape_of_config(LLAMA).n_parameters
    assert fused.components["step"].get("step transient", 0) < 0.01 * n
    assert foreach.components["step"]["step transient"] == pytest.approx(2 * n, rel=0.05)


def test_bfloat16_adapter_takes_half():
    wide, narrow = (
        measure_fake(LLAMA, Step(batch=1, seq=16, rank=4, adapter_dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert 2 * narrow.components["step"]["adapter"] == wide.components["step"]["adapter"]


MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
T5 = {"model_type": "t5", "vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BERT = {
    "model_type": "bert", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96,
}  # fmt: skip
# PEFT hands the adapter of OPT's table of positions an attention mask in place of token numbers.
OPT = {
    "model_type": "opt", "vocab_size": 256, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 128,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "vocab_size": 1000, "hidden_size": 64, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "targets"),
    [(MIXTRAL, "all-linear"), (MIXTRAL, "mlp"), (MIXTRAL, "attention"), (T5, "all-linear"), (BERT, "all-linear"),
     (BLOOM, "all-linear"), (LLAMA, ["model.layers.1.self_attn.q_proj", "down"]), (GPT2, ["c_attn", "wte"])],
)  # fmt: skip
def test_what_is_measured_is_what_is_counted(config, targets):
    shape = shape_of_config(config)
    found = measure_fake(config, Step(batch=1, seq=16, rank=4, targets=targets))
    adapter = shape.lora_parameters(4, targets)
    assert (found.n_trainable, found.n_parameters) == (adapter, shape.n_parameters + adapter)
    assert ("eager" in found.how) == (config is BLOOM)


def test_a_position_bias_that_is_trained_has_its_gradient():
    found = measure_fake(T5, Step(batch=1, seq=16, method="full"))
    assert found.components["step"]["gradients"] == 2 * shape_of_config(T5).n_parameters


@pytest.mark.parametrize(
    ("config", "step", "said"),
    [
        (LLAMA, Step(seq=8, method="qlora"), "bitsandbytes"),
        (LLAMA, Step(seq=8, optimizer="adafactor"), "adafactor"),
        (LLAMA, Step(), "--seq"),
        ({"model_type": "no_such_model"}, Step(seq=8, method="full"), "no_such_model"),
        (
            {**BERT, "architectures": ["BertForSequenceClassification"]},
            Step(seq=8),
            "BertForSequenceClassification has",
        ),
        (T5, Step(seq=8, chunked_loss=True), "decoders alone"),
        (OPT, Step(seq=8, targets="everything"), "'opt': the step cannot be run: .*on one of everything: try other"),
    ],
)
def test_what_cannot_be_measured_says_so(config, step, said):
    with pytest.raises(ProbeError, match=said):
        measure_fake(config, step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ProbeError, match="no CUDA device"):
        measure_cuda(LLAMA, Step(seq=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_what_fake_tensors_hold():
    step = Step(batch=8, seq=256, method="lora")
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32000}
    assert measure_cuda(wide, step).peak == pytest.approx(measure_fake(wide, step).peak, rel=0.1)
