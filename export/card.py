"""Model cards: the README.md that Hugging Face shows for a model folder, written from the run's evidence alone.
Language and licence are the user's to add; a card that somebody else wrote is left as it is.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from export.files import size_mib
from export.io_spec import PAIR_STEMS, exported_stems, graph_files
from export.results import STAGES, Results, Row, full_rows, is_verified, parity_of, quality_text
from trainer.artifact import write_text
from trainer.export_config import ONNX_FILES

_TEMPLATES = Path(__file__).parent / "templates"
MARK = "<!-- Written by `lmworks report` from this folder's evidence. Remove this line to keep your own edits. -->"
_PIPELINES = {"ForMaskedLM": "fill-mask", "LMHeadModel": "text-generation", "ForCausalLM": "text-generation",
              "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
              "ForQuestionAnswering": "question-answering", "ForConditionalGeneration": "text2text-generation",
              "Model": "feature-extraction"}  # fmt: skip
_TASK_NAMES = {"fill-mask": "Masked language modelling", "text-generation": "Causal language modelling",
               "text-classification": "Text classification", "token-classification": "Token classification",
               "question-answering": "Question answering", "text2text-generation": "Text to text",
               "feature-extraction": "Feature extraction"}  # fmt: skip
# evidence name -> metric type as Hugging Face lists it; others are shown in the text only
_METRIC_TYPES = {"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "masked_accuracy": "accuracy",
                 "bits_per_byte": "bits_per_byte"}  # fmt: skip


def write_cards(found: Results) -> list[Path]:
    """Write README.md into every model folder of the run; returns those left alone because they are not ours."""
    kept = []
    for name, folder in card_folders(found):
        path = folder / "README.md"
        if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            kept.append(path)
        else:
            write_text(path, card(found, name, folder))
    return kept


def card_folders(found: Results) -> Iterator[tuple[str, Path]]:
    """Model name and folder of everything that gets a card: trained models, then exports; never foreign folders."""
    for name, one in found.trained.items():
        if one.artifact is not None:
            yield name, found.recipe.model_dir(one.stage)
    for name in found.exported:
        yield name, found.recipe.stage_dir("export") / name


def card(found: Results, name: str, folder: Path) -> str:
    """The whole README.md of one folder: front matter and text."""
    is_export = folder.parent == found.recipe.stage_dir("export")
    evidence = _evaluations(found, name, is_export)
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, finalize=markdown, autoescape=False)  # fmt: skip
    environment.filters |= {"code": code, "number": _number}
    trained = found.trained.get(name)
    text = environment.get_template("card.md").render(
        title=card_name(found, name, is_export),
        name=name,
        is_export=is_export,
        pipeline=pipeline_tag(folder),
        manifest=found.manifest,
        trained=trained,
        about=(trained.artifact or {}).get("about", {}) if trained else {},
        teacher=_teacher_name(found) or "a larger model",
        settings=_training_settings(found, name),
        evaluations=evidence,
        exports=_exports(found, name),
        rows=[row for row in full_rows(found) if row["model"] == name],
        machine=found.bench["machine"] if found.bench else {},
        versions=_versions(found, name, is_export),
        verified=lambda row: is_verified(found, row),
        mark=Markup(MARK),
    )
    return f"---\n{_yaml(front_matter(found, name, folder, evidence))}---\n{text}"


def front_matter(found: Results, name: str, folder: Path, evidence: list[Row]) -> Row:
    """The metadata block, by the specification of Hugging Face's model cards (hub-docs, modelcard.md).

    `language` and `license` are left out: nothing that was measured says them.
    """
    is_export = folder.parent == found.recipe.stage_dir("export")
    pipeline = pipeline_tag(folder)
    config = _config(folder)
    tags = ["lmworks", config.get("model_type"), "distillation" if name == "student" else None,
            "onnx" if is_export else None]  # fmt: skip
    block: Row = {"library_name": "transformers", "pipeline_tag": pipeline, "tags": [tag for tag in tags if tag]}
    if is_export:
        block |= {"base_model": card_name(found, name, False)}
        block |= {"base_model_relation": "quantized"} if _is_quantized(folder) else {}
    elif name == "student" and (teacher := _teacher_name(found)):
        block |= {"base_model": teacher, "base_model_relation": "finetune"}  # the Hub has no word for distilled
    index = _model_index(found, card_name(found, name, is_export), pipeline, evidence)
    block |= {"model-index": index} if index else {}
    return {key: value for key, value in block.items() if value is not None}


def card_name(found: Results, name: str, is_export: bool) -> str:
    """Name of one model of the run, such as `quickstart-student` or `quickstart-student-onnx`."""
    return f"{found.name}-{name}" + ("-onnx" if is_export else "")


def pipeline_tag(folder: Path) -> str | None:
    """The Hub's task for the architecture that config.json names; None for one that is not known here."""
    names = _config(folder).get("architectures") or [""]
    return next((tag for ending, tag in _PIPELINES.items() if str(names[0]).endswith(ending)), None)


# ---- parts -----------------------------------------------------------------------------------------------------


def _evaluations(found: Results, name: str, is_export: bool) -> list[Row]:
    """What was measured about a model's quality: where, metric, value, and the command."""
    if is_export:
        quality = found.bench["quality"] if found.bench else []
        return [
            {"what": f"benchmark, {entry['backend']}", "metric": entry["metric"], "value": entry["value"],
             "command": found.bench["command"] if found.bench else ""}
            for entry in quality
            if entry["model"] == name and found.verified.get((name, entry["backend"]))
        ]  # fmt: skip
    trained = found.trained.get(name)
    record = trained.artifact if trained and trained.artifact else {"evidence": []}
    return [
        {"what": entry["what"], "metric": metric, "value": value, "command": entry.get("command", "")}
        for entry in record["evidence"]
        for metric, value in entry.get("metrics", {}).items()
        if metric in _METRIC_TYPES
    ]


def _model_index(found: Results, title: str, pipeline: str | None, evidence: list[Row]) -> list[Row]:
    """Evaluation results in Hugging Face's `model-index` form; empty where there is nothing to list."""
    if pipeline is None or not evidence or found.manifest is None:
        return []
    sources = ", ".join(str(source["name"]) for source in found.manifest["sources"])
    dataset: Row = {"type": "custom", "name": sources, "split": "validation"}
    if found.data is not None:
        dataset["revision"] = found.data["content_sha256"]
    metrics = [
        {
            "type": _METRIC_TYPES[entry["metric"]],
            "value": entry["value"],
            "name": f"{entry['metric']} ({entry['what']})",
        }
        for entry in evidence
        if entry["metric"] in _METRIC_TYPES and entry["value"] is not None
    ]
    task = {"type": pipeline, "name": _TASK_NAMES[pipeline]}
    return [{"name": title, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}] if metrics else []


def _training_settings(found: Results, name: str) -> list[tuple[str, Any]]:
    """What the model was trained with, from the resolved recipe."""
    stage = getattr(found.recipe, STAGES.get(name, ""), None)
    if stage is None:
        return []
    objective = stage.objective or (found.recipe.pretrain.objective if found.recipe.pretrain else None)
    pairs = [
        ("objective", objective.name if objective else None),
        ("steps", stage.max_steps),
        ("sequences a step", stage.global_batch_size),
        ("optimizer", f"{stage.optim.name}, weight decay {stage.optim.weight_decay:g}"),
        ("learning rate", f"{stage.optim.learning_rate:g}, {stage.schedule.name}"),
        ("warm-up steps", stage.schedule.warmup_steps),
        ("precision", stage.precision),
        ("seed", found.recipe.seed),
    ]  # fmt: skip
    return [(key, value) for key, value in pairs if value is not None]


def _is_quantized(folder: Path) -> bool:
    forms = [backend for backend in ONNX_FILES if "_int" in backend]
    files = (file for backend in forms for file in graph_files(("model", PAIR_STEMS[1]), backend))
    return any((folder / file).is_file() for file in files)


def _exports(found: Results, name: str) -> list[Row]:
    record = found.exported.get(name)
    if record is None:
        return []
    rows = []
    for backend in ONNX_FILES:
        files = graph_files(exported_stems(record["about"]), backend)
        if (name, backend) in found.verified:
            folder = found.recipe.stage_dir("export") / name
            proof = parity_of(record, backend)
            what = f"quality_{backend.removeprefix('onnx_')}"
            quality = next((entry for entry in record["evidence"] if entry["what"] == what), None)
            rows.append({"file": " and ".join(files), "precision": backend.removeprefix("onnx_"),
                         "passed": found.verified[name, backend],
                         "mib": sum(size_mib(folder / file) for file in files),
                         "metrics": proof.get("metrics", {}), "quality": quality_text(quality)})  # fmt: skip
    return rows


def _versions(found: Results, name: str, is_export: bool) -> Mapping[str, str]:
    trained = found.trained.get(name)
    record = found.exported.get(name) if is_export else trained.artifact if trained else None
    return (record or {}).get("versions", {})


def _teacher_name(found: Results) -> str | None:
    """The student's teacher: this run's, or what the card in the folder that the recipe names says; else None."""
    given = found.recipe.distill.teacher if found.recipe.distill else None
    if given is None:
        return card_name(found, "teacher", False) if "teacher" in found.trained else None
    path = given / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if MARK not in text:
        return None
    index = YAML(typ="safe").load(text.split("---")[1]).get("model-index")
    return index[0]["name"] if index else None


def _config(folder: Path) -> Row:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- text ------------------------------------------------------------------------------------------------------


def _yaml(block: Row) -> str:
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] - keep the order written above
    out = io.StringIO()
    yaml.dump(block, out)
    return out.getvalue()


def markdown(value: Any) -> Any:
    """Any value as Markdown that shows its characters and nothing else: one line, no markup, no HTML."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return re.sub(
        r"([\\`*_{}\[\]<>#|~$&!])", lambda found: f"&#{ord(found[1])};" if found[1] in "<>&" else f"\\{found[1]}", text
    )


def code(value: Any) -> Markup:
    """Any value as a Markdown code span, also within a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}") if text else Markup("")


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.{digits}g}"
