"""Engines that Triton's TensorRT backend may be given: TensorRT's own, run and found equal to their graph.
How they are named to Triton is `triton_config`'s.
"""

from pathlib import Path

from export.engine_files import read_manifest
from export.hostile import check_folder
from export.triton_config import Engines
from export.verified import Subject
from trainer.artifact import hash_file, read_artifact
from trainer.errors import GateFailed, UserError
from trainer.serving_config import Pack


def verified_engines(folder: Path, subject: Subject, variant: str, settings: Pack) -> Engines:
    """The engines of a variant, one a compute capability.

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
    # `<what>_<variant>_<compute capability>`; int8 also begins int8_static.
    proofs = [(proof["what"].rsplit("_", 1)[0], proof) for proof in record["evidence"]]
    ran = {proof["file"]: proof for what, proof in proofs if what == f"parity_{variant}"}
    built = [folder / proof["file"] for what, proof in proofs if what == f"audit_{variant}"]
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
    return Engines(
        plans={manifest["compute_capability"]: plan for plan, manifest in manifests.items()},
        profiles=len(profiles) // len(manifests),
        max_length=min(profile["input_ids"][2][1] for profile in profiles),
        library_version=record["about"]["library_version"],
        content_sha256=record["content_sha256"],
        evidence=record["evidence"],
    )
