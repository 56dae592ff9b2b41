"""Disks that are really full, small ones made for the purpose: the run says so, keeps what it has, and goes on."""

import json
import subprocess

import pytest

from tests.distributed.test_strategies import recipe, run_forked  # noqa: F401 - recipe is a fixture
from trainer.artifact import hash_file
from trainer.recipe_file import load_recipe

# Mounts a file system of 4 MiB and 100 files at each of the folders named before `--`, for the command after it and
# nobody else; copies of what is on them at the end stay beside them, as <folder>.seen.
ON_SMALL_DISKS = """
folders=
while [ "$1" != -- ]; do
  folders="$folders $1"; mount -t tmpfs -o size=4m,nr_inodes=100 none "$1" || exit 90; shift
done
shift; "$@"; code=$?
for folder in $folders; do cp -r "$folder" "$folder.seen"; done
exit $code
"""


@pytest.fixture(scope="module")
def own_mounts():
    """Words of a command that may mount file systems for itself: as root, or as one in a namespace of users."""
    for words in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        tried = subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
        if tried.returncode == 0:
            return words
    pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")


# Name: ranks, what is full, whether it is saved in the background, and the folder of the run that lies on the disk.
CASES = {
    "saving": (1, "disk_nearly_full", False, "checkpoints"),
    "saving_in_background": (1, "disk_nearly_full", True, "checkpoints"),
    "two_ranks": (2, "disk_full", False, "checkpoints"),
    "not_a_folder_more": (1, "no_inodes", False, "checkpoints"),
    "metrics_too": (1, "disk_full", True, "."),
}


def test_a_run_survives_a_full_disk(recipe, own_mounts, tmp_path):  # noqa: F811
    """Full from the second of four checkpoints to the last; each case has a disk of its own."""
    attempts, disks, paths = [], [], {}
    for name, (ranks, fault, background, folder) in CASES.items():
        settings = {"max_steps": 40, "save_every_steps": 10, "eval_every_steps": 40}
        paths[name] = recipe(name, micro_batch_size=8 // ranks, checkpoint={"asynchronous": background}, **settings)
        disks.append(load_recipe(str(paths[name])).run_dir / "pretrain" / folder)
        disks[-1].mkdir(parents=True)
        command = ["pretrain", str(paths[name]), "pretrain.engine.collective_timeout_s=20"]
        attempts.append({"ranks": ranks, "fault": fault, "arguments": command})
    within = [*own_mounts, "sh", "-c", ON_SMALL_DISKS, "sh", *map(str, disks), "--"]
    codes, said = run_forked(tmp_path, attempts, within=within)
    assert codes == [[0] * ranks for ranks, *_ in CASES.values()], said[-3000:]
    assert said.count("checkpoint not written, going on without it") == 2 * len(CASES)
    assert said.count("metrics.jsonl: No space left on device") == 1
    for name, disk in zip(CASES, disks, strict=True):
        seen = disk.with_name(f"{disk.name}.seen")
        saved = seen / "checkpoints" if disk.name == "pretrain" else seen
        assert sorted(path.name for path in saved.iterdir()) == ["LATEST", "step-00000010", "step-00000040"], name
        marker = json.loads((saved / "step-00000010" / "COMMITTED").read_text())
        assert all(hash_file(saved / "step-00000010" / file) == digest for file, digest in marker["files"].items())
        metrics = saved.parent / "metrics.jsonl" if disk.name == "pretrain" else disk.parent / "metrics.jsonl"
        steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["event"] == "train"]
        assert steps == list(range(1, 41)), name


def test_no_room_for_the_model_folder_is_said_and_the_next_try_only_writes_it(recipe, own_mounts, tmp_path):  # noqa: F811
    path = recipe("end", micro_batch_size=4, max_steps=4, save_every_steps=2, eval_every_steps=4)
    disk = load_recipe(str(path)).run_dir / "pretrain"
    disk.mkdir(parents=True)
    attempt = {"ranks": 2, "fault": "disk_full_at_the_end", "arguments": ["pretrain", str(path)]}
    within = [*own_mounts, "sh", "-c", ON_SMALL_DISKS, "sh", str(disk), "--"]
    codes, said = run_forked(tmp_path, [attempt, attempt], within=within)
    assert codes[0][0] == 74 and codes[1] == [0, 0], said[-3000:]
    assert "No space left on device" in said and "make room" in said and "Traceback" not in said
    assert sorted(path.name for path in disk.with_name("pretrain.seen").iterdir() if path.name != "tensorboard") == [
        "checkpoints", "environment.json", "launch.json", "metrics.jsonl", "model", "recipe.yaml",
    ]  # fmt: skip
