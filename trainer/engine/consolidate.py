"""A model folder from the files of a checkpoint, whatever strategy and number of ranks wrote them.
Reads and writes one part of the weights after another, so that no process ever holds the model twice."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from trainer.engine.fragments import WEIGHT, FragmentFiles
from trainer.errors import as_os_error

_MAX_FILE_BYTES = 5 * 10**9  # transformers' own default
_PREFIX = "model."  # LanguageModel holds the transformers model under this name
_BYTES = 4  # master weights are float32


def write_model(
    folder: Path, model: PreTrainedModel, files: FragmentFiles, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Write config and float32 weights so that `from_pretrained` opens them; `model` gives only its configuration."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    parts = list(_parts(shapes))
    index = {}
    for number, names in enumerate(parts, start=1):
        last = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        path = folder / f"model{last}.safetensors"
        weights = {
            name.removeprefix(_PREFIX): files.load(WEIGHT, name, 0, math.prod(shapes[name])).view(shapes[name])
            for name in names
        }
        try:
            save_file(weights, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
        index |= dict.fromkeys(weights, path.name)
    if len(parts) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * _BYTES
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of the parameters of each file."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        numel_bytes = math.prod(shape) * _BYTES
        if names and size + numel_bytes > _MAX_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += numel_bytes
    yield names
