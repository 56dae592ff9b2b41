import pytest
import torch

from tests.trainer.packed import CAUSAL, SHAPES, SMALL, everywhere, logits, make, packed_batch, scattered, with_targets
from trainer.config import Model
from trainer.errors import UserError
from trainer.models import (
    LanguageModel,
    build,
    count_parameters,
    decay_groups,
    make_config,
    train_flops,
    transformer_layers,
)
from trainer.students import student_from_layers


@pytest.fixture
def batch(tokens_in_memory):
    return lambda causal: packed_batch(tokens_in_memory, causal)


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_packed_document_is_as_good_as_alone(architecture, tiny_tokenizer, batch):
    """Logits of each document in a packed row equal those of the document by itself, fed as transformers does."""
    model = scattered(make(architecture, tiny_tokenizer))
    packed = batch(architecture in CAUSAL)
    whole = with_targets(packed, torch.arange(packed.input_ids.numel()))
    with torch.no_grad():
        packed_logits = logits(LanguageModel(model), whole).unflatten(0, packed.input_ids.shape)
        for row in range(len(packed.input_ids)):
            for number in range(1, int(packed.segments[row].max()) + 1):
                inside = packed.segments[row] == number
                alone = model(input_ids=packed.input_ids[row][inside][None]).logits[0]
                torch.testing.assert_close(packed_logits[row][inside], alone, rtol=1e-4, atol=1e-5)


def test_weights_are_drawn_from_the_seed(tiny_tokenizer):
    one, two = make("bert", tiny_tokenizer), make("bert", tiny_tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_unknown_keys_and_architectures_are_named(tiny_tokenizer):
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        make_config("bert", {"hiden_size": 32}, tiny_tokenizer, 32)
    with pytest.raises(UserError, match="no architecture 'bort'"):
        make_config("bort", {}, tiny_tokenizer, 32)
    with pytest.raises(UserError, match="takes 16 tokens"):
        make_config("bert", {"max_position_embeddings": 16}, tiny_tokenizer, 32)
    with pytest.raises(UserError, match="vocab_size 50"):
        make_config("bert", {"vocab_size": 50}, tiny_tokenizer, 32)
    with pytest.raises(UserError, match="no masked_lm model"):
        build(Model(architecture="gpt2"), tiny_tokenizer, False, 32, 0)


def test_special_tokens_and_length_come_from_tokenizer_and_data(tiny_tokenizer):
    config = make_config("roberta", SMALL, tiny_tokenizer, 64)
    assert (config.vocab_size, config.pad_token_id, config.max_position_embeddings) == (100, 0, 65)
    assert make_config("gpt2", {"n_positions": 80}, tiny_tokenizer, 64).max_position_embeddings == 80


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama", "distilbert"])
def test_a_student_of_all_layers_is_its_teacher(architecture, tiny_tokenizer, batch):
    teacher = scattered(make(architecture, tiny_tokenizer))
    student = student_from_layers(teacher, (0, 1, 2, 3), None).eval()
    packed = batch(architecture in CAUSAL)
    with torch.no_grad():
        theirs, ours = (logits(LanguageModel(m), everywhere(packed)) for m in (teacher, student))
    assert torch.equal(theirs, ours)


def test_a_distilbert_of_all_layers_is_its_bert(tiny_tokenizer):
    teacher = scattered(make("bert", tiny_tokenizer))
    student = student_from_layers(teacher, (0, 1, 2, 3), "distilbert").eval()
    tokens = torch.randint(5, 100, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=tokens).logits, teacher(input_ids=tokens).logits)


def test_kept_layers_are_the_teachers(tiny_tokenizer):
    teacher = scattered(make("bert", tiny_tokenizer))
    student = student_from_layers(teacher, (1, 3), "bert")
    for new, old in enumerate((1, 3)):
        pairs = zip(
            transformer_layers(student)[new].parameters(), transformer_layers(teacher)[old].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert student.config.num_hidden_layers == 2
    head = student.get_output_embeddings().weight
    assert head is student.get_input_embeddings().weight  # still tied


def test_impossible_students_are_refused(tiny_tokenizer):
    teacher = make("bert", tiny_tokenizer)
    with pytest.raises(UserError, match="layers 0 to 3"):
        student_from_layers(teacher, (0, 4), None)
    with pytest.raises(UserError, match="cannot become a gpt2"):
        student_from_layers(teacher, (0,), "gpt2")
    with pytest.raises(UserError, match="modernbert: its first layer"):
        student_from_layers(make("modernbert", tiny_tokenizer), (1, 2), None)


def test_vectors_are_not_decayed_and_nothing_is_left_out(tiny_tokenizer):
    model = make("bert", tiny_tokenizer)
    decayed, plain = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert sum(p.numel() for p in decayed["params"] + plain["params"]) == count_parameters(model)


def test_flops_of_gpt2_124m_are_nanogpts():
    """nanoGPT's estimate_mfu: 6 * 123,653,376 + 12 * 12 * 12 * 64 * 1024 a token, with its 50,257 entries."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    model.tie_weights()
    assert train_flops(model, 1024).of(1, 1) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
