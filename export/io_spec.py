"""What goes into and comes out of an exported model: names, types and axes, declared once for each architecture.
Exporter, parity gate, runners and benchmark read it; tracing and running are theirs.

Names and axes follow optimum (its OnnxConfig and TextDecoderWithPositionIdsOnnxConfig), so that its loaders and Triton
configurations written for it fit. A causal model has a cache: one graph serves the prompt, with a past of length 0, and
every later step.
An encoder-decoder is two graphs. The encoder's also puts out the keys and values that the decoder's layers attend to,
which are so computed once, and decoder_with_past_model's face is optimum's; with a past of length 0 it takes the first
step, too, which makes optimum's decoder_model, and the If node of its merged one, needless (`merged` writes that for
transformers.js).
Shape letters: B batch, T sequence length, P length of the past, S length of the encoder's text, V vocabulary, K heads
of keys and values, D their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from trainer.errors import UserError
from trainer.export_config import ONNX_FILES, Precision

Value = TypeVar("Value")

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
ENCODED = "encoder_sequence_length"
Task = Literal[
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
    "classification",
    "token_classification",
    "question_answering",
    "feature_extraction",
]

_ENCODERS = ("Bert", "DistilBert", "Roberta", "ModernBert")
_HEADS: dict[str, Task] = {
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "Model": "feature_extraction",
}
_DECODERS = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_PAIRS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BartForConditionalGeneration")
TASKS: dict[str, Task] = {f"{encoder}{head}": task for encoder in _ENCODERS for head, task in _HEADS.items()}
TASKS |= dict.fromkeys(_DECODERS, "causal_lm")
TASKS |= dict.fromkeys(_PAIRS, "seq2seq_lm")
_TOKEN_TYPES = ("bert",)
# optimum's names of the two graphs of an encoder-decoder
PAIR_STEMS = ("encoder_model", "decoder_with_past_model")
# In a graph's metadata: the tensors of its past may be longer than the past is, and are then those of the present, too.
ROOM_IN_PAST = "lmworks.room_in_past"
# An input of such a graph that may be left out: how many of the last tokens' logits are wanted, 0: all.
LOGITS_TO_KEEP = "num_logits_to_keep"
# T5's positions are relative, without an end; it was trained on texts of so many tokens (Raffel et al. 2020).
_T5_LENGTH = 512


@dataclass(frozen=True)
class Port:
    """One input or output: its name, numpy's name of its type, and its axes (a name where it is dynamic)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.axes))}]"


@dataclass(frozen=True)
class CacheLayout:
    """What a decoder keeps of each layer, keys and values alike: float32 [B, heads, P, head_size]."""

    layers: int
    heads: int
    head_size: int
    of: str = ""
    """`decoder.` or `encoder.` in the names where there are both: what it has seen itself, and what was encoded."""

    @property
    def past_names(self) -> tuple[str, ...]:
        """Inputs that hold the past, in the order of `present_names`."""
        return tuple(
            f"past_key_values.{layer}.{self.of}{kind}" for layer in range(self.layers) for kind in ("key", "value")
        )

    @property
    def present_names(self) -> tuple[str, ...]:
        """Outputs that are the past of the next step."""
        return tuple(f"present.{layer}.{self.of}{kind}" for layer in range(self.layers) for kind in ("key", "value"))

    def ports(self, names: tuple[str, ...], length: str) -> tuple[Port, ...]:
        return tuple(Port(name, "float32", (BATCH, self.heads, length, self.head_size)) for name in names)

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """A past of length 0."""
        shape = (batch, self.heads, 0, self.head_size)
        return {name: np.zeros(shape, dtype=np.float32) for name in self.past_names}

    def next_past(self, outputs: Mapping[str, Value]) -> dict[str, Value]:
        """What one step puts out under the names that the next takes it by."""
        return {past: outputs[present] for past, present in zip(self.past_names, self.present_names, strict=True)}


@dataclass(frozen=True)
class IoSpec:
    """The face of one model's graph, and what is needed to feed it. Of an encoder-decoder it is the decoder's."""

    architecture: str
    model_type: str
    task: Task
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_length: int
    vocab_size: int
    pad_id: int
    cache: CacheLayout | None = None
    stem: str = "model"
    """What the graph's file is called, before the form's name."""
    cross: CacheLayout | None = None
    """Keys and values that an encoder puts out and its decoder takes."""
    encoder: "IoSpec | None" = None
    start_id: int = 0
    """The token that a decoder with an encoder begins with."""

    @property
    def parts(self) -> "tuple[IoSpec, ...]":
        """The faces of all graphs of the model."""
        return (self.encoder, self) if self.encoder else (self,)

    @property
    def reader(self) -> "IoSpec":
        """The face that takes a text: the encoder's, where there is one."""
        return self.encoder or self

    @property
    def prefix(self) -> str:
        """What the names of evidence begin with: `encoder_` for that graph of an encoder-decoder."""
        return "encoder_" if self.cross and not self.encoder else ""

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> "IoSpec":
        """The face that `dataclasses.asdict` made a record of, also where it went through JSON; it needs no model."""
        ports = {
            which: tuple(Port(one["name"], one["dtype"], tuple(one["axes"])) for one in record[which])
            for which in ("inputs", "outputs")
        }
        caches = {which: CacheLayout(**record[which]) if record[which] else None for which in ("cache", "cross")}
        encoder = IoSpec.of_record(record["encoder"]) if record["encoder"] else None
        return IoSpec(**{**record, **ports, **caches, "encoder": encoder})

    def file(self, variant: Precision) -> str:
        """Name of the graph's file in one form."""
        (name,) = graph_files([self.stem], f"onnx_{variant}")
        return name

    def files(self, variant: Precision) -> tuple[str, ...]:
        """Names of all graphs' files in one form."""
        return tuple(part.file(variant) for part in self.parts)

    def feeds(
        self, ids_BT: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """All inputs of the model for token ids, int64 [B, T], and a mask (1 token, 0 padding), int64 [B, P + T].

        Without `past` a decoder gets one of length 0. Where there is an encoder, the mask is that of its text, int64
        [B, S], and `past` must hold what it put out.
        """
        made = self.token_feeds(ids_BT, mask)
        if self.cache is not None:
            past = self.cache.empty(len(ids_BT)) | dict(past or {})
            made |= {port.name: past[port.name] for port in self.inputs if port.name not in made}
        return made

    def token_feeds(self, ids_BT: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs other than the past. A token's position is the number of real tokens before it."""
        made = {
            "input_ids": ids_BT,
            "attention_mask": mask,
            "encoder_attention_mask": mask,
            "token_type_ids": np.zeros_like(ids_BT),
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids_BT.shape[1] :],
        }
        ports = [port for port in self.inputs if port.name in made]
        return {port.name: np.ascontiguousarray(made[port.name], dtype=port.dtype) for port in ports}

    def pad(self, rows: Sequence[np.ndarray], length: int, left: bool = False) -> dict[str, np.ndarray]:
        """Inputs for rows of token ids, padded to `length` tokens on the right, or on the left as for generating."""
        ids_BT = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids_BT[index, place] = row
            mask_BT[index, place] = 1
        return self.feeds(ids_BT, mask_BT)


def graph_files(stems: Sequence[str], backend: str) -> tuple[str, ...]:
    """Names of graphs' files in one form."""
    return tuple(ONNX_FILES[backend].replace("model", stem, 1) for stem in stems)


def exported_stems(about: Mapping[str, Any]) -> tuple[str, ...]:
    """What the graphs of an export are called, by what its artifact says of it."""
    return PAIR_STEMS if "encoder_inputs" in about else ("model",)


def read_spec(folder: Path) -> IoSpec:
    """The face of the model in a transformers folder.

    Raises UserError when there is no config.json that can be read, or its architecture is not one of `TASKS`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json", "a model folder of transformers", "train it, or mend the path"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}/config.json: {said}", f"a config of one of {', '.join(TASKS)}", "mend it") from None
    return spec_of(config)


def spec_of(config: Any) -> IoSpec:
    """The face of a model with this transformers config; UserError for an architecture that is not supported."""
    architecture = (config.architectures or ["none named"])[0]
    if architecture not in TASKS:
        raise UserError(
            f"architecture {architecture} (model type {config.model_type}) cannot be exported",
            f"one of {', '.join(TASKS)}",
            "export another model",
        )
    task = TASKS[architecture]
    if task == "seq2seq_lm":
        return _pair_spec(config, architecture)
    cache = _cache_layout(config) if task == "causal_lm" else None
    outputs = _outputs(task, config)
    return IoSpec(
        architecture=architecture,
        model_type=config.model_type,
        task=task,
        inputs=_token_ports(config.model_type, cache is not None)
        + (cache.ports(cache.past_names, PAST) if cache else ()),
        outputs=outputs + (cache.ports(cache.present_names, TOTAL) if cache else ()),
        max_length=_max_length(config),
        vocab_size=config.vocab_size,
        pad_id=max(0, config.pad_token_id or 0),  # some name -1; what is padded is masked
        cache=cache,
    )


def _pair_spec(config: Any, architecture: str) -> IoSpec:
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    size = getattr(config, "d_kv", None) or config.d_model // heads
    layers = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    own, cross = (CacheLayout(layers, heads, size, of) for of in ("decoder.", "encoder."))
    shared = {
        "architecture": architecture,
        "model_type": config.model_type,
        "task": "seq2seq_lm",
        "max_length": getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", _T5_LENGTH),
        "vocab_size": config.vocab_size,
        "pad_id": config.pad_token_id or 0,
        "cross": cross,
    }
    hidden = Port("last_hidden_state", "float32", (BATCH, SEQUENCE, config.d_model))
    encoder = IoSpec(
        inputs=_token_ports(config.model_type, cached=False),
        outputs=(hidden, *cross.ports(cross.present_names, SEQUENCE)),
        stem=PAIR_STEMS[0],
        **shared,
    )
    tokens = (Port("input_ids", "int64", (BATCH, SEQUENCE)), Port("encoder_attention_mask", "int64", (BATCH, ENCODED)))
    logits = Port("logits", "float32", (BATCH, SEQUENCE, config.vocab_size))
    start = getattr(config, "decoder_start_token_id", None)
    return IoSpec(
        inputs=(*tokens, *own.ports(own.past_names, PAST), *cross.ports(cross.past_names, ENCODED)),
        outputs=(logits, *own.ports(own.present_names, TOTAL)),
        cache=own,
        stem=PAIR_STEMS[1],
        encoder=encoder,
        start_id=shared["pad_id"] if start is None else start,
        **shared,
    )


def _outputs(task: Task, config: Any) -> tuple[Port, ...]:
    """The outputs other than the cache, in optimum's names. Those called logits have scores that compete in their last
    axis."""
    axes: dict[str, tuple[str | int, ...]] = {"logits": (BATCH, SEQUENCE, config.vocab_size)}
    if task == "classification":
        axes = {"logits": (BATCH, config.num_labels)}
    elif task == "token_classification":
        axes = {"logits": (BATCH, SEQUENCE, config.num_labels)}
    elif task == "question_answering":
        axes = {"start_logits": (BATCH, SEQUENCE), "end_logits": (BATCH, SEQUENCE)}
    elif task == "feature_extraction":
        axes = {"last_hidden_state": (BATCH, SEQUENCE, config.hidden_size)}
    return tuple(Port(name, "float32", its) for name, its in axes.items())


def _token_ports(model_type: str, cached: bool) -> tuple[Port, ...]:
    axes: dict[str, tuple[str | int, ...]] = {
        "input_ids": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, TOTAL if cached else SEQUENCE),
    }
    if model_type in _TOKEN_TYPES:
        axes["token_type_ids"] = (BATCH, SEQUENCE)
    if cached:
        axes["position_ids"] = (BATCH, SEQUENCE)
    return tuple(Port(name, "int64", its) for name, its in axes.items())


def _cache_layout(config: Any) -> CacheLayout:
    heads = config.num_attention_heads
    return CacheLayout(
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _max_length(config: Any) -> int:
    if config.model_type == "roberta":  # its positions begin after the padding index
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings
