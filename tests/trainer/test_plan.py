import json
import re
from pathlib import Path

import pytest

from trainer.__main__ import GPU_NAMES, main
from trainer.config import EngineConfig
from trainer.plan import run, strategies
from trainer.planning.hardware import GPUS
from trainer.planning.workload import workloads
from trainer.recipe_file import find_recipe, load_recipe

RECIPES = ["bert-base", "bert-large-lamb", "modernbert-base", "gpt2-124m", "llama-1b", "llama-7b-zero3"]
STATED = re.compile(r"# Estimated by plan, not measured: ([\d.]+) GiB a GPU, ([\d.]+) h at 40 % of the peak")


@pytest.fixture(autouse=True)
def away_from_runs(tmp_path, monkeypatch):
    """Shipped recipes name folders below the current one, where `make quickstart` may have left its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_load_plan_and_dry_run(name, capsys):
    """What a recipe states on its top is what its own command computes, over all phases, and it fits."""
    text = find_recipe(name).read_text(encoding="utf-8")
    command = re.search(rf"lmworks plan {name} --gpus (\d+) --gpu (\S+)", text)
    stages = run(load_recipe(name), gpus=int(command[1]), gpu=command[2], mfu=0.4)["stages"]
    chosen = [row for stage in stages for row in stage["strategies"] if row["chosen"]]
    gib, hours = STATED.search(text).groups()
    assert len(chosen) == len(stages) and all(row["fits"] for row in chosen)
    assert float(gib) == pytest.approx(max(row["gib"]["total"] for row in chosen), rel=5e-3)
    assert float(hours) == pytest.approx(sum(stage["hours"] for stage in stages), rel=5e-3)
    assert not [note for stage in stages for note in stage["notes"] if "does not divide" in note]
    assert f"{stages[0]['stage']}: {stages[0]['architecture']}" in capsys.readouterr().out
    assert main(["pretrain", name, "--dry-run"]) == 0


def test_the_table_says_what_the_json_says(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "quickstart", "--gpus", "8", "--gpu", "h200", "--mfu", "0.5", "--json", str(file)]) == 0
    plan, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [stage["stage"] for stage in plan["stages"]] == ["pretrain", "distill"]
    assert (plan["gpus"], plan["gpu"]["name"], plan["mfu"]) == (8, "h200", 0.5)
    for stage in plan["stages"]:
        assert f"{stage['parameters']:,}" in printed
        for row in stage["strategies"]:
            parts = {name: gib for name, gib in row["gib"].items() if name not in ("total", "host", "nvme")}
            assert sum(parts.values()) == pytest.approx(row["gib"]["total"])
            assert f"{row['gib']['total']:.2f}" in printed
    student = plan["stages"][1]
    assert student["teacher_parameters"] == plan["stages"][0]["parameters"] > student["parameters"]


def test_overrides_and_strategies_reach_the_plan():
    small, large = (
        run(load_recipe("quickstart", [f"pretrain.micro_batch_size={rows}"]), gpus=1, gpu="h100", mfu=0.4)["stages"][0]
        for rows in (16, 32)
    )
    assert small["accumulation"] == 2 * large["accumulation"]
    activations = [stage["strategies"][0]["gib"]["activations"] for stage in (small, large)]
    assert activations[1] == pytest.approx(2 * activations[0])
    taken = {
        name: [one.name for one, chosen in strategies(EngineConfig(strategy=name)) if chosen]
        for name in ("auto", "fsdp2")
    }
    assert taken == {"auto": ["ddp / zero0"], "fsdp2": ["fsdp2"]}
    names = [one.name for one, _ in strategies(EngineConfig(zero="zero3"))]
    assert names.count("zero3") == 1
    assert [one.name for one, chosen in strategies(EngineConfig(zero="zeropp")) if chosen] == ["zeropp"]


def test_what_does_not_fit_and_what_does_not_divide_is_said(capsys):
    recipe = load_recipe("llama-7b-zero3", ["pretrain.engine.zero=null", "pretrain.global_batch_size=1040"])
    stage = run(recipe, gpus=8, gpu="rtx4090", mfu=0.4)["stages"][0]
    row = next(row for row in stage["strategies"] if row["chosen"])
    assert not row["fits"]
    assert row["largest_micro_batch"] == {"checkpointing_off": 0, "checkpointing_on": 0}
    printed = capsys.readouterr().out
    assert f"{row['gib']['total']:.2f} !" in printed
    assert (
        "global_batch_size 1040 does not divide over 8 GPU(s) x micro_batch_size 16; nearest: 896, 1024, 1152"
        in printed
    )


def test_choices_of_auto_are_named():
    def notes(*overrides, gpu="h100"):
        return run(load_recipe("gpt2-124m", overrides), gpus=8, gpu=gpu, mfu=0.4)["stages"][0]["notes"]

    isolate = "pretrain.data.packing=isolate"
    assert "attention auto: counted without a mask" in notes(isolate)
    assert "attention auto: counted with a dense mask (sdpa)" in notes(isolate, "pretrain.model.config.attn_pdrop=0.1")
    assert any("counted as chunked" in note for note in notes())
    assert any("counted as full" in note for note in notes("pretrain.micro_batch_size=4"))
    assert not any("cross_entropy" in note for note in notes("pretrain.cross_entropy=chunked"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pretrain.model.architecture=mamba"], "does not know architecture 'mamba'"),
        (["pretrain.model.config.hiden_size=32"], "did you mean 'hidden_size'"),
        (["pretrain.objective={name: causal_lm}"], "no causal_lm model of architecture 'bert'"),
        (["prepare.tokenizer={path: nowhere}"], "no tokenizer.json, vocab.json or vocab.txt at nowhere"),
        (["pretrain.engine.zero=zero9"], "no DeepSpeed config 'zero9'"),
        (["pretrain=null", "distill=null"], "the recipe trains nothing"),
        (["prepare=null"], "the size of the vocabulary is not known"),
        (["--gpus", "0"], "at least one GPU"),
        (["--mfu", "1.5"], "a share of its peak"),
        (["pretrain.precision=bf16", "--gpu", "v100"], "precision bf16 on v100"),
    ],
)
def test_user_errors(overrides, said, capsys):
    assert main(["plan", "quickstart", *overrides]) == 2
    assert said in capsys.readouterr().err


def test_vocabularies_are_counted(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "prepared")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n")
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": [{"content": "<pad>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    counts = {"prepared": 100, "vocab.txt": 3, "bpe": 2, "tokenizer.json": 3}
    for name, entries in counts.items():
        recipe = load_recipe("quickstart", [f"prepare.tokenizer={{path: {tmp_path / name}}}"])
        assert workloads(recipe)[0].shape.vocabulary == entries
    characters = workloads(load_recipe("shakespeare-char", [f"run_dir={tmp_path}"]))[0]
    assert characters.shape.vocabulary == 256
    assert any("assumed" in note for note in characters.notes)


def test_a_prepared_tokenizer_and_model_folders_are_read(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "prepare" / "tokenizer")
    folder = tmp_path / "teacher"
    folder.mkdir()
    config = {
        "model_type": "bert",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "vocab_size": 321,
        "hidden_act": "gelu",
    }
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    recipe = load_recipe("quickstart", [f"run_dir={tmp_path}", f"distill.teacher={folder}"])
    pretrained, student = workloads(recipe)
    assert pretrained.shape.vocabulary == 100
    assert (student.teacher.hidden, student.shape.hidden, student.shape.vocabulary) == (48, 48, 321)
    assert (student.shape.architecture, student.shape.layers) == ("distilbert", 6)
    going_on = load_recipe("quickstart", [f"pretrain.model={{init_from: {folder}}}"])
    assert workloads(going_on)[0].shape == student.teacher


def test_students_have_the_shapes_that_distill_makes(tiny_tokenizer):
    """Parameters of student and teacher equal those of the models that the stage builds."""
    from trainer.distill import make_student
    from trainer.models import build, count_parameters

    for name in ("quickstart", "quickstart-gpt"):
        recipe = load_recipe(name, ["prepare.tokenizer.vocab_size=100"])
        workload = workloads(recipe)[1]
        causal, length = workload.objective.name == "causal_lm", workload.data.sequence_length
        teacher = build(recipe.pretrain.model, tiny_tokenizer, causal, length, 0)
        student = make_student(recipe.distill, teacher, tiny_tokenizer, causal, length, 0)
        assert workload.teacher.parameters().total == count_parameters(teacher)
        assert workload.shape.parameters().total == count_parameters(student)


def test_probe_beside_the_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    small = [
        "pretrain.micro_batch_size=4",
        "pretrain.model.config.num_hidden_layers=2",
        "prepare.tokenizer.vocab_size=600",
    ]
    assert main(["plan", "quickstart", *small, "--probe", "--json", str(file)]) == 0
    parts = {part["part"]: part for part in json.loads(file.read_text())["probe"]["parts"]}
    assert abs(parts["activations"]["error"]) < 0.05
    printed = capsys.readouterr().out
    assert re.search(r"activations .* [+-]\d+\.\d%", printed)
    assert f"{parts['peak']['measured_bytes'] / 2**20:,.2f}" in printed


def test_the_command_line_knows_every_gpu():
    assert set(GPU_NAMES) == set(GPUS)
    assert Path(find_recipe("quickstart")).is_file()
