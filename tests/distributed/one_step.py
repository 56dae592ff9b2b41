"""Takes one optimizer step of a recipe and writes its gradients, loss and samples; run alone or by a launcher.

one_step.py RECIPE OUT [key=value ...]
"""

import sys
from pathlib import Path

import torch

import trainer.engine.loop as loop
from trainer.engine.launch import leave
from trainer.models import build
from trainer.objectives.language_model import language_model
from trainer.recipe_file import load_recipe
from trainer.session import Session


def main(recipe_path: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_path, overrides)
    stage = recipe.pretrain
    session = Session(recipe, "pretrain", stage, stage.objective, stage.data)
    model = build(stage.model, session.tokenizer, session.causal, stage.data.sequence_length, recipe.seed)
    run = session.wire(model, language_model, {})
    gradients = {}
    real_step = run.engine.step

    def capture():
        gradients.update({n: p.grad.clone() for n, p in run.engine.unwrapped.named_parameters()})
        return real_step()

    run.engine.step = capture
    batches = run.batches(0)
    counts, _ = loop.count_targets(run, 0, batches)
    loop.take_step(run, 0, batches, counts)
    row = run.meter.flush()
    samples = [list(batch.sample_ids) for batch in batches]
    torch.save(
        {"gradients": gradients, "counts": counts, "row": row, "samples": samples}, f"{out}.{run.engine.ranks.rank}"
    )
    run.engine.ranks.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
    Path(sys.argv[2] + ".done").touch()
    leave(0)
