"""A finished run folder without a run: files as the stages write them, with numbers to work out by hand."""

import json
from pathlib import Path

from trainer.artifact import content_hash, hash_file, staging, write_artifact, write_json
from trainer.config import Recipe

TRAINING = {"max_steps": 40, "global_batch_size": 8, "micro_batch_size": 8}
TREE = {
    "prepare": {"sources": [{"type": "stdlib", "name": "stdlib"}], "tokenizer": {"type": "wordpiece"}},
    "pretrain": TRAINING
    | {
        "model": {"architecture": "bert", "config": {"num_hidden_layers": 4}},
        "objective": {"name": "masked_lm"},
        "data": {"sequence_length": 128},
    },
    "distill": TRAINING | {"student": {"every": 2}},
    "export": {},
    "bench": {"sequence_lengths": [32, 128]},
}
# (model, backend) -> p50 in ms at batch 1 x 128
LATENCY_MS = {
    ("teacher", "eager"): 12.0,
    ("teacher", "compile"): 11.0,
    ("teacher", "onnx_fp32"): 8.0,
    ("teacher", "onnx_int8"): 3.0,
    ("student", "eager"): 6.5,
    ("student", "compile"): 6.0,
    ("student", "onnx_fp32"): 4.0,
    ("student", "onnx_int8"): 1.5,
}
QUALITY = {"teacher": 0.42, "student": 0.40}
MIB = {("teacher", "torch"): 44.0, ("student", "torch"): 22.0, ("teacher", "onnx_int8"): 12.0,
       ("student", "onnx_int8"): 6.0}  # fmt: skip


def make_recipe(run_dir: Path, without=(), **changes) -> Recipe:
    tree = {"run_dir": str(run_dir), **{name: part for name, part in TREE.items() if name not in without}, **changes}
    return Recipe.model_validate(tree)


def build(run_dir: Path, stages=("prepare", "pretrain", "distill", "export", "bench"), source="stdlib") -> Recipe:
    """Write the results of `stages` into run_dir; returns the recipe of the whole chain."""
    recipe = make_recipe(run_dir)
    makers = {"prepare": prepare, "pretrain": pretrain, "distill": distill, "export": export, "bench": bench}
    for stage in stages:
        if stage == "prepare":
            prepare(recipe, source)
        else:
            makers[stage](recipe)
    return recipe


def prepare(recipe, source="stdlib"):
    with staging(recipe.tokenizer_dir) as partial:
        (partial / "tokenizer.json").write_text("{}")
        write_artifact(partial, "tokenizer", recipe_sha256="0" * 64, parents={})
    counts = {"characters": 1_000_000, "bytes": 1_100_000}
    manifest = {
        "format": "megatron-indexed",
        "vocab_size": 8192,
        "end_of_document": None,
        "splits": {
            "train": {"documents": 970, "tokens": 300_000, "shards": [], **counts},
            "validation": {"documents": 30, "tokens": 9_000, "shards": [], "characters": 30_000, "bytes": 33_000},
        },
        "sources": [
            {
                "name": source,
                "type": "stdlib",
                "weight": 1.0,
                "split": "hash",
                "files": 1010,
                "documents_read": 1010,
                "documents_kept": 1000,
                "dropped": {"duplicate": 10, "empty": 0},
            }
        ],
        "tokenizer": {"fertility_tokens_per_word": 1.7, "bytes_per_token": 3.67, "unknown_rate": 0.001},
    }
    with staging(recipe.data_dir) as partial:
        write_json(partial / "manifest.json", manifest)
        parents = {"tokenizer": content_hash(recipe.tokenizer_dir)}
        write_artifact(partial, "token_shards", recipe_sha256="0" * 64, parents=parents)


def train_row(step, loss, **more):
    row = {"event": "train", "step": step, "samples": step * 8, "tokens": step * 1000, "loss": loss, "step_time_s": 0.1}
    return row | {"learning_rate": 1e-3, "tokens_per_s": 10_000.0, "mfu": None, "peak_memory_gib": 0.7, **more}


def eval_row(step, loss):
    return {"event": "eval", "step": step, "tokens": step * 1000, "loss": loss, "perplexity": 9.0,
            "masked_accuracy": 0.4}  # fmt: skip


def write_metrics(folder: Path, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(recipe):
    rows = [{"event": "start", "step": 0}, eval_row(0, 9.0)]
    rows += [train_row(step, 9.0 - 0.15 * step) for step in range(1, 31)] + [eval_row(20, 5.0)]
    rows += [{"event": "resume", "step": 20}]  # steps 21 to 30 are done again, with other values
    rows += [train_row(step, 6.0 - 0.08 * (step - 20)) for step in range(21, 41)] + [eval_row(40, 2.5)]
    write_metrics(recipe.stage_dir("pretrain"), [*rows, {"event": "end", "step": 40, "seconds": 100.0}])
    _model(recipe, "pretrain", "BertForMaskedLM", "bert", 11_000_000, 2.5, {})


def distill(recipe):
    rows = [{"event": "start", "step": 0}]
    rows += [train_row(step, 40.0 - step * 0.5, loss_hard=6.0 - 0.07 * step) for step in range(1, 41)]
    rows += [eval_row(20, 4.0), eval_row(40, 2.75), {"event": "end", "step": 40, "seconds": 50.0}]
    write_metrics(recipe.stage_dir("distill"), rows)
    parents = {"teacher": content_hash(recipe.model_dir("pretrain"))} if recipe.model_dir("pretrain").is_dir() else {}
    _model(recipe, "distill", "DistilBertForMaskedLM", "distilbert", 5_500_000, 2.75, parents)


def _model(recipe, stage, architecture, model_type, parameters, loss, parents):
    folder = recipe.stage_dir(stage)
    command = f"lmworks run quickstart {stage}.max_steps=40"
    write_json(folder / "launch.json", {"command": command, "ranks": 1, "device": "cpu"})
    cpu = {"model": "Test CPU", "physical_cores": 2, "memory_gib": 8.0}
    write_json(folder / "environment.json", {"python": "3.11.7", "processor": cpu, "gpus": [], "git": None})
    if recipe.data_dir.is_dir():
        parents = {"data": content_hash(recipe.data_dir), "tokenizer": content_hash(recipe.tokenizer_dir), **parents}
    with staging(recipe.model_dir(stage)) as partial:
        write_json(partial / "config.json", {"architectures": [architecture], "model_type": model_type})
        (partial / "model.safetensors").write_bytes(stage.encode() * 100)
        write_artifact(
            partial,
            "model",
            recipe_sha256="1" * 64,
            parents=parents,
            evidence=[
                {"what": "validation", "metrics": {"loss": loss, "masked_accuracy": 0.4}, "command": command},
            ],
            about={"architecture": model_type, "parameters": parameters, "sequence_length": 128, "steps": 40,
                   "tokens": 40_000, "objective": "masked_lm"},
        )  # fmt: skip


def export(recipe, names=("teacher", "student")):
    for name in names:
        source = recipe.exported_models()[name]
        with staging(recipe.stage_dir("export") / name) as partial:
            write_json(partial / "config.json", json.loads((source / "config.json").read_text()))
            proofs = []
            for variant, file in (("fp32", "model.onnx"), ("int8", "model_quantized.onnx")):
                (partial / file).write_bytes(f"{name} {variant}".encode() * 50)
                metrics = {"cases": 7, "positions": 900, "max_abs": 2e-6, "relative_rms": 1e-6, "top1": 1.0}
                limits = {"max_abs": 1e-3, "relative_rms": 1e-4, "min_top1": 0.999}
                proofs.append({"what": f"parity_{variant}", "file": file, "sha256": hash_file(partial / file),
                               "command": "lmworks export", "metrics": metrics, "thresholds": limits})  # fmt: skip
                kept = {"metric": "masked_accuracy", "kept": 0.9904, "kept_low": 0.9749, "kept_high": 1.0071}
                proofs.append(proofs[-1] | {"what": f"quality_{variant}", "metrics": kept,
                                            "thresholds": {"share": 0.99}})  # fmt: skip
            write_artifact(partial, "onnx", recipe_sha256="2" * 64, parents={"model": content_hash(source)},
                           evidence=proofs, about={"task": "masked_lm"})  # fmt: skip


def bench_report():
    rows = []
    for (model, backend), p50 in LATENCY_MS.items():
        for batch, length, factor in ((1, 32, 0.3), (1, 128, 1.0), (8, 128, 7.0)):
            mib = MIB.get((model, backend), MIB[model, "torch"])
            rows.append({"model": model, "backend": backend, "batch_size": batch, "sequence_length": length,
                         "threads": 2, "status": "ok", "reason": "", "p50_ms": p50 * factor,
                         "p90_ms": p50 * factor * 1.1,
                         "p99_ms": p50 * factor * 1.3, "samples_per_s": 1000 * batch / (p50 * factor),
                         "real_tokens_per_s": 1000 * batch * length / (p50 * factor), "peak_memory_mib": 300.0,
                         "file_mib": mib, "cold_start_s": 0.25, "padded_tokens": batch * length,
                         "padded_tokens_per_s": 1000 * batch * length / (p50 * factor), "limit_share": 0.25,
                         "limit": "compute", "nodes": None, "cpu_share": 0.98, "windows": 4, "calls": 400})  # fmt: skip
    quality = [
        {"model": model, "backend": backend, "metric": "masked_accuracy", "sequences": 256,
         "value": QUALITY[model] - (0.005 if backend == "onnx_int8" else 0.0)}
        for model, backend in LATENCY_MS
    ]  # fmt: skip
    return {
        "machine": {"cpu": "Test CPU", "cores": 2, "threads": 2, "memory_gib": 8.0},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": "lmworks bench",
        "rows": rows,
        "quality": quality,
        "noise": {"model": "teacher", "backend": "onnx_fp32", "relative": 0.05, "shapes": [], "reason": ""},
        "rates": {"fp32_per_s": 1.5e11, "int8_per_s": 6e11, "bytes_per_s": 2.5e10},
        "decode": [
            {"model": "student", "backend": "onnx_int8", "batch_size": 1, "prompt_tokens": 32, "new_tokens": 16,
             "status": "ok", "reason": "", "first_token_ms": 8.25, "token_ms": 2.125, "tokens_per_s": 444.0,
             "limit_share": 0.375, "limit": "memory"}
        ],
        "load": [
            {"model": "student", "backend": "onnx_int8", "status": "ok", "reason": "", "limit_ms": 50.0,
             "most_per_s": 640.0, "highest_rate_per_s": 480.0, "points": [
                {"rate_per_s": rate, "requests": 1000, "unanswered": 0, "p50_ms": 4.0, "p99_ms": p99_ms,
                 "mean_batch": 1.5, "cpu_share": 0.99, "holds": p99_ms <= 50}
                for rate, p99_ms in ((320.0, 11.0), (480.0, 31.0), (560.0, 93.0))]}
        ],
        "models": {"teacher": {"parameters": 11_000_000, "file_mib": 44.0},
                   "student": {"parameters": 5_500_000, "file_mib": 22.0}},
    }  # fmt: skip


def bench(recipe, change=None, **more):
    """Write bench/report.json; `change` may alter each row in place, `more` replaces other parts."""
    report = bench_report() | more
    for name, model in report["models"].items():
        folders = {"model": recipe.exported_models()[name], "export": recipe.stage_dir("export") / name}
        model["sha256"] = {what: content_hash(folder) for what, folder in folders.items() if folder.is_dir()}
    for row in report["rows"]:
        if change is not None:
            change(row)
    write_json(recipe.stage_dir("bench") / "report.json", report)
