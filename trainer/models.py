"""Builds and loads models, and runs them on packed rows, with the loss as a part of the forward pass.
The numbers about a model (parameters, FLOPs) are here too; how it is trained is left to `engine`.

Shapes: B rows, T tokens in a row, N target tokens, D hidden size, V vocabulary.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from trainer.attention import Kernel, packed_inputs, position_offset
from trainer.config import Model
from trainer.data.stream import Batch
from trainer.errors import UserError
from trainer.heads import WHOLE, Head, LossPlan, Score, Sums, head_of, nothing, sums_over_targets


class AtTargets(NamedTuple):
    """What a forward pass comes to before the head."""

    hidden_BTD: Tensor  # the last hidden states
    hidden_ND: Tensor  # of them those at targets, as the head takes them
    head: Head


class LanguageModel(nn.Module):
    """A transformers language model that takes packed rows and gives sums over the logits where there is a target.

    All that touches parameters happens inside `forward`, head and loss included: that is where DDP counts them,
    and where FSDP and ZeRO-3 have them at hand.
    """

    def __init__(self, model: PreTrainedModel, kernel: Kernel = "sdpa", loss_plan: LossPlan = WHOLE) -> None:
        super().__init__()
        self.model = model
        self._kernel: Kernel = kernel
        self._loss_plan = loss_plan
        self._is_causal = is_causal(model)

    def forward(self, batch: Batch, score: Score, score_hidden: Callable[[Tensor], Sums] | None = None) -> Sums:
        """The sums that `score` makes of the logits at targets, and `score_hidden` of the last hidden states [B, T, D].

        Call it by keywords: ZeRO-3 warns of positional arguments that it cannot look into.
        """
        at = self.at_targets(batch)
        sums = sums_over_targets(at.head, at.hidden_ND, score, self._loss_plan)
        return sums | (score_hidden(at.hidden_BTD) if score_hidden else {})

    def at_targets(self, batch: Batch) -> AtTargets:
        """Hidden states everywhere and at the targets, and the head that makes logits of the latter."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        inputs |= {"use_cache": False} if self._is_causal else {}
        inputs |= packed_inputs(self.model.config, self._is_causal, self._kernel, batch)
        head = head_of(self.model)
        if head is not None:
            hidden_BTD = self.model.base_model(**inputs).last_hidden_state
            return AtTargets(hidden_BTD, hidden_BTD.flatten(0, 1)[batch.target_places], head)
        output = self.model(**inputs, output_hidden_states=True)
        logits_NV = output.logits.flatten(0, 1)[batch.target_places]
        return AtTargets(output.hidden_states[-1], logits_NV, Head(nothing, nothing))


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token rather than hidden ones."""
    return type(model) in MODEL_FOR_CAUSAL_LM_MAPPING.values()


def build(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    causal: bool,
    sequence_length: int,
    seed: int,
    blank: bool = False,
) -> PreTrainedModel:
    """A new model from `model.architecture` and `model.config`, or one loaded from `model.init_from`.

    Weights are drawn from `seed`; those of a `blank` model are neither drawn nor loaded, and take no memory before
    they are written. UserError for an unknown architecture or key, or one that contradicts the tokenizer.
    """
    if model.init_from is not None:
        loaded = load_model(model.init_from, causal, blank)
        require_same_vocabulary(model.init_from, loaded, tokenizer)
        require_length(loaded.config, sequence_length, str(model.init_from))
        return loaded
    assert model.architecture is not None
    return from_config(make_config(model.architecture, model.config, tokenizer, sequence_length), causal, seed, blank)


def make_config(
    architecture: str, keys: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> PretrainedConfig:
    """A transformers config with the tokenizer's vocabulary and special tokens and room for `sequence_length`."""
    try:
        known = AutoConfig.for_model(architecture)
    except ValueError:
        raise UserError(
            f"transformers has no architecture {architecture!r}", "a model type such as bert or gpt2"
        ) from None
    names = set(known.to_dict()) | set(known.attribute_map)
    for key in keys:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            raise UserError(
                f"model.config.{key}: {architecture} has no such key"
                + (f"; did you mean {close[0]!r}?" if close else ""),
                f"a key of transformers' {type(known).__name__}",
            )
    special = {
        f"{name}_token_id": token_id(tokenizer, name)
        for name in ("pad", "bos", "eos", "cls", "sep")
        if f"{name}_token_id" in names
    }
    room = {}
    if "max_position_embeddings" in names and not {"max_position_embeddings", "n_positions"} & set(keys):
        room["max_position_embeddings"] = sequence_length + position_offset(architecture, token_id(tokenizer, "pad"))
    with refused(f"model.config of {architecture}", "values that this architecture takes"):
        config = AutoConfig.for_model(architecture, **({"vocab_size": len(tokenizer)} | special | room | dict(keys)))
    _check_vocabulary(config, tokenizer, f"model.config of {architecture}")
    require_length(config, sequence_length, f"model.config of {architecture}")
    return config


def from_config(config: PretrainedConfig, causal: bool, seed: int, blank: bool = False) -> PreTrainedModel:
    """A model with fresh weights drawn from `seed`, or with none (see `build`)."""
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MASKED_LM_MAPPING
    if type(config) not in mapping:
        kind = "causal_lm" if causal else "masked_lm"
        raise UserError(
            f"transformers has no {kind} model of architecture {config.model_type!r}", "another architecture"
        )
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    with (
        refused(f"model.config of {config.model_type}", "values that this architecture takes with attention sdpa"),
        no_init_weights() if blank else contextlib.nullcontext(),
    ):
        model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if blank:
        model.tie_weights()  # which is left out with the rest of init_weights
    return model


def load_model(folder: Path, causal: bool, blank: bool = False) -> PreTrainedModel:
    """A model folder's language model in float32, never looked for anywhere but on disk; or only its like (`build`)."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model", "a folder with config.json and model.safetensors", "check the path")
    if blank:
        with refused(str(folder), "a whole config.json"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return from_config(config, causal, seed=0, blank=True)
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    options = {"local_files_only": True, "use_safetensors": True, "attn_implementation": "sdpa", "dtype": torch.float32}
    with refused(str(folder), "a model folder with whole safetensors, of an architecture that has attention sdpa"):
        loaded: Any = auto.from_pretrained(folder, output_loading_info=True, **options)
    model, loading = loaded
    lacking = sorted(loading["missing_keys"]) + [str(entry) for entry in loading["mismatched_keys"]]
    if lacking:  # transformers would draw them at random, from no seed
        raise UserError(
            f"{folder} lacks {len(lacking)} of the weights of {type(model).__name__}, first {lacking[0]}",
            f"a {'causal' if causal else 'masked'} language model with its head",
            "take the folder that holds it, or train one",
        )
    return model


@contextlib.contextmanager
def refused(found: str, needed: str) -> Iterator[None]:
    """What transformers and safetensors raise for values and files of the user's, as one message."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{found}: {said[:300]}", needed, "mend what it names") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer folder, never looked for anywhere but on disk."""
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer", "a folder that prepare or transformers wrote", "check the path")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Id of the special token `name` (pad, bos, eos, cls, sep); None if the tokenizer has none."""
    found = getattr(tokenizer, f"{name}_token_id")
    assert found is None or isinstance(found, int)
    return found


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of transformer blocks: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep the input of each transformer block only, and run the block again in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x; the old one warns there
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, vectors (biases, norms) without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class TrainFlops(NamedTuple):
    """FLOPs of forward and backward."""

    per_token: float  # embeddings to last hidden state
    per_target: float  # the last matrix of the head, which runs where there is a target

    def of(self, tokens: float, targets: float) -> float:
        """FLOPs of a step with so many of both."""
        return tokens * self.per_token + targets * self.per_target


def train_flops(model: PreTrainedModel, sequence_length: int) -> TrainFlops:
    """FLOPs of forward and backward: 6 N + 12 L D T a token (PaLM, arXiv:2204.02311, appendix B).

    N: parameters that multiply, so without position tables and, where it is tied or only looked up, the embedding
    counted once as the head. Attention is counted in full, not halved for causal models, as everybody reports it.
    """
    config = model.config
    head = model.get_output_embeddings()
    positions = sum(p.numel() for name, p in model.named_parameters() if re.search(r"position_embeddings|wpe", name))
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    looked_up = 0 if head is not None and head.weight is embedding else embedding.numel()
    multiplying = count_parameters(model) - positions - looked_up
    last = head.weight.numel() if head is not None and head_of(model) is not None else 0
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * sequence_length
    return TrainFlops(6.0 * (multiplying - last) + attention, 6.0 * last)


def require_same_vocabulary(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless the model of `folder` reads token ids as the data's tokenizer wrote them.

    A folder without a tokenizer of its own is taken at its word, as far as its size goes.
    """
    if (folder / "tokenizer_config.json").is_file():
        theirs, ours = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
        if theirs != ours:
            token = next(iter(sorted(dict(theirs.items() ^ ours.items()))))
            raise UserError(
                f"the model {folder} and the data's tokenizer differ, first at {token!r}: "
                f"id {theirs.get(token)} there, {ours.get(token)} here",
                "one vocabulary for models and data",
                "prepare the data with prepare.tokenizer.path set to the model's folder",
            )
    _check_vocabulary(model.config, tokenizer, str(folder))


def _check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"{where} has vocab_size {config.vocab_size}",
            f"at least {len(tokenizer)}, the size of the tokenizer",
            "leave vocab_size out, or use the tokenizer that the model was made with",
        )


def require_length(config: PretrainedConfig, sequence_length: int, where: str) -> None:
    """UserError if the model has too few positions for rows of `sequence_length`."""
    room = getattr(config, "max_position_embeddings", None)
    if room is None:
        return
    usable = room - position_offset(config.model_type, config.pad_token_id)
    if usable < sequence_length:
        raise UserError(
            f"{where} takes {usable} tokens (max_position_embeddings {room})",
            f"at least data.sequence_length, {sequence_length}",
            "raise the one or lower the other",
        )
