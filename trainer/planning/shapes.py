"""Sizes of a language model as its transformers config gives them, and its parameters by kind, exactly.
transformers itself is not asked (a login node may lack it); which recipe gives which config is `workload`'s business.

Sizes: V vocabulary, D hidden size, F inner size of the feed-forward part, Q width of all query heads, K of all keys.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import UserError


@dataclass(frozen=True)
class Family:
    """What an architecture fixes whatever its sizes. Read in transformers 5.23, models/<architecture>/modeling_*.py."""

    defaults: Mapping[str, Any]  # of transformers' config class, for the keys that this module reads
    names: Mapping[str, str]  # our name of a size -> the config's, where they differ
    aliases: Mapping[str, str] = field(default_factory=dict)  # the config class's attribute_map
    causal: bool = False
    pre_norm: bool = False  # norms before attention and feed-forward, a last one after the blocks
    embedding_norm: bool = True
    rotary: bool = False
    gated: bool = False  # feed-forward of three matrices: activation(gate) * up
    fused_qkv: bool = False  # one matrix for queries, keys and values
    norm_biases: int = 1
    dropouts_in_block: int = 2  # with the config's hidden dropout


_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}
_BERT_NAMES = {"attention_dropout": "attention_probs_dropout_prob", "hidden_dropout": "hidden_dropout_prob"}

FAMILIES: dict[str, Family] = {
    "bert": Family(_BERT_DEFAULTS, _BERT_NAMES),
    "roberta": Family(_BERT_DEFAULTS | {"vocab_size": 50265}, _BERT_NAMES),
    "distilbert": Family(
        defaults={
            "vocab_size": 30522,
            "dim": 768,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 3072,
            "activation": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout": "dropout",
        },
        aliases={"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
        dropouts_in_block=1,
    ),
    "modernbert": Family(
        defaults={
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "hidden_activation": "gelu",
            "max_position_embeddings": 8192,
            "norm_bias": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "mlp_bias": False,
            "mlp_dropout": 0.0,
            "decoder_bias": True,
            "classifier_bias": False,
            "tie_word_embeddings": True,
        },
        names={"hidden_act": "hidden_activation"},
        pre_norm=True,
        rotary=True,
        gated=True,
        fused_qkv=True,
        dropouts_in_block=0,  # its two have rates of their own, see `Shape`
    ),
    "gpt2": Family(
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "hidden_dropout": "resid_pdrop",
            "embedding_dropout": "embd_pdrop",
            "attention_dropout": "attn_pdrop",
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        causal=True,
        pre_norm=True,
        embedding_norm=False,
        fused_qkv=True,
    ),
    "llama": Family(
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
        names={},
        causal=True,
        pre_norm=True,
        embedding_norm=False,
        rotary=True,
        gated=True,
        norm_biases=0,
        dropouts_in_block=0,
    ),
}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by what is done with them; tied ones once."""

    embedding: int  # V x D
    positions: int  # the learned position table
    outside: int  # token types and the norms around the blocks
    block_matrices: int  # weights and biases of the matrix products of all blocks
    block_norms: int
    head_matrices: int  # what stands between the last block and the output matrix
    head_norm: int
    output: int  # the output matrix where it is not the embedding
    output_bias: int
    largest_block: int

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.positions
            + self.outside
            + self.block_matrices
            + self.block_norms
            + self.head_matrices
            + self.head_norm
            + self.output
            + self.output_bias
        )

    @property
    def multiplying(self) -> int:
        """N of 6 N: without the position table, the embedding once, as the output matrix."""
        return self.total - self.positions - (self.embedding if self.output else 0)

    @property
    def cast(self) -> int:
        """Parameters of which autocast keeps a copy: those of matrix products."""
        return self.block_matrices + self.head_matrices + (self.output or self.embedding) + self.output_bias


@dataclass(frozen=True)
class Shape:
    """Sizes of one model."""

    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    inner: int
    position_rows: int  # 0: rotary
    token_types: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    norm_biases: int
    transform_bias: bool
    output_biases: int
    activation: str
    hidden_dropout: float
    attention_dropout: float
    embedding_dropout: float
    inner_dropout: float  # modernbert's, on the F-wide product

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def queries(self) -> int:
        """Q, width of all query heads together."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K, width of all key heads together, and of all value heads."""
        return self.key_value_heads * self.head_size

    def parameters(self) -> Parameters:
        """Counts that equal those of transformers' model with its language-model head."""
        D, F = self.hidden, self.inner
        norm = D * (1 + self.norm_biases)
        attention = D * (self.queries + 2 * self.keys) + self.queries * D
        attention += (self.queries + 2 * self.keys + D) * self.attention_bias
        wide = 2 if self.family.gated else 1
        mlp = (wide + 1) * D * F + (wide * F + D) * self.mlp_bias
        block_norms = 2 * self.layers * norm
        if self.architecture == "modernbert":
            block_norms -= norm  # its first block has none before attention
        outside = self.token_types * D + norm * (self.family.embedding_norm + self.family.pre_norm)
        transform = 0 if self.family.causal else D * D + D * self.transform_bias
        embedding = self.vocabulary * D
        return Parameters(
            embedding=embedding,
            positions=self.position_rows * D,
            outside=outside,
            block_matrices=self.layers * (attention + mlp),
            block_norms=block_norms,
            head_matrices=transform,
            head_norm=0 if self.family.causal else norm,
            output=0 if self.tied else embedding,
            output_bias=self.output_biases * self.vocabulary,
            largest_block=attention + mlp + 2 * norm,
        )


def shape_of(architecture: str, keys: Mapping[str, Any]) -> tuple[Shape, tuple[str, ...]]:
    """The shape of a transformers config, and the keys that were not looked at.

    UserError for an unknown architecture, and for a key that looks like a slip of one that counts.
    """
    if architecture not in FAMILIES:
        raise UserError(
            f"plan does not know architecture {architecture!r}",
            f"one of: {', '.join(FAMILIES)}",
            "train it without a plan, or measure: lmworks pretrain RECIPE pretrain.max_steps=20",
        )
    family = FAMILIES[architecture]
    given = {family.aliases.get(key, key): value for key, value in keys.items()}
    unread = tuple(key for key in given if key not in family.defaults)
    for key in unread:
        close = difflib.get_close_matches(key, family.defaults, n=1, cutoff=0.85)
        if close:
            raise UserError(f"model.config.{key}: {architecture} has no such key; did you mean {close[0]!r}?")
    read = {key: value for key, value in given.items() if key in family.defaults}
    return _shape(architecture, family, {**family.defaults, **read}), unread


def _shape(architecture: str, family: Family, config: Mapping[str, Any]) -> Shape:
    def get(name: str, default: Any = None) -> Any:
        return config.get(family.names.get(name, name), default)

    hidden, heads = get("hidden_size"), get("num_attention_heads")
    if hidden % heads:
        raise UserError(f"model.config: hidden size {hidden} with {heads} heads", "a multiple of the heads")
    biased = not family.rotary  # the architectures without a key for it have biases everywhere
    tied = get("tie_word_embeddings")
    # In bert and roberta the bias of the output matrix is a tied weight as well: untied, there are two of them.
    biases = 0 if family.causal else 2 if architecture in ("bert", "roberta") and not tied else 1
    return Shape(
        architecture=architecture,
        vocabulary=get("vocab_size"),
        hidden=hidden,
        layers=get("num_hidden_layers"),
        heads=heads,
        key_value_heads=get("num_key_value_heads") or heads,
        head_size=get("head_dim") or hidden // heads,
        inner=get("intermediate_size") or 4 * hidden,
        position_rows=0 if family.rotary else get("max_position_embeddings"),
        token_types=get("type_vocab_size", 0),
        tied=tied,
        attention_bias=get("attention_bias", biased),
        mlp_bias=get("mlp_bias", biased),
        norm_biases=int(get("norm_bias", bool(family.norm_biases))),
        transform_bias=get("classifier_bias", True),
        output_biases=biases * get("decoder_bias", True),
        activation=get("hidden_act"),
        hidden_dropout=get("hidden_dropout", 0.0),
        attention_dropout=get("attention_dropout", 0.0),
        embedding_dropout=get("embedding_dropout", get("hidden_dropout", 0.0)),
        inner_dropout=get("mlp_dropout", 0.0),
    )
