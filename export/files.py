"""Graph files and what lies beside them: weights too large for one ONNX file go into a second, `<file>_data`, which is
part of all that is proven, hashed and counted. Which graphs there are is others' business.
"""

from pathlib import Path
from typing import Any

from trainer.artifact import hash_file

# protobuf refuses messages of 2 GiB; the rest is room for the graph itself.
LARGE_BYTES = 2**31 - 2**26


def data_file(file: Path) -> Path:
    """Where the weights of a large graph lie: optimum's and transformers.js's name, model.onnx_data."""
    return file.with_name(f"{file.name}_data")


def hashes(file: Path) -> dict[str, str]:
    """File name and content hash, as evidence names what it was gathered on; of the data beside it, too."""
    found = {"file": file.name, "sha256": hash_file(file)}
    return found | {"data_sha256": hash_file(data_file(file))} if data_file(file).is_file() else found


def is_the_one(proof: dict[str, Any], file: Path) -> bool:
    """Whether evidence was gathered on this very file, data included."""
    data = data_file(file)
    same = proof["sha256"] == hash_file(file)
    return same and proof.get("data_sha256") == (hash_file(data) if data.is_file() else None)


def size_mib(file: Path) -> float:
    data = data_file(file)
    return (file.stat().st_size + (data.stat().st_size if data.is_file() else 0)) / 2**20


def save_graph(model: Any, file: Path) -> None:
    """Write an onnx.ModelProto, with its weights beside it where they do not fit into one file, and check it."""
    import onnx

    if sum(weight.ByteSize() for weight in model.graph.initializer) > LARGE_BYTES:
        location = data_file(file).name
        onnx.save(model, file, save_as_external_data=True, location=location, size_threshold=1024)
    else:
        onnx.save(model, file)
    onnx.checker.check_model(str(file))
