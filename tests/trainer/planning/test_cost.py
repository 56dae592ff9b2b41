import pytest

from trainer.errors import UserError
from trainer.planning.cost import flops_per_token, recomputed_flops_per_token, step_seconds, traffic
from trainer.planning.hardware import GPUS
from trainer.planning.memory import standard_strategies, strategy_of
from trainer.planning.shapes import shape_of

STRATEGIES = {strategy.name: strategy for strategy in standard_strategies()}
H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("name", "accumulation", "psi"),
    [("ddp / zero0", 4, 2 * 4), ("zero1", 4, 2 * 2), ("zero2", 1, 2 * 2), ("zero2", 4, 5 * 2), ("zero3", 1, 3 * 2),
     ("zero3", 4, 12 * 2), ("fsdp2", 1, 2 * 2 + 4), ("fsdp2", 4, 4 * (2 * 2 + 4))],
)  # fmt: skip
def test_volumes_of_the_zero_paper(name, accumulation, psi):
    """Section 7: 2 Psi for data parallelism and stages 1 and 2, 3 Psi for stage 3, here in bytes a parameter."""
    moved = traffic(1e9, 8, STRATEGIES[name], "bf16", accumulation, H100)
    assert moved.ring_bytes == pytest.approx(psi * 1e9 * 7 / 8)
    assert traffic(1e9, 1, STRATEGIES[name], "bf16", accumulation, H100).ring_bytes == 0


def test_zeropp_moves_a_quarter_between_nodes():
    """arXiv:2306.10209: from 3 M to 0.75 M, with the backward gather inside the node."""
    full, plus = (
        traffic(1e9, 64, strategy, "bf16", 1, H100) for strategy in (STRATEGIES["zero3"], strategy_of("zeropp"))
    )
    assert plus.ring_bytes == pytest.approx(full.ring_bytes / 4)
    assert plus.node_bytes == pytest.approx(2e9 * 7 / 8)
    assert plus.seconds < full.seconds / 2


def test_the_slowest_link_sets_the_time():
    inside, across = (traffic(1e9, gpus, STRATEGIES["zero2"], "bf16", 1, H100) for gpus in (8, 16))
    assert inside.seconds == pytest.approx(inside.ring_bytes / (450e9 * 0.8))
    assert across.seconds == pytest.approx(across.ring_bytes / (50e9 * 0.8))


def test_the_output_matrix_counts_at_targets_only_and_blocks_again_when_recomputed():
    shape, _ = shape_of("bert", {})
    counts = shape.parameters()
    assert flops_per_token(shape, 128) == 6 * counts.multiplying + 12 * 12 * 768 * 128
    assert flops_per_token(shape, 128) - flops_per_token(shape, 128, 0.15) == pytest.approx(0.85 * 6 * 30522 * 768)
    blocks = 6 * (counts.block_matrices + counts.block_norms) + 12 * 12 * 768 * 128
    assert recomputed_flops_per_token(shape, 128) == pytest.approx(blocks / 3)


def test_time_and_peaks():
    assert step_seconds(989.4e12, 1, H100, "bf16", 1.0) == pytest.approx(1.0)
    assert step_seconds(989.4e12, 8, H100, "bf16", 0.4) == pytest.approx(1 / 3.2)
    assert GPUS["a100-80"].peak_flops("tf32") == 156e12
    assert GPUS["v100"].peak_flops("fp16") == 125e12
    for precision in ("bf16", "tf32"):
        with pytest.raises(UserError, match="no datasheet peak"):
            GPUS["v100"].peak_flops(precision)


def test_every_gpu_has_a_peak():
    for gpu in GPUS.values():
        assert gpu.peak_flops("fp16") > 1e14
        assert gpu.usable_bytes < gpu.memory_gb * 1e9
