"""What this machine can do at the most, measured in a fresh process: matrix products and copies of memory.
What a model's calls need of either is `roofline`'s arithmetic.

    python -m export.machine_rates THREADS PROVIDER FILE
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from export.runners import CPU_PROVIDER
from export.windows import Settings, SystemClock, measure
from trainer.artifact import write_json

_SIDE = 1024  # of square matrices: 2.1 GFLOP, and 12 MiB in fp32, which blocks of any kernel hide
_GPU_SIDE = 8192
_COPIED_MIB = 256  # in all: beyond the last cache of any processor that is sold, at the time of writing
_GPU_COPIED_MIB = 1024  # 0.6 ms at 3.35 TB/s, beside which a launch and a wait are little
_WINDOW_S = 0.1
_WINDOWS = 10
_STABILITY = 0.1


def main(threads: int, provider: str, path: Path) -> None:
    """Write the rates of this machine, in operations and bytes a second; None for one that never settled."""
    rates = cpu_rates(threads) if provider == CPU_PROVIDER else gpu_rates(threads)
    write_json(path, rates)


def cpu_rates(threads: int) -> dict[str, float | None]:
    """Products in fp32 and of int8 by ONNX Runtime, and copies by numpy, on so many threads."""
    copied = copier(threads)
    operations = 2.0 * _SIDE**3
    return {
        "fp32_per_s": _rate(operations, product("MatMul", threads), threads),
        "int8_per_s": _rate(operations, product("MatMulInteger", threads), threads),
        "bytes_per_s": _rate(2.0 * _COPIED_MIB * 2**20, copied, threads),
    }


def gpu_rates(threads: int) -> dict[str, float | None]:
    """Products in fp32, fp16 and bf16 and copies, by PyTorch on the first GPU."""
    import torch

    def timed(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (call(), torch.cuda.synchronize())

    rates = {}
    for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        matrix = torch.randn(_GPU_SIDE, _GPU_SIDE, device="cuda").to(kind)
        rates[f"{name}_per_s"] = _rate(2.0 * _GPU_SIDE**3, timed(lambda m=matrix: m @ m), threads)
    block, target = (torch.zeros(_GPU_COPIED_MIB * 2**20, dtype=torch.uint8, device="cuda") for _ in range(2))
    return rates | {"bytes_per_s": _rate(2.0 * block.nbytes, timed(lambda: target.copy_(block)), threads)}


def product(operator: str, threads: int) -> Callable[[], object]:
    """One product of two square matrices in ONNX Runtime, by `MatMul` (fp32) or `MatMulInteger` (uint8 by int8)."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    left, right = random.integers(0, 127, (2, _SIDE, _SIDE))
    whole = operator == "MatMulInteger"
    left = left.astype(np.uint8 if whole else np.float32)
    weights = numpy_helper.from_array(right.astype(np.int8 if whole else np.float32), "weights")
    kinds = (TensorProto.UINT8, TensorProto.INT32) if whole else (TensorProto.FLOAT, TensorProto.FLOAT)
    ports = [helper.make_tensor_value_info(name, kind, [_SIDE, _SIDE]) for name, kind in zip("xy", kinds, strict=True)]
    graph = helper.make_graph([helper.make_node(operator, ["x", "weights"], ["y"])], "product", ports[:1], ports[1:],
                              [weights])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU_PROVIDER])
    return lambda: session.run(None, {"x": left})


def copier(threads: int) -> Callable[[], object]:
    """A copy of `_COPIED_MIB`, a part in each thread; numpy lets go of the interpreter's lock while it copies."""
    parts = [np.ones(_COPIED_MIB * 2**20 // threads, dtype=np.uint8) for _ in range(threads)]
    targets = [np.empty_like(part) for part in parts]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.copyto, targets, parts))


def _rate(amount: float, call: Callable[[], Any], threads: int) -> float | None:
    """`amount` a second of the fastest call, as it is a limit that is looked for."""
    found = measure(call, Settings(threads, _WINDOW_S, _WINDOWS, _STABILITY), SystemClock())
    return amount / float(found.calls_s.min()) if found.calls_s.size else None


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
