"""Engines that Triton's TensorRT backend may be given: TensorRT's own, run and found equal to their graph.
How they are named to Triton is `triton_config`'s.
"""

from pathlib import Path
from typing import Any

from export.engine_files import check_together, read_manifest
from export.hostile import check_folder
from export.triton_config import Engines
from export.verified import Subject
from trainer.artifact import hash_file, read_artifact
from trainer.errors import GateFailed, UserError
from trainer.serving_config import Pack

_PAST = "past_key_values.0.decoder.key"  # what an encoder-decoder's decoder has read, [B, heads, P, size]


def verified_engines(folder: Path, subject: Subject, variant: str, settings: Pack) -> list[Engines]:
    """The engines of a variant for each graph of the model, one a compute capability.

    Raises UserError where there are none that Triton reads, or none for so large a batch, and GateFailed for one that
    was never run, was changed since, or was built from another graph.
    """
    record = read_artifact(folder, "engines")
    check_folder(folder)
    if record["about"]["library"] != "tensorrt":
        raise UserError(
            f"the engines in {folder} are of {record['about']['library']}",
            "TensorRT's: Triton's backend reads no others",
            "build them where a GPU is: tensorrt.library=tensorrt, or pack with pack.backend=onnxruntime",
        )
    if record["parents"].get("onnx") != subject.record["content_sha256"]:
        raise GateFailed(f"{folder} was built from another export", "engines of this one", "run `lmworks tensorrt`")
    found = [_engines_of(folder, record, part.prefix, variant, settings) for part in subject.spec.parts]
    for plans in zip(*(one.plans.values() for one in found), strict=True):
        check_together(plans)
    longest = min((one.longest_past for one in found if one.longest_past is not None), default=None)
    if subject.spec.encoder and longest is not None and settings.max_new_tokens > longest + 1:
        raise UserError(
            f"pack.max_new_tokens is {settings.max_new_tokens}, the decoder in {folder} keeps {longest} before one",
            f"at most {longest + 1}",
            "lower it, or raise past_length in tensorrt.profiles",
        )
    return found


def _engines_of(folder: Path, record: dict[str, Any], prefix: str, variant: str, settings: Pack) -> Engines:
    """The engines of one graph; `prefix` of its evidence."""
    # `<what>_<variant>_<compute capability>`; int8 also begins int8_static.
    proofs = [(proof["what"].rsplit("_", 1)[0], proof) for proof in record["evidence"]]
    ran = {proof["file"]: proof for what, proof in proofs if what == f"{prefix}parity_{variant}"}
    built = [folder / proof["file"] for what, proof in proofs if what == f"{prefix}audit_{variant}"]
    if not built:
        raise UserError(f"{folder} has no engine of {variant}", "one", "add it to tensorrt.variants, or pack another")
    manifests = {plan: read_manifest(plan) for plan in built}
    for plan, manifest in manifests.items():
        if plan.name not in ran or ran[plan.name]["sha256"] != hash_file(plan):
            raise GateFailed(f"{plan} was not run", "evidence of its graph's numbers", "run `lmworks tensorrt`")
        largest = max(profile["input_ids"][2][0] for profile in manifest["profiles"])
        if settings.max_batch_size > largest:
            raise UserError(
                f"pack.max_batch_size is {settings.max_batch_size}, {plan.name} takes {largest}",
                "a batch that the engine takes",
                "lower it, or raise batch_size in tensorrt.profiles",
            )
    profiles = [profile for manifest in manifests.values() for profile in manifest["profiles"]]
    pasts = [profile[_PAST][2][2] for profile in profiles if _PAST in profile]
    return Engines(
        plans={manifest["compute_capability"]: plan for plan, manifest in manifests.items()},
        profiles=len(profiles) // len(manifests),
        max_length=min(profile["input_ids"][2][1] for profile in profiles),
        longest_past=min(pasts, default=None),
        library_version=record["about"]["library_version"],
        content_sha256=record["content_sha256"],
        evidence=record["evidence"],
    )
