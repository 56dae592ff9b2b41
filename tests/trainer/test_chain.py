"""The chain's bookkeeping, with stages that only write what the chain looks at; real stages run in test_end_to_end."""

import pytest

from trainer import chain
from trainer.artifact import staging, write_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError


@pytest.fixture
def ran(monkeypatch):
    """Stages replaced by ones that note their name and leave a folder whose content is their recipe section."""
    names = []

    class Stage:
        def __init__(self, name):
            self.name = name

        def run(self, recipe):
            names.append(self.name)
            if self.name == "report":
                return
            for folder in chain.STAGES[self.name][1]:
                with staging(recipe.run_dir / folder) as partial:
                    (partial / "content").write_text(repr(getattr(recipe, self.name)))
                    write_artifact(partial, self.name, recipe_sha256="", parents={})

    def load(module):
        return Stage(module.rsplit(".", 1)[1])

    monkeypatch.setattr(chain.importlib, "import_module", load)
    return names


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def make(**changes):
        tree = tiny_recipe(tmp_path / "run")
        for section, keys in changes.items():
            tree[section] |= keys
        return Recipe.model_validate(tree)

    return make


def test_stages_run_in_order_once(ran, recipe):
    chain.run(recipe())
    assert ran == ["prepare", "pretrain", "distill", "report"]
    ran.clear()
    chain.run(recipe())
    assert ran == ["report"]


def test_a_change_runs_its_stage_and_those_after_it(ran, recipe):
    chain.run(recipe())
    ran.clear()
    chain.run(recipe(pretrain={"max_steps": 13}))
    assert ran == ["pretrain", "distill", "report"]
    ran.clear()
    chain.run(recipe(pretrain={"max_steps": 13}, distill={"temperature": 3.0}))
    assert ran == ["distill", "report"]


def test_a_lost_result_is_made_again(ran, recipe):
    chain.run(recipe())
    ran.clear()
    (recipe().model_dir("distill") / "artifact.json").unlink()
    chain.run(recipe())
    assert ran == ["distill", "report"]


def test_a_changed_input_is_noticed_whoever_changed_it(ran, recipe):
    chain.run(recipe())
    ran.clear()
    chain.importlib.import_module("trainer.pretrain").run(recipe(pretrain={"max_steps": 14}))  # by hand, as a user may
    ran.clear()
    chain.run(recipe(pretrain={"max_steps": 14}))
    assert ran == ["pretrain", "distill", "report"]


def test_a_failed_stage_stops_the_chain_and_is_run_again(ran, recipe, monkeypatch):
    load = chain.importlib.import_module

    def failing(module):
        stage = load(module)
        if module == "trainer.pretrain":
            stage.run = lambda recipe: (_ for _ in ()).throw(GateFailed("no"))
        return stage

    with monkeypatch.context() as patch:
        patch.setattr(chain.importlib, "import_module", failing)
        with pytest.raises(GateFailed):
            chain.run(recipe())
    assert ran == ["prepare"]
    chain.run(recipe())
    assert ran == ["prepare", "pretrain", "distill", "report"]


def test_the_chain_refuses_to_be_launched_as_ranks(ran, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="accelerate launch -m trainer.pretrain"):
        chain.run(recipe())
