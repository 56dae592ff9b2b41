"""Every strategy and ZeRO stage trains alike, on two real gloo ranks, and takes up what another one left."""

import ctypes.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.engine.zero import load_zero
from trainer.models import from_config, load_tokenizer, make_config
from trainer.recipe_file import load_recipe

FORKED = Path(__file__).with_name("forked.py")
ROOT = Path(__file__).parents[2]
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

STEPS = 20
STRATEGIES = {
    "ddp": [],
    "fsdp2": ["pretrain.engine.strategy=fsdp2"],
    "zero0": ["pretrain.engine.zero=zero0"],
    "zero1": ["pretrain.engine.zero=zero1"],
    "zero2": ["pretrain.engine.zero=zero2"],
    "zero3": ["pretrain.engine.zero=zero3"],
}


def run_forked(tmp_path, attempts, timeout_s=500, within=()):
    """Run attempts one after another; returns the ranks' exit codes of each, and what was said. `within`: words of a
    command that runs the one after it."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(attempts))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*within, sys.executable, FORKED, plan],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shm_comm" not in done.stdout  # nothing is compiled that training does not call
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def recipe(written_recipe):
    """Writes a tiny recipe without dropout, which falls otherwise on other numbers of ranks; clipping is at work."""

    def write(name, architecture="bert", **settings):
        fixed = {"max_steps": STEPS, "max_grad_norm": 0.05, "save_every_steps": 10, "micro_batch_size": 1}
        path = written_recipe(architecture, name, **fixed | settings)
        tree = json.loads(path.read_text())
        tree["pretrain"]["model"]["config"] |= (
            {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            if architecture == "bert"
            else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        )
        path.write_text(json.dumps(tree))
        return path

    return write


def weights(path, stage="pretrain"):
    return load_file(load_recipe(str(path)).model_dir(stage) / "model.safetensors")


def rows(path, event="train", stage="pretrain"):
    lines = (load_recipe(str(path)).stage_dir(stage) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def assert_alike(path, reference, tolerance, stage="pretrain"):
    """Losses, gradient norms and final weights of two runs agree."""
    ours, theirs = ({row["step"]: row for row in rows(one, stage=stage)} for one in (path, reference))
    assert ours.keys() == theirs.keys()
    for step, row in ours.items():
        assert row["tokens"] == theirs[step]["tokens"]
        for name in ("loss", "grad_norm_before_clip"):
            assert row[name] == pytest.approx(theirs[step][name], rel=tolerance), (path.stem, step, name)
    for name, tensor in weights(reference, stage).items():
        torch.testing.assert_close(weights(path, stage)[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_every_strategy_trains_alike(recipe, tmp_path):
    """Two ranks, accumulation 1 and 4, padded rows, every step clipped: against plain AdamW in one process."""
    reference = recipe("reference", micro_batch_size=8)
    assert main(["pretrain", str(reference)]) == 0
    assert all(row["grad_norm_before_clip"] > 0.05 for row in rows(reference))
    attempts, paths = [], []
    for name, overrides in STRATEGIES.items():
        for micro in (4, 1) if name in ("ddp", "zero2") else (1,):
            paths.append(recipe(f"{name}-{micro}", micro_batch_size=micro))
            attempts.append({"ranks": 2, "arguments": ["pretrain", str(paths[-1]), *overrides]})
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[0, 0]] * len(attempts), said[-3000:]
    for path in paths:
        assert_alike(path, reference, 2e-4)


def test_a_checkpoint_is_taken_up_by_any_strategy_and_number_of_ranks(recipe, tmp_path):
    """Stopped at step 10 under one, finished under another, each against the run that was never stopped."""
    reference = recipe("reference", micro_batch_size=8)
    assert main(["pretrain", str(reference)]) == 0
    pairs = [
        ("zero2", 2, "zero2", 1),
        ("zero2", 1, "zero3", 2),
        ("zero3", 2, "zero1", 4),
        ("fsdp2", 2, "ddp", 1),
        ("ddp", 1, "fsdp2", 2),
    ]
    attempts, paths = [], []
    for before, ranks, after, more_ranks in pairs:
        path = recipe(f"{before}-{ranks}-{after}-{more_ranks}")
        paths.append(path)
        attempts.append(
            {"ranks": ranks, "arguments": ["pretrain", str(path), *STRATEGIES[before]], "stop_before_step": 10}
        )
        attempts.append({"ranks": more_ranks, "arguments": ["pretrain", str(path), *STRATEGIES[after]]})
    codes, said = run_forked(tmp_path, attempts)
    for (_, ranks, _, more_ranks), stopped, done in zip(pairs, codes[::2], codes[1::2], strict=True):
        assert stopped == [75] * ranks, said[-3000:]
        assert done == [0] * more_ranks, said[-3000:]
    for path in paths:
        assert [row["step"] for row in rows(path, "resume")] == [10]
        assert_alike(path, reference, 2e-4)


def test_a_teacher_is_cut_where_its_student_is_and_teaches_alike(recipe, tmp_path):
    """Distillation on two ranks: against one process; in bf16, of which a teacher is made whatever autocast does, near
    to it."""
    reference = recipe("reference", micro_batch_size=8)
    assert main(["pretrain", str(reference)]) == 0
    assert main(["distill", str(reference)]) == 0
    teacher = f"distill.teacher={load_recipe(str(reference)).model_dir('pretrain')}"
    attempts, paths = [], []
    for name, precision in [*((name, "fp32") for name in ("ddp", "fsdp2", "zero2", "zero3")),
                            *((name, "bf16") for name in ("ddp", "fsdp2", "zero0", "zero3"))]:  # fmt: skip
        paths.append(recipe(f"{name}-{precision}"))
        overrides = [word.replace("pretrain.", "distill.", 1) for word in STRATEGIES[name]]
        overrides += [teacher, "distill.micro_batch_size=2", f"distill.precision={precision}"]
        attempts.append({"ranks": 2, "arguments": ["distill", str(paths[-1]), *overrides]})
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[0, 0]] * len(attempts), said[-3000:]
    held = re.findall(r"teacher: (\d+)% of its weights on each rank, torch.(\w+)", said)
    assert [kind for _, kind in held] == ["float32"] * 4 + ["bfloat16"] * 4
    whole = [int(share) for share, _ in held]
    assert [share for share in whole if share == 100] == [100] * 4  # ddp, zero2, zero0 and ddp in bf16
    assert all(share < 80 for share in whole if share != 100)  # half of the blocks
    for path in paths[:4]:
        assert_alike(path, reference, 2e-4, "distill")
    exact = [row["loss"] for row in rows(reference, stage="distill")]
    for path in paths[4:]:
        assert [row["loss"] for row in rows(path, stage="distill")] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    "overrides",
    [STRATEGIES["fsdp2"], pytest.param(["pretrain.engine.zero=zero3_offload"], marks=pytest.mark.slow)],
    ids=["fsdp2", "zero3_offload"],
)
@pytest.mark.timeout(900)  # at first use DeepSpeed compiles its CPU Adam
def test_a_teacher_whose_head_nobody_looked_at_is_cut_too(recipe, tmp_path, overrides):
    """Its whole model is called, not its base; and under parameter offload as without."""
    reference, path = recipe("reference"), recipe("cut")
    tokenizer = load_tokenizer(load_recipe(str(reference)).tokenizer_dir)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    config = make_config("xlm-roberta", shape, tokenizer, 32)
    from_config(config, causal=False, seed=3).save_pretrained(tmp_path / "teacher")
    teacher = f"distill.teacher={tmp_path / 'teacher'}"
    cut = [word.replace("pretrain", "distill") for word in overrides]
    assert main(["distill", str(reference), teacher]) == 0
    attempt = {"ranks": 2, "arguments": ["distill", str(path), "distill.micro_batch_size=2", teacher, *cut]}
    codes, said = run_forked(tmp_path, [attempt])
    assert codes == [[0, 0]], said[-3000:]
    (share,) = re.findall(r"teacher: (\d+)% of its weights on each rank", said)
    assert int(share) < 80
    assert_alike(path, reference, 2e-4, "distill")


def test_without_zero_deepspeed_evaluates_in_the_precision_that_it_trains_in(recipe, tmp_path):
    """bf16 by autocast: before the first step the same loss as that of the plain loop, to the bit, not float32's."""
    cases = {"bf16": ("bf16", []), "zero0": ("bf16", STRATEGIES["zero0"]), "fp32": ("fp32", STRATEGIES["zero0"])}
    settings = {"micro_batch_size": 8, "max_steps": 3}
    paths = {name: recipe(name, precision=precision, **settings) for name, (precision, _) in cases.items()}
    attempts = [{"ranks": 1, "arguments": ["pretrain", str(paths[name]), *cases[name][1]]} for name in cases]
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[0]] * 3, said[-3000:]
    first = {name: rows(path, "eval")[0]["loss"] for name, path in paths.items()}
    assert first["zero0"] == first["bf16"] != first["fp32"]


@pytest.mark.slow
def test_a_second_partition_within_each_node_trains_alike_and_is_resumed(recipe, tmp_path):
    """ZeRO++'s hierarchical partition on four ranks, as if on two nodes of two: against one process, never stopped."""
    config = load_zero("zero3")
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    reference, path = recipe("reference", micro_batch_size=8), recipe("hpz")
    assert main(["pretrain", str(reference)]) == 0
    attempt = {"ranks": 4, "arguments": ["pretrain", str(path), f"pretrain.engine.zero={tmp_path / 'hpz.json'}"]}
    codes, said = run_forked(tmp_path, [attempt | {"stop_before_step": 10}, attempt])
    assert codes == [[75] * 4, [0] * 4], said[-3000:]
    assert [row["step"] for row in rows(path, "resume")] == [10]
    assert_alike(path, reference, 2e-4)


def offloads(tmp_path):
    """Configs that keep the optimizer's state elsewhere, and those of them that can run here."""
    made = {name: [f"pretrain.engine.zero={name}"] for name in ("zero2_offload", "zero3_offload")}
    if ctypes.util.find_library("aio") and Path("/usr/include/libaio.h").exists():  # DeepSpeed compiles against it
        drive = f"pretrain.engine.nvme_path={tmp_path / 'drive'}"
        made["zero_infinity"] = ["pretrain.engine.zero=zero_infinity", drive]
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)  # at first use DeepSpeed compiles its CPU Adam and its asynchronous reads
def test_offloaded_state_trains_alike_and_is_saved(recipe, tmp_path):
    """Optimizer (and parameters, at stage 3) in host memory or in files: the same losses; a checkpoint of it goes on
    under plain training, and one of plain training under it."""
    reference = recipe("reference", micro_batch_size=8)
    assert main(["pretrain", str(reference)]) == 0
    attempts, paths = [], []
    for name, overrides in offloads(tmp_path).items():
        for before, after in ((overrides, STRATEGIES["ddp"]), (STRATEGIES["ddp"], overrides)):
            paths.append(recipe(f"{name}-{len(paths)}", micro_batch_size=2))
            command = {"ranks": 2, "arguments": ["pretrain", str(paths[-1]), *before]}
            attempts += [
                command | {"stop_before_step": 10},
                {"ranks": 2, "arguments": [*command["arguments"][:2], *after]},
            ]
    codes, said = run_forked(tmp_path, attempts, timeout_s=1500)
    assert codes == [[75, 75], [0, 0]] * (len(attempts) // 2), said[-3000:]
    for path in paths:
        assert_alike(path, reference, 2e-4)


KILLS = {"ddp": (4, 0.8), "zero2": (4, 1.2), "zero3": (4, 3.0)}  # how many, and within which time


@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero3"))]
)
def test_killed_at_any_instant_it_ends_as_if_nothing_had_happened(recipe, tmp_path, strategy):
    """SIGKILL to both ranks at random instants, a checkpoint after every step, every other run saving in background:
    bit for bit, because two numbers have one sum."""
    settings = {"save_every_steps": 1, "micro_batch_size": 2}
    unbroken, broken = recipe("unbroken", **settings), recipe("broken", **settings)
    metrics = str(load_recipe(str(broken)).run_dir / "pretrain" / "metrics.jsonl")
    arguments = ["pretrain", str(broken), *STRATEGIES[strategy]]
    background = ["pretrain.checkpoint.asynchronous=true"]
    number, within_s = KILLS[strategy]
    delays = np.random.default_rng(11).uniform(0.2 * within_s, within_s, size=number)
    attempts = [
        {"ranks": 2, "arguments": arguments + background * (number % 2), "kill": {"file": metrics, "delay_s": delay}}
        for number, delay in enumerate(delays)
    ]
    attempts += [{"ranks": 2, "arguments": arguments}]
    attempts += [{"ranks": 2, "arguments": ["pretrain", str(unbroken), *STRATEGIES[strategy]]}]
    codes, said = run_forked(tmp_path, attempts)
    assert codes[-2:] == [[0, 0], [0, 0]], said[-3000:]
    assert sum(code == [-9, -9] for code in codes[:-2]) >= 2
    assert rows(broken, "resume")
    ours, theirs = weights(broken), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_verify_passes_what_is_right_and_catches_what_is_not(recipe, tmp_path):
    """Planted: a missed all-reduce, a lost micro-batch, clipping that is off, moments that a resume forgets."""
    path = recipe("verified", micro_batch_size=2)
    report = load_recipe(str(path)).run_dir / "verify"
    cases = [
        ("resume", "zero3", None, 0),
        ("resume", "zero2", "forgotten_moments", 1),
        ("gradients", "zero3", None, 0),
        ("gradients", "zero0", "no_all_reduce", 1),
        ("gradients", "zero2", "lost_micro_batch", 1),
        ("gradients", "fsdp2", "no_clipping", 1),
    ]
    attempts = [
        {"ranks": 2, "arguments": ["verify", what, str(path), *STRATEGIES[strategy]]}
        | ({"fault": fault} if fault else {})
        for what, strategy, fault, _ in cases
    ]
    bf16 = ["pretrain.precision=bf16"]
    attempts += [
        {"ranks": 2, "arguments": ["verify", "gradients", str(path), *STRATEGIES[name], *bf16]}
        for name in ("zero0", "zero2")
    ]
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[code, code] for *_, code in cases] + [[0, 0]] * 2, said[-3000:]
    assert json.loads((report / "gradients.json").read_text())["passed"]
    assert "unbroken" in said and "gradient of" in said


@pytest.mark.slow
def test_lamb_takes_whole_tensors_under_every_strategy(recipe, tmp_path):
    """The trust ratio is that of whole parameters, however ZeRO cut them: equal to LAMB in one process."""
    lamb = {"optim": {"name": "lamb", "learning_rate": 5e-3}}
    reference = recipe("reference", micro_batch_size=8, **lamb)
    assert main(["pretrain", str(reference)]) == 0
    names = ("fsdp2", "zero1", "zero2", "zero3")
    paths = [recipe(name, micro_batch_size=2, **lamb) for name in names]
    attempts = [
        {"ranks": 2, "arguments": ["pretrain", str(path), *STRATEGIES[name]]}
        for path, name in zip(paths, names, strict=True)
    ]
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[0, 0]] * len(attempts), said[-3000:]
    for path in paths:
        assert_alike(path, reference, 2e-4)


def test_a_rank_that_hangs_is_named_and_ends_the_run(recipe, tmp_path):
    """Rank 1 is stopped amid training: rank 0 waits no longer than it was told, says for whom, and a resume works."""
    path = recipe("hung", max_steps=2000, save_every_steps=20, eval_every_steps=2000)
    metrics = str(load_recipe(str(path)).run_dir / "pretrain" / "metrics.jsonl")
    command = ["pretrain", str(path), "pretrain.engine.collective_timeout_s=5"]
    attempts = [
        {"ranks": 2, "arguments": command, "freeze": {"file": metrics, "bytes": 30_000, "rank": 1}},
        {"ranks": 2, "arguments": [*command, "pretrain.engine.collective_timeout_s=60"], "stop_before_step": 300},
    ]
    codes, said = run_forked(tmp_path, attempts)
    assert codes == [[71, -9], [75, 75]], said[-3000:]
    assert "waited for rank 1 (last seen" in said and "Traceback" not in said
    assert rows(path, "resume")


def test_a_rank_whose_file_is_not_seen_is_named(recipe, tmp_path):
    """Rank 0 gives the checkpoint up before the others give rank 0 up, and both end with the same message."""
    command = ["pretrain", str(recipe("unseen", micro_batch_size=2)), "pretrain.engine.collective_timeout_s=8"]
    codes, said = run_forked(tmp_path, [{"ranks": 2, "arguments": command, "fault": "unseen_report"}])
    assert codes == [[2, 2]], said[-3000:]
    assert "not seen by rank 0 within 6 s: rank-00001.json" in said and "Traceback" not in said
