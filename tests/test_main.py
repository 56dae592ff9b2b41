"""The `lmworks` command itself: what a signal makes of a verb that does not train."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from trainer.__main__ import main

ROOT = Path(__file__).parents[1]
VERB = """
import subprocess
def run():
    worker = subprocess.Popen(["sleep", "600"])
    try:
        print(worker.pid, flush=True)
        worker.wait()
    except BaseException:  # as subprocess.run does
        worker.kill()
        worker.wait()
        raise
"""
MAIN = """
import sys
from trainer.__main__ import VERBS, Verb, main
VERBS["wait"] = Verb("waiting", "", takes_recipe=False)
sys.exit(main(["wait"]))
"""


def test_a_dry_run_refuses_what_the_run_would(capsys, tmp_path):
    for verb in ("pretrain", "run"):
        assert main([verb, "quickstart", f"run_dir={tmp_path}", "pretrain.engine.zero=zero9", "--dry-run"]) == 2
        assert "no DeepSpeed config 'zero9'; did you mean" in capsys.readouterr().err


def test_sigterm_ends_a_verb_with_what_it_started(tmp_path):
    """As bench and its workers: without an answer of ours the worker would go on alone."""
    (tmp_path / "waiting.py").write_text(VERB)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    verb = subprocess.Popen([sys.executable, "-c", MAIN], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip
    assert verb.stdout is not None
    worker = int(verb.stdout.readline())
    verb.send_signal(signal.SIGTERM)
    _, said = verb.communicate(timeout=60)
    assert verb.returncode == 75 and "stopped by SIGTERM; run the same command" in said
    assert not psutil.pid_exists(worker)
