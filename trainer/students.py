"""A student that begins as some of its teacher's layers: which weights go where, also from BERT to DistilBERT.
Students of a shape of their own are built in `models`; how one is trained is the distill stage's business."""

import copy
import re
from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from trainer.errors import UserError
from trainer.models import from_config, is_causal

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


def student_from_layers(
    teacher: PreTrainedModel, layers: tuple[int, ...], architecture: str | None, blank: bool = False
) -> PreTrainedModel:
    """A student that begins as the chosen layers of the teacher, with its embeddings and head; a `blank` one has no
    weights (see `models.build`).

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
    student = from_config(config, is_causal(teacher), seed=0, blank=blank)
    if blank:
        return student
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
