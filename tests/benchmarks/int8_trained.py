"""What a BERT of BERT-base's depth and width, once it has learnt something, keeps of its masked accuracy in int8.

    python tests/benchmarks/int8_trained.py [--steps-scale X] [--run-dir DIR] [--out FILE]

Pretrained from nothing on the sources of Python's standard library in an hour or more of 2 CPU cores, in which 12
layers of random weights would get nowhere: 3 layers first, which are then copied on top of themselves and trained on,
twice over (Gong et al. 2019, "Efficient training of BERT by progressively stacking"). All else is lmworks' own stages,
with the gates as a recipe has them by default: int8 must keep 99 % of fp32's masked accuracy on validation text, and
`held` says whether it did.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from export.bench import describe_machine
from export.export import run as export
from export.runners import usable_threads
from trainer.artifact import read_artifact, versions, write_json
from trainer.config import Recipe
from trainer.errors import GateFailed
from trainer.prepare import run as prepare
from trainer.pretrain import run as pretrain

# Layers, steps and highest learning rate of each stack.
STACKS = ((3, 720, 5e-4), (6, 180, 3e-4), (12, 210, 2e-4))
WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 768, 12, 128, 16, 8192
WARMUP_SHARE = 0.1


def main() -> None:
    """Train, export, and write what the gates saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="of the steps of every stack")
    parser.add_argument("--run-dir", type=Path, help="where to work, and go on after an interruption")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(usable_threads())
    with tempfile.TemporaryDirectory() as scratch:
        root, begun_s = arguments.run_dir or Path(scratch), time.monotonic()
        prepare(recipe(root, 0, 1.0, None))
        model = None
        for index in range(len(STACKS)):
            if model is not None:
                model = doubled(model, root / f"from_{STACKS[index][0]}_layers")
            made = recipe(root, index, arguments.steps_scale, model)
            pretrain(made)
            model = made.model_dir("pretrain")
        taken_s = time.monotonic() - begun_s
        found = gates(recipe(root, len(STACKS) - 1, arguments.steps_scale, model))
    results = {
        "command": "python tests/benchmarks/int8_trained.py --out results.json",
        "machine": describe_machine(usable_threads()),
        "versions": versions(),
        "model": {"layers": STACKS[-1][0], "hidden_size": WIDTH, "heads": HEADS, "vocab_size": VOCABULARY},
        "training": {
            "stacks": [dict(zip(("layers", "steps", "learning_rate"), stack, strict=True)) for stack in STACKS],
            "steps_scale": arguments.steps_scale,
            "tokens_per_step": BATCH * LENGTH,
            "seconds": taken_s,
        },
        "forms": found,
    }
    print(results)
    if arguments.out:
        write_json(arguments.out, results)


def recipe(root: Path, index: int, scale: float, model: Path | None) -> Recipe:
    """The recipe of one stack: `model`, or one from nothing."""
    layers, steps, rate = STACKS[index]
    steps = max(10, round(steps * scale))
    config = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    folder = root / f"{layers}_layers"
    made = {} if index == 0 else {"prepare_dir": str(root / f"{STACKS[0][0]}_layers" / "prepare")}
    return Recipe.model_validate(
        made
        | {
            "run_dir": str(folder),
            "prepare": {
                "sources": [{"type": "stdlib", "on_bad_document": "skip"}],
                "tokenizer": {"type": "wordpiece", "vocab_size": VOCABULARY, "lowercase": True},
                "validation_fraction": 0.03,
            },
            "pretrain": {
                "model": {"init_from": str(model)} if model else {"architecture": "bert", "config": config},
                "objective": {"name": "masked_lm", "whole_word": False},
                "data": {"sequence_length": LENGTH},
                "precision": "fp32",
                "max_steps": steps,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "optim": {"learning_rate": rate},
                "schedule": {"name": "linear", "warmup_steps": round(steps * WARMUP_SHARE)},
                "eval_every_steps": steps,
                "eval_sequences": 256,
                "save_every_steps": 200,
            },
            "export": {"models": {"teacher": str(folder / "pretrain" / "model")}, "quality": {"sequences": 2048}},
        }
    )


def doubled(model: Path, folder: Path) -> Path:
    """A model folder with twice the layers of a BERT, the upper half a copy of the lower."""
    from transformers import AutoTokenizer, BertForMaskedLM

    small = BertForMaskedLM.from_pretrained(model)
    layers = small.config.num_hidden_layers
    large = BertForMaskedLM(type(small.config)(**small.config.to_dict() | {"num_hidden_layers": 2 * layers}))
    large.load_state_dict(small.state_dict(), strict=False)
    large.tie_weights()
    for index, layer in enumerate(large.bert.encoder.layer):
        layer.load_state_dict(small.bert.encoder.layer[index % layers].state_dict())
    large.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def gates(made: Recipe) -> dict[str, Any]:
    """What the gates of export found, of fp32 and int8, or why they did not let a form out."""
    try:
        export(made)
    except GateFailed as failure:
        return {"held": False, "reason": str(failure)}
    proofs = read_artifact(made.stage_dir("export") / "teacher")["evidence"]
    kept = ("metrics", "thresholds")
    return {"held": True} | {proof["what"]: {key: proof[key] for key in kept if key in proof} for proof in proofs}


if __name__ == "__main__":
    main()
