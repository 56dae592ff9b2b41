"""Our trainer against transformers' Trainer: real tokens a second, same model, text, batch, precision and threads.

    python tests/benchmarks/train_throughput.py [--objective masked_lm causal_lm] [--out FILE]

masked_lm: documents of natural length, none longer than a row. Trainer pads each batch to its longest document, as
transformers' run_mlm.py does with --line_by_line; ours packs them. causal_lm: one stream cut into blocks on both
sides, as run_clm.py does, so that nobody has padding and only the loops differ.
Both run in fresh processes, in turns; a round counts only if its process got the CPU time that it wanted (cpu_share).
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SEQUENCE_LENGTH, BATCH = 128, 32
MODELS = {
    "masked_lm": (
        "bert",
        {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    ),
    "causal_lm": ("gpt2", {"n_embd": 256, "n_layer": 4, "n_head": 4}),
}
MIN_CPU_SHARE = 0.85


def recipe(objective: str, run_dir: Path, steps: int) -> dict:
    """The recipe of our side; its prepare section makes the data of both."""
    architecture, config = MODELS[objective]
    causal = objective == "causal_lm"
    return {
        "run_dir": str(run_dir),
        "prepare": {
            "sources": [{"type": "text", "paths": [str(run_dir / "documents.txt")], "document": "line"}],
            "tokenizer": {"type": "byte_level_bpe" if causal else "wordpiece", "vocab_size": 8192},
        },
        "pretrain": {
            "model": {"architecture": architecture, "config": config},
            "objective": {"name": objective} | ({} if causal else {"whole_word": False}),
            "data": {"sequence_length": SEQUENCE_LENGTH, "packing": "concatenate" if causal else "isolate"},
            "max_steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "eval_every_steps": 10**6,
            "eval_sequences": BATCH,
            "log_every_steps": 5,
            "save_every_steps": 10**6,
            "resume": False,
        },
    }


def write_documents(path: Path) -> None:
    """Paragraphs of Python's own documentation strings and comments: natural lengths, a line each."""
    import ast
    import sysconfig

    lines = []
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(source.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                lines += [" ".join(block.split()) for block in text.split("\n\n")]
    kept = sorted({line for line in lines if 20 <= len(line) <= 350})  # below 128 tokens, so nobody has to cut
    path.write_text("\n".join(kept), encoding="utf-8")


def work_ours(objective: str, run_dir: Path, steps: int) -> dict:
    """Steady-state tokens a second of `lmworks pretrain`, from its own metrics."""
    import trainer.pretrain
    from trainer.config import Recipe

    metrics = run_dir / "pretrain" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    trainer.pretrain.run(Recipe.model_validate(recipe(objective, run_dir, steps)))
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["event"] == "train"]
    rows = rows[len(rows) // 3 :]
    seconds = sum(row["step_time_s"] * 5 for row in rows)
    return {"tokens_per_s": sum(row["tokens_per_s"] * row["step_time_s"] * 5 for row in rows) / seconds}


def work_trainer(objective: str, run_dir: Path, steps: int) -> dict:
    """Steady-state tokens a second of transformers' Trainer with its defaults, counted where batches are made."""
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    from trainer.config import Model
    from trainer.data.shards import TokenShards
    from trainer.models import build

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "prepare" / "tokenizer")
    causal = objective == "causal_lm"
    architecture, config = MODELS[objective]
    model = build(Model(architecture=architecture, config=config), tokenizer, causal, SEQUENCE_LENGTH, 0)
    shards = TokenShards.open(run_dir / "prepare" / "data", "train")
    documents = [shards.read(number) for number in range(len(shards))]
    if causal:
        stream = np.concatenate(documents)
        blocks = stream[: len(stream) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].reshape(-1, SEQUENCE_LENGTH)
        data = [{"input_ids": block, "labels": block} for block in blocks]
        collate = default_data_collator
    else:
        cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        data = [{"input_ids": np.concatenate([cls, document[: SEQUENCE_LENGTH - 2], sep])} for document in documents]
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    counted, marks = [0], []

    def counting(features: list) -> dict:
        batch = collate(features)
        counted[0] += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        return batch

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: object, state: object, control: object, **rest: object) -> None:
            marks.append((time.perf_counter(), counted[0]))

    arguments = TrainingArguments(
        output_dir=str(run_dir / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=counting, callbacks=[Clock()]).train()
    (began, before), (ended, after) = marks[len(marks) // 3], marks[-1]
    return {"tokens_per_s": (after - before) / (ended - began)}


def in_fresh_process(side: str, objective: str, run_dir: Path, steps: int, threads: int) -> dict:
    """One round of one side; its figure and the share of the CPUs it had."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--side", side, "--objective", objective, "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(objective: str, steps: int, rounds: int, threads: int) -> dict:
    """Alternate the two sides; medians over the rounds that had the CPUs."""
    from trainer.config import Recipe
    from trainer.prepare import run

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        write_documents(run_dir / "documents.txt")
        run(Recipe.model_validate(recipe(objective, run_dir, steps)))
        seen: dict[str, list[dict]] = {"ours": [], "trainer": []}
        for _ in range(rounds):
            for side, results in seen.items():
                results.append(in_fresh_process(side, objective, run_dir, steps, threads))
                print(objective, side, results[-1], file=sys.stderr)
    clean = {
        side: [round_ for round_ in results if round_["cpu_share"] >= MIN_CPU_SHARE] for side, results in seen.items()
    }
    medians = {
        side: statistics.median(r["tokens_per_s"] for r in results) if results else None
        for side, results in clean.items()
    }
    both = medians["ours"] is not None and medians["trainer"] is not None
    return {
        "tokens_per_s": medians,
        "ratio": medians["ours"] / medians["trainer"] if both else None,
        "rounds": seen,
        "steps": steps,
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        from export.windows import SystemClock

        clock = SystemClock()
        cpu_s, queued_s = clock.cpu_s(), clock.queued_s()
        work = work_ours if arguments.side == "ours" else work_trainer
        result = work(arguments.objective[0], arguments.run_dir, arguments.steps)
        got_s, queued_after_s = clock.cpu_s() - cpu_s, clock.queued_s()
        assert queued_s is not None and queued_after_s is not None, "needs Linux's /proc/self/schedstat"
        share = got_s / (got_s + max(0.0, queued_after_s - queued_s))
        print(json.dumps(result | {"cpu_share": round(share, 3)}))
        return
    import transformers

    from trainer.artifact import versions

    result = {
        "command": shlex.join(["python", "tests/benchmarks/train_throughput.py", *sys.argv[1:]]),
        "peer": f"transformers.Trainer {transformers.__version__}, its defaults",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "model": {
            "hidden_size": 256,
            "layers": 4,
            "vocab_size": 8192,
            "sequence_length": SEQUENCE_LENGTH,
            "batch": BATCH,
        },
        "results": {o: compare(o, arguments.steps, arguments.rounds, arguments.threads) for o in arguments.objective},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
