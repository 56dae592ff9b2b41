"""A transformers model folder to a raw ONNX graph with dynamic batch and sequence, by torch's dynamo exporter.
The graph holds standard operators only, which TensorRT and OpenVINO read; fusing and quantizing are done elsewhere.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from export.io_spec import BATCH, SEQUENCE, IoSpec
from trainer.errors import UserError

_LOADERS: dict[str, Any] = {
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
# protobuf refuses messages of 2 GiB; the rest is room for the graph itself.
_MAX_WEIGHT_BYTES = 2**31 - 2**26
# Batch and length of the traced example: 0 and 1 would be taken for constants, and the mask needs padding in it.
_TRACED_BATCH, _TRACED_LENGTH = 2, 24


def load_model(folder: Path, spec: IoSpec) -> torch.nn.Module:
    """The model of a folder as it is served: fp32, evaluation mode, on the CPU.

    UserError for a folder without safetensors: its weights could only be a pickle, which runs code when it is opened.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no model.safetensors",
            "weights as safetensors; pickles such as pytorch_model.bin are not opened",
            "load the model where you trust it, and save_pretrained it again",
        )
    transformers_logging.disable_progress_bar()
    model = _LOADERS[spec.task].from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


class Traceable(torch.nn.Module):
    """The model as a function of the spec's inputs, in their order, that returns only the logits."""

    def __init__(self, model: torch.nn.Module, spec: IoSpec) -> None:
        super().__init__()
        self.model = model
        self.names = [port.name for port in spec.inputs]
        # ORT's fused rotary embedding works for more than one row only if positions have a batch axis.
        self.makes_positions = spec.model_type == "modernbert"
        self.options: dict[str, Any] = {"use_cache": False} if spec.task == "causal_lm" else {}

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = dict(zip(self.names, inputs, strict=True)) | self.options
        if self.makes_positions:
            batch, length = inputs[0].shape
            arguments["position_ids"] = torch.arange(length)[None].expand(batch, -1)
        return self.model(**arguments).logits


def export_graph(model: torch.nn.Module, spec: IoSpec, path: Path, opset: int) -> None:
    """Write `model` as a raw ONNX graph with the spec's names and axes. The model's Conv1D layers become Linear.

    Raises UserError for a model whose weights do not fit into one ONNX file.
    """
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size_bytes > _MAX_WEIGHT_BYTES:
        raise UserError(f"the model has {size_bytes / 2**30:.1f} GiB of weights", "less than 2 GiB (one ONNX file)")
    replace_conv1d(model)
    axes = {0: torch.export.Dim(BATCH, min=1, max=2**15), 1: torch.export.Dim(SEQUENCE, min=1, max=spec.max_length)}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            Traceable(model, spec).eval(),
            _example(spec),
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            dynamo=True,
            dynamic_shapes=(tuple(axes for _ in spec.inputs),),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecated internals and of torchvision's absence: nothing a user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def replace_conv1d(module: torch.nn.Module) -> None:
    """Turn GPT-2's Conv1D layers into equal Linear ones: ORT's fusions make invalid graphs of the former's Gemm."""
    for name, child in list(module.named_children()):
        if isinstance(child, Conv1D):
            linear = torch.nn.Linear(child.weight.shape[0], child.weight.shape[1])
            linear.weight = torch.nn.Parameter(child.weight.detach().t().contiguous())
            linear.bias = torch.nn.Parameter(child.bias.detach())
            setattr(module, name, linear)
        else:
            replace_conv1d(child)


def _example(spec: IoSpec) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with: their values do not matter, their sizes and the padding do."""
    length = min(_TRACED_LENGTH, spec.max_length)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, spec.vocab_size, (_TRACED_BATCH, length), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, length // 2 :] = 0
    return tuple(torch.from_numpy(array) for array in spec.feeds(ids_BT.numpy(), mask_BT.numpy()).values())
