"""Model cards hold what was measured, load in Hugging Face's own reader, and change nothing but README.md."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from export.card import MARK, code, markdown, pipeline_tag, write_cards
from export.results import read_results
from tests.export.synthetic_run import bench, build, distill, export, make_recipe, prepare, pretrain
from trainer.artifact import content_hash, hash_tree, write_json

HOSTILE = (
    "x\n---\nlicense: mit\n# Big | <script>alert(1)</script> `code` [a](http://b) ![i](j) **b** $m$ &amp; {{ 7*7 }}"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recipe = build(tmp_path_factory.mktemp("whole") / "demo")
    write_cards(read_results(recipe))
    return recipe


def folders(recipe):
    return {"teacher": recipe.model_dir("pretrain"), "student": recipe.model_dir("distill"),
            "teacher-onnx": recipe.stage_dir("export") / "teacher",
            "student-onnx": recipe.stage_dir("export") / "student"}  # fmt: skip


def front_matter(text):
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return YAML(typ="safe").load(block)


def tables(text):
    """Rows of cells of every table, as a Markdown renderer with tables sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    rows, row = [], []
    for index, token in enumerate(tokens):
        if token.type == "tr_open":
            row = []
        elif token.type == "inline" and tokens[index - 1].type in ("td_open", "th_open"):
            row.append("".join(c.content for c in token.children if c.type in ("text", "code_inline", "text_special")))
        elif token.type == "tr_close":
            rows.append(row)
    return rows


def test_every_model_folder_gets_a_card_and_keeps_its_content_hash(tmp_path):
    recipe = build(tmp_path / "demo")
    before = {name: (hash_tree(folder), content_hash(folder)) for name, folder in folders(recipe).items()}
    assert write_cards(read_results(recipe)) == []
    assert {name: (hash_tree(folder), content_hash(folder)) for name, folder in folders(recipe).items()} == before
    assert all((folder / "README.md").is_file() for folder in folders(recipe).values())


def test_huggingface_reads_the_results(whole):
    card = ModelCard((folders(whole)["student"] / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.base_model == "demo-teacher"
    assert card.data.language is None and card.data.license is None
    assert card.data.model_name == "demo-student"
    assert {"distilbert", "distillation"} <= set(card.data.tags)
    results = {r.metric_name: (r.metric_type, r.metric_value, r.dataset_split) for r in card.data.eval_results}
    assert results == {
        "loss (validation)": ("loss", 2.75, "validation"),
        "masked_accuracy (validation)": ("accuracy", 0.4, "validation"),
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_front_matter_of_teacher_and_exports(whole):
    blocks = {name: front_matter((folder / "README.md").read_text()) for name, folder in folders(whole).items()}
    assert "base_model" not in blocks["teacher"]
    assert blocks["teacher"]["tags"] == ["lmworks", "bert"]
    assert (blocks["student-onnx"]["base_model"], blocks["student-onnx"]["base_model_relation"]) == (
        "demo-student", "quantized"
    )  # fmt: skip
    assert "onnx" in blocks["student-onnx"]["tags"]
    (index,) = blocks["student-onnx"]["model-index"]
    values = [metric["value"] for metric in index["results"][0]["metrics"]]
    assert values == [0.40, pytest.approx(0.395)]  # fp32, int8; eager is not in this folder


def test_the_text_holds_data_training_parity_and_speed(whole):
    rows = tables((folders(whole)["student"] / "README.md").read_text())
    for expected in (
        ["stdlib", "stdlib", "1,010", "1,000", "hash"],
        ["parameters", "5,500,000"],
        ["steps", "40"],
        ["processor", "Test CPU, 2 cores, 8.0 GiB"],
        ["validation", "loss", "2.75"],
        [
            "model_quantized.onnx",
            "int8",
            "0.0005722",
            "passed",
            "2e-06",
            "1e-06",
            "1",
            "99.0% of masked accuracy (97.5% to 100.7%) [99.0%]",
        ],
        ["onnx int8", "1 × 128", "ok", "1.5", "1.95", "400", "85,333", "300"],
    ):
        assert expected in rows, expected
    text = (folders(whole)["student"] / "README.md").read_text()
    assert "Command: `lmworks run quickstart distill.max_steps=40`" in text
    assert "transformers " in text.split("## Versions")[1]


def test_only_evidence_gives_results(tmp_path):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain"))
    path = recipe.model_dir("pretrain") / "artifact.json"
    record = json.loads(path.read_text())
    record["evidence"] = []
    write_json(path, record)
    write_cards(read_results(recipe))
    text = (recipe.model_dir("pretrain") / "README.md").read_text()
    assert "model-index" not in front_matter(text)  # though metrics.jsonl has losses
    assert "Nothing was measured." in text


def test_unverified_files_have_no_numbers(tmp_path):
    recipe = build(tmp_path / "demo")
    (recipe.stage_dir("export") / "student" / "model_quantized.onnx").write_bytes(b"another")
    write_cards(read_results(recipe))
    text = (recipe.stage_dir("export") / "student" / "README.md").read_text()
    rows = tables(text)
    file = next(row for row in rows if row[0] == "model_quantized.onnx")
    assert file[3:] == ["not shown for this file", "–", "–", "–", "–"]
    assert ["onnx int8", "1 × 128", "ok, parity not shown", "–", "–", "–", "–", "–"] in rows
    metrics = front_matter(text)["model-index"][0]["results"][0]["metrics"]
    assert [metric["name"] for metric in metrics] == ["masked_accuracy (benchmark, onnx_fp32)"]


def test_failed_rows_have_no_numbers(tmp_path):
    recipe = build(tmp_path / "demo")
    bench(recipe, lambda row: row.update(status="failed", reason="x"))
    write_cards(read_results(recipe))
    rows = tables((recipe.model_dir("distill") / "README.md").read_text())
    assert ["eager", "1 × 128", "failed", "–", "–", "–", "–", "–"] in rows


def test_a_card_of_somebody_else_is_left_alone(tmp_path):
    recipe = build(tmp_path / "demo")
    mine = recipe.model_dir("pretrain") / "README.md"
    mine.write_text("# My own words\n")
    assert write_cards(read_results(recipe)) == [mine]
    assert mine.read_text() == "# My own words\n"
    mine.write_text(f"{MARK}\nold\n")
    assert write_cards(read_results(recipe)) == []
    assert "# demo" in mine.read_text()


def test_folders_given_by_path_are_not_written_to(tmp_path):
    other = build(tmp_path / "other", stages=("prepare", "pretrain"))
    recipe = make_recipe(tmp_path / "demo", without=("pretrain", "distill"),
                         export={"models": {"theirs": str(other.model_dir("pretrain"))}})  # fmt: skip
    export(recipe, names=("theirs",))
    write_cards(read_results(recipe))
    assert not (other.model_dir("pretrain") / "README.md").exists()
    assert (recipe.stage_dir("export") / "theirs" / "README.md").is_file()


@pytest.mark.parametrize("has_card", [True, False])
def test_a_teacher_by_path_is_named_only_if_its_card_names_it(tmp_path, has_card):
    other = build(tmp_path / "other", stages=("prepare", "pretrain"))
    if has_card:
        write_cards(read_results(other))
    tree = make_recipe(tmp_path / "demo", without=("export", "bench")).model_dump(mode="json")
    teacher = {"distill": {**tree["distill"], "teacher": str(other.model_dir("pretrain"))}}
    recipe = type(other).model_validate({**tree, **teacher})
    prepare(recipe)
    pretrain(recipe)
    distill(recipe)
    write_cards(read_results(recipe))
    text = (recipe.model_dir("distill") / "README.md").read_text()
    assert front_matter(text).get("base_model") == ("other-teacher" if has_card else None)
    assert str(tmp_path) not in text.split("## Training\n")[0]


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("T5Something", None),
    ],
)
def test_pipeline_by_architecture(tmp_path, architecture, tag):
    write_json(tmp_path / "config.json", {"architectures": [architecture]})
    assert pipeline_tag(tmp_path) == tag


def test_hostile_names_stay_names(tmp_path):
    recipe = make_recipe(tmp_path / "a: b 'c'")
    prepare(recipe, source=HOSTILE)
    pretrain(recipe)
    launch = recipe.stage_dir("pretrain") / "launch.json"
    launch.write_text(json.dumps({"command": f"lmworks pretrain '{HOSTILE}'", "device": HOSTILE, "ranks": 1}))
    write_cards(read_results(recipe))
    text = (recipe.model_dir("pretrain") / "README.md").read_text()
    block = front_matter(text)
    assert "license" not in block
    dataset = block["model-index"][0]["results"][0]["dataset"]
    assert dataset["name"] == HOSTILE  # whole, and only here
    assert block["model-index"][0]["name"] == "a: b 'c'-teacher"
    assert ModelCard(text).data.license is None
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])
    for wrong in ("<script", "<strong>", "<img", "<a ", "<h1>Big", "49"):
        assert wrong not in page, wrong
    flat = " ".join(HOSTILE.split())
    assert flat in tables(text)[[row[0] for row in tables(text)].index(flat)]


@pytest.mark.parametrize("text", ["a`b", "``", "a | b", "`", "plain", "x\ny", "``` ```"])
def test_code_spans_hold_their_text_in_a_table(text):
    table = f"| a |\n| --- |\n| {code(text)} |\n"
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    spans = [c.content for t in tokens for c in t.children or [] if c.type == "code_inline"]
    assert spans == [" ".join(text.split())]


@pytest.mark.parametrize(
    "text", ["*a* _b_ `c`", "<b>", "[a](b)", "# h", "a | b", "\\", "&lt;", "1. x", "- x", "~~a~~", "!"]
)
def test_markdown_shows_characters_as_they_are(text):
    inline = MarkdownIt("commonmark").enable("strikethrough").renderInline(f"x {markdown(text)}")
    plain = inline.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert plain == f"x {text}"


def test_a_folder_without_config_still_has_a_card(tmp_path):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain"))
    (recipe.model_dir("pretrain") / "config.json").unlink()
    write_cards(read_results(recipe))
    block = front_matter((recipe.model_dir("pretrain") / "README.md").read_text())
    assert "pipeline_tag" not in block and "model-index" not in block
    shutil.rmtree(recipe.model_dir("pretrain"))
