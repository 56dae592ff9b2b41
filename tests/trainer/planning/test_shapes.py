import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from trainer.errors import UserError
from trainer.models import train_flops
from trainer.planning.cost import flops_per_token
from trainer.planning.shapes import FAMILIES, shape_of

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 77}
SIZES = {
    "bert": [{}, SMALL | {"max_position_embeddings": 40, "type_vocab_size": 3}, {"tie_word_embeddings": False}],
    "roberta": [{}, SMALL | {"max_position_embeddings": 41, "type_vocab_size": 1}, {"tie_word_embeddings": False}],
    "distilbert": [
        {},
        {"hidden_size": 64, "n_heads": 4, "n_layers": 3, "hidden_dim": 96},
        {"tie_word_embeddings": False},
    ],
    "modernbert": [
        {},
        SMALL | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        {"decoder_bias": False, "tie_word_embeddings": False},
    ],
    "gpt2": [{}, {"n_inner": 100, "n_layer": 3}, {"hidden_size": 64, "n_head": 4, "tie_word_embeddings": False}],
    "llama": [
        {},
        SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 4},
    ],
}
CASES = [(architecture, keys) for architecture, sizes in SIZES.items() for keys in sizes]


def on_meta(architecture, keys):
    auto = AutoModelForCausalLM if FAMILIES[architecture].causal else AutoModelForMaskedLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(architecture, **{"pad_token_id": 0, **keys}))


@pytest.mark.parametrize(("architecture", "keys"), CASES, ids=lambda value: str(value)[:60])
def test_counts_are_those_of_transformers(architecture, keys):
    model, (shape, unread) = on_meta(architecture, keys), shape_of(architecture, keys)
    assert unread == ()
    assert shape.parameters().total == sum(parameter.numel() for parameter in model.parameters())
    for share in (1.0, 0.15):
        assert flops_per_token(shape, 128, share) == pytest.approx(train_flops(model, 128).of(1, share), rel=1e-12)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture):
    config = type(AutoConfig.for_model(architecture))
    fields = {name: field.default for name, field in config.__dataclass_fields__.items()}
    family = FAMILIES[architecture]
    assert {key: fields[key] for key in family.defaults} == dict(family.defaults)
    assert config.attribute_map == dict(family.aliases)


def test_published_sizes():
    """BERT-base with its masked-LM head and GPT-2 as transformers has them; Llama 7B (arXiv:2302.13971, table 2)."""
    totals = {name: shape_of(name, {})[0].parameters().total for name in ("bert", "gpt2", "llama")}
    assert totals == {"bert": 109_514_298, "gpt2": 124_439_808, "llama": 6_738_415_616}


def test_what_is_not_looked_at_is_named():
    _, unread = shape_of("llama", {"rms_norm_eps": 1e-5})
    assert unread == ("rms_norm_eps",)
    assert shape_of("bert", {"attention_bias": False})[0] == shape_of("bert", {})[0], "bert has no such key"


def test_unknown_architectures_and_slips_are_errors():
    with pytest.raises(UserError, match="does not know architecture 'mamba'"):
        shape_of("mamba", {})
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        shape_of("bert", {"hiden_size": 32})
    with pytest.raises(UserError, match="hidden size 30 with 4 heads"):
        shape_of("llama", {"hidden_size": 30, "num_attention_heads": 4})
