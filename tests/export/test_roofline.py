"""The limit of a call: operations as PyTorch counts them, bytes and least times by hand, rates of right kernels."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export import machine_rates
from export.io_spec import read_spec
from export.roofline import Work, least_s, limit_of, work_of
from tests.export.conftest import CONFIGS

RATES = {"fp32_per_s": 1e9, "int8_per_s": 4e9, "bytes_per_s": 1e9}
WORK = Work(multiplying=1_000_000, share_read=0.5, layers=2, width=10, cache_width=5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_operations_are_those_that_pytorch_counts(name, model_folder):
    """Eager attention: its products are counted, those of a fused kernel on the CPU are not."""
    folder = model_folder(name)
    work = work_of(folder, read_spec(folder))
    model = CONFIGS[name][0].from_pretrained(folder, attn_implementation="eager").eval()
    ids_BT = torch.arange(5, 65).reshape(2, 30)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids_BT)
    # rotary angles are products too, and a classifier's one token a row is left out
    assert sum(work.operations(60, 30)) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_is_read_of_a_file_is_what_multiplies(model_folder):
    tied = work_of(model_folder("gpt2"), read_spec(model_folder("gpt2")))
    assert 0.9 < tied.share_read <= 1.0  # all but positions: the table of tokens is the head
    features = work_of(model_folder("bert_features"), read_spec(model_folder("bert_features")))
    assert features.share_read < 0.7  # its table is only looked up, and its pooler not exported


def test_the_least_time_by_hand():
    """100 tokens that see 50: 0.2 G operations in weights, 4 * 2 * 10 * 50 * 100 = 0.0004 G in attention."""
    assert least_s(WORK, "eager", 4e6, RATES, 100, 50) == (pytest.approx(0.2 + 0.0004), "compute")
    assert least_s(WORK, "onnx_int8", 4e6, RATES, 100, 50) == (pytest.approx(0.05 + 0.0004), "compute")
    assert least_s(WORK, "onnx_fp16", 4e6, RATES, 100, 50)[0] == pytest.approx(0.2004)  # no rate of its own here
    assert least_s(WORK, "eager", 800e6, RATES, 100, 50) == (pytest.approx(0.4), "memory")
    assert least_s(WORK, "eager", 800e6, RATES, 100, 50, cache=1e9)[0] == pytest.approx(1.4)
    assert least_s(WORK, "eager", 4e6, {"reason": "no rates"}, 100, 50) is None
    assert least_s(WORK, "tensorrt_fp32", 4e6, RATES, 100, 50) == (pytest.approx(0.2004), "compute")
    assert least_s(WORK, "tensorrt_fp8", 4e6, RATES, 100, 50) is None  # it is as fast as no rate that was measured


def test_shares_of_rows():
    row = {"backend": "eager", "batch_size": 2, "padded_tokens": 100, "p50_ms": 400.8, "file_mib": 1.0}
    assert limit_of(row, WORK, RATES) == {"limit_share": pytest.approx(0.5), "limit": "compute"}
    assert limit_of(row | {"p50_ms": None}, WORK, RATES) == {}
    # a decoder's step: 2 tokens, 0.5 GB of weights and a cache of 2 rows x 2 layers x 2 x 5 x 4 bytes x 1000 tokens
    step = {"backend": "eager", "batch_size": 2, "prompt_tokens": 992, "new_tokens": 16, "token_ms": 1000.32,
            "file_mib": 1e9 / 2**20}  # fmt: skip
    cache_s = 2 * 2 * 2 * 5 * 4 * 1000 / 1e9
    found = limit_of(step, WORK, RATES)
    assert found == {"limit_share": pytest.approx((0.5 + cache_s) / 1.00032), "limit": "memory"}


@pytest.mark.parametrize(("operator", "kind"), [("MatMul", "float32"), ("MatMulInteger", "int32")])
def test_the_measured_products_are_products(operator, kind, monkeypatch):
    monkeypatch.setattr(machine_rates, "_SIDE", 64)
    random = np.random.default_rng(0)
    left, right = random.integers(0, 127, (2, 64, 64))
    (found,) = machine_rates.product(operator, 1)()
    assert found.dtype == kind
    np.testing.assert_allclose(found, left @ right, rtol=1e-6)


def test_copies_are_whole(monkeypatch):
    monkeypatch.setattr(machine_rates, "_COPIED_MIB", 3)
    call = machine_rates.copier(2)
    targets = call.__closure__
    call()
    arrays = [cell.cell_contents for cell in targets if isinstance(cell.cell_contents, list)]
    assert len(arrays) == 2
    assert all((array == 1).all() for pair in arrays for array in pair)
    assert sum(array.nbytes for array in arrays[0]) == 3 * 2**20
