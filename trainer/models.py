"""Builds and loads models, and gives each architecture packed rows in the form it understands.
The numbers about a model (parameters, FLOPs) are here too; how it is trained is left to `engine`.

Shapes: B rows, T tokens in a row, N target tokens, D hidden size, V vocabulary.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
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

from trainer.config import Model
from trainer.data.stream import Batch
from trainer.errors import UserError

# Position 0 of these is padding_idx + 1 (transformers/models/roberta/modeling_roberta.py: position ids of an input).
_OFFSET_POSITIONS = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer")

# Masked-LM heads that work token by token, so that they need to see only the targets: model -> (hidden -> logits).
_MASKED_HEADS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "bert": lambda model: model.cls,
    "roberta": lambda model: model.lm_head,
    "modernbert": lambda model: lambda hidden_ND: model.decoder(model.head(hidden_ND)),
    "distilbert": lambda model: (
        lambda hidden_ND: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))
        )
    ),
}


class TargetOutput(NamedTuple):
    """What an objective gets: logits where there is a target, and the last hidden states everywhere."""

    logits_NV: Tensor
    hidden_BTD: Tensor


class LanguageModel(nn.Module):
    """A transformers language model that takes packed rows and computes its head only where there is a target."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._is_causal = is_causal(model)
        self._head_of = None if self._is_causal else _MASKED_HEADS.get(model.config.model_type)

    def forward(
        self, input_ids: Tensor, segments: Tensor, positions: Tensor, target_places: Tensor, isolated: bool
    ) -> TargetOutput:
        """input_ids, segments, positions [B, T]; target_places [N] into the flattened [B * T]."""
        inputs = {"input_ids": input_ids}
        if isolated:
            inputs |= packed_inputs(self.model.config, self._is_causal, segments, positions)
        if self._head_of is not None:
            hidden_BTD = self.model.base_model(**inputs).last_hidden_state
            logits_NV = self._head_of(self.model)(hidden_BTD.flatten(0, 1)[target_places])
        else:
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
            hidden_BTD = output.hidden_states[-1]
            logits_NV = output.logits.flatten(0, 1)[target_places]
        return TargetOutput(logits_NV, hidden_BTD)


def forward_batch(model: nn.Module, batch: Batch) -> TargetOutput:
    """Call a LanguageModel, or what an engine wrapped around it, on a batch."""
    return model(batch.input_ids, batch.segments, batch.positions, batch.target_places, batch.isolated)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token rather than hidden ones."""
    return type(model) in MODEL_FOR_CAUSAL_LM_MAPPING.values()


def packed_inputs(config: PretrainedConfig, causal: bool, segments: Tensor, positions: Tensor) -> dict[str, Any]:
    """Positions and attention mask that keep the documents of a row apart.

    Causal models of transformers find the borders in the position ids themselves. Encoders get the mask [B, 1, T, T],
    in which padding sees padding (a row that sees nothing at all is NaN in some kernels).
    """
    offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
    inputs: dict[str, Any] = {"position_ids": positions + offset}
    if causal:
        return inputs
    same_B1TT = segments[:, None, :, None] == segments[:, None, None, :]
    if config.model_type != "modernbert":
        return inputs | {"attention_mask": same_B1TT}
    at_T = torch.arange(segments.shape[1], device=segments.device)
    near_TT = (at_T[:, None] - at_T[None, :]).abs() <= config.sliding_window
    return inputs | {"attention_mask": {"full_attention": same_B1TT, "sliding_attention": same_B1TT & near_TT}}


def check_isolation(model: LanguageModel) -> None:
    """UserError if a document of a packed row changes what the model says about its neighbour.

    Runs two rows of 2 x 8 tokens that differ in the first document only. Not every architecture takes packed rows;
    one that does not would train on mixed contexts without any other sign.
    """
    config = model.model.config
    device = next(model.parameters()).device
    tokens = torch.arange(16, device=device).remainder(max(2, config.vocab_size - 1))[None]
    other = torch.cat([tokens[:, :8].flip(1), tokens[:, 8:]], dim=1)
    segments = torch.arange(16, device=device)[None].div(8, rounding_mode="floor") + 1
    positions = torch.arange(16, device=device)[None].remainder(8)
    second_N = torch.arange(8, 16, device=device)
    training = model.training
    with torch.no_grad():
        model.eval()
        one, two = (model(ids, segments, positions, second_N, True).logits_NV for ids in (tokens, other))
        alone = model(tokens[:, 8:], segments[:, 8:], positions[:, 8:], second_N - 8, True).logits_NV
    model.train(training)
    difference = max((one - two).abs().max().item(), (one - alone).abs().max().item())
    if (
        difference > 1e-3
    ):  # float32 rounding of other kernels and shapes stays below 1e-5; a leak is of order 1e-2 and up
        raise UserError(
            f"architecture {config.model_type!r} mixes the documents of a packed row (logits move by {difference:.2g})",
            "one whose attention stays inside a document",
            "use bert, distilbert, roberta, modernbert, gpt2, llama, or data.packing: concatenate for a causal model",
        )


def build(
    model: Model, tokenizer: PreTrainedTokenizerBase, causal: bool, sequence_length: int, seed: int
) -> PreTrainedModel:
    """A new model from `model.architecture` and `model.config`, or one loaded from `model.init_from`.

    Weights are drawn from `seed`. UserError for an unknown architecture or key, or one that contradicts the tokenizer.
    """
    if model.init_from is not None:
        loaded = load_model(model.init_from, causal)
        _check_vocabulary(loaded.config, tokenizer, str(model.init_from))
        _check_length(loaded.config, sequence_length)
        return loaded
    assert model.architecture is not None
    return from_config(make_config(model.architecture, model.config, tokenizer, sequence_length), causal, seed)


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
    config = AutoConfig.for_model(architecture, **({"vocab_size": len(tokenizer)} | special | room | dict(keys)))
    _check_vocabulary(config, tokenizer, f"model.config of {architecture}")
    _check_length(config, sequence_length)
    return config


def from_config(config: PretrainedConfig, causal: bool, seed: int) -> PreTrainedModel:
    """A model with fresh weights drawn from `seed`."""
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MASKED_LM_MAPPING
    if type(config) not in mapping:
        kind = "causal_lm" if causal else "masked_lm"
        raise UserError(
            f"transformers has no {kind} model of architecture {config.model_type!r}", "another architecture"
        )
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def load_model(folder: Path, causal: bool) -> PreTrainedModel:
    """A model folder's language model in float32, never looked for anywhere but on disk."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model", "a folder with config.json and model.safetensors", "check the path")
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    return auto.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, attn_implementation="sdpa", dtype=torch.float32
    )


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


def position_offset(architecture: str, pad_token_id: int | None) -> int:
    """Rows of the position table that stand before position 0."""
    return (pad_token_id or 0) + 1 if architecture in _OFFSET_POSITIONS else 0


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of transformer blocks: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


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


def train_flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

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
    return 6.0 * multiplying + 12.0 * config.num_hidden_layers * config.hidden_size * sequence_length


# ---- a student from its teacher --------------------------------------------------------------------------------

_LAYER = re.compile(r"^(?P<stem>.*?\.(?:layers?|h|block))\.(?P<index>\d+)\.(?P<rest>.*)$")

# Where a DistilBERT keeps what BERT has (transformers' distillation example extracts the same weights).
_BERT_TO_DISTILBERT = (
    (r"^bert\.embeddings\.", "distilbert.embeddings."),
    (r"^bert\.encoder\.layer\.", "distilbert.transformer.layer."),
    (r"\.attention\.self\.query\.", ".attention.q_lin."),
    (r"\.attention\.self\.key\.", ".attention.k_lin."),
    (r"\.attention\.self\.value\.", ".attention.v_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(layer\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(layer\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
    (r"^cls\.predictions\.transform\.dense\.", "vocab_transform."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "vocab_layer_norm."),
    (r"^cls\.predictions\.decoder\.", "vocab_projector."),
    (r"^cls\.predictions\.bias$", "vocab_projector.bias"),
)
# DistilBERT has no token types; BERT's type 0 is added to every position, so it moves into the position table.
_TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_POSITIONS = "bert.embeddings.position_embeddings.weight"

# transformers' names of one and the same size in BERT and in DistilBERT.
_DISTILBERT_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "pad_token_id": "pad_token_id",
}


def student_from_layers(teacher: PreTrainedModel, layers: tuple[int, ...], architecture: str | None) -> PreTrainedModel:
    """A student that begins as the chosen layers of the teacher, with its embeddings and head.

    `architecture` may be the teacher's own, or distilbert for a bert teacher (Sanh et al. 2019, arXiv:1910.01108).
    """
    source, depth = teacher.config.model_type, teacher.config.num_hidden_layers
    target = architecture or source
    if max(layers) >= depth:
        raise UserError(f"keep_layers names layer {max(layers)}", f"layers 0 to {depth - 1}", "the teacher has no more")
    if (source, target) not in {(source, source), ("bert", "distilbert")}:
        raise UserError(
            f"layers of a {source} teacher cannot become a {target}",
            f"student.architecture {source}" + (" or distilbert" if source == "bert" else ""),
            "or give the student its own `config`",
        )
    config = _student_config(teacher.config, target, layers)
    student = from_config(config, is_causal(teacher), seed=0)
    weights = dict(_kept_weights(teacher.state_dict(), layers))
    if target != source:
        weights = _bert_to_distilbert(weights)
    missing, unexpected = student.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise UserError(
            f"layers {list(layers)} of a {source} teacher do not fit a {target} of {len(layers)} layers "
            f"({', '.join([*missing, *unexpected][:3])})",
            "layers of the same make in the same places (modernbert: its first layer is unlike the others)",
            "choose other keep_layers",
        )
    student.tie_weights()
    return student


def _student_config(teacher: PretrainedConfig, target: str, layers: tuple[int, ...]) -> PretrainedConfig:
    if target == teacher.model_type:
        config = copy.deepcopy(teacher)
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [teacher.layer_types[layer] for layer in layers]
        return config
    sizes = {new: getattr(teacher, old) for old, new in _DISTILBERT_SIZES.items()}
    return AutoConfig.for_model("distilbert", n_layers=len(layers), sinusoidal_pos_embds=False, **sizes)


def _kept_weights(weights: Mapping[str, Tensor], layers: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        match = _LAYER.match(name)
        if match is None:
            yield name, tensor
        for new, old in enumerate(layers):
            if match is not None and int(match["index"]) == old:
                yield f"{match['stem']}.{new}.{match['rest']}", tensor


def _bert_to_distilbert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        if name == _TOKEN_TYPES or name.endswith("_ids"):
            continue
        if name == _POSITIONS:
            tensor = tensor + weights[_TOKEN_TYPES][0]
        for pattern, replacement in _BERT_TO_DISTILBERT:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"{where} has vocab_size {config.vocab_size}",
            f"at least {len(tokenizer)}, the size of the tokenizer",
            "leave vocab_size out, or use the tokenizer that the model was made with",
        )


def _check_length(config: PretrainedConfig, sequence_length: int) -> None:
    room = getattr(config, "max_position_embeddings", None)
    if room is None:
        return
    usable = room - position_offset(config.model_type, config.pad_token_id)
    if usable < sequence_length:
        raise UserError(
            f"the model takes {usable} tokens (max_position_embeddings {room})",
            f"at least data.sequence_length, {sequence_length}",
            "raise the one or lower the other",
        )
