import numpy as np
import pytest
import torch
from torch import nn

from trainer.config import Model
from trainer.data.packing import Framing, PackedRows
from trainer.data.stream import BatchPlan, TrainStream
from trainer.errors import UserError
from trainer.models import (
    LanguageModel,
    build,
    check_isolation,
    count_parameters,
    decay_groups,
    forward_batch,
    make_config,
    packed_inputs,
    student_from_layers,
    train_flops_per_token,
    transformer_layers,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES = {
    "bert": SMALL,
    "roberta": SMALL,
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    "modernbert": SMALL | {"local_attention": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "llama": SMALL | {"num_key_value_heads": 2},
}
CAUSAL = {"gpt2", "llama"}


def make(architecture, tokenizer, length=32, **more):
    model = Model(architecture=architecture, config=SHAPES[architecture] | more)
    return build(model, tokenizer, architecture in CAUSAL, length, seed=1).eval()


def scattered(model):
    """Fresh models have zero biases and unit norms, which hide mistakes; draw everything."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def batch(tokens_in_memory):
    draw = np.random.default_rng(0)
    texts = [list(map(int, draw.integers(5, 100, size=n))) for n in (5, 9, 12, 20, 7, 3, 14, 28, 30, 6)]

    def of(causal):
        framing = Framing(32, causal, 2, None if causal else 3, 0)
        stream = TrainStream(PackedRows(tokens_in_memory(texts), framing, 0), None, BatchPlan(3, 3, 0, 1), 0)
        return stream.micro_batches(0)[0]

    return of


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_packed_document_is_as_good_as_alone(architecture, tiny_tokenizer, batch):
    """Logits of each document in a packed row equal those of the document by itself, fed as transformers does."""
    model = scattered(make(architecture, tiny_tokenizer))
    packed = batch(architecture in CAUSAL)
    everywhere = torch.arange(packed.input_ids.numel())
    with torch.no_grad():
        logits = LanguageModel(model)(packed.input_ids, packed.segments, packed.positions, everywhere, True).logits_NV
        logits = logits.unflatten(0, packed.input_ids.shape)
        for row in range(len(packed.input_ids)):
            for number in range(1, int(packed.segments[row].max()) + 1):
                inside = packed.segments[row] == number
                alone = model(input_ids=packed.input_ids[row][inside][None]).logits[0]
                torch.testing.assert_close(logits[row][inside], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SHAPES)
def test_changing_a_document_moves_no_logit_of_its_neighbours(architecture, tiny_tokenizer, batch):
    model = LanguageModel(scattered(make(architecture, tiny_tokenizer)))
    packed = batch(architecture in CAUSAL)
    row = int((packed.segments.max(dim=1).values >= 2).nonzero()[0])
    changed = packed.input_ids.clone()
    first = packed.segments[row] == 1
    changed[row][first] = changed[row][first].flip(0)
    changed[row, 0] = 77
    others = (packed.segments != 1).flatten() & (packed.segments > 0).flatten()
    places = others.nonzero().squeeze(1)
    with torch.no_grad():
        before = model(packed.input_ids, packed.segments, packed.positions, places, True).logits_NV
        after = model(changed, packed.segments, packed.positions, places, True).logits_NV
    assert torch.equal(before, after)


@pytest.mark.parametrize("architecture", SHAPES)
def test_isolation_check_passes_and_catches_a_leak(architecture, tiny_tokenizer, monkeypatch):
    model = LanguageModel(scattered(make(architecture, tiny_tokenizer)))
    check_isolation(model)

    def without_borders(config, causal, segments, positions):
        running = torch.arange(segments.shape[1])[None].expand_as(positions)
        return packed_inputs(config, causal, torch.ones_like(segments), running)

    monkeypatch.setattr("trainer.models.packed_inputs", without_borders)
    with pytest.raises(UserError, match="mixes the documents"):
        check_isolation(model)


@pytest.mark.parametrize("architecture", SHAPES)
def test_logits_at_targets_equal_the_whole_head(architecture, tiny_tokenizer, batch):
    model = LanguageModel(scattered(make(architecture, tiny_tokenizer)))
    packed = batch(architecture in CAUSAL)
    everywhere = torch.arange(packed.input_ids.numel())
    some = everywhere[5::7]
    with torch.no_grad():
        whole = model(packed.input_ids, packed.segments, packed.positions, everywhere, True).logits_NV
        part = model(packed.input_ids, packed.segments, packed.positions, some, True).logits_NV
    torch.testing.assert_close(part, whole[some], rtol=1e-5, atol=1e-6)


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
        theirs, ours = (forward_batch(LanguageModel(m), packed).logits_NV for m in (teacher, student))
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
    assert train_flops_per_token(model, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
