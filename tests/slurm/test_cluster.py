"""Jobs on a real SLURM, the quick ones; what takes long is in drill.py.
Where a test is about the batch script alone, its interpreter is a few lines of bash that do what ranks are known to do.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slurm.preflight import judge, summary
from slurm.preflight import turns as turns_of
from tests.slurm.cluster import NO_DROPOUT, ROOT, Chain, Cluster, corpus, missing, tiny_tree, weights

if missing():
    pytest.skip(missing(), allow_module_level=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Sockets have short paths, so it is no folder of pytest's.
    folder = Path("/tmp") / f"lmw-{tmp_path_factory.mktemp('slurm').stat().st_ino % 10**6}"
    made = Cluster(folder)
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("slurm-text") / "corpus")


@pytest.fixture
def recipe(text, tmp_path):
    """Writes the tiny recipe, changed section by section."""

    def write(name: str = "run", **sections) -> Path:
        tree = tiny_tree(text, tmp_path / name)
        for section, changes in sections.items():
            tree[section] = tree[section] | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tree))
        return path

    return write


@pytest.fixture
def acting(tmp_path):
    """A site whose interpreter runs `lines` of bash, with $outcome set, once for each start of a node."""

    def make(lines: str, **site) -> str:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/bash\noutcome=${{@: -3:1}}\n{lines}\n")
        python.chmod(0o755)
        path = tmp_path / "site.yaml"
        path.write_text(json.dumps({"python": str(python), **site}))
        return str(path)

    return make


def test_a_chain_on_two_nodes_of_two_ranks_is_stopped_goes_on_and_equals_one_process(cluster, recipe, tmp_path):
    job = {"pretrain": {"nodes": 2, "ranks_per_node": 2}, "notice_s": 30}
    path = recipe(pretrain={"max_steps": 30, "save_every_steps": 10, "eval_every_steps": 15}, slurm=job)
    chain = cluster.submit(path, "prepare", "pretrain", *NO_DROPOUT)
    chain.until(lambda: chain.step() >= 3)
    chain.signal()
    assert (chain.ended(), chain.restarts()) == ("COMPLETED", 1), chain.log()
    assert chain.state("prepare") == "COMPLETED"
    assert "4 ranks on n[1-2]" in chain.log()
    assert [row["event"] for row in chain.rows() if row["event"] in ("start", "resume")] == ["start", "resume"]

    alone = Chain(cluster, tmp_path / "alone", {})
    shutil.copytree(chain.run_dir / "prepare", alone.run_dir / "prepare")
    command = [sys.executable, "-m", "trainer", "pretrain", str(path), f"run_dir={alone.run_dir}", *NO_DROPOUT]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    losses = [row["loss"] for row in alone.rows(event="train")]
    assert len(losses) == 30 and losses == pytest.approx([row["loss"] for row in chain.rows(event="train")], rel=1e-5)
    for name, value in weights(alone.run_dir).items():
        if "c_attn.bias" not in name:  # keys' biases have no gradient but rounding, which Adam makes as large as any
            torch.testing.assert_close(weights(chain.run_dir)[name], value, rtol=0, atol=5e-5, msg=name)

    said = cluster.lmworks("status", str(chain.run_dir)).stdout
    assert "30/30" in said and "COMPLETED" in said and "srun ended with 0" in said
    assert "no job" in cluster.lmworks("cancel", str(chain.run_dir)).stdout


RECORD = """
[ "$3" != probe ] || exit 0
printf '%s\\n' "$SLURM_NODEID $CUDA_VISIBLE_DEVICES $*" >"$outcome/said-$SLURM_NODEID"
echo 0 >"$outcome/0"
"""


def test_gpus_and_ranks_are_laid_out_on_two_nodes_of_four(cluster, recipe, acting):
    site = acting(RECORD, gpus_per_node=4)
    run_dir = """it's "$(touch pwned)" `touch pwned` #%j; &"""
    chain = cluster.submit(recipe(run_dir), "pretrain", "--site", site, "pretrain.micro_batch_size=3")
    said = chain.until(lambda: sorted((chain.run_dir / "slurm").glob("outcome/*/said-*")) * (chain.ended() != ""))
    lines = [path.read_text().strip() for path in said]
    assert [line.split()[:2] for line in lines] == [["0", "0,1,2,3"], ["1", "0,1,2,3"]]
    for rank, line in enumerate(lines):
        assert f"--multi_gpu --same_network --num_machines 2 --num_processes 8 --machine_rank {rank}" in line
        assert "--main_process_ip n1 --main_process_port 2" in line or "--main_process_port 3" in line
        assert line.endswith(f"pretrain {chain.run_dir}/slurm/recipe.yaml")
    assert not list(chain.run_dir.parent.glob("pwned")) and chain.log()


@pytest.mark.parametrize(
    ("code", "state", "restarts", "starts"),
    [
        ("echo 2", "FAILED", 0, 1),  # a mistake in the recipe: the next start would end alike
        ("echo 75", "FAILED", 1, 2),  # asked to stop, until max_restarts
        ("exit 1", "FAILED", 0, 2),  # killed: no code; again within the allocation, until max_restarts
        ("echo 71", "FAILED", 0, 2),
        ("echo 70", "FAILED", 0, 2),  # an exception: it may be a GPU's or the network's
    ],
)
def test_what_follows_from_the_ranks_code(cluster, recipe, acting, code, state, restarts, starts):
    # Each node in a file of its own: the one that ends first has the other killed, perhaps amid its writing.
    site = acting(f'{code} >"$outcome/$SLURM_NODEID"\nexit 1')
    path = recipe(slurm={"max_restarts": 1, "preflight": False})
    chain = cluster.submit(path, "pretrain", "distill", "--site", site)
    assert chain.ended() == state
    assert (chain.restarts(), chain.log().count(": start ")) == (restarts, starts), chain.log()
    assert chain.ended("distill") == "CANCELLED"  # --kill-on-invalid-dep


def test_ranks_that_save_too_long_do_not_end_the_chain(cluster, recipe, acting):
    """They ignore the signal; the job is requeued before SLURM would end it for good, and is over at its next start."""
    lines = (
        '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || { trap "" USR1 TERM; touch "$outcome.waits"; sleep 600 & wait; wait; }'
    )
    path = recipe(slurm={"preflight": False, "notice_s": 10})
    chain = cluster.submit(path, "pretrain", "--site", acting(f'{lines}\necho 0 >"$outcome/0"'))
    chain.until(lambda: list((chain.run_dir / "slurm" / "outcome").glob("*.waits")))
    chain.signal()
    assert (chain.ended(), chain.restarts()) == ("COMPLETED", 1), chain.log()
    assert "the ranks have not ended 5 s after the signal" in chain.log()


@pytest.mark.slow
def test_only_starts_without_a_newer_checkpoint_are_counted(cluster, recipe, acting):
    """Three starts that bring one each, then two that do not."""
    newer = 'mkdir -p "$to"; [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] || echo "${SLURM_RESTART_COUNT:-0}" >"$to/LATEST"'
    path = recipe(slurm={"preflight": False, "max_restarts": 1, "pretrain": {"nodes": 1}})
    lines = f'to={path.parent}/run/pretrain/checkpoints\n{newer}\necho 75 >"$outcome/0"'
    chain = cluster.submit(path, "pretrain", "--site", acting(lines))
    assert chain.ended() == "FAILED" and chain.log().count(": start ") == 5, chain.log()
    assert "no newer checkpoint in 2 starts" in chain.log()


def test_ranks_that_never_end_are_ended_when_one_did(cluster, recipe, acting):
    """What SLURM does not notice: one node is over, the other never reports."""
    site = acting('if [ "$SLURM_NODEID" = 0 ]; then echo 71 >"$outcome/0"; fi\nsleep 600')
    path = recipe(slurm={"max_restarts": 0, "preflight": False, "pretrain": {"nodes": 2}})
    chain = cluster.submit(path, "pretrain", "--site", site)
    cluster.lmworks("cancel", str(chain.run_dir))
    script = chain.run_dir / "slurm" / "pretrain.sbatch"
    script.write_text(script.read_text().replace("straggler_s=90", "straggler_s=2"))
    chain.jobs["pretrain"] = cluster.call("sbatch", "--parsable", str(script)).stdout.strip()  # by hand, as one may
    assert chain.ended() == "FAILED"
    assert "a rank ended 2 s ago and others did not" in chain.log()


def test_a_node_that_is_not_fit_is_named_and_excluded(cluster, recipe, acting, tmp_path):
    (tmp_path / "planted" / "planted-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "planted" / "planted-1.0.dist-info" / "METADATA").write_text("Name: planted\nVersion: 1.0\n")
    more = f'if [ "$SLURMD_NODENAME" = n2 ]; then export PYTHONPATH="{tmp_path}/planted:$PYTHONPATH"; fi'
    real = f'if [ "$2" = slurm.preflight ]; then {more}; exec {sys.executable} "$@"; fi\necho 0 >"$outcome/0"'
    chain = cluster.submit(recipe(slurm={"preflight": True}), "pretrain", "--site", acting(real))
    assert chain.ended() == "COMPLETED", chain.log()
    assert "preflight: 2 nodes, all-reduce of 64 MiB at" in chain.log()  # at the second start
    assert "preflight: n2 is not fit: other versions" in chain.log() and "excluded: n2" in chain.log()
    facts = cluster.show(chain.jobs["pretrain"])
    assert facts["ExcNodeList"] == "n2"
    assert "n2" not in cluster.call("scontrol", "show", "hostnames", facts["NodeList"]).stdout.split()


@pytest.mark.slow
def test_a_node_with_a_slow_network_is_named_and_excluded(cluster, recipe, acting):
    if not cluster.has_networks:
        pytest.skip("the nodes share one network here: it takes root and iproute2 to give each its own")
    real = f'if [ "$2" = slurm.preflight ]; then exec {sys.executable} "$@"; fi\necho 0 >"$outcome/0"'
    path = recipe(slurm={"preflight": True, "pretrain": {"nodes": 3}})
    with cluster.slow_node("n2"):
        site = acting(real, min_all_reduce_gb_s=0.15)
        chain = cluster.submit(path, "pretrain", "--site", site, "pretrain.micro_batch_size=4")
        assert chain.ended() == "COMPLETED", chain.log()
    assert "preflight: n2 is not fit: all-reduce with each neighbour at 0.0" in chain.log()
    assert chain.log().count("is not fit") == 1 and "excluded: n2" in chain.log()
    assert "preflight: 3 nodes, all-reduce of 64 MiB at" in chain.log()  # at the second start


def test_nodes_that_are_all_unfit_are_tried_on_others_once(cluster, recipe, acting):
    """Every node lacks GPUs: not the nodes' fault, so that not all of a cluster is excluded one after the other."""
    unfit = 'for node in "${@:6}"; do all=${all:+$all,}$node; done; echo "$all"'
    lines = f'case "$3" in probe) exit 0 ;; judge) {unfit}; exit 0 ;; esac'
    path = recipe(slurm={"preflight": True, "pretrain": {"nodes": 2}})
    chain = cluster.submit(path, "pretrain", "--site", acting(lines))
    assert (chain.ended(), chain.restarts()) == ("FAILED", 1), chain.log()
    first = chain.log().split("excluded: ")[1].split()[0].split(",")
    assert len(first) == 2 and "again no node is fit" in chain.log()

    path = recipe("four", slurm={"preflight": True, "pretrain": {"nodes": 4}})
    chain = cluster.submit(path, "pretrain", "--site", acting(lines))
    assert (chain.ended(), chain.restarts()) == ("FAILED", 0), chain.log()
    assert "without n1,n2,n3,n4 the partition has 0 nodes, and this job needs 4" in chain.log()


def test_what_slurm_would_refuse_is_refused_before_anything_is_submitted(cluster, recipe, acting):
    site = acting("exit 1", partition="nowhere")
    path = recipe()
    done = cluster.lmworks("submit", str(path), "--site", site, check=False, cwd=path.parent)
    assert done.returncode == 2 and "invalid partition" in done.stderr.lower()
    assert not (path.parent / "run" / "slurm" / "jobs.json").exists()


def test_cancel_ends_the_chain_for_good_and_a_second_chain_waits_for_it(cluster, recipe, acting):
    path = recipe(slurm={"preflight": False})
    site = acting('trap "echo 75 >$outcome/0; exit 1" TERM\nsleep 300 & wait')
    chain = cluster.submit(path, "pretrain", "distill", "--site", site)
    chain.until(lambda: chain.state() == "RUNNING")
    again = cluster.lmworks("submit", str(path), "--site", site, check=False, cwd=path.parent)
    assert again.returncode == 2 and "are not over" in again.stderr
    cluster.lmworks("cancel", str(chain.run_dir))
    assert (chain.ended(), chain.ended("distill")) == ("CANCELLED", "CANCELLED")
    assert chain.restarts() == 0


def test_an_array_runs_each_element_with_its_own_recipe_and_requeues_it_alone(cluster, recipe, acting):
    row = '{"event": "eval", "step": 30, "loss": 1.5}'
    lines = f"""
folder=$(grep -o 'run_dir: .*' "${{@: -1}}" | cut -d' ' -f2)
mkdir -p "$folder/pretrain"
echo '{row}' >>"$folder/pretrain/metrics.jsonl"
code=0
if [ "${{@: -2:1}} $SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}}" = "pretrain 1 0" ]; then code=75; fi
echo $code >"$outcome/0"
"""
    path = recipe(slurm={"preflight": False, "pretrain": {"nodes": 1}, "distill": {"nodes": 1}})
    chain = cluster.submit(path, "pretrain", "distill", "--array", "seed=3,5", "--site", acting(lines))
    again = cluster.lmworks("submit", str(path), check=False, cwd=path.parent)
    assert "are not over" in again.stderr
    chain.until(lambda: "2 COMPLETED" in (said := chain.said("distill")) and said)
    assert "2 COMPLETED" in chain.said("pretrain")
    starts = [len(folder.read_text().splitlines()) for folder in sorted(chain.run_dir.glob("array/*/*/metrics.jsonl"))]
    assert starts == [2, 3]  # pretrain and distill write here; the second element's pretrain started twice
    table = (chain.run_dir / "array.csv").read_text().splitlines()
    assert table == ["element,pretrain.loss,pretrain.step", "seed=3,1.5,30", "seed=5,1.5,30"]


GOOD = {"versions": "a", "disk_gib": 10.0, "gpus_wanted": 8, "gpus": 8, "clock_s": 0.1, "all_reduce_gb_s": 5.0}


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"clock_s": 9.0}, "its clock is +8.9 s off"),
        ({"disk_gib": 0.5}, "0.50 GiB free"),
        ({"versions": "b"}, "other versions"),
        ({"gpus": 7}, "7 of 8 GPUs"),
        ({"sum_is_right": False}, "the sum of an all-reduce is wrong"),
        ({"all_reduce_gb_s": ..., "all_reduce_error": "refused"}, "no all-reduce: refused"),
        (None, "no answer"),
    ],
)
def test_preflight_names_the_node_with_the_fault(tmp_path, planted, said):
    for node in ("a", "b", "c"):
        (tmp_path / f"{node}.json").write_text(json.dumps(GOOD))
    assert judge(tmp_path, ["a", "b", "c"]) == {}
    if planted is None:
        (tmp_path / "b.json").unlink()
    else:
        facts = {key: value for key, value in (GOOD | planted).items() if value is not ...}
        (tmp_path / "b.json").write_text(json.dumps(facts))
    faults = judge(tmp_path, ["a", "b", "c"])
    assert list(faults) == ["b"] and said in faults["b"]


@pytest.mark.parametrize(
    ("pairs", "slow"),
    [
        ({"a": [0.5, 0.4], "b": [0.5, 9.0], "c": [9.0, 8.0], "d": [8.0, 0.4]}, ["a"]),
        ({"a": [0.5, 0.4], "b": [0.5, 0.3], "c": [0.3, 8.0], "d": [8.0, 0.4]}, ["a", "b"]),
        ({"a": [3.0, 3.0], "b": [3.0, 3.0], "c": [3.0, 3.0], "d": [3.0, 3.0]}, []),  # slow together, not alone
        ({"a": [0.5], "b": [0.5]}, ["a", "b"]),
        ({"a": [], "b": []}, []),  # fast enough: no pairs were measured
    ],
)
def test_preflight_names_the_node_that_is_slow_with_all_its_neighbours(tmp_path, pairs, slow):
    for node, rates in pairs.items():
        facts = GOOD | {"all_reduce_gb_s": 0.6 if rates else 5.0, "pairs_gb_s": rates}
        (tmp_path / f"{node}.json").write_text(json.dumps(facts))
    assert list(judge(tmp_path, list(pairs), 2.0)) == slow
    assert judge(tmp_path, list(pairs)) == {}
    if not slow and pairs["a"]:
        assert "less than the site's 2, but no node by itself: pairs from 3.00" in summary(tmp_path, 2.0)


@pytest.mark.parametrize("nodes", range(2, 10))
def test_no_node_is_in_two_pairs_at_once_and_each_is_in_two(nodes):
    ring = [(one, (one + 1) % nodes) for one in range(nodes if nodes > 2 else 1)]
    turns = [[ring[at] for at in turn] for turn in turns_of(len(ring))]
    for turn in turns:
        assert len({node for pair in turn for node in pair}) == 2 * len(turn)
    assert sorted(pair for turn in turns for pair in turn) == sorted(ring)
