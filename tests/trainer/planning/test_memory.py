import json

import pytest

from trainer.errors import UserError
from trainer.planning.activations import MicroBatch
from trainer.planning.case import Case
from trainer.planning.memory import (
    Strategy,
    buffers,
    footprint,
    largest_micro_batch,
    standard_strategies,
    states,
    strategy_of,
)
from trainer.planning.shapes import shape_of

STRATEGIES = {strategy.name: strategy for strategy in standard_strategies()}
BERT = shape_of("bert", {})[0]
GIB = 2.0**30


def case(rows=8, precision="bf16", **more):
    batch = {"length": 128, "targets": rows * 19, "isolated": True, "dense_mask": False} | more.pop("batch", {})
    settings = {"shape": BERT, "precision": precision, "optimizer": "adamw"} | more
    return Case(batch=MicroBatch(rows=rows, **batch), **settings)


def test_the_zero_papers_table():
    """arXiv:1910.02054, figure 1: 7.5 billion parameters on 64 GPUs, decimal GB as printed."""
    held = {name: states(7.5e9, 64, STRATEGIES[name], "bf16").total / 1e9 for name in ("zero1", "zero2", "zero3")}
    assert states(7.5e9, 64, STRATEGIES["ddp / zero0"], "bf16").total / 1e9 == 120.0
    assert {name: round(gb, 1) for name, gb in held.items()} == {"zero1": 31.4, "zero2": 16.6, "zero3": 1.9}


@pytest.mark.parametrize(
    ("name", "precision", "bytes_per_parameter"),
    [
        ("ddp / zero0", "bf16", 4 + 4 + 8),
        ("ddp / zero0", "fp32", 4 + 4 + 8),
        ("zero1", "fp32", 4 + 4 + (4 + 8) / 8),  # DeepSpeed copies its shard in fp32 too
        ("zero2", "bf16", 2 + (2 + 4 + 8) / 8),
        ("zero3", "bf16", (2 + 2 + 4 + 8) / 8),
        ("fsdp2", "bf16", (4 + 4 + 8) / 8),
        ("zero2_offload", "bf16", 2),
        ("zero3_offload", "bf16", 0),
    ],
)
def test_bytes_of_a_parameter_on_eight_gpus(name, precision, bytes_per_parameter):
    assert states(1e9, 8, STRATEGIES[name], precision).total / 1e9 == pytest.approx(bytes_per_parameter)


def test_optimizers_and_what_offload_takes_to_the_host():
    ddp = STRATEGIES["ddp / zero0"]
    moments = {name: states(1e9, 1, ddp, "bf16", name).moments / 1e9 for name in ("adamw", "lamb", "lion")}
    assert moments == {"adamw": 8.0, "lamb": 8.0, "lion": 4.0}
    held = states(1e9, 8, STRATEGIES["zero3_offload"], "bf16")
    assert held.host * 8 / 1e9 == pytest.approx(4 + 8 + 4 + 2)  # master, moments, fp32 gradients, 16-bit weights
    infinity = Strategy("own", 3, deepspeed=True, offload_optimizer="nvme", offload_parameters="nvme")
    assert states(1e9, 8, infinity, "bf16").nvme == held.host


def test_shipped_configs_are_what_the_table_takes_for_them():
    for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        assert strategy_of(name) == STRATEGIES[name]
    plain, autocast = STRATEGIES["ddp / zero0"], strategy_of("zero0")
    assert states(1e9, 8, autocast, "bf16") == states(1e9, 8, plain, "bf16")
    assert autocast.autocast("bf16") and not autocast.autocast("fp32")
    assert strategy_of("zero_infinity").offload_parameters == "nvme"
    plus = strategy_of("zeropp")
    assert plus.quantized_weights and plus.quantized_gradients and plus.secondary_partition == 8
    assert states(8e9, 16, plus, "bf16").weights == pytest.approx(2 * 8e9 / 16 + 2 * 8e9 / 8)


def test_a_config_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False}}))
    mine = strategy_of(str(path))
    assert (mine.name, mine.stage, mine.reduce_bucket) == ("mine", 2, 1000)
    assert buffers(BERT, 8, mine, "bf16") == 1000 * 2
    with pytest.raises(UserError, match="no DeepSpeed config 'zero7'"):
        strategy_of("zero7")


@pytest.mark.parametrize("strategy", standard_strategies(), ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_one_more_does_not(strategy, checkpointing):
    usable = 20 * GIB
    largest = largest_micro_batch(case(batch={"checkpointing": checkpointing}), 8, strategy, usable)
    assert largest > 8
    totals = [
        footprint(case().with_checkpointing(checkpointing).with_rows(largest + more), 8, strategy).total
        for more in (0, 1)
    ]
    assert totals[0] <= usable < totals[1]


def test_nothing_fits_where_the_states_do_not():
    large = case(shape=shape_of("llama", {})[0], batch={"targets": 1024})
    assert largest_micro_batch(large, 8, STRATEGIES["ddp / zero0"], 80e9) == 0
    assert largest_micro_batch(large, 8, STRATEGIES["zero3"], 80e9) > 0


def test_moments_of_the_peak():
    """Each moment is the largest where it should be: few logits and much in a recomputed block, and so on."""
    ddp, zero2 = STRATEGIES["ddp / zero0"], STRATEGIES["zero2"]
    assert footprint(case(batch={"targets": 8 * 128}), 1, ddp).moment == "loss"
    few = {"targets": 8, "checkpointing": True}
    wide = shape_of("bert", {"vocab_size": 300, "num_hidden_layers": 2})[0]
    assert footprint(case(precision="fp32", shape=wide, batch=few), 1, ddp).moment == "backward"
    assert footprint(case(rows=1, batch={"length": 8, "targets": 1}), 1, zero2).moment == "update"
    teacher = shape_of("gpt2", {"n_inner": 2**15})[0]
    student = shape_of("gpt2", {"n_layer": 1})[0]
    small = case(rows=64, shape=student, teacher=teacher, batch={"targets": 1, "checkpointing": True})
    assert footprint(small, 1, ddp).moment == "teacher"


def test_a_teacher_is_cut_where_the_weights_are_and_has_the_type_of_the_products():
    counts = BERT.parameters()
    blocks = counts.block_matrices + counts.block_norms
    cut = counts.total - blocks + blocks / 8 + 2 * counts.largest_block
    for strategy in standard_strategies():
        held = cut if strategy.stage == 3 else counts.total
        fp16 = 4 if strategy.autocast("fp16") else 2
        for precision, size in (("bf16", 2), ("fp16", fp16), ("fp32", 4), ("fp8", 4)):
            assert footprint(case(precision=precision, teacher=BERT), 8, strategy).teacher == size * held
        assert footprint(case(precision="fp32", teacher=BERT), 1, strategy).teacher == 4 * counts.total
        assert footprint(case(), 8, strategy).teacher == 0


def test_parts_at_a_time_make_the_logits_small():
    gpt = shape_of("gpt2", {"tie_word_embeddings": False})[0]
    batch = {"length": 1024, "targets": 64 * 1024}
    whole, parts, fused = (
        footprint(case(rows=64, shape=gpt, batch=batch | {"cross_entropy": kind}), 8, STRATEGIES["zero2"])
        for kind in ("full", "chunked", "liger")
    )
    assert whole.moment == "loss"
    assert whole.logits == pytest.approx(12 * 64 * 1024 * 50257, rel=1e-3)
    assert parts.total < whole.total - 0.9 * whole.logits
    assert fused.total <= parts.total
