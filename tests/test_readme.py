"""What README and the shipped recipes say is so: commands exist and run, links lead somewhere, recipes load."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import VERBS, main
from trainer.config import Recipe
from trainer.recipe_file import dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.stem for path in (ROOT / "trainer" / "recipes").glob("*.yaml"))


def commands(program):
    """Everything in README's code that starts with `program`."""
    code = re.findall(r"`([^`\n]+)`", README) + re.findall(r"```\n(.*?)```", README, re.S)
    return sorted({line.strip() for block in code for line in block.splitlines() if line.startswith(program)})


def test_make_targets_exist():
    made = commands("make ")
    assert {"make quickstart", "make test", "make quickstart-gpt"} <= set(made)
    for command in made:
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_verb_is_in_readme_and_every_verb_in_readme_is_one():
    named = set(re.findall(r"lmworks ([a-z]+)", " ".join(commands("lmworks"))))
    listed = set(re.findall(r"\b([a-z]+)\b", " ".join(re.findall(r"`lmworks ([^`]+) RECIPE", README))))
    assert named <= set(VERBS)
    assert set(VERBS) <= named | listed


@pytest.mark.parametrize("verb", [verb for verb in VERBS if VERBS[verb].takes_recipe])
def test_dry_run_prints_a_recipe_that_loads_again(verb, tmp_path, capsys):
    assert main([verb, *VERBS[verb].what[:1], "quickstart", "--dry-run"]) == 0
    said = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(said)
    assert load_recipe(str(again)) == load_recipe("quickstart")


def test_dry_run_of_the_chain_says_what_each_stage_would_do(capsys, tmp_path):
    assert main(["run", "quickstart", f"run_dir={tmp_path}", "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in said] == [
        "# prepare", "# pretrain", "# distill", "# export", "# bench", "# report"
    ]  # fmt: skip
    assert all("would run" in line for line in said)


@pytest.mark.parametrize("verb", ["distill", "export", "bench"])
def test_a_missing_section_is_named_alike_by_the_verb_and_its_dry_run(capsys, tmp_path, verb):
    said = []
    for more in ([], ["--dry-run"]):
        assert main([verb, "shakespeare-char", f"run_dir={tmp_path}", *more]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and f"the recipe has no `{verb}` section" in said[0]
    assert not list(tmp_path.iterdir())


def test_dry_run_needs_no_torch():
    code = (
        "import sys; from trainer.__main__ import main; main(['pretrain', 'quickstart', '--dry-run']);"
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_load_and_reload_equal(name, tmp_path):
    recipe = load_recipe(name)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(str(dumped)) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_say_their_command_and_hardware(name):
    head = (ROOT / "trainer" / "recipes" / f"{name}.yaml").read_text().split("run_dir:")[0]
    assert f"lmworks run {name}" in head or re.search(rf"accelerate launch .*-m trainer\.pretrain {name}\b", head)
    assert "Hardware:" in head


def test_the_readmes_override_example_is_valid():
    (example,) = re.findall(r"`lmworks pretrain quickstart (\S+)`", README)
    key, value = example.split("=")
    recipe = load_recipe("quickstart", [example])
    assert isinstance(recipe, Recipe) and recipe.pretrain.optim.learning_rate == float(value), key


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_benchmark_figures_come_from_committed_results():
    """Every `tests/benchmarks/results/*.json` that README names exists and is JSON with its command."""
    named = re.findall(r"tests/benchmarks/results/[\w.-]+\.json", README)
    for path in named:
        assert json.loads((ROOT / path).read_text())["command"]
