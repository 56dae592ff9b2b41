"""`export.variants: auto`: what is on the front, and that the stage keeps that, says why, and is not run again."""

import json
from dataclasses import replace

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


# By point values each of these beats int8, or is beaten by it; none can be told from it.
NEAR = {
    "a little better": {"quality": 0.9951},
    "a little worse": {"quality": 0.9949},
    "a little quicker": {"latency_ms": 2.9},
    "a little slower": {"latency_ms": 3.1},
    "both": {"quality": 0.9951, "latency_ms": 2.9},
}


@pytest.mark.parametrize("change", NEAR.values(), ids=NEAR)
def test_near_ties_are_kept(change):
    """Intervals that meet, and latencies that differ by less than one form from itself, order nothing."""
    noisy = {"quality_range": (0.993, 0.997), "latency_noise": 0.05}
    one = replace(FORMS["int8"], **noisy)
    other = replace(one, variant="int8_static", **change)
    assert choose(("int8", "int8_static"), {"int8": one, "int8_static": other}.get).kept == ("int8", "int8_static")
    exact = {"quality_range": None, "latency_noise": 0.0}
    assert (
        len(
            choose(
                ("int8", "int8_static"), {"int8": replace(one, **exact), "int8_static": replace(other, **exact)}.get
            ).kept
        )
        == 1
    )


def test_beyond_noise_a_form_is_beaten():
    """Each is better by more than the noise in one thing, and no worse beyond the noise in the others."""
    noisy = {"quality_range": (0.993, 0.997), "latency_noise": 0.05}
    one = replace(FORMS["int8"], **noisy)
    slower = replace(one, latency_ms=3.3, quality=0.9951)
    worse = replace(one, quality=0.99, quality_range=(0.988, 0.992), latency_ms=2.9)
    larger = replace(one, size_mib=110.0, quality=0.9951, latency_ms=2.9)
    for other in (slower, worse, larger):
        assert beats(one, other) and not beats(other, one)
    assert not beats(one, replace(slower, latency_noise=0.2))  # by its own noise it may be as quick


def test_what_beats_a_form_is_itself_kept():
    """The second is quicker than the third, and the first than the second; but the third is better than the first."""
    chain = [
        Form("int8", 0.992, 3.0, 100.0, (0.990, 0.9945), 0.05),
        Form("int8_static", 0.9945, 3.3, 100.0, (0.993, 0.996), 0.05),
        Form("fp16", 0.996, 3.6, 100.0, (0.995, 0.997), 0.05),
    ]
    assert beats(chain[0], chain[1]) and beats(chain[1], chain[2]) and not beats(chain[0], chain[2])
    forms = {form.variant: form for form in chain}
    assert choose(tuple(forms), forms.get).kept == ("int8", "fp16")


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
