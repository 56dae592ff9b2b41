"""The chain's bookkeeping, with stages that only write what the chain looks at; real stages run in test_end_to_end."""

import shutil

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


@pytest.mark.parametrize(
    ("stage", "keys"), [("prepare", {"validation_fraction": 0.2}), ("pretrain", {"max_steps": 14})]
)
def test_a_result_that_another_recipe_made_is_made_again(ran, recipe, stage, keys):
    chain.run(recipe())
    left = chain.outputs(recipe(), stage)
    chain.importlib.import_module(f"trainer.{stage}").run(recipe(**{stage: keys}))  # by hand, as a user may
    assert chain.outputs(recipe(), stage) != left
    ran.clear()
    chain.run(recipe())
    assert ran == [stage, "report"]  # it gives what it gave before, so that nothing after it changes
    assert chain.outputs(recipe(), stage) == left


@pytest.fixture
def own_text(corpus, recipe, tmp_path):
    """A recipe on a copy of the corpus, which a test may change."""
    folder = tmp_path / "text"
    shutil.copytree(corpus, folder)
    return folder, recipe(prepare={"sources": [{"type": "text", "paths": [str(folder)]}]})


def rewrite(path, content):
    """Other bytes of the same number, at once: only the time of the change tells."""
    path.write_text(content[: path.stat().st_size].ljust(path.stat().st_size))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: rewrite(folder / "000.txt", "another text"),
        lambda folder: (folder / "more.txt").write_text("a new file"),
        lambda folder: (folder / "000.txt").unlink(),
        lambda folder: (folder / "000.txt").rename(folder / "zzz.txt"),
    ],
    ids=["changed", "added", "removed", "renamed"],
)
def test_changed_text_is_noticed(ran, own_text, change):
    folder, recipe = own_text
    chain.run(recipe)
    ran.clear()
    chain.run(recipe)
    assert ran == ["report"]
    ran.clear()
    change(folder)
    chain.run(recipe)
    assert ran == ["prepare", "report"]


def test_a_changed_tokenizer_file_and_another_python_are_noticed(ran, recipe, tmp_path, monkeypatch):
    loaded = tmp_path / "loaded" / "vocab.json"
    loaded.parent.mkdir()
    for name in ("vocab.json", "merges.txt"):
        loaded.with_name(name).write_text("{}")
    made = recipe(prepare={"sources": [{"type": "stdlib"}], "tokenizer": {"path": str(loaded)}})
    chain.run(made)
    for change in (
        lambda: loaded.write_text('{"a": 0}'),
        lambda: loaded.with_name("merges.txt").write_text("a b"),
        lambda: monkeypatch.setattr(chain.platform, "python_version", lambda: "3.99.0"),
    ):
        change()
        ran.clear()
        chain.run(made)
        assert ran == ["prepare", "report"]


def test_missing_text_stops_before_anything_runs(ran, own_text):
    folder, recipe = own_text
    chain.run(recipe)
    ran.clear()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="matches no text file"):
        chain.run(recipe)
    assert ran == []
    assert next(chain.preview(recipe)).startswith(f"prepare: would stop: '{folder}' matches no text file")


def test_keys_that_move_no_number_run_nothing_again(ran, recipe):
    chain.run(recipe())
    ran.clear()
    free = {"micro_batch_size": 4, "save_every_steps": 2, "resume": False, "log_every_steps": 5, "compile": True}
    chain.run(recipe(pretrain=free, distill=free))
    assert ran == ["report"]


def test_preview_says_what_would_run_and_why(ran, recipe):
    assert list(chain.preview(recipe())) == [
        "prepare: would run: `lmworks run` has not finished it here",
        "pretrain: would run: `lmworks run` has not finished it here",
        "distill: would run: `lmworks run` has not finished it here",
        "report: would run",
    ]
    assert ran == [] and not recipe().run_dir.exists()
    chain.run(recipe())
    assert list(chain.preview(recipe())) == [
        "prepare: up to date",
        "pretrain: up to date",
        "distill: up to date",
        "report: would run",
    ]
    assert list(chain.preview(recipe(pretrain={"max_steps": 13}))) == [
        "prepare: up to date",
        "pretrain: would run: other recipe than before",
        "distill: would run if pretrain gives another result than before",
        "report: would run",
    ]
    (recipe().stage_dir("pretrain") / "checkpoints" / "step-00000002").mkdir(parents=True)
    said = list(chain.preview(recipe(pretrain={"max_steps": 13})))[1]
    assert said.startswith("pretrain: would run: other recipe than before; it goes on from ") and "at step 0" in said
    shutil.rmtree(recipe().stage_dir("pretrain") / "checkpoints")
    (recipe().model_dir("pretrain") / "artifact.json").unlink()
    assert list(chain.preview(recipe()))[1] == "pretrain: would run: pretrain/model is not there"
    assert list(chain.preview(recipe()))[2] == "distill: would run: other inputs than before"


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
