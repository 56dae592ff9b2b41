"""`export.variants: auto`: what is on the front, and that the stage keeps that, says why, and is not run again."""

import json

import pytest

from export import export as stage
from export.front import Form, beats, choose
from export.verify import verify_model
from tests.export.test_export import SETTINGS
from trainer.artifact import hash_file, read_artifact
from trainer.chain import due, outputs, stage_key
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import ONNX_FILES

FORMS = {
    "fp32": Form("fp32", 1.0, 8.0, 400.0),
    "fp16": Form("fp16", 1.0, 9.0, 200.0),  # slower than fp32, but smaller
    "int8": Form("int8", 0.995, 3.0, 100.0),
    "int8_static": Form("int8_static", 0.995, 3.5, 100.0),  # int8 beats it
    "int4": Form("int4", 0.99, None, 120.0),  # larger and worse than int8, but nobody knows how quick
}


def attempt(variant):
    if variant not in FORMS:
        raise UserError("bf16 does not open", "a provider", "take another")
    return FORMS[variant]


def test_the_front_is_kept_and_each_form_has_its_reason():
    choice = choose((*FORMS, "bf16"), attempt)
    assert choice.kept == ("fp32", "fp16", "int8", "int4")
    assert choice.became["int8_static"] == (
        "left out: quality 99.50%, 3.5 ms, 100.0 MiB; int8: quality 99.50%, 3 ms, 100.0 MiB"
    )
    assert choice.became["bf16"] == "refused: bf16 does not open; Needed: a provider"
    assert choice.became["int4"] == "kept: quality 99.00%, latency unknown, 120.0 MiB"
    metrics = choice.evidence("one call")["metrics"]
    assert metrics["forms"]["int8_static"]["latency_ms"] == 3.5 and "bf16" not in metrics["forms"]


@pytest.mark.parametrize("worse", [{"quality": 0.9}, {"latency_ms": 9.0}, {"size_mib": 500.0}])
def test_a_form_beats_another_only_if_it_is_worse_in_nothing(worse):
    one = FORMS["int8"]
    other = Form(**(vars(one) | worse))
    assert beats(one, other) and not beats(other, one) and not beats(one, one)


def test_where_fp32_fails_no_other_form_ships():
    """Though int8, with its looser gate, would pass: it is made of the same graph."""

    def fails(variant):
        if variant == "fp32":
            raise GateFailed("fp32 differs from its source")
        return FORMS[variant]

    with pytest.raises(GateFailed, match="fp32 differs from its source"):
        choose(("fp32", "int8"), fails)


def test_the_stage_keeps_what_is_on_the_front(model_folder, tmp_path, capsys):
    """int8_static is refused by a gate that nothing passes; what this machine cannot run is told as such."""
    parity = SETTINGS.parity.model_dump() | {"int8_static": {"relative_rms": 1e-9}, "shapes": [[3, 9]]}
    models = {"m": str(model_folder("distilbert"))}
    section = {"models": models, "variants": "auto", "quality": None, "parity": parity}
    recipe = Recipe.model_validate({"run_dir": tmp_path, "export": section})
    key = stage_key(recipe, "export")
    stage.run(recipe)
    target = tmp_path / "export" / "m"
    record = read_artifact(target, "onnx")
    (found,) = [proof["metrics"] for proof in record["evidence"] if proof["what"] == "variants_auto"]
    said = capsys.readouterr().out
    assert all(said.count(f"m {variant}: {found['became'][variant]}") == 1 for variant in found["became"])
    assert set(found["became"]) == {"fp32", "fp16", "bf16", "int8", "int8_static", "int4"}
    for variant, why in {"int8_static": "relative_rms", "int4": "there is no int4", "bf16": "does not open"}.items():
        assert found["became"][variant].startswith("refused: ") and why in found["became"][variant]
    assert set(found["forms"]) == {"fp32", "fp16", "int8"} and {"fp32", "int8"} <= set(found["kept"])
    files = {ONNX_FILES[f"onnx_{variant}"] for variant in found["kept"]}
    assert {file.name for file in target.glob("*.onnx*")} == files
    proofs = {proof["file"]: proof["sha256"] for proof in record["evidence"] if "file" in proof}
    assert proofs == {name: hash_file(target / name) for name in files}
    assert due(recipe, "export", {"made_from": key, "outputs": outputs(recipe, "export")}) == ""
    json.dumps(record)
    (target / "model_quantized.onnx").unlink()  # verify holds what auto kept, and makes anew what is not there
    rows = list(verify_model(recipe, recipe.export, "m", model_folder("distilbert"), bisect=False))
    assert [(row["variant"], row["exported"], row["passed"]) for row in rows] == [
        (variant, variant != "int8", True) for variant in found["kept"]
    ]
