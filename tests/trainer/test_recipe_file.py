"""What a user reads when a recipe is wrong, and that nothing of a right one is lost or guessed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import Recipe
from trainer.errors import UserError
from trainer.export_config import Parity
from trainer.recipe_file import dump_recipe, json_schema, load_recipe, recipe_hash

GOOD = """\
run_dir: runs/x
prepare:
  sources:
    - {type: text, paths: [a.txt]}
  tokenizer: {type: wordpiece}
pretrain:
  model: {architecture: bert}
  objective: {name: masked_lm}
  data: {sequence_length: 64}
  max_steps: 10
  global_batch_size: 8
  micro_batch_size: 8
"""
SHIPPED = ("quickstart", "quickstart-gpt", "shakespeare-char")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes r.yaml into the working directory, so that messages name a short path."""
    monkeypatch.chdir(tmp_path)

    def file(text):
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return file


def message(name, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_good_recipe_loads_and_keeps_defaults(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.pretrain.max_steps == 10
    assert recipe.pretrain.optim.learning_rate == 1e-3
    assert recipe.distill is None


def test_all_problems_at_once_with_line_and_nearest_name(write):
    text = GOOD.replace("max_steps: 10", "max_step: 10") + "  optim: {weight_decay: -1, beta: 0.9}\nseeed: 3\n"
    assert message(write(text)) == (
        "5 problems in recipe r.yaml:\n"
        "  r.yaml:6: pretrain.max_steps: Field required\n"
        "  r.yaml:10: pretrain.max_step: unknown key; did you mean 'max_steps'?\n"
        "  r.yaml:13: pretrain.optim.beta: unknown key; did you mean 'beta2'?\n"
        "  r.yaml:13: pretrain.optim.weight_decay: Input should be greater than or equal to 0 (found -1)\n"
        "  r.yaml:14: seeed: unknown key; did you mean 'seed'?"
    )


GOLDEN = {
    "unknown key without a near one": (
        GOOD + "  optim: {lr: 3e-4}\n",
        "1 problem in recipe r.yaml:\n  r.yaml:13: pretrain.optim.lr: unknown key; "
        "known: backend, beta1, beta2, epsilon, learning_rate, name, weight_decay",
    ),
    "wrong name of a union": (
        GOOD.replace("masked_lm}", "mask_lm}"),
        "1 problem in recipe r.yaml:\n  r.yaml:8: pretrain.objective: unknown name 'mask_lm'; "
        "did you mean 'masked_lm'?",
    ),
    "no name in a union": (
        GOOD.replace("{name: masked_lm}", "{}"),
        "1 problem in recipe r.yaml:\n  r.yaml:8: pretrain.objective: `name` is missing; known: causal_lm, masked_lm",
    ),
    "key of the other alternative": (
        GOOD.replace("masked_lm}", "causal_lm, mlm_probability: 0.1}"),
        "1 problem in recipe r.yaml:\n  r.yaml:8: pretrain.objective.mlm_probability: unknown key; known: name",
    ),
    "in a list, without a finding that only follows from it": (
        GOOD.replace("paths: [a.txt]}", "path: a.txt}"),
        "1 problem in recipe r.yaml:\n  r.yaml:4: prepare.sources.0.path: unknown key; did you mean 'paths'?",
    ),
    "an empty list is still too short": (
        GOOD.replace("\n    - {type: text, paths: [a.txt]}", " []"),
        "1 problem in recipe r.yaml:\n  r.yaml:3: prepare.sources: "
        "Tuple should have at least 1 item after validation, not 0",
    ),
    "keys that do not fit each other": (
        GOOD.replace("global_batch_size: 8", "global_batch_size: 9"),
        "1 problem in recipe r.yaml:\n  r.yaml:6: pretrain: global_batch_size 9 is not a multiple of "
        "micro_batch_size 8; nearest: 8, 16, 24",
    ),
    "a key twice": (
        GOOD.replace("  max_steps: 10\n", "  max_steps: 10\n  max_steps: 11\n"),
        'r.yaml:11: found duplicate key "max_steps" with value "11" (original value: "10")\n'
        "Needed: valid YAML 1.2, each key once",
    ),
    "broken YAML": (
        "run_dir: [1,\n seed: }",
        "r.yaml:2: expected the node content, but found '}'\nNeeded: valid YAML 1.2, each key once",
    ),
    "a tab": (
        "run_dir: x\n\tseed: 1\n",
        "r.yaml:2: found character '\\t' that cannot start any token\nNeeded: valid YAML 1.2, each key once",
    ),
    "not UTF-8": (b"run_dir: \xff\n", "r.yaml: byte 9 is not UTF-8\nNeeded: a YAML file in UTF-8"),
    "nothing": ("", "r.yaml: holds NoneType, not a mapping\nNeeded: keys such as run_dir and pretrain"),
    "a list": ("- 1\n", "r.yaml: holds CommentedSeq, not a mapping\nNeeded: keys such as run_dir and pretrain"),
    "an impossible date": (
        "run_dir: 2020-13-45\n",
        "r.yaml: month must be in 1..12\nNeeded: valid YAML 1.2, each key once",
    ),
    "a control character": (
        "run_dir: \x07\n",
        "r.yaml: unacceptable character #x0007: special characters are not allowed\n"
        "Needed: valid YAML 1.2, each key once",
    ),
    "a value without end": (
        "&all\nrun_dir: x\nexport: *all\n",
        "r.yaml: an anchor whose value holds itself\nNeeded: values that end",
    ),
    "a date": (
        GOOD.replace("architecture: bert", "architecture: 2020-01-01"),
        "r.yaml:7: architecture: a value of YAML type date\n"
        "Needed: text, a number, true, false, null, a list or a mapping\nDo: put it into quotes if it is text",
    ),
    "a Python object": (
        GOOD.replace("architecture: bert", "architecture: !!python/object/apply:os.system [ls]"),
        "1 problem in recipe r.yaml:\n  r.yaml:7: pretrain.model.architecture: Input should be a valid string",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_messages(write, case):
    text, expected = GOLDEN[case]
    assert message(write(text)) == expected


@pytest.mark.parametrize("value", ["true", "'10'", "10.0", "1e1", "[10]"])
def test_an_integer_is_an_integer(write, value):
    assert "pretrain.max_steps: Input should be a valid integer" in message(
        write(GOOD.replace("max_steps: 10", f"max_steps: {value}"))
    )


@pytest.mark.parametrize("value", [".inf", ".nan", "'3e-4'", "true"])
def test_a_number_is_a_finite_number(write, value):
    found = message(write(GOOD + f"  optim: {{learning_rate: {value}}}\n"))
    assert found.startswith("1 problem in recipe r.yaml:\n  r.yaml:13: pretrain.optim.learning_rate: Input should be ")


@pytest.mark.parametrize("value", ["1", "'true'", "yes"])
def test_a_switch_is_true_or_false(write, value):
    assert "pretrain.compile: Input should be a valid boolean" in message(write(GOOD + f"  compile: {value}\n"))


def test_yaml_1_2(write):
    """3e-4 is a number, which PyYAML reads as text; `no` is a word; 010 is ten; an anchored boolean stays one."""
    text = GOOD.replace("architecture: bert", "architecture: no, config: {eps: 3e-4, size: 010}")
    recipe = load_recipe(write(text + "  optim: {learning_rate: 3e-4}\n  compile: &on true\n  resume: *on\n"))
    assert recipe.pretrain.optim.learning_rate == 3e-4
    assert recipe.pretrain.model.architecture == "no"
    assert recipe.pretrain.model.config == {"eps": 3e-4, "size": 10}
    assert recipe.pretrain.compile is True


def test_frozen(write):
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


# ---- overrides -------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_rules(write):
    overrides = ["pretrain.optim.learning_rate=3e-4", "seed=1", "seed=2", "prepare.sources.0.weight=2",
                 "pretrain.max_grad_norm=null", "run_dir=a=b", "export={variants: [fp32]}"]  # fmt: skip
    recipe = load_recipe(write(GOOD), overrides)
    assert recipe.pretrain.optim.learning_rate == 3e-4
    assert recipe.seed == 2
    assert recipe.prepare.sources[0].weight == 2.0
    assert recipe.pretrain.max_grad_norm is None
    assert str(recipe.run_dir) == "a=b"
    assert recipe.export.variants == ("fp32",)


def test_an_override_of_an_aliased_section_changes_no_other(write):
    text = GOOD.replace("data: {", "data: &data {") + (
        "distill: {data: *data, student: {every: 2}, max_steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    )
    recipe = load_recipe(write(text), ["pretrain.data.sequence_length=32"])
    assert recipe.pretrain.data.sequence_length == 32
    assert recipe.distill.data.sequence_length == 64


BAD_OVERRIDES = {
    "foo": "override 'foo' has no '='",
    "=3": "override '=3' has an empty key",
    "pretrain..x=1": "override 'pretrain..x=1' has an empty key",
    "run_dir=[1": "override 'run_dir=[1': expected ',' or ']', but got '<stream end>'",
    "run_dir=2020-13-45": "override 'run_dir=2020-13-45': month must be in 1..12",
    "run_dir.x=2": "override 'run_dir.x=2': nothing to set below 'run_dir'",
    "prepare.sources.3.weight=2": "override 'prepare.sources.3.weight=2': the list has 1 entry, none at 3",
    "prepare.sources.1={type: stdlib}": "override 'prepare.sources.1={type: stdlib}': the list has 1 entry, none at 1",
    "prepare.sources.x=1": "override 'prepare.sources.x=1': the list has 1 entry, none at 'x'",
    "pretrain.optim.lr=3e-4": "override 'pretrain.optim.lr=3e-4': pretrain.optim.lr: unknown key; known: backend,",
    "pretran.optim.lr=3e-4": "override 'pretran.optim.lr=3e-4': pretran: unknown key; did you mean 'pretrain'?",
    "pretrain.max_steps=-1": "override 'pretrain.max_steps=-1': pretrain.max_steps: Input should be greater than 0",
    "pretrain.objective.name=causal": "override 'pretrain.objective.name=causal': pretrain.objective: unknown name",
    "bench.threads=0": "override 'bench.threads=0': bench.threads: Input should be greater than 0 (found 0)",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides_are_named(write, override):
    assert BAD_OVERRIDES[override] in message(write(GOOD), override)


def test_problems_of_file_and_override_are_told_apart(write):
    found = message(write(GOOD + "seeed: 3\n"), "bench.thread=1")
    assert "r.yaml:13: seeed: unknown key" in found
    assert "override 'bench.thread=1': bench.thread: unknown key; did you mean 'threads'?" in found


# ---- gates -----------------------------------------------------------------------------------------------------


def test_one_parity_threshold_leaves_the_others_as_they_are(write):
    recipe = load_recipe(write(GOOD), ["export.parity.int8.relative_rms=0.2", "export.parity.fp32.max_abs=1e-2"])
    parity, default = recipe.export.parity, Parity()
    assert parity.int8 == default.int8.model_copy(update={"relative_rms": 0.2})
    assert parity.fp32 == default.fp32.model_copy(update={"max_abs": 1e-2})
    assert (default.int8.min_top1, default.fp32.min_top1, default.fp32.relative_rms) == (0.9, 0.999, 1e-5)


def test_a_gate_that_passes_everything_is_refused(write):
    off = ["export.parity.int8.relative_rms=null", "export.parity.int8.min_top1=0"]
    assert "export.parity.int8: a gate without any limit passes everything" in message(write(GOOD), *off)
    assert load_recipe(write(GOOD), off[:1]).export.parity.int8.relative_rms is None  # one of two may go


# ---- names that become folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../pretrain", "..", "", "a/b", "/tmp/x", ".hidden", "teacher.partial", "x.previous"])
def test_a_model_name_that_is_no_plain_folder_name_is_refused(write, name):
    text = GOOD + f"export:\n  models: {{{json.dumps(name)}: m}}\n"
    assert "r.yaml:13: export.models." in message(write(text)) or "r.yaml:14: export.models." in message(write(text))


@pytest.mark.parametrize("name", ["teacher", "BERT_base-2", "v1.0", "qwen2.5-0.5B"])
def test_usual_model_names_are_taken(write, name):
    text = GOOD + f"export:\n  models: {{{json.dumps(name)}: m}}\n"
    assert load_recipe(write(text)).exported_models() == {name: Path("m")}


# ---- tokenizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{path: t, vocab_size: 90}", "vocab_size would change nothing: a tokenizer from `path` brings its own"),
        ("{path: t, vocab_size: 8192}", "vocab_size would change nothing"),  # the default, but written down
        ("{path: t, max_training_mib: 3}", "max_training_mib would change nothing"),
        ("{type: character, vocab_size: 90}", "vocab_size would change nothing: type character brings its own"),
    ],
)
def test_a_key_that_a_tokenizer_would_ignore_is_refused(write, section, said):
    assert f"prepare.tokenizer: {said}" in message(write(GOOD.replace("{type: wordpiece}", section)))


@pytest.mark.parametrize("section", ["{path: t}", "{type: character}", "{type: unigram, vocab_size: 90}"])
def test_a_tokenizers_resolved_section_loads_again(write, tmp_path, section):
    recipe = load_recipe(write(GOOD.replace("{type: wordpiece}", section)))
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("again.yaml") == recipe


# ---- resolved recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_dump_reloads_equal(tmp_path, name):
    recipe = load_recipe(name, ["seed=7"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe
    assert dump_recipe(load_recipe(str(path))) == path.read_text()


def test_dump_keeps_small_numbers_and_odd_text(write, tmp_path):
    odd = "a: b # 'c' \"d\" {e}\nno"
    recipe = load_recipe(write(GOOD), ["pretrain.optim.epsilon=1e-12", f"run_dir={json.dumps(odd)}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(str(again)) == recipe
    assert load_recipe(str(again)).pretrain.optim.epsilon == 1e-12


def test_a_long_path_stays_on_its_keys_line(write):
    path = "/" + "/".join(["a-folder-with-a-long-name"] * 20)
    assert f"run_dir: {path}\n" in dump_recipe(load_recipe(write(GOOD), [f"run_dir={path}"]))


def test_hash_depends_on_values_only(write):
    recipe = load_recipe(write(GOOD))
    same = load_recipe(
        write("seed: 0\n" + GOOD.replace("{type: text, paths: [a.txt]}", "{paths: ['a.txt'], type: text}"))
    )
    other = load_recipe(write(GOOD), ["seed=1"])
    assert recipe_hash(recipe) == recipe_hash(same) != recipe_hash(other)


def test_shipped_names_and_a_near_miss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").run_dir.name == "quickstart"
    assert message("quickstrat").startswith(
        "no recipe 'quickstrat'; did you mean 'quickstart'?\nNeeded: a YAML file, or"
    )


def test_schema_knows_every_key():
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "older ones are deleted" in schema["$defs"]["Pretrain"]["properties"]["keep_last"]["description"]
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_command_line_shows_one_message_and_exit_code_2(write):
    path = write(GOOD.replace("max_steps", "max_step"))
    command = [sys.executable, "-m", "trainer", "pretrain", path, "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lmworks pretrain: 2 problems in recipe r.yaml:\n")
    assert "Traceback" not in done.stderr
