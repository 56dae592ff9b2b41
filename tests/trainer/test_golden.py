"""The loss does not drift: 50 steps of a tiny masked and a tiny causal run against losses kept in tests/golden/.

After a change that is meant to move them:  pytest tests/trainer/test_golden.py --write-golden
"""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
# Equal on one machine; other CPUs add in another order, and 50 steps let that grow (1e-5 seen between AVX2 and AVX-512
# is assumed, not measured).
RELATIVE = 1e-4


def trace(recipe_path: Path) -> dict:
    from trainer.__main__ import main
    from trainer.recipe_file import load_recipe

    assert main(["pretrain", str(recipe_path)]) == 0
    lines = (load_recipe(str(recipe_path)).run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm_before_clip": [row["grad_norm_before_clip"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
    }


SETTINGS = {
    "max_steps": 50,
    "eval_every_steps": 50,
    "save_every_steps": 50,
    "global_batch_size": 8,
    "micro_batch_size": 4,
}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_losses_are_the_golden_ones(written_recipe, architecture, pytestconfig):
    if pytestconfig.getoption("--write-golden"):
        path = GOLDEN / f"tiny-{architecture}.json"
        path.write_text(json.dumps(trace(written_recipe(architecture, "new", **SETTINGS)), indent=1) + "\n")
    golden = json.loads((GOLDEN / f"tiny-{architecture}.json").read_text())  # a missing golden fails
    seen = trace(written_recipe(architecture, **SETTINGS))
    assert seen["tokens"] == golden["tokens"]
    for name in ("loss", "grad_norm_before_clip"):
        assert seen[name] == pytest.approx(golden[name], rel=RELATIVE), name


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_slightly_wrong_run_is_noticed(written_recipe, architecture):
    golden = json.loads((GOLDEN / f"tiny-{architecture}.json").read_text())
    seen = trace(written_recipe(architecture, optim={"learning_rate": 5.05e-3}, **SETTINGS))
    assert seen["loss"] != pytest.approx(golden["loss"], rel=RELATIVE)
