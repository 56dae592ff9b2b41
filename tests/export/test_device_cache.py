"""A decoder's cache in two sets of device buffers: their turns and profiles as arithmetic, and the binding for real, on
an engine's face over ONNX Runtime that computes at the addresses it is given."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from export import device_cache
from export.device_cache import DeviceDecoder
from export.engine_proof import prove_engine, steps_within
from export.generate import CopyingDecoder, Sampling, decoder_of, generate
from export.io_spec import read_spec
from export.profiles import call_shapes, fitting_profile, plan_step, require_profile
from export.runners import open_onnx
from export.to_tensorrt import engine_shapes
from tests.export.onnx_engine import runner_of
from trainer.errors import GateFailed, UserError
from trainer.export_config import Fp32Tolerance, Parity
from trainer.serving_config import Profile, TensorRT

# Prompts, then steps after short pasts, then after long ones: a text goes through all three.
PROFILES = (
    Profile(batch_size=(1, 1, 4), sequence_length=(1, 8, 16), past_length=(0, 0, 0)),
    Profile(batch_size=(1, 1, 4), sequence_length=(1, 1, 1), past_length=(1, 8, 12)),
    Profile(batch_size=(1, 1, 4), sequence_length=(1, 1, 8), past_length=(13, 32, 71)),
)
PROMPTS = [[7, 40, 41, 9], [30], [5, 6, 7, 8, 9, 200, 201, 202, 203]]
SEEDS = {"gpt2": 1, "llama": 0}


def profiles_of(spec, profiles=PROFILES):
    return engine_shapes(spec, TensorRT(profiles=profiles))


@pytest.fixture
def gpt2(model_folder):
    return read_spec(model_folder("gpt2", SEEDS["gpt2"]))


def test_a_step_reads_what_the_last_one_wrote_and_its_profile_is_that_of_its_past(gpt2):
    profiles = profiles_of(gpt2)
    lengths = [(9, 0), *((1, past) for past in range(9, 30))]
    steps = [plan_step(profiles, gpt2, number, 3, new, past) for number, (new, past) in enumerate(lengths)]
    assert all(step.reads != step.writes for step in steps)
    assert [step.reads for step in steps[1:]] == [step.writes for step in steps[:-1]]
    assert [step.profile for step in steps] == [0] + [1] * 4 + [2] * 17
    assert [step.kept for step in steps] == [new + past for new, past in lengths]
    assert steps[3].shapes == {
        "input_ids": (3, 1),
        "attention_mask": (3, 12),
        "position_ids": (3, 1),
        **dict.fromkeys(gpt2.cache.past_names, (3, 4, 11, 8)),
    }
    assert [step.room for step in steps[:2]] == [18, 20] and max(step.room for step in steps) <= gpt2.max_length


def test_the_first_profile_that_takes_all_inputs_is_the_one(gpt2):
    profiles = profiles_of(gpt2)
    assert fitting_profile(profiles, call_shapes(gpt2, 1, 1, 12)) == 1
    assert fitting_profile(profiles, call_shapes(gpt2, 4, 8, 64)) == 2
    assert fitting_profile([profiles[2], *profiles], call_shapes(gpt2, 1, 1, 30)) == 0
    for batch, new, past in ((5, 1, 0), (1, 17, 0), (1, 2, 5), (1, 9, 20), (1, 1, 73)):
        assert fitting_profile(profiles, call_shapes(gpt2, batch, new, past)) is None
    with pytest.raises(UserError, match=r"no profile of the engine takes input_ids \(1, 2\), attention_mask \(1, 7\)"):
        require_profile(profiles, call_shapes(gpt2, 1, 2, 5))


def test_how_far_steps_go_within_the_profiles(gpt2):
    assert steps_within(profiles_of(gpt2), gpt2, 72) == (1, 1, 72)
    assert steps_within(profiles_of(gpt2), gpt2, 40) == (1, 1, 40)
    assert steps_within(profiles_of(gpt2, PROFILES[:2]), gpt2, 72) == (1, 1, 13)
    assert steps_within(profiles_of(gpt2, PROFILES[:1]), gpt2, 72)[2] == 0  # a prompt, and nothing after it
    assert steps_within(profiles_of(gpt2, PROFILES[1:]), gpt2, 72)[2] == 0  # no prompt


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch of three lengths", "one"])
def test_texts_are_those_of_the_graph_and_nothing_is_copied(name, prompts, model_folder, raw_graph):
    """Keys and values are read at the very addresses at which the step before wrote them, through all profiles."""
    graph, spec = raw_graph(name, SEEDS[name]), read_spec(model_folder(name, SEEDS[name]))
    runner = runner_of(graph, spec, profiles_of(spec))
    assert isinstance(decoder_of(runner, spec), DeviceDecoder)
    settings = Sampling(40)
    assert generate(runner, spec, prompts, settings) == generate(open_onnx(graph, 1), spec, prompts, settings)
    calls = runner.engine.calls
    assert len(calls) == 40 and {profile for profile, _, _ in calls} == {0, 1, 2}
    past, present = spec.cache.past_names, spec.cache.present_names
    for (_, _, before), (_, _, after) in pairwise(calls):
        assert [after[one] for one in past] == [before[one] for one in present]
        assert not {after[one] for one in past} & {after[one] for one in present}
    made = {addresses[one] for _, _, addresses in calls for one in present[:1]}
    assert len(made) <= 6  # two sets, each made anew as often as its length doubles


def test_a_second_text_and_a_second_step_from_one_cache(gpt2, raw_graph):
    runner = runner_of(raw_graph("gpt2", SEEDS["gpt2"]), gpt2, profiles_of(gpt2))
    copying = CopyingDecoder(open_onnx(raw_graph("gpt2", SEEDS["gpt2"]), 1), gpt2)
    decoder = decoder_of(runner, gpt2)
    for batch, length in ((1, 16), (4, 5), (2, 9)):
        ids, mask = np.full((batch, length), 7), np.ones((batch, length), dtype=np.int64)
        cache = copied = None
        for _ in range(3):
            first = cache
            whole = batch != 4  # or the last token's logits alone
            found, cache = decoder.advance(gpt2.token_feeds(ids, mask), cache, whole)
            expected, copied = copying.advance(gpt2.token_feeds(ids, mask), copied, whole)
            assert found.shape[1] == (ids.shape[1] if whole else 1)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            ids, mask = ids[:, :1], np.ones((batch, mask.shape[1] + 1), dtype=np.int64)
    with pytest.raises(AssertionError, match="the last step's cache alone"):
        decoder.advance(gpt2.token_feeds(ids, mask), first)


def test_one_set_that_is_read_and_written_is_seen(gpt2, raw_graph, monkeypatch):
    planned = device_cache.plan_step
    monkeypatch.setattr(device_cache, "plan_step", lambda *words: replace(planned(*words), reads=0, writes=0))
    runner = runner_of(raw_graph("gpt2", SEEDS["gpt2"]), gpt2, profiles_of(gpt2))
    with pytest.raises(AssertionError, match=r"present.0.key lies on past_key_values.0.key"):
        generate(runner, gpt2, PROMPTS, Sampling(3))


def test_an_engine_with_a_cache_is_held_on_pasts_and_on_the_device(
    gpt2, model_folder, raw_graph, documents, monkeypatch
):
    graph, profiles = raw_graph("gpt2", SEEDS["gpt2"]), profiles_of(gpt2)
    source, tolerance = open_onnx(graph, 1), Fp32Tolerance()

    def prove(engine):
        return prove_engine("gpt2", gpt2, engine, source, documents, Parity(), tolerance)

    found = prove(runner_of(graph, gpt2, profiles))
    assert found["metrics"]["tokens_on_device"] == gpt2.max_length
    told = {case["case"] for case in found["cases"]}
    assert {"1x1", "1x1 after 1", "1x5 after 20", "1x1 after 71", "3x5 and 64 steps"} <= told
    assert not {"8x16", "7x1 after 16"} & told  # no profile takes so many rows
    with pytest.raises(GateFailed, match="gpt2: case"):
        prove(runner_of(raw_graph("gpt2", 0), gpt2, profiles))

    def crossed(self, step, batch):
        bound = bind(self, step, batch)
        one, other = gpt2.cache.past_names[0], gpt2.cache.past_names[2]
        return bound | {one: bound[other], other: bound[one]}

    bind = DeviceDecoder._bind
    monkeypatch.setattr(DeviceDecoder, "_bind", crossed)
    with pytest.raises(GateFailed, match="gpt2, its cache on the device: case"):
        prove(runner_of(graph, gpt2, profiles))
