"""What goes into and comes out of an exported model: names, types and axes, declared once for each architecture.
Exporter, parity gate, runners and benchmark read it; tracing and running are theirs.

Names follow optimum, so that its loaders and Triton configurations written for it fit. A cache for decoding would be
further inputs (`past_key_values.<i>.key`), outputs (`present.<i>.key`) and one more axis here.
Shape letters: B batch, T sequence length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.errors import UserError

BATCH = "batch_size"
SEQUENCE = "sequence_length"
Task = Literal["masked_lm", "causal_lm", "classification"]

TASKS: dict[str, Task] = {
    "BertForMaskedLM": "masked_lm",
    "DistilBertForMaskedLM": "masked_lm",
    "RobertaForMaskedLM": "masked_lm",
    "ModernBertForMaskedLM": "masked_lm",
    "GPT2LMHeadModel": "causal_lm",
    "LlamaForCausalLM": "causal_lm",
    "BertForSequenceClassification": "classification",
    "DistilBertForSequenceClassification": "classification",
    "RobertaForSequenceClassification": "classification",
    "ModernBertForSequenceClassification": "classification",
}
_THIRD_INPUT = {"bert": "token_type_ids", "gpt2": "position_ids", "llama": "position_ids"}


@dataclass(frozen=True)
class Port:
    """One input or output: its name, numpy's name of its type, and its axes (a name where it is dynamic)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.axes))}]"


@dataclass(frozen=True)
class IoSpec:
    """The face of one model, and what is needed to feed it."""

    architecture: str
    model_type: str
    task: Task
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_length: int
    vocab_size: int
    pad_id: int

    def feeds(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, np.ndarray]:
        """All inputs of the model for token ids and a mask (1 token, 0 padding), both int64 [B, T]."""
        made = {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "token_type_ids": np.zeros_like(ids_BT),
            "position_ids": np.maximum(mask_BT.cumsum(axis=1) - 1, 0),
        }
        return {port.name: np.ascontiguousarray(made[port.name], dtype=port.dtype) for port in self.inputs}

    def pad(self, rows: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Inputs for rows of token ids, padded on the right to `length` tokens."""
        ids_BT = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row)] = row
            mask_BT[index, : len(row)] = 1
        return self.feeds(ids_BT, mask_BT)


def read_spec(folder: Path) -> IoSpec:
    """The face of the model in a transformers folder.

    Raises UserError when there is no config.json, or its architecture is not one of `TASKS`.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json", "a model folder of transformers", "train it, or mend the path"
        )
    return spec_of(AutoConfig.from_pretrained(folder, local_files_only=True))


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
    names = ["input_ids", "attention_mask"]
    if config.model_type in _THIRD_INPUT:
        names.append(_THIRD_INPUT[config.model_type])
    logits_axes = (BATCH, config.num_labels) if task == "classification" else (BATCH, SEQUENCE, config.vocab_size)
    return IoSpec(
        architecture=architecture,
        model_type=config.model_type,
        task=task,
        inputs=tuple(Port(name, "int64", (BATCH, SEQUENCE)) for name in names),
        outputs=(Port("logits", "float32", logits_axes),),
        max_length=_max_length(config),
        vocab_size=config.vocab_size,
        pad_id=config.pad_token_id or 0,
    )


def _max_length(config: Any) -> int:
    if config.model_type == "roberta":  # its positions begin after the padding index
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings
