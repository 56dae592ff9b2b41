"""The pack stage: verified exports to a folder that a server takes, one for each model.
Triton's configurations are `triton_config`'s, its Python models `triton_models`'; nothing is run here.
"""

import itertools
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from export.cases import Documents, load_documents
from export.decoding_graph import has_room
from export.export import copy_companions
from export.generate import Sampling
from export.hostile import data_files
from export.io_spec import PAIR_STEMS, IoSpec
from export.merged import MERGED_STEM, merge, prove_merged
from export.runners import open_onnx_graphs, usable_threads
from export.texts import with_end
from export.triton_config import (
    Engines,
    Names,
    answer_config,
    answer_inputs,
    as_text,
    ensemble_config,
    network_config,
    texts_of,
    tokenizer_config,
)
from export.triton_engines import verified_engines
from export.triton_image import RELEASE, triton_image
from export.verified import Subject, Verified, require_unchanged, subjects
from trainer.__main__ import stage_main
from trainer.artifact import staging, versions, write_artifact
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.recipe_file import recipe_hash, require_section
from trainer.serving_config import Pack

TRITON_MODELS = Path(__file__).parent / "triton_models"
_TEMPLATES = Path(__file__).parent / "templates"
# Tasks that have an answer, in words or in vectors, and the Python model that gives it.
ANSWERED_TASKS = {
    "masked_lm": "answer_text.py",
    "causal_lm": "answer_text.py",
    "classification": "answer_text.py",
    "token_classification": "answer_text.py",
    "question_answering": "answer_text.py",
    "feature_extraction": "answer_features.py",
    "seq2seq_lm": "answer_generated.py",
}
# Variant to its file's name in transformers.js (its documentation, "Using quantized models"): fp32 and q8 are ours.
HUB_FILES = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_quantized.onnx",
    "int8_static": "model_int8.onnx",
    "int4": "model_q4.onnx",
}


def run(recipe: Recipe) -> None:
    """Pack every model that the recipe names into `<run_dir>/pack/<name>`; GateFailed for one that is not verified."""
    require_section(recipe, "pack")
    assert recipe.pack is not None
    for subject in subjects(recipe, "pack", recipe.pack.models):
        pack_model(recipe, recipe.pack, subject)


def choose_variant(subject: Subject, wanted: str, device: str) -> Verified:
    """The variant that is served: the one that is named, or the smallest that the device has operators for.

    UserError for one that is named and has the CPU's.
    """
    cpus = {variant for variant, one in subject.variants.items() if device == "gpu" and has_room(one.file)}
    if wanted in cpus:
        raise UserError(
            f"pack.variant is {wanted}, which has the attention of ONNX Runtime's CPU provider",
            "a form for a GPU",
            "export it with provider CUDAExecutionProvider, or pack fp32 or fp16",
        )
    if wanted != "auto":
        if wanted not in subject.variants:
            raise UserError(
                f"pack.variant is {wanted}, which {subject.folder} has not in verified form",
                f"one of {', '.join(subject.variants)}",
                "add it to export.variants and export again, or pack another",
            )
        return subject.variants[wanted]
    # bf16 does not run on the CPU, and fp8 is quicker than fp32 in an engine alone.
    unfit = {"fp8", *["bf16"] * (device == "cpu")} | cpus
    runs = [one for one in subject.variants.values() if one.variant not in unfit]
    if not runs:
        only = ", ".join(subject.variants)
        raise UserError(f"{subject.folder} has {only} alone, which the {device} does not run", "another", "export one")
    return min(runs, key=lambda one: one.size_bytes)


def pack_model(recipe: Recipe, settings: Pack, subject: Subject) -> Path:
    """Write the packed folder of one model; returns it. On any failure nothing new is left behind."""
    spec, names = subject.spec, Names(subject.name)
    if spec.task not in ANSWERED_TASKS:
        raise UserError(f"{subject.name} is a {spec.task} model", f"one of {', '.join(ANSWERED_TASKS)} to answer texts")
    served = choose_variant(subject, settings.variant, settings.device)
    if spec.encoder and settings.max_new_tokens > spec.max_length:
        raise UserError(
            f"pack.max_new_tokens is {settings.max_new_tokens}",
            f"at most {spec.max_length}, what {subject.name} writes",
        )
    engines: list[Engines] = []
    if settings.backend == "tensorrt":
        engines = verified_engines(recipe.stage_dir("tensorrt") / subject.name, subject, served.variant, settings)
    about = {
        "architecture": spec.architecture,
        "task": spec.task,
        "texts": list(texts_of(spec)),
        "variant": served.variant,
        "backend": settings.backend,
        "max_length": _max_length(spec, engines),
        "models": vars(names) | {"tokenizer": names.tokenizer, "answer": names.answer, "ensemble": names.ensemble},
        "networks": [names.of(part) for part in spec.parts],
        "max_new_tokens": settings.max_new_tokens if spec.encoder else None,
        "image": settings.image or triton_image(engines[0].library_version if engines else None),
    }
    target = recipe.stage_dir("pack") / subject.name
    with staging(target) as partial:
        tokenizer = _open_tokenizer(subject.folder)
        write_repository(partial / "models", subject, served, settings, tokenizer, engines)
        hub_files = write_hub(partial / "hub", subject, load_documents(recipe, subject.folder) if spec.encoder else [])
        require_unchanged(subject)
        write_companions(partial, names, about, hub_files, _example(spec, tokenizer), target, engines)
        write_artifact(
            partial,
            "packed",
            recipe_sha256=recipe_hash(recipe),
            parents={"onnx": subject.record["content_sha256"], **subject.record["parents"]}
            | ({"engines": engines[0].content_sha256} if engines else {}),
            evidence=subject.record["evidence"] + (engines[0].evidence if engines else []),
            about=about,
        )
    Console(highlight=False).print(
        f"{subject.name}: {served.variant} ({served.size_bytes / 2**20:.1f} MiB) of {', '.join(subject.variants)}, "
        f"for {about['image']}; lmworks serve {target}",
        soft_wrap=True,
    )
    return target


def write_repository(
    models: Path, subject: Subject, served: Verified, settings: Pack, tokenizer: Any, engines: Sequence[Engines] = ()
) -> None:
    """The Triton model repository: the graphs or their engines, the two Python models around them, the ensemble."""
    spec, names = subject.spec, Names(subject.name)
    parts = list(itertools.zip_longest(spec.parts, served.files, engines))
    configs = [
        *(network_config(names, part, settings, one) for part, _, one in parts),
        tokenizer_config(names, spec, settings),
        answer_config(names, spec, settings),
        ensemble_config(names, spec, settings),
    ]
    for name, text in as_text(configs).items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(text, encoding="utf-8")
    (models / names.ensemble / "1" / ".keep").touch()  # Triton wants a version folder, and git no empty one
    for part, file, one in parts:
        version = models / names.of(part) / "1"
        if one is None:
            copy_graph(file, version / "model.onnx")
        for plan in one.plans.values() if one else ():
            shutil.copyfile(plan, version / plan.name)
    inputs = [
        {
            "name": port.name,
            "dtype": port.dtype,
            "dims": [axis if isinstance(axis, int) else 0 for axis in port.axes[1:]],
        }
        for port in spec.reader.inputs
    ]
    reading = {
        "texts": texts_of(spec),
        "inputs": inputs,
        "token_types": "token_type_ids" in tokenizer.model_input_names,  # or transformers gives a BERT zeros
        "pad_id": spec.pad_id,
        "max_length": _max_length(spec, engines),
        "pad_to_multiple_of": settings.pad_to_multiple_of,
    }
    _python_model(models / names.tokenizer / "1", "tokenize_text.py", reading, tokenizer)
    answering = _generating(subject, settings) if spec.encoder else _answering(subject, settings, tokenizer)
    _python_model(models / names.answer / "1", ANSWERED_TASKS[spec.task], answering, tokenizer)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph and the files of its external data, which keep their names, as the graph knows them by these."""
    shutil.copyfile(source, target)
    for file in data_files(source):
        shutil.copyfile(file, target.parent / file.name)


def write_hub(folder: Path, subject: Subject, documents: Documents) -> list[str]:
    """Config, tokenizer and every verified variant as transformers.js and text-embeddings-inference look for them.

    Of an encoder-decoder the graphs are laid out anew and held to the verified ones on `documents`.
    """
    (folder / "onnx").mkdir(parents=True)
    copy_companions(subject.folder, folder)
    if not (folder / "tokenizer.json").is_file():
        _open_tokenizer(subject.folder).save_pretrained(folder)
    files = []
    for variant, one in subject.variants.items():
        if variant not in HUB_FILES:  # they have no name for the others
            continue
        if subject.spec.encoder and variant == "int8_static":  # in a branch ONNX Runtime rounds its products otherwise
            continue
        if subject.spec.encoder:
            files += _write_merged(folder / "onnx", subject, one, documents)
        else:
            copy_graph(one.file, folder / "onnx" / HUB_FILES[variant])
            files.append(HUB_FILES[variant])
    return files


def _write_merged(folder: Path, subject: Subject, one: Verified, documents: Documents) -> list[str]:
    names = [HUB_FILES[one.variant].replace("model", stem, 1) for stem in (PAIR_STEMS[0], MERGED_STEM)]
    encoder, decoder = (folder / name for name in names)
    merge(one.files, subject.spec, encoder, decoder)
    verified: Any = open_onnx_graphs(one.files, subject.spec, usable_threads())
    what = f"{subject.name} {one.variant} for transformers.js"
    prove_merged(what, subject.spec, verified, encoder, decoder, documents, usable_threads())
    return names


def write_companions(
    folder: Path,
    names: Names,
    about: Mapping[str, Any],
    hub_files: list[str],
    example: str,
    target: Path,
    engines: Sequence[Engines],
) -> None:
    """What a serving team needs beside the model: client, container, load test, and a page that says how."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    values = {
        "names": names,
        "about": about,
        "hub_files": hub_files,
        "image": about["image"],
        "sdk": RELEASE,
        "folder": shlex.quote(str(target)),
        "example": " ".join([shlex.quote(example)] * len(about["texts"])),
        "gpu": "kind: KIND_GPU" in (folder / "models" / about["networks"][0] / "config.pbtxt").read_text("utf-8"),
        "tensorrt": engines[0].library_version if engines else "",
        "library_version": engines[0].library_number if engines else 0,
        "tokenizers": versions()["tokenizers"],
    }
    written = {
        "compose.yaml": "triton_compose.yaml",
        "Dockerfile": "triton_dockerfile",
        "README.md": "triton_readme.md",
    }
    for name, template in written.items():
        (folder / name).write_text(environment.get_template(template).render(values), encoding="utf-8")
    (folder / ".dockerignore").write_text("*\n")  # the models are mounted, not copied into the image
    client = (TRITON_MODELS / "client.py").read_text(encoding="utf-8").replace("{{ ensemble }}", names.ensemble)
    client = client.replace('["TEXT"]', json.dumps(about["texts"]))
    (folder / "client.py").write_text(client, encoding="utf-8")
    load = {"data": [{text: [" ".join([example] * repeats)] for text in about["texts"]} for repeats in (1, 2, 4)]}
    (folder / "perf_input.json").write_text(json.dumps(load, indent=2) + "\n", encoding="utf-8")


def _max_length(spec: IoSpec, engines: Sequence[Engines]) -> int:
    return min(spec.max_length, engines[0].max_length) if engines else spec.max_length


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} has no tokenizer.json form", "a fast tokenizer: the server has no transformers"
        )
    return tokenizer


def _python_model(folder: Path, code: str, settings: Mapping[str, Any], tokenizer: Any) -> None:
    shutil.copyfile(TRITON_MODELS / code, folder / "model.py")
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _answering(subject: Subject, settings: Pack, tokenizer: Any) -> dict[str, Any]:
    spec = subject.spec
    answering = {"task": spec.task, "inputs": answer_inputs(spec), "top_k": settings.top_k}
    if spec.task == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer in {subject.folder} has no mask token", "one, to be filled")
        answering |= {"mask_id": tokenizer.mask_token_id, "mask_token": tokenizer.mask_token}
    if spec.task in ("classification", "token_classification"):
        answering |= _classes(subject.folder) | {"unk_id": tokenizer.unk_token_id}
    if spec.task == "question_answering":
        answering["cls_id"] = tokenizer.cls_token_id
    return answering


def _generating(subject: Subject, settings: Pack) -> dict[str, Any]:
    """What a text is written by: the decoder, its cache, and how its texts begin and end."""
    spec, sampling = subject.spec, with_end(Sampling(settings.max_new_tokens), subject.folder)
    assert spec.cache is not None and spec.cross is not None
    return {
        "decoder": Names(subject.name).of(spec),
        "encoded": dict(zip(spec.cross.present_names, spec.cross.past_names, strict=True)),
        "cache": dict(zip(spec.cache.present_names, spec.cache.past_names, strict=True)),
        "empty": [spec.cache.heads, 0, spec.cache.head_size],
        "start_id": spec.start_id,
        "pad_id": spec.pad_id,
        "max_new_tokens": settings.max_new_tokens,
        "ends": list(sampling.eos_token_ids),
        "forced_first": sampling.forced_bos_token_id,
        "forced_last": sampling.forced_eos_token_id,
    }


def _classes(folder: Path) -> dict[str, Any]:
    """Labels, and how logits become scores: as transformers' text-classification pipeline does it."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    activation = "softmax" if config.num_labels > 1 else "sigmoid"
    if config.problem_type in ("regression", "multi_label_classification"):
        activation = {"regression": "none", "multi_label_classification": "sigmoid"}[config.problem_type]
    return {"labels": [config.id2label[index] for index in range(config.num_labels)], "activation": activation}


def _example(spec: IoSpec, tokenizer: Any) -> str:
    return f"return first + {tokenizer.mask_token}" if spec.task == "masked_lm" else "return first +"


if __name__ == "__main__":
    stage_main("pack")
