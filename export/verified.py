"""Exported models that may be handed on: folders as export left them, and in them the files that passed the gate.
What is made of them is the business of those that ask: pack, tensorrt and generate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.bench_inputs import METRICS
from export.files import is_the_one
from export.hostile import check_folder, check_graph, data_files
from export.io_spec import IoSpec, read_spec
from export.parity import holds_under
from trainer.artifact import hash_tree, read_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError


@dataclass(frozen=True)
class Verified:
    """One variant of an exported model that passed the parity gate."""

    variant: str
    file: Path
    evidence: dict[str, Any]
    encoder_file: Path | None = None
    """Of an encoder-decoder, whose `file` is the decoder's."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All graphs, in the order of `IoSpec.parts`."""
        return (self.encoder_file, self.file) if self.encoder_file else (self.file,)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for file in self.files for path in (file, *data_files(file)))


@dataclass(frozen=True)
class Subject:
    """An exported model that may be packed, and what is known of it."""

    name: str
    folder: Path
    spec: IoSpec
    record: dict[str, Any]
    variants: dict[str, Verified]


def subjects(recipe: Recipe, section: str, wanted: Sequence[str]) -> list[Subject]:
    """The exported models that `<section>.models` names, by default all; refused as `examine` does."""
    models = recipe.exported_models()
    unknown = [name for name in wanted if name not in models]
    if unknown or not models:
        raise UserError(
            f"{section}.models names {', '.join(unknown) or 'nothing'}",
            f"exported models: {', '.join(models) or 'there are none'}",
            f"mend {section}.models, or export the model",
        )
    found = [examine(name, recipe.stage_dir("export") / name, models[name]) for name in wanted or models]
    for subject in found:
        _require_todays_gates(recipe, subject)
    return found


def _require_todays_gates(recipe: Recipe, subject: Subject) -> None:
    """GateFailed for a form that passed looser gates than the recipe has now."""
    if recipe.export is None:
        return
    parity, quality = recipe.export.parity, recipe.export.quality
    proofs = {proof["what"]: proof for proof in subject.record["evidence"]}
    judged = subject.spec.task in METRICS
    for variant, one in subject.variants.items():
        kept = proofs.get(f"quality_{variant}", {}).get("metrics", {}).get("kept")
        if not holds_under(one.evidence["metrics"], getattr(parity, variant)):
            what = f"export.parity.{variant}"
        elif quality and (judged if kept is None else kept < quality.share):
            what = "export.quality"
        else:
            continue
        raise GateFailed(f"{one.file} has not passed the {what} of this recipe", "evidence of it", "export it again")


def examine(name: str, exported: Path, model: Path | None = None) -> Subject:
    """Read and check one export folder.

    Raises UserError where there is none, and GateFailed where a file in it is not what passed the gate, or where the
    model that it is held to, if one is named and there, was trained anew since.
    """
    record = read_artifact(exported, "onnx")
    check_folder(exported)
    if hash_tree(exported) != record["content_sha256"]:
        raise GateFailed(f"{exported} is not what export left there", "files that passed parity", "export it again")
    if model and model.is_dir() and record["parents"].get("model") != hash_tree(model):
        raise GateFailed(f"{exported} was exported from another {model}", "an export of this model", "export it again")
    variants = {one.variant: one for one in verified_variants(exported, record)}
    if not variants:
        raise GateFailed(f"no file in {exported} has passed parity", "evidence of it", "export it again")
    return Subject(name, exported, read_spec(exported), record, variants)


def verified_variants(exported: Path, record: Mapping[str, Any]) -> Iterator[Verified]:
    """Variants with evidence that names the very bytes of their files; GateFailed for a file of other bytes."""
    proofs = {proof["what"]: proof for proof in record["evidence"] if "file" in proof}
    encoded = "encoder_inputs" in record.get("about", {})
    for what, proof in proofs.items():
        gate, _, variant = what.partition("_")
        encoder = proofs.get(f"encoder_{what}")
        if gate == "parity" and (encoder or not encoded):
            encoder_file = _proven_file(exported, encoder) if encoder else None
            yield Verified(variant, _proven_file(exported, proof), proof, encoder_file)


def _proven_file(exported: Path, proof: dict[str, Any]) -> Path:
    file = exported / proof["file"]
    if not file.is_file() or not is_the_one(proof, file):
        raise GateFailed(f"{file} is not the file that passed parity", "the file itself", "export it again")
    check_graph(file)
    return file


def require_unchanged(subject: Subject) -> None:
    """GateFailed if an export changed since it was examined: what was copied meanwhile may be of either."""
    if hash_tree(subject.folder) != subject.record["content_sha256"]:
        raise GateFailed(f"{subject.folder} changed meanwhile", "an export that stays as it is", "try again")
