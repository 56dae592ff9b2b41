"""Tools that know nothing of us open what we write, and find transformers' numbers and tokens in it: optimum the
exported folders, transformers.js on Node the packed ones."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, pipeline

from export import pack
from export.export import export_model
from export.io_spec import read_spec
from export.runners import open_onnx, open_torch
from tests.export.conftest import CONFIGS, PAIRS, build_tokenizer, learn
from trainer.config import Recipe

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent / "foreign"
NEW, END = 32, 3
# What the models learn to write to each text, and then end.
ANSWERS = {
    "def add(first, second):": "\n    return first + second\n\nclass Point:\n    x = 0\n    y = 1",
    "class Point:": "\n    x = 0\n    y = 1\n\ndef add(first, second):\n    return first + second",
}
WRITERS = {"gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
MASKED = "return first [MASK]"
LOOSE = {"relative_rms": 0.4, "min_top1": 0.0}  # the words are what is held
EXPORT = {"variants": ["fp32", "int8", "int4"], "quality": None,
          "parity": {"shapes": [[3, 9]], "int8": LOOSE, "int4": LOOSE}}  # fmt: skip
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
# optimum wants an older transformers than ours. That and what it wants in turn lie in a folder that is looked into
# first; torch, onnx and onnxruntime are those of this environment, as pip resolves nothing and fetches these alone.
OPTIMUM = (
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "requests==2.34.2",
    "charset_normalizer==3.5.3",
)


@pytest.fixture(scope="module")
def sources(model_folder, tmp_path_factory) -> dict[str, Path]:
    """Model folders. Those that write know their answers by heart: of random weights int8 takes other tokens."""
    folders = {"bert": model_folder("bert")}
    for name in WRITERS:
        kind, make = (CONFIGS | PAIRS)[name]
        config: Any = make()
        if name == "t5":  # optimum takes the model's width, divided by the heads, for a head's
            config.num_heads = config.d_model // config.d_kv
        torch.manual_seed(1)
        model = kind(config).eval()  # without dropout
        batches = []
        for text, answer in ANSWERS.items():
            read, said = tokens(text), [*tokens(answer), END]
            row = (read, said) if name == "t5" else (read + said, read + said)
            batches.append({key: np.array([ids]) for key, ids in zip(("input_ids", "labels"), row, strict=True)})
        learn(model, batches, steps=200, rate=5e-3, warmup=20)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        build_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def run_dir(sources, documents, tmp_path_factory) -> Path:
    """A run's folder, in which all models are exported and packed."""
    root = tmp_path_factory.mktemp("run")
    models = {name: str(folder) for name, folder in sources.items()}
    recipe = Recipe.model_validate({"run_dir": root, "export": EXPORT | {"models": models}, "pack": {}})
    assert recipe.export is not None
    for name, folder in sources.items():
        forms = recipe.export.variants if name in WRITERS else ("fp32", "int8")
        export_model(recipe, recipe.export.model_copy(update={"variants": forms}), name, folder, documents)
    pack.run(recipe)
    return root


@pytest.fixture(scope="module")
def written(sources) -> dict[str, list[list[int]]]:
    """The tokens that transformers writes to each text."""
    found = {}
    for name, kind in WRITERS.items():
        model = kind.from_pretrained(sources[name], dtype=torch.float32).eval()
        rows = [build_tokenizer()(text, return_tensors="pt") for text in ANSWERS]
        made = [model.generate(**row, max_new_tokens=NEW, do_sample=False, num_beams=1) for row in rows]
        found[name] = [row[0].tolist() for row in made]
        for row, answer in zip(found[name], ANSWERS.values(), strict=True):
            assert row[-len(tokens(answer)) - 1 :] == [*tokens(answer), END]
    return found


def tokens(text: str) -> list[int]:
    return build_tokenizer()(text)["input_ids"]


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """Where a tool is installed, for as long as the test takes: each has hundreds of megabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def install(command: list[str], what: str, folder: Path) -> None:
    """Run an installer; the test is skipped where it reaches no index, or Node is too old."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        problem = next((line for line in lines if line.lower().startswith(("error", "npm err"))), lines[-1])
        assert re.search("ECONN|ENOTFOUND|EAI_AGAIN|onnection|timed out|EBADENGINE", "\n".join(lines)), lines
        pytest.skip(f"{what} cannot be installed here: {problem}")


def ask(command: list[str], folder: Path, question: Any, **variables: str) -> Any:
    """What a script answers: it runs in `folder` without a hub, and is given two files, of question and answer."""
    asked, answer = folder / "question.json", folder / "answer.json"
    asked.write_text(json.dumps(question))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [*command, asked, answer], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


def test_optimum_opens_exported_folders(sources, run_dir, written, place):
    """Texts of unequal lengths in one batch; also forms whose attention is ONNX Runtime's own."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    install([*pip, "--only-binary", ":all:", "--target", str(place / "site"), *OPTIMUM], "optimum", place)
    cases = [(name, form) for name in ("bert", "gpt2", "llama") for form in ("fp32", "int8", "int4")]
    cases = [case for case in cases if case != ("bert", "int4")] + [("t5", "fp32")]
    specs, feeds, questions = {name: read_spec(folder) for name, folder in sources.items()}, {}, []
    for name, form in cases:
        spec, prompts = specs[name], [np.array(tokens(text)) for text in ANSWERS]
        feeds[name] = spec.reader.pad(
            prompts, max(map(len, prompts)), left=spec.cache is not None and spec.encoder is None
        )
        inputs = {key: value.tolist() for key, value in feeds[name].items() if "past" not in key}
        folder = run_dir / "pack" / name / "hub" if spec.encoder else run_dir / "export" / name
        graph = {"name": name, "folder": str(folder), "file": spec.file(form)}
        questions.append({**graph, "inputs": inputs, "new": NEW if spec.cache else 0, "pad": spec.pad_id})
    site = {"PYTHONPATH": str(place / "site")}
    answers = ask([sys.executable, str(SCRIPTS / "open_with_optimum.py")], place, questions, **site)
    for (name, form), answer in zip(cases, answers, strict=True):
        spec, real = specs[name], feeds[name]["attention_mask"] == 1
        runners = [open_onnx(run_dir / "export" / name / spec.file(form), 1)] if "logits" in answer else []
        runners += [open_torch(sources[name], 1)] if runners and form == "fp32" else []
        for runner in runners:
            expected = runner.run(feeds[name])["logits"][real]
            np.testing.assert_allclose(np.array(answer["logits"])[real], expected, atol=1e-4, err_msg=f"{name} {form}")
        if name in written:
            found, known = ([[token for token in row if token != spec.pad_id] for row in rows]
                            for rows in (answer["tokens"], written[name]))  # fmt: skip
            assert found == known, (name, form)


def test_transformers_js_opens_packed_folders(sources, run_dir, written, place):
    """From text to tokens, with the tokenizer that lies beside the graphs."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no node with npm here")
    # Its ONNX Runtime for the CPU is in the package; what a script would fetch is CUDA's.
    npm = ["npm", "install", "--ignore-scripts", "--engine-strict", "--no-audit", "--no-fund"]
    install([*npm, TRANSFORMERS_JS], "transformers.js", place)
    script = shutil.copy(SCRIPTS / "open_with_transformers_js.mjs", place)
    cases = [(name, dtype) for name in WRITERS for dtype in ("fp32", "q8", "q4")]
    question = {
        "folder": str(run_dir / "pack"),
        "models": [{"name": name, "dtype": dtype} for name, dtype in cases],
        "texts": list(ANSWERS),
        "length": NEW,
        "masked": MASKED,
    }
    answer = ask(["node", script], place, question)
    for (name, dtype), rows in zip(cases, answer["tokens"], strict=True):
        assert rows == written[name], (name, dtype)
    model = AutoModelForMaskedLM.from_pretrained(sources["bert"])
    filled = pipeline("fill-mask", model, tokenizer=build_tokenizer(), top_k=3)(MASKED)
    assert [one["token"] for one in answer["filled"]] == [one["token"] for one in filled]
    assert [one["score"] for one in answer["filled"]] == pytest.approx([one["score"] for one in filled], rel=1e-4)
