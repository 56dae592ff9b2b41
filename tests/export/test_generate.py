"""Generation over runners: token by token what transformers' `generate` gives, with a cache that stays where it is."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from export.generate import (
    BoundDecoder,
    CopyingDecoder,
    Sampling,
    TorchDecoder,
    choose,
    decoder_of,
    generate,
    probabilities,
    stream,
)
from export.io_spec import read_spec
from export.runners import open_onnx, open_torch
from trainer.errors import UserError

PROMPTS = [[7, 40, 41, 9], [30], [5, 6, 7, 8, 9, 200, 201, 202, 203]]
NEW = 40
SEED = 1  # a tiny GPT-2 whose text does not end in one token for ever
SEEDS = {"gpt2": SEED, "llama": 0}


def of_transformers(folder, prompts, **options):
    """New tokens of transformers' own loop, on prompts padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spec = read_spec(folder)
    inputs = spec.pad([np.array(prompt) for prompt in prompts], max(map(len, prompts)), left=True)
    ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": spec.pad_id, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch of three lengths", "one"])
def test_greedy_tokens_are_those_of_transformers(name, prompts, model_folder, raw_graph):
    folder = model_folder(name, SEEDS[name])
    expected = of_transformers(folder, prompts).tolist()
    assert len({token for row in expected for token in row}) > 5  # a constant would prove little
    for runner in (open_onnx(raw_graph(name, SEEDS[name]), 1), open_torch(folder, 1)):
        assert generate(runner, read_spec(folder), prompts, Sampling(NEW)) == expected


def test_rows_end_by_themselves_and_the_stream_with_the_last(model_folder, raw_graph):
    folder, spec = model_folder("gpt2", SEED), read_spec(model_folder("gpt2", SEED))
    runner = open_onnx(raw_graph("gpt2", SEED), 1)
    free = generate(runner, spec, PROMPTS, Sampling(NEW))
    ends = (free[0][3], free[1][6], free[2][5])
    expected = of_transformers(folder, PROMPTS, eos_token_id=list(ends))
    settings = Sampling(NEW, eos_token_ids=ends)
    taken = np.stack(list(stream(runner, spec, PROMPTS, settings)), axis=1)
    assert taken.tolist() == expected.tolist()
    rows = generate(runner, spec, PROMPTS, settings)
    assert [row[-1] in ends for row in rows] == [True] * 3 and {len(row) for row in rows} != {taken.shape[1]}
    assert [row + [spec.pad_id] * (taken.shape[1] - len(row)) for row in rows] == expected.tolist()


def test_a_stream_can_be_left(model_folder, raw_graph):
    """One token a step, so that the reader may stop when it has seen enough."""
    spec, runner = read_spec(model_folder("gpt2", SEED)), open_onnx(raw_graph("gpt2", SEED), 1)
    tokens = stream(runner, spec, PROMPTS, Sampling(NEW))
    first = [next(tokens).tolist() for _ in range(3)]
    tokens.close()
    assert first == np.array(generate(runner, spec, PROMPTS, Sampling(3))).T.tolist()


def test_the_cache_is_bound_where_it_lies(model_folder, raw_graph):
    """The past of a step is the very memory of the present before it; both decoders give the same."""
    spec, runner = read_spec(model_folder("gpt2", SEED)), open_onnx(raw_graph("gpt2", SEED), 1)

    class Spy:
        def __init__(self, session):
            self.session, self.bound, self.put_out = session, [], []

        def __getattr__(self, name):
            return getattr(self.session, name)

        def io_binding(self):
            binding, spy = self.session.io_binding(), self

            class SpyingBinding:
                def __getattr__(self, name):
                    return getattr(binding, name)

                def bind_ortvalue_input(self, name, value):
                    spy.bound.append(value.data_ptr())
                    binding.bind_ortvalue_input(name, value)

                def get_outputs(self):
                    outputs = binding.get_outputs()
                    spy.put_out += [value.data_ptr() for value in outputs[1:]]
                    return outputs

                @property
                def _iobinding(self):
                    return binding._iobinding

            return SpyingBinding()

    spy = Spy(runner.session)
    decoder = decoder_of(type(runner)(spy, runner.inputs, runner.outputs), spec)
    assert isinstance(decoder, BoundDecoder)
    tokens, mask, cache, copied = np.array([[4, 5, 6]]), np.ones((1, 3), dtype=np.int64), None, None
    for _ in range(4):
        feeds = spec.token_feeds(tokens, mask)
        logits, cache = decoder.advance(feeds, cache)
        other, copied = CopyingDecoder(runner, spec).advance(feeds, copied)
        np.testing.assert_array_equal(logits, other)
        tokens, mask = logits[:, -1].argmax(axis=-1)[:, None], np.ones((1, mask.shape[1] + 1), dtype=np.int64)
    width = len(spec.cache.past_names)
    assert len(spy.bound) == 4 * width
    assert spy.bound[width:] == spy.put_out[:-width]


def test_pytorchs_cache_stays_in_its_tensors(model_folder):
    folder = model_folder("llama")
    spec, runner = read_spec(folder), open_torch(folder, 1)
    decoder = decoder_of(runner, spec)
    assert isinstance(decoder, TorchDecoder)
    tokens, mask, cache, copied = np.array([[4, 5, 6]]), np.ones((1, 3), dtype=np.int64), None, None
    for whole in (True, False, True):
        logits, cache = decoder.advance(spec.token_feeds(tokens, mask), cache, whole)
        other, copied = CopyingDecoder(runner, spec).advance(spec.token_feeds(tokens, mask), copied, whole)
        np.testing.assert_array_equal(logits, other)
        assert logits.shape[1] == (tokens.shape[1] if whole else 1)
        assert {type(value) for value in cache.values()} == {torch.Tensor}
        tokens, mask = logits[:, -1].argmax(axis=-1)[:, None], np.ones((1, mask.shape[1] + 1), dtype=np.int64)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 20, 0.9), (1.0, 0, 1e-9)],
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    logits_BV = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    scores = torch.from_numpy(logits_BV)
    warpers = [logits_process.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(torch.zeros(4, 1, dtype=torch.int64), scores)
    ours = probabilities(logits_BV, Sampling(1, temperature, top_k, top_p))
    np.testing.assert_allclose(ours, scores.softmax(dim=-1).numpy(), atol=1e-6)
    assert ((ours > 0) == (scores.softmax(dim=-1).numpy() > 0)).all()


def test_tokens_are_drawn_with_their_probabilities():
    logits_BV = np.tile(np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32)), (20_000, 1))
    drawn = choose(logits_BV, Sampling(1, temperature=1.0, top_k=3), np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.012)  # 3.4 standard errors
    assert shares[3] == 0


def test_a_seed_repeats_its_text(model_folder, raw_graph):
    spec, runner = read_spec(model_folder("gpt2", SEED)), open_onnx(raw_graph("gpt2", SEED), 1)
    texts = [generate(runner, spec, PROMPTS, Sampling(9, 1.0, 50, 0.9, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_refusals(model_folder, raw_graph):
    spec, runner = read_spec(model_folder("gpt2", SEED)), open_onnx(raw_graph("gpt2", SEED), 1)
    for prompts, new, message in (
        ([[]], 1, "a prompt is empty"),
        ([], 1, "a prompt is empty"),
        ([[1, 2, 3]], 70, r"(?s)prompt of 3 tokens and 70 new ones.*at most 72"),
        ([[1, 300]], 1, "holds token 300"),
    ):
        with pytest.raises(UserError, match=message):
            next(stream(runner, spec, prompts, Sampling(new)))
    with pytest.raises(UserError, match="BertForMaskedLM does not generate text"):
        next(stream(runner, read_spec(model_folder("bert")), [[1]], Sampling(1)))
    with pytest.raises(UserError, match="max_new_tokens of at least 1"):
        Sampling(0)
