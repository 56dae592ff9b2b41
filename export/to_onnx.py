"""A transformers model folder to a raw ONNX graph with dynamic batch and sequence, by torch's dynamo exporter.
The graph holds standard operators only, which TensorRT and OpenVINO read; fusing and quantizing are done elsewhere.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from export import files
from export.files import data_file
from export.io_spec import BATCH, ENCODED, PAST, SEQUENCE, TOTAL, CacheLayout, IoSpec
from trainer.errors import UserError
from trainer.models import refused

_LOADERS: dict[str, Any] = {
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "feature_extraction": AutoModel,
}
# Batch, length and past of the traced example: 0 and 1 would be taken for constants, and the mask needs padding in it.
_TRACED_BATCH, _TRACED_LENGTH, _TRACED_PAST, _TRACED_ENCODED = 2, 24, 5, 11


def load_model(folder: Path, spec: IoSpec) -> torch.nn.Module:
    """The model of a folder as it is served: fp32, evaluation mode, on the CPU.

    UserError for a folder without safetensors: its weights could only be a pickle, which runs code when it is opened;
    and for one that lacks weights, which transformers would make up, the same ones in source and graph.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no model.safetensors",
            "weights as safetensors; pickles such as pytorch_model.bin are not opened",
            "load the model where you trust it, and save_pretrained it again",
        )
    transformers_logging.disable_progress_bar()
    with refused(str(folder), f"whole weights of a {spec.architecture} that has attention sdpa"):
        loaded: Any = _LOADERS[spec.task].from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    model, loading = loaded
    lacking = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))  # not asked for
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} of the weights of {spec.architecture}, first {lacking[0]}",
            "a folder with all of them",
            "take the one that holds them, or train the model",
        )
    return model.eval()


class Traceable(torch.nn.Module):
    """The model as a function of the spec's inputs, in their order, that returns the spec's outputs in theirs."""

    def __init__(self, model: torch.nn.Module, spec: IoSpec) -> None:
        super().__init__()
        self.model = model
        self.cache, self.cross, self.encoded = spec.cache, spec.cross, spec.encoder is not None
        self.names = [port.name for port in spec.inputs]
        self.outputs = [port.name for port in spec.outputs]
        # ORT's fused rotary embedding works for more than one row only if positions have a batch axis.
        self.makes_positions = spec.model_type == "modernbert"

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if self.makes_positions:
            batch, length = inputs[0].shape
            arguments["position_ids"] = torch.arange(length, device=inputs[0].device)[None].expand(batch, -1)
        if self.cache is None and self.cross is not None:
            return self._encode(arguments, self.cross)
        if self.cache is None:
            made = self.model(**arguments)
            return tuple(getattr(made, name) for name in self.outputs)
        past = _past_of(arguments, self.cache)
        if self.encoded:
            logits = self._decode(arguments, past)
        else:
            logits = self.model(**arguments, past_key_values=past, use_cache=True).logits
        layers: Any = past.layers
        return (logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))

    def _encode(self, arguments: dict[str, Any], cross: CacheLayout) -> tuple[torch.Tensor, ...]:
        """The encoder's hidden states, and the keys and values that each of the decoder's layers makes of them."""
        model: Any = self.model
        hidden = model.get_encoder()(**arguments).last_hidden_state
        projected = [projection(hidden) for layer in _cross_projections(model) for projection in layer]
        shape = (*hidden.shape[:2], cross.heads, cross.head_size)
        return (hidden, *(value.view(shape).transpose(1, 2) for value in projected))

    def _decode(self, arguments: dict[str, Any], past: DynamicCache) -> torch.Tensor:
        """Logits of a decoder, which is given what was encoded as keys and values; nothing of it is computed again."""
        assert self.cross is not None
        keys: torch.Tensor = arguments[self.cross.past_names[0]]
        crossed = _past_of(arguments, self.cross)
        length = past.get_seq_length() + arguments["input_ids"].shape[1]
        return self.model(
            decoder_input_ids=arguments["input_ids"],
            # Without it the causal mask is left to attention itself, which T5's position bias counts from 0.
            decoder_attention_mask=torch.ones(keys.shape[0], length, dtype=torch.int64, device=keys.device),
            attention_mask=arguments["encoder_attention_mask"],
            encoder_outputs=BaseModelOutput(last_hidden_state=keys[:, 0]),  # asked for its batch and length only
            past_key_values=EncoderDecoderCache(past, crossed),
            use_cache=True,
        ).logits


def _cross_projections(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """What makes keys and values of encoded text, in each layer of the decoder."""
    if model.config.model_type == "bart":
        attentions = [layer.encoder_attn for layer in model.model.decoder.layers]
        return [(attention.k_proj, attention.v_proj) for attention in attentions]
    attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
    return [(attention.k, attention.v) for attention in attentions]


def _past_of(arguments: dict[str, Any], layout: CacheLayout) -> DynamicCache:
    """Take the past out of a model's arguments, as transformers' own cache.

    Its layers are filled by hand: `update` would first join the past to an empty tensor, a copy in the graph. All keep
    their whole past, as a sliding window is the mask's matter.
    """
    past = DynamicCache()
    names = iter(layout.past_names)
    for key_name, value_name in zip(names, names, strict=True):
        layer: Any = DynamicLayer()
        layer.keys, layer.values = arguments.pop(key_name), arguments.pop(value_name)
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        past.layers.append(layer)
    return past


def export_graph(model: torch.nn.Module, spec: IoSpec, path: Path, opset: int) -> None:
    """Write `model` as a raw ONNX graph with the spec's names and axes, a large one's weights in a file beside it.

    The model's Conv1D layers become Linear, and T5's position buckets a table.
    """
    replace_conv1d(model)
    tabulate_buckets(model)
    with torch.no_grad(), _quiet(), _as_user_error(spec):
        program = torch.onnx.export(
            Traceable(model, spec).eval(),
            _example(spec),
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            dynamo=True,
            dynamic_shapes=(_dynamic_shapes(spec),),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    _tidy(program.model, spec)
    transpose_keys_at_once(program.model)
    divide_by_roots(program.model)
    take_softmax_as_it_is(program.model)
    common.RemoveUnusedNodesPass()(program.model)
    size_bytes = sum(weight.const_value.nbytes for weight in program.model.graph.initializers.values()
                     if weight.const_value is not None)  # fmt: skip
    ir.save(program.model, path, external_data=data_file(path).name if size_bytes > files.LARGE_BYTES else None)
    onnx.checker.check_model(str(path), full_check=True)


def _dynamic_shapes(spec: IoSpec) -> tuple[dict[int, Any], ...]:
    """For each input its dynamic axes. One that is a sum of two others has no name in torch: it gets its own later."""
    dims: dict[str, Any] = {
        BATCH: torch.export.Dim(BATCH, min=1, max=2**15),
        SEQUENCE: torch.export.Dim(SEQUENCE, min=1, max=spec.max_length),
        PAST: torch.export.Dim(PAST, min=0, max=spec.max_length),
        TOTAL: torch.export.Dim.DYNAMIC,
        ENCODED: torch.export.Dim(ENCODED, min=1, max=spec.max_length),
    }
    return tuple(
        {index: dims[axis] for index, axis in enumerate(port.axes) if isinstance(axis, str)} for port in spec.inputs
    )


def _tidy(model: ir.Model, spec: IoSpec) -> None:
    """Give the dynamic axes that torch named after symbols of its own the spec's names; fixed ones stay fixed.

    Stack traces, which the exporter leaves at every node, go: they hold paths of this machine.
    """
    ports = {port.name: port for port in (*spec.inputs, *spec.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None and value.shape is not None
        dims = [
            axis if isinstance(axis, str) and not isinstance(dim, int) else dim
            for dim, axis in zip(value.shape, ports[value.name].axes, strict=True)
        ]
        value.shape = ir.Shape(dims)
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def transpose_keys_at_once(model: ir.Model) -> None:
    """Write the transpose of attention's keys, [B, K, S, D] to [B, K, D, S], as one node.

    torch's exporter makes it of a Reshape to three axes, a Transpose, and a Reshape back, which ONNX Runtime does not
    take into the product: all keys of a cache would be copied at each step.
    """
    makers = {output: node for node in model.graph for output in node.outputs}
    for back in [node for node in model.graph if node.op_type == "Reshape"]:
        turned = makers.get(back.inputs[0])  # type: ignore[arg-type] - None is no key
        flat = makers.get(turned.inputs[0]) if turned and turned.op_type == "Transpose" else None  # type: ignore[arg-type]
        if not (
            turned and flat and flat.op_type == "Reshape" and tuple(turned.attributes["perm"].as_ints()) == (0, 2, 1)
        ):
            continue
        keys = flat.inputs[0]
        if keys is None or keys.shape is None or len(keys.shape) != 4:
            continue
        whole = ir.node("Transpose", [keys], {"perm": [0, 1, 3, 2]}, name=turned.name)
        whole.outputs[0].name, whole.outputs[0].type = turned.outputs[0].name, back.outputs[0].type
        model.graph.insert_before(back, whole)
        ir.convenience.replace_all_uses_with(back.outputs[0], whole.outputs[0])
        model.graph.remove([back, turned], safe=True)


def divide_by_roots(model: ir.Model) -> None:
    """Write x * (1 / sqrt(v)), torch's exporter's form of a norm by the root of the mean square, as x / sqrt(v).

    In that form ONNX Runtime knows it: the seven nodes of a Llama's norm become one when it loads the graph.
    """
    makers = {output: node for node in model.graph for output in node.outputs}
    for product in [node for node in model.graph if node.op_type == "Mul"]:
        for value, other in (product.inputs, reversed(product.inputs)):
            reciprocal = makers.get(value)  # type: ignore[arg-type] - None is no key
            root = makers.get(reciprocal.inputs[0]) if reciprocal and reciprocal.op_type == "Reciprocal" else None  # type: ignore[arg-type]
            if root is None or root.op_type != "Sqrt":
                continue
            quotient = ir.node("Div", [other, root.outputs[0]], name=product.name)
            quotient.metadata_props.update(product.metadata_props)
            made, now = product.outputs[0], quotient.outputs[0]
            now.name, now.type, now.shape = made.name, made.type, made.shape
            model.graph.insert_before(product, quotient)
            ir.convenience.replace_all_uses_with(made, now)
            model.graph.remove(product, safe=True)
            break


def take_softmax_as_it_is(model: ir.Model) -> None:
    """Remove the exporter's replacement of NaN by 0 behind attention's softmax, where the mask is finite.

    A row that attends to nothing, as padding's own may, then attends to all alike; a NaN of an overflow is seen. With
    the two nodes between softmax and product TensorRT makes no single layer of attention (TensorRT-RTX, BERT-base in
    fp16, two profiles: 407 layers instead of 277), and ONNX Runtime goes over all probabilities twice more (BERT-base
    in int8, 4 x 512 tokens: a fifth of the time).
    """
    makers = {output: node for node in model.graph for output in node.outputs}

    def maker(value: ir.Value | None, kind: str) -> ir.Node | None:
        node = makers.get(value)  # type: ignore[arg-type] - None is no key
        return node if node is not None and node.op_type == kind else None

    for chosen in [node for node in model.graph if node.op_type == "Where"]:
        probabilities = chosen.inputs[2]
        test, softmax = maker(chosen.inputs[0], "IsNaN"), maker(probabilities, "Softmax")
        masked = maker(softmax.inputs[0], "Add") if softmax else None
        mask = maker(masked.inputs[1], "Where") if masked else None
        if probabilities is None or test is None or mask is None or test.inputs[0] is not probabilities:
            continue
        added = [value.const_value if value is not None else None for value in mask.inputs[1:]]
        if all(constant is not None and np.isfinite(constant.numpy()).all() for constant in added):
            ir.convenience.replace_all_uses_with(chosen.outputs[0], probabilities)
            model.graph.remove([chosen, test], safe=True)


@contextlib.contextmanager
def _as_user_error(spec: IoSpec) -> Iterator[None]:
    """A model that torch cannot trace is the user's, or the exporter's: its first line tells more than its pages."""
    try:
        yield
    except torch.onnx.errors.OnnxExporterError as error:  # pyright: ignore[reportAttributeAccessIssue]
        said = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "no reason")
        raise UserError(
            f"torch cannot export this {spec.architecture}: {said[:300]}",
            "a model without control flow that depends on its input",
            "change that setting of its config.json, or export another model",
        ) from error


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


def tabulate_buckets(model: torch.nn.Module) -> None:
    """Let T5's attention look the bucket of a distance up in a table of integers, to the same result.

    Its formula takes the logarithm of 0, where the result is not used, and in 16 bits it rounds to other buckets.
    Beyond the largest distance all are in one, so that the table ends there.
    """
    for module in model.modules():
        if hasattr(module, "relative_attention_bias"):
            attention: Any = module
            reach = attention.relative_attention_max_distance
            buckets = attention._relative_position_bucket(
                torch.arange(-reach, reach + 1),
                bidirectional=not attention.is_decoder,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=reach,
            )
            attention.register_buffer("buckets", buckets, persistent=False)
            attention.compute_bias = functools.partial(_tabled_bias, attention)


def _tabled_bias(
    attention: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
) -> torch.Tensor:
    """What T5Attention.compute_bias gives, [1, K, T, P + T], from its table."""
    own_T1 = torch.arange(query_length)[:, None] + past_seen_tokens
    reach = attention.relative_attention_max_distance
    distance = (torch.arange(key_length)[None, :] - own_T1).clamp(-reach, reach)
    return attention.relative_attention_bias(attention.buckets[distance + reach]).permute(2, 0, 1)[None]


def _example(spec: IoSpec) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with: their values do not matter, their sizes and the padding do."""
    past_length = _TRACED_PAST if spec.cache else 0
    length = min(_TRACED_LENGTH, spec.max_length - past_length)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, spec.vocab_size, (_TRACED_BATCH, length), generator=generator)
    encoded = min(_TRACED_ENCODED, spec.max_length)
    seen = encoded if spec.encoder else past_length + length
    mask = torch.ones(_TRACED_BATCH, seen, dtype=torch.int64)
    mask[1, -(min(length, seen) // 2) :] = 0
    past = {}
    for layout, size in ((spec.cache, past_length), (spec.cross if spec.encoder else None, encoded)):
        if layout:
            shape = (_TRACED_BATCH, layout.heads, size, layout.head_size)
            past |= {name: np.zeros(shape, dtype=np.float32) for name in layout.past_names}
    return tuple(torch.from_numpy(array) for array in spec.feeds(ids_BT.numpy(), mask.numpy(), past).values())
