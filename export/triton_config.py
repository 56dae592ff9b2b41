"""Triton's model configurations (config.pbtxt) of one packed model, as text made from the model's IoSpec.
Files and folders are `pack`'s; what the Python models do is in `triton_models`.

Shape letters: B batch, T sequence length. Triton adds B itself, so that it stands in no `dims`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.io_spec import BATCH, ENCODED, PAST, SEQUENCE, TOTAL, IoSpec, Port
from trainer.errors import UserError
from trainer.serving_config import Pack

# What a client sends, texts of one row each, and what it gets; other tasks than these take TEXT and give ANSWER, JSON.
_TEXTS = {"question_answering": ("QUESTION", "CONTEXT")}
_READS_TEXTS = ("token_classification", "question_answering")  # to answer with places in the text
# What the answering model reads beside the network's outputs.
_TOKEN_PORTS = ("input_ids", "attention_mask")
_TYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
_TEXT_PORT = {"data_type": "TYPE_STRING", "dims": [1]}
Message = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """Names of the models that serve one exported model: four, of an encoder-decoder five."""

    network: str

    def of(self, spec: IoSpec) -> str:
        """The name of a graph."""
        if spec.cross is None:
            return self.network
        return f"{self.network}_decoder" if spec.encoder else f"{self.network}_encoder"

    @property
    def tokenizer(self) -> str:
        return f"{self.network}_tokenize"

    @property
    def answer(self) -> str:
        return f"{self.network}_answer"

    @property
    def ensemble(self) -> str:
        return f"{self.network}_text"


@dataclass(frozen=True)
class Engines:
    """TensorRT engines of one variant: compute capability ("8.0") to the plan for it, all of the same profiles.

    `max_length`: tokens in a text that every profile takes; `longest_past`: tokens before the one that the decoder of
    an encoder-decoder takes.
    """

    plans: Mapping[str, Path]
    profiles: int
    max_length: int
    library_version: str
    content_sha256: str
    evidence: list[dict[str, Any]]
    longest_past: int | None = None

    @property
    def library_number(self) -> int:
        """The version as TensorRT's own getInferLibVersion() says it (10.13.3: 101303)."""
        major, minor, patch = (int(part) for part in self.library_version.split(".")[:3])
        return major * 10000 + minor * 100 + patch


class Word(str):
    """An enumerator, which protobuf's text form writes without quotes."""


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Protobuf's text form of nested mappings; a list is a repeated field."""
    lines = []
    for key, value in message.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key} {{\n{pbtxt(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [pbtxt({key: one}, indent) for one in value]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: [{', '.join(_scalar(one) for one in value)}]\n")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def network_config(names: Names, spec: IoSpec, settings: Pack, engines: Engines | None = None) -> Message:
    """The exported graph, or engines of it, of which Triton takes the one for its GPU."""
    kind = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}[settings.device]
    config: Message = {
        "name": names.of(spec),
        "backend": settings.backend,
        "max_batch_size": settings.max_batch_size,
        "input": [_port(port) for port in spec.inputs],
        "output": [_port(port) for port in spec.outputs],
        "dynamic_batching": _batching(settings),
        "instance_group": [{"kind": Word(kind), "count": settings.instances}],
        "model_warmup": _warm_up(spec, settings),
    }
    if engines:
        files = {capability: plan.name for capability, plan in engines.plans.items()}
        config["default_model_filename"] = next(iter(files.values()))
        config["cc_model_filenames"] = [{"key": key, "value": file} for key, file in files.items()]
        config["instance_group"][0]["profile"] = [str(index) for index in range(engines.profiles)]
    return config


def tokenizer_config(names: Names, spec: IoSpec, settings: Pack) -> Message:
    """Text to all inputs of the network, of an encoder-decoder the encoder's."""
    texts = [_text(name) for name in texts_of(spec)]
    return _python_model(names.tokenizer, settings, texts, [_port(port) for port in spec.reader.inputs])


def texts_of(spec: IoSpec) -> tuple[str, ...]:
    """Names of the texts that a client sends."""
    return _TEXTS.get(spec.task, ("TEXT",))


def answer_inputs(spec: IoSpec) -> list[str]:
    """Names of what the answering model reads, in its order: tokens, the network's outputs, texts."""
    texts = texts_of(spec) if spec.task in _READS_TEXTS else ()
    return [port.name for port in (*_token_ports(spec), *_scores(spec.reader))] + list(texts)


def answer_config(names: Names, spec: IoSpec, settings: Pack) -> Message:
    """The network's outputs, the tokens it was given and, where places in it are answered, the text, to an answer.

    Of an encoder-decoder it calls the decoder, token by token, and has as many instances as that: they wait for it.
    """
    ports = {port.name: _port(port) for port in (*_token_ports(spec), *_scores(spec.reader))}
    inputs = [ports[name] if name in ports else _text(name) for name in answer_inputs(spec)]
    answering = _python_model(names.answer, settings, inputs, _answers(spec))
    if spec.encoder is not None:
        answering["instance_group"][0]["count"] = settings.instances
    return answering


def ensemble_config(names: Names, spec: IoSpec, settings: Pack) -> Message:
    """Text in, answer out. A tensor has one name in all steps. An encoder-decoder's decoder is no step of it, as it is
    called many times: that is the answering model's work."""
    texts, reader = texts_of(spec), spec.reader
    outputs = _answers(spec)
    steps = [
        _step(names.tokenizer, texts, [port.name for port in reader.inputs]),
        _step(names.of(reader), [port.name for port in reader.inputs], [port.name for port in _scores(reader)]),
        _step(names.answer, answer_inputs(spec), [port["name"] for port in outputs]),
    ]
    return {
        "name": names.ensemble,
        "platform": "ensemble",
        "max_batch_size": settings.max_batch_size,
        "input": [_text(name) for name in texts],
        "output": outputs,
        "ensemble_scheduling": {"step": steps},
    }


def _python_model(name: str, settings: Pack, inputs: list[Message], outputs: list[Message]) -> Message:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": settings.max_batch_size,
        "input": inputs,
        "output": outputs,
        "dynamic_batching": _batching(settings),
        "instance_group": [{"kind": Word("KIND_CPU"), "count": 1}],
    }


def _step(model: str, inputs: Sequence[str], outputs: Sequence[str]) -> Message:
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": name, "value": name} for name in inputs],
        "output_map": [{"key": name, "value": name} for name in outputs],
    }


def _scores(spec: IoSpec) -> list[Port]:
    """The network's outputs that are made use of: all but a cache, or of an encoder with a decoder what that reads."""
    if spec.cross is not None and spec.encoder is None:
        return [port for port in spec.outputs if port.name in spec.cross.present_names]
    cache = spec.cache.present_names if spec.cache else ()
    return [port for port in spec.outputs if port.name not in cache]


def _answers(spec: IoSpec) -> list[Message]:
    if spec.task != "feature_extraction":
        return [_text("ANSWER")]
    (hidden,) = _scores(spec)
    features = _port(hidden) | {"name": "FEATURES"}
    return [features, features | {"name": "EMBEDDING", "dims": features["dims"][1:]}]


def _batching(settings: Pack) -> Message:
    return {"max_queue_delay_microseconds": round(settings.max_queue_delay_ms * 1000)}


def _warm_up(spec: IoSpec, settings: Pack) -> list[Message]:
    """Zeros of the shortest shape, alone and in the largest batch: the first call allocates, later ones are quick.

    A cache is empty, and a decoder with an encoder takes one token.
    """
    free = min(settings.pad_to_multiple_of, spec.max_length)
    sizes = {SEQUENCE: 1 if spec.encoder else free, PAST: 0, TOTAL: free, ENCODED: free}
    dims = {
        port.name: [axis if isinstance(axis, int) else sizes[axis] for axis in port.axes[1:]] for port in spec.inputs
    }
    inputs = [
        {"key": port.name, "value": {**_port(port), "dims": dims[port.name], "zero_data": True}} for port in spec.inputs
    ]
    for one in inputs:
        del one["value"]["name"]
    sizes = dict.fromkeys((1, settings.max_batch_size))
    return [{"name": f"batch_{size}", "batch_size": size, "inputs": inputs} for size in sizes]


def _token_ports(spec: IoSpec) -> list[Port]:
    return [port for port in spec.reader.inputs if port.name in _TOKEN_PORTS]


def _text(name: str) -> Message:
    return {"name": name, **{key: Word(value) if key == "data_type" else value for key, value in _TEXT_PORT.items()}}


def _port(port: Port) -> Message:
    if port.axes[0] != BATCH or port.dtype not in _TYPES:
        raise UserError(f"Triton cannot be told of {port}", f"axes that begin with {BATCH}, of {', '.join(_TYPES)}")
    dims = [axis if isinstance(axis, int) else -1 for axis in port.axes[1:]]
    return {"name": port.name, "data_type": Word(_TYPES[port.dtype]), "dims": dims}


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value)  # its escapes, numbers and true/false are those of protobuf's text form


def as_text(configs: Sequence[Message]) -> dict[str, str]:
    """Name of each model to the text of its config.pbtxt."""
    return {config["name"]: pbtxt(config) for config in configs}
