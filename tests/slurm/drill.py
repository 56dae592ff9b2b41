"""Disturbs jobs on a real SLURM in every way that is known to happen, and holds their models against unbroken runs.

    python tests/slurm/drill.py [--only CASE …] [--out FILE]

The table: what was done, how the job ended, how often it started, the seconds from the disturbance until the step that
it was at was passed again, and whether the parameters equal the unbroken run's bit for bit. With --only, rows of FILE
that are not asked for stay.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.slurm.cluster import NO_DROPOUT, Chain, Cluster, corpus, equal, missing, tiny_tree, weights
from trainer.artifact import content_hash, versions, write_json

URGENT = (
    "sbatch",
    "--parsable",
    "--partition=urgent",
    "--nodes=4",
    "--exclusive",
    "--wrap=sleep 3",
    "--output=/dev/null",
)
SLOW = ("pretrain.eval_every_steps=1", "pretrain.eval_sequences=null")  # an evaluation takes longer than a step


@dataclass(frozen=True)
class Case:
    """One disturbance of pretraining on 2 nodes of one rank each."""

    does: Callable[[Chain], Any]
    says: str
    words: tuple[str, ...] = ()
    exact: bool = True  # the same number of ranks to the end, so the same bits


def at(chain: Chain, step: int) -> None:
    """Wait until a step is reported."""
    chain.until(lambda: chain.step() >= step)


def signal_at(*steps: int) -> Callable[[Chain], None]:
    """What SLURM sends before it takes the nodes away, at each of the steps."""

    def does(chain: Chain) -> None:
        for number, step in enumerate(steps):
            at(chain, step)
            chain.signal()
            chain.until(lambda number=number: chain.restarts() > number)

    return does


def before_the_first_step(chain: Chain) -> None:
    chain.until(lambda: chain.cluster.ranks(chain.jobs["pretrain"]))
    assert chain.step() == 0
    chain.signal()


def during_an_evaluation(chain: Chain) -> str:
    at(chain, 40)
    chain.signal()
    chain.until(lambda: chain.restarts() > 0)
    trained, judged = chain.step(), max(row["step"] for row in chain.rows(event="eval"))
    return f"evaluation of step {trained} {'cut short' if judged < trained else 'was over'}"


def during_a_save(chain: Chain) -> None:
    at(chain, 40)
    chain.until(lambda: list((chain.run_dir / "pretrain" / "checkpoints").glob("*.partial")))
    chain.signal()


def to_a_rank(number: int, step: int = 50) -> Callable[[Chain], None]:
    """A signal that the rank of the second node cannot answer."""

    def does(chain: Chain) -> None:
        at(chain, step)
        os.kill(chain.cluster.ranks(chain.jobs["pretrain"], hosts(chain)[-1])[0], number)

    return does


def time_limit(chain: Chain) -> None:
    """Hold a rank until SLURM itself sends the signal, so that the run is longer than its limit."""
    at(chain, 50)
    rank = chain.cluster.ranks(chain.jobs["pretrain"], hosts(chain)[-1])[0]
    os.kill(rank, signal.SIGSTOP)
    chain.until(lambda: "signal: asking" in chain.log())
    os.kill(rank, signal.SIGCONT)


def kill_node(which: int) -> Callable[[Chain], str]:
    def does(chain: Chain) -> str:
        at(chain, 50)
        host = hosts(chain)[which]
        chain.cluster.kill_node(host)
        return host

    return does


def restart_slurmd(chain: Chain) -> None:
    at(chain, 50)
    for host in hosts(chain):
        chain.cluster.restart_slurmd(host)


def restart_node_at_once(chain: Chain) -> None:
    """SLURM itself does not notice this one."""
    at(chain, 50)
    host = hosts(chain)[-1]
    chain.cluster.kill_node(host)
    chain.cluster.start_node(host)


def urgent_job(chain: Chain) -> None:
    at(chain, 50)
    chain.cluster.call(*URGENT)
    chain.until(lambda: chain.restarts() > 0)


def hosts(chain: Chain) -> list[str]:
    nodes = chain.cluster.show(chain.jobs["pretrain"])["NodeList"]
    return chain.cluster.call("scontrol", "show", "hostnames", nodes).stdout.split()


CASES = {
    "signal": Case(signal_at(50), "scancel --signal=USR1"),
    "three signals": Case(signal_at(40, 70, 100), "requeued three times in a row"),
    "signal before step 1": Case(before_the_first_step, "while the ranks import torch"),
    "signal in evaluation": Case(during_an_evaluation, "evaluating after every step", SLOW),
    "signal in a save": Case(during_a_save, "saving after every step", ("pretrain.save_every_steps=1",)),
    "preemption": Case(urgent_job, "a job of higher priority takes all nodes"),
    "time limit": Case(time_limit, "--time=1, a rank is held until the signal comes",
                       ("slurm.time_minutes=1", "slurm.notice_s=25")),
    "rank killed": Case(to_a_rank(signal.SIGKILL), "kill -9 on the second node"),
    "rank stopped": Case(to_a_rank(signal.SIGSTOP), "SIGSTOP, engine.collective_timeout_s=10",
                         ("pretrain.engine.collective_timeout_s=10",)),
    "node killed": Case(kill_node(-1), "not the batch host; others are free"),
    "batch host killed": Case(kill_node(0), "others are free"),
    "node killed and back at once": Case(restart_node_at_once, "SLURM does not notice it"),
    "slurmd restarted": Case(restart_slurmd, "on both nodes, under the running job"),
    "fewer nodes": Case(kill_node(-1), "4 nodes, one killed, min_nodes=2",
                        ("slurm.pretrain.nodes=4", "slurm.pretrain.min_nodes=2", *NO_DROPOUT), exact=False),
}  # fmt: skip


class Drill:
    """A cluster, prepared data, and runs that nobody disturbed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._text = corpus(root / "text")
        self.cluster = Cluster(root / "slurm")
        unbroken = self.chain("unbroken", ("prepare", "pretrain"))
        assert unbroken.ended("pretrain") == "COMPLETED", unbroken.log()
        self.unbroken = unbroken.run_dir

    def chain(self, name: str, words: tuple[str, ...]) -> Chain:
        run_dir = self._root / name.replace(" ", "-")
        if name != "unbroken" and "prepare" not in words:
            shutil.copytree(self._root / "unbroken" / "prepare", run_dir / "prepare")
        recipe = self._root / f"{run_dir.name}.yaml"
        recipe.write_text(json.dumps(tiny_tree(self._text, run_dir)))
        return self.cluster.submit(recipe, *words)

    def case(self, name: str) -> dict[str, Any]:
        """One row of the table."""
        case = CASES[name]
        reference = self.unbroken if case.exact else self._unbroken_without_dropout()
        chain = self.chain(name, ("pretrain", *case.words))
        noted = case.does(chain)
        step, began = chain.step(), time.monotonic()
        chain.until(lambda: chain.step() > step or chain.state() == "COMPLETED", 400)
        lost_s = time.monotonic() - began
        state = chain.ended()
        row = {"case": name, "what": case.says, "ended": state, "restarts": chain.restarts(),
               "starts": chain.log().count(": start "), "seconds_lost": round(lost_s, 1)}  # fmt: skip
        if row["starts"] == 1 and name != "slurmd restarted":
            row["ended"] = "not disturbed"
        row["nodes"] = re.findall(r" ranks on (\S+),", chain.log())
        row["parameters"] = compared(reference, chain.run_dir) if state == "COMPLETED" else "none"
        if isinstance(noted, str) and noted in ("n1", "n2", "n3", "n4"):
            self.cluster.start_node(noted)
        elif noted:
            row["noted"] = noted
        return row

    def _unbroken_without_dropout(self) -> Path:
        chain = self.chain("unbroken without dropout", ("pretrain", *NO_DROPOUT))
        assert chain.ended() == "COMPLETED", chain.log()
        return chain.run_dir

    def whole_chain(self) -> dict[str, Any]:
        """All stages with dependencies; prepare, which is short, pretrain and distill are each asked to stop once."""
        chain = self.chain("chain", ("prepare", "pretrain", "distill", "export", "report", "export={}"))
        reference = self.chain("chain unbroken", ("prepare", "pretrain", "distill"))
        chain.until(lambda: chain.cluster.ranks(chain.jobs["prepare"]))
        chain.signal("prepare")
        for stage, step in (("pretrain", 50), ("distill", 20)):
            chain.until(lambda stage=stage, step=step: chain.step(stage) >= step, 400)
            chain.signal(stage)
        states = {stage: chain.ended(stage) for stage in chain.jobs}
        assert reference.ended("distill") == "COMPLETED"
        same = content_hash(chain.run_dir / "prepare" / "data") == content_hash(reference.run_dir / "prepare" / "data")
        same &= all(equal(chain.run_dir, reference.run_dir, stage) for stage in ("pretrain", "distill"))
        restarts = {stage: chain.restarts(stage) for stage in chain.jobs}
        return {"case": "whole chain", "what": "prepare (if not over by then), pretrain and distill get a signal each",
                "ended": ", ".join(sorted(set(states.values()))), "restarts": sum(restarts.values()),
                "starts": len(chain.jobs) + sum(restarts.values()), "seconds_lost": None,
                "parameters": "equal" if same else "differ", "noted": restarts}  # fmt: skip

    def long_prepare(self) -> dict[str, Any]:
        """Prepare alone, on the standard library's sources, asked to stop twice while it works."""
        sources = ("prepare", 'prepare.sources=[{"type": "stdlib"}]', "prepare.max_shard_tokens=200000")
        reference = self.chain("long prepare unbroken", sources)
        assert reference.ended("prepare") == "COMPLETED", reference.log("prepare")
        chain = self.chain("long prepare", sources)
        journal = chain.run_dir / "prepare" / "unfinished" / "journal.jsonl"

        def finished_steps() -> int:
            return journal.read_text().count("\n") if journal.is_file() else 0

        for number in range(2):
            had = finished_steps()
            chain.until(lambda had=had: finished_steps() > had + 200)
            chain.signal("prepare")
            chain.until(lambda number=number: chain.restarts("prepare") > number)
        state = chain.ended("prepare")
        same = content_hash(chain.run_dir / "prepare" / "data") == content_hash(reference.run_dir / "prepare" / "data")
        return {"case": "signals in prepare", "what": "on the standard library, stopped twice while it reads",
                "ended": state, "restarts": chain.restarts("prepare"), "starts": 1 + chain.restarts("prepare"),
                "seconds_lost": None, "parameters": "equal data" if same else "differ",
                "noted": re.findall("it had finished (.*)", chain.log("prepare"))}  # fmt: skip

    def quickstart(self) -> dict[str, Any]:
        """The recipe that ships, as it is, all of its stages."""
        run_dir = self._root / "quickstart"
        self.cluster.lmworks("submit", "quickstart", f"run_dir={run_dir}", cwd=self._root)
        chain = Chain(self.cluster, run_dir, json.loads((run_dir / "slurm" / "jobs.json").read_text())["jobs"])
        began = time.monotonic()
        states = {stage: chain.ended(stage, 1800) for stage in chain.jobs}
        summary = json.loads((run_dir / "summary.json").read_text())
        return {"case": "quickstart", "what": "the shipped recipe, whole: " + ", ".join(chain.jobs),
                "ended": ", ".join(sorted(set(states.values()))), "restarts": 0, "starts": len(chain.jobs),
                "seconds": round(time.monotonic() - began), "seconds_lost": None, "parameters": "none to compare",
                "noted": summary}  # fmt: skip


def compared(first: Path, second: Path) -> str:
    """`equal`, bit for bit, or how far two runs' parameters and losses are apart."""
    if equal(first, second):
        return "equal"
    one, other = weights(first), weights(second)
    most = max(float((one[name] - other[name]).abs().max()) for name in one)
    losses = [Chain.last_loss(folder) for folder in (first, second)]
    return f"differ by up to {most:.1e}, validation losses {losses[0]:.6f} and {losses[1]:.6f}"


CHAINS = {"whole chain": Drill.whole_chain, "signals in prepare": Drill.long_prepare, "quickstart": Drill.quickstart}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*CASES, *CHAINS]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if missing():
        sys.exit(missing())
    root = Path(tempfile.mkdtemp(prefix="lmw-"))
    drill = Drill(root)
    rows = json.loads(arguments.out.read_text())["cases"] if arguments.out and arguments.out.is_file() else []
    try:
        for name in arguments.only:
            try:
                row = CHAINS[name](drill) if name in CHAINS else drill.case(name)
            except AssertionError as error:
                row = {"case": name, "ended": "not as expected", "noted": str(error)[-2000:]}
            rows = [old for old in rows if old["case"] != name] + [row]
            print(json.dumps(row), flush=True)
            if arguments.out:
                about = {
                    "command": "python tests/slurm/drill.py",
                    "versions": versions(),
                    "slurm": slurm_version(drill),
                }
                write_json(arguments.out, about | {"cases": rows})
    finally:
        drill.cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
    return 0 if all(row["ended"] == "COMPLETED" for row in rows) else 1


def slurm_version(drill: Drill) -> str:
    return drill.cluster.call("sinfo", "--version").stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
