"""What README and the shipped recipes say is so: commands exist and run, links lead somewhere, recipes load."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from export.parity import holds_under
from trainer.__main__ import VERBS, main
from trainer.config import Recipe
from trainer.export_config import Parity
from trainer.recipe_file import dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.stem for path in (ROOT / "trainer" / "recipes").glob("*.yaml"))


def commands(program):
    """Everything in README's code that starts with `program`."""
    code = re.findall(r"`([^`\n]+)`", README) + re.findall(r"```\n(.*?)```", README, re.S)
    return sorted({line.strip() for block in code for line in block.splitlines() if line.startswith(program)})


def test_make_targets_exist():
    made = commands("make ")
    assert {"make quickstart", "make test", "make quickstart-gpt"} <= set(made)
    for command in made:
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_verb_is_in_readme_and_every_verb_in_readme_is_one():
    named = set(re.findall(r"lmworks ([a-z]+)", " ".join(commands("lmworks"))))
    listed = set(re.findall(r"\b([a-z]+)\b", " ".join(re.findall(r"`lmworks ([^`]+) RECIPE", README))))
    assert named <= set(VERBS)
    assert set(VERBS) <= named | listed


@pytest.mark.parametrize("verb", [verb for verb in VERBS if VERBS[verb].takes_recipe and not VERBS[verb].takes_stages])
def test_dry_run_prints_a_recipe_that_loads_again(verb, tmp_path, capsys):
    section = ["tensorrt.tf32=false"] * (verb == "tensorrt")  # quickstart has none: not every machine has the library
    assert main([verb, *VERBS[verb].what[:1], "quickstart", *section, "--dry-run"]) == 0
    said = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(said)
    assert load_recipe(str(again)) == load_recipe("quickstart", section)


def test_dry_run_of_the_chain_says_what_each_stage_would_do(capsys, tmp_path):
    assert main(["run", "quickstart", f"run_dir={tmp_path}", "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in said] == [
        "# prepare", "# pretrain", "# distill", "# export", "# bench", "# pack", "# report"
    ]  # fmt: skip
    assert all("would run" in line for line in said)


@pytest.mark.parametrize("verb", ["distill", "export", "bench", "tensorrt", "pack"])
def test_a_missing_section_is_named_alike_by_the_verb_and_its_dry_run(capsys, tmp_path, verb):
    said = []
    for more in ([], ["--dry-run"]):
        assert main([verb, "shakespeare-char", f"run_dir={tmp_path}", *more]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and f"the recipe has no `{verb}` section" in said[0]
    assert not list(tmp_path.iterdir())


def test_dry_run_needs_no_torch():
    code = (
        "import sys; from trainer.__main__ import main; main(['pretrain', 'quickstart', '--dry-run']);"
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_load_and_reload_equal(name, tmp_path):
    recipe = load_recipe(name)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(str(dumped)) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_say_their_command_and_hardware_and_what_comes_of_it(name):
    head = (ROOT / "trainer" / "recipes" / f"{name}.yaml").read_text().split("run_dir:")[0]
    assert re.search(rf"^#   (lmworks run|accelerate launch .*-m trainer\.pretrain) {name}\b", head, re.M)
    # A recipe for a laptop says what was measured; one for a cluster what `lmworks plan` estimates.
    for said in ("Hardware", "(Duration|Estimate.*)"):
        assert re.search(rf"^# {said}: .*\d", head, re.M), said


def test_the_character_reference_is_made_by_the_commands_as_they_stand(tmp_path, monkeypatch):
    (block,) = [code for code in re.findall(r"```\n(.*?)```", README, re.S) if "shakespeare-char" in code]
    making, running = block.splitlines()
    recipe = (ROOT / "trainer" / "recipes" / "shakespeare-char.yaml").read_text()
    assert f"#   {making}\n#   {running}\n" in recipe
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("".join(chr(97 + number * number % 26) for number in range(1_115_394)))
    subprocess.run(making, shell=True, check=True)
    assert main(["prepare", *running.split()[2:]]) == 0  # the first stage is what may miss its files
    manifest = json.loads((tmp_path / "runs/shakespeare-char/prepare/data/manifest.json").read_text())
    counts = [split["characters"] for split in manifest["splits"].values()]
    assert counts == [1_003_854, 1_115_394 - 1_003_854]  # nanoGPT's 90 %


def test_the_readmes_override_example_is_valid():
    (example,) = re.findall(r"`lmworks pretrain quickstart (\S+)`", README)
    key, value = example.split("=")
    recipe = load_recipe("quickstart", [example])
    assert isinstance(recipe, Recipe) and recipe.pretrain.optim.learning_rate == float(value), key


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


RESULTS = ROOT / "tests" / "benchmarks" / "results"
# What README quotes from others (source in its table) and from config.py, beside what was measured.
QUOTED = {"9.4×", "96.8 %", "1.88 ", "0.25,", "0.1,", "90 %", "1.81×", "3.23×"}


def latency_figures():
    """README's statements about latency, made from the committed result."""
    result = json.loads((RESULTS / "inference.json").read_text())
    rows = {
        (head, row["model"], row["backend"]): row
        for head in ("BertForMaskedLM", "BertForSequenceClassification")
        for row in result[head]["rows"]
    }
    masked = {key[1:]: row for key, row in rows.items() if key[0] == "BertForMaskedLM"}
    student = masked["student", "onnx_int8"]
    other = masked["teacher", "onnx_int8"]
    classifiers = [rows["BertForSequenceClassification", model, "onnx_int8"] for model in ("teacher", "student")]
    shipped = Parity().int8
    passing = [holds_under(row["parity"], shipped) for row in (student, other, *classifiers)]
    assert passing == [True, False, True, True], "what passes the shipped gate is not what README says"
    batch = result["BertForMaskedLM"]["input_of_rows_paragraphs"]
    row, paragraphs = latencies("inference.json")
    return [
        row,
        f"{batch['real_tokens']} tokens, padded to {batch['batch_size']} × {batch['sequence_length']} | {paragraphs} |",
        "; ".join(latencies("inference-xeon.json")),
        own_int8(result["BertForMaskedLM"]),
        f"relative_rms {student['parity']['relative_rms']:.3f}, top-1 {student['parity']['top1'] * 100:.1f} %",
        f"the teacher's does not (top-1 {other['parity']['top1'] * 100:.2f} %)",
        f"{classifiers[0]['speedup']:.1f}× and {classifiers[1]['speedup']:.1f}×",
        f"1 × {result['BertForMaskedLM']['input_of_rows']['sequence_length']} tokens, "
        f"{result['machine']['threads']} threads",
    ]


def latencies(name):
    """Of one full row, and of paragraphs."""
    masked = json.loads((RESULTS / name).read_text())["BertForMaskedLM"]
    said = []
    for key, digits in (("rows", 1), ("rows_paragraphs", 0)):
        rows = {(row["model"], row["backend"]): row for row in masked[key]}
        slow, fast = rows["teacher", "eager"], rows["student", "onnx_int8"]
        times = f"{slow['median_ms']:.0f} ms against {fast['median_ms']:.{digits}f} ms"
        said.append(f"{times}, {speedup_of(fast)} over {fast['windows']} rounds)")
    return said


def own_int8(masked):
    """The teacher's int8 against its own source, and against its fp32 graph."""
    said = []
    for key, digits in (("rows", 1), ("rows_paragraphs", 0)):
        rows = {row["backend"]: row for row in masked[key] if row["model"] == "teacher"}
        plain, fast = rows["onnx_fp32"]["median_ms"], rows["onnx_int8"]
        ratio = f"{plain / fast['median_ms']:.1f}× its fp32 ONNX in {plain:.{digits}f} ms"
        said.append(f"{fast['median_ms']:.{digits}f} ms, {speedup_of(fast)}), {ratio}")
    return "; ".join(said)


def speedup_of(row):
    low, high = row["speedup_range"]
    return f"{row['speedup']:.1f}× ({low:.1f} to {high:.1f}"


def trained_figures():
    result = json.loads((RESULTS / "int8_trained.json").read_text())
    forms, training = result["forms"], result["training"]
    steps = sum(stack["steps"] for stack in training["stacks"])
    found, top1 = forms["quality_int8"]["metrics"], forms["parity_int8"]["metrics"]["top1"]
    assert forms["held"] and forms["quality_int8"]["thresholds"] == {"share": 0.99}
    kept, low, high = (found[key] * 100 for key in ("kept", "kept_low", "kept_high"))
    return [
        f"{steps:,} steps of {training['tokens_per_step']:,} tokens",
        f"which is {found['source'] * 100:.1f} % after",
        f"{kept:.1f} % ({low:.1f} to {high:.1f}, bootstrap over {found['sequences']} rows); top-1 {top1 * 100:.1f} %",
        "| 99 %, the recipe's gate |",
    ]


def decoding_figures():
    short, long = (decoding_rows("decode.json", key) for key in ("rows", "rows_long"))
    passing = {name: row["passes_shipped_gate"] for name, row in short.items() if "passes_shipped_gate" in row}
    assert passing == {"onnx_fp32": True, "onnx_fp32_fused": True, "onnx_int8": False, "onnx_int4": False}
    plain, fused = long["onnx_fp32"], long["onnx_fp32_fused"]
    return [
        generating_figure(decoding_rows("decode-xeon.json", "rows")),
        f"{generating_figure(short)}; `fp32_fused` {tokens_figure(short['onnx_fp32_fused'])}",
        f"{generating_figure(long)}, the first token after {long['transformers']['first_token_ms']:.0f} ms against "
        f"{plain['first_token_ms']:.0f} ms; `fp32_fused` {tokens_figure(fused)}, {fused['first_token_ms']:.0f} ms",
        "; after 900 tokens ".join(small_figures(rows) for rows in (short, long)),
        "llama2.c's int8 is 3× its fp32, on another machine",
        f"{short['onnx_int8']['file_mib']:.0f} and {short['onnx_int4']['file_mib']:.0f} MiB",
    ]


def decoding_rows(name, key):
    return {row["variant"]: row for row in json.loads((RESULTS / name).read_text())[key]}


def small_figures(rows):
    return " and ".join(tokens_figure(rows[form]) for form in ("onnx_int8", "onnx_int4"))


def generating_figure(rows):
    return f"{rows['transformers']['tokens_per_s']:.1f} against {tokens_figure(rows['onnx_fp32'])}"


def tokens_figure(row):
    return f"{row['tokens_per_s']:.1f} tokens/s, {speedup_of(row)})"


def loop_figures():
    sizes = json.loads((RESULTS / "engine_overhead.json").read_text())["results"]
    again = json.loads((RESULTS / "engine_overhead-least.json").read_text())["results"]["least"]
    trainer = f"ours to it {sizes['small']['ours_to_trainer']:.3f}× at {step_ms(sizes['small']):.0f} ms"
    return [", ".join(map(loop_figure, sizes.values())), loop_figure(again), trainer]


def loop_figure(size):
    low, high = size["ours_to_bare_range"]
    return f"{step_ms(size):.0f} ms {size['ours_to_bare']:.3f}× ({low:.3f} to {high:.3f})"


def step_ms(size):
    return statistics.median(one["bare_s"] for one in size["rounds"]) * 1e3


def character_figures():
    result = json.loads((RESULTS / "shakespeare-char.json").read_text())
    loss, reference = result["validation_loss"], result["reference"]["validation_loss"]
    steps = f"{result['validation'][-1]['step']:,} steps"
    parameters = f"{result['parameters'] / 1e6:.1f}M parameters"
    return [f"{steps}: validation loss | {loss:.3f} | {reference} (nanoGPT's README)", parameters]


def throughput_figures():
    result = json.loads((RESULTS / "train_throughput.json").read_text())["results"]
    said = []
    for objective, digits in (("masked_lm", 1), ("causal_lm", 2)):
        ours, trainer = (result[objective]["tokens_per_s"][side] for side in ("ours", "trainer"))
        said.append(f"{ours:.0f} against {trainer:.0f} tokens/s, {result[objective]['ratio']:.{digits}f}×")
    return said


def quantizing_figures():
    result = json.loads((RESULTS / "quantize_memory.json").read_text())["results"]["beside_it"]
    ours, theirs = (result["times_the_weights"][way] for way in ("ours", "onnxruntime"))
    return [f"int8 of {result['mib']} MiB of weights", f"| {ours:.2f}× | {theirs:.2f}× (ONNX Runtime's"]


def unsupported(section):
    """Figures in README's text of measurements that no committed result gives."""
    text = " ".join(section.split())
    figures = (
        latency_figures,
        trained_figures,
        decoding_figures,
        loop_figures,
        character_figures,
        throughput_figures,
        quantizing_figures,
    )
    for said in (said for of_one in figures for said in of_one()):
        assert said in text, said
        text = text.replace(said, "")
    figures = re.findall(r"\d+(?:\.\d+)?(?: ms|×| %)|\b\d+\.\d+\S?", re.sub(r"\(https?:[^)]*\)", "", text))
    return [figure for figure in figures if figure not in QUOTED]


def measured_section():
    return README.split("## Measured")[1].split("## Map")[0]


def test_measured_figures_are_those_of_the_committed_results():
    assert unsupported(measured_section()) == []
    named = re.findall(r"\(tests/benchmarks/results/([\w.-]+\.json)\)", measured_section())
    assert named and all(json.loads((RESULTS / name).read_text())["command"] for name in named)
    shipped = Parity().int8
    assert f"(up to {shipped.relative_rms}, top-1 at least {shipped.min_top1:.0%})".replace("%", " %") in " ".join(
        measured_section().split()
    )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("12.1×", "12.9×"), ("1.878", "1.868"), ("9.8×", "9.9×"), ("0.041", "0.031"), ("1.008×", "1.003×")],
)
def test_a_changed_figure_is_noticed(right, wrong):
    assert right in measured_section()
    with pytest.raises(AssertionError):
        unsupported(measured_section().replace(right, wrong))


def test_an_added_figure_is_noticed():
    assert unsupported(measured_section() + "\nand a student in fp32 takes 12.3 ms, 20×") == ["12.3 ms", "20×"]
