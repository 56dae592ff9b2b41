"""The pretrain stage: token shards to a language model, masked or causal.
The training itself is in `session` and `engine`, the model's making in `models`."""

from trainer.__main__ import stage_main
from trainer.config import Recipe
from trainer.models import build
from trainer.objectives.language_model import language_model
from trainer.recipe_file import require_section
from trainer.session import Session


def run(recipe: Recipe) -> None:
    """Train the model of `recipe.pretrain` and write `<run_dir>/pretrain/model`."""
    require_section(recipe, "pretrain")
    assert recipe.pretrain is not None
    stage = recipe.pretrain
    session = Session(recipe, "pretrain", stage, stage.objective, stage.data)
    blank = session.engine.is_given_weights
    model = build(stage.model, session.tokenizer, session.causal, stage.longest_row, recipe.seed, blank)
    parents = {"init_from": stage.model.init_from} if stage.model.init_from else {}
    session.train(model, language_model, parents)


if __name__ == "__main__":
    stage_main("pretrain")
