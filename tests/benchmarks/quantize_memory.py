"""Most memory that making the int8 form of a graph takes, relative to the graph: ours, and ONNX Runtime's own.

    python tests/benchmarks/quantize_memory.py [--mib 600] [--out FILE]

Square matrices of random numbers, in the file or, as all graphs above 2 GB have them, beside it. Each way runs in a
process of its own; what it holds after its imports is not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

_SIZE = 2048
_WAYS = ("ours", "onnxruntime")


def write_graph(path: Path, mib: int, beside: bool) -> int:
    """A chain of products; returns its size in bytes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from export.files import data_file

    layers = mib * 2**20 // (4 * _SIZE**2)
    random = np.random.default_rng(0)
    arrays = (random.standard_normal((_SIZE, _SIZE), dtype=np.float32) for _ in range(layers))
    weights = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"m{i}") for i in range(layers)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _SIZE]) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=beside, location=data_file(path).name, size_threshold=1024)
    return layers * 4 * _SIZE**2


def be_process(way: str, raw: Path) -> None:
    """Quantizes, and prints by how many bytes the process grew meanwhile."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from export.dynamic import quantize
    from export.files import data_file

    written = raw.with_name(f"{way}.onnx")
    before = _peak_bytes()
    if way == "ours":
        quantize(raw, written)
    else:
        options = {"per_channel": True, "reduce_range": True, "use_external_data_format": data_file(raw).is_file()}
        types = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(raw, written, weight_type=QuantType.QInt8, extra_options=types, **options)
    print(_peak_bytes() - before)


def _peak_bytes() -> int:
    # Not getrusage's: that begins with what the parent held.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(mib: int, beside: bool) -> dict[str, Any]:
    """Growth of each way relative to the weights."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "model.onnx")
        size, found = write_graph(raw, mib, beside), {}
        for way in _WAYS:
            command = [sys.executable, __file__, "--process", way, "--raw", str(raw)]
            grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found[way] = round(grown / size, 2)
    return {
        "mib": round(size / 2**20),
        "times_the_weights": found,
        "ratio": round(found["onnxruntime"] / found["ours"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--process", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        be_process(arguments.process, arguments.raw)
        return
    from trainer.artifact import versions, write_json
    from trainer.environment import launch_command

    results = {name: measure(arguments.mib, beside) for name, beside in (("in_the_file", False), ("beside_it", True))}
    report = {"command": launch_command(), "versions": versions(), "results": results}
    print(json.dumps(report, indent=2))
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
