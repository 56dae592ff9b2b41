"""Folders appear whole or not at all: a crash is planted before every step that touches the disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import artifact
from trainer.artifact import (
    add_evidence,
    alone_in,
    content_hash,
    hash_tree,
    read_artifact,
    recover,
    staging,
    write_artifact,
    write_json,
    write_text,
)
from trainer.errors import UserError


class Crash(BaseException):
    """Stands for the process's end: no handler of the code under test may catch it and go on."""


def put(folder: Path, content: str) -> None:
    with staging(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "content").write_text(content)
        write_artifact(partial, "test", recipe_sha256="", parents={})


def held(folder: Path) -> str:
    read_artifact(folder, "test")  # every reader comes through here, and it repairs
    assert hash_tree(folder) == read_artifact(folder)["content_sha256"]
    return (folder / "sub" / "content").read_text()


CRASHING = """
import os, signal, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trainer import artifact
steps = 0
def dies(call):
    def counted(*arguments, **options):
        global steps
        steps += 1
        if steps == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
for owner, name in ((os, "fsync"), (os, "open"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
    setattr(owner, name, dies(getattr(owner, name)))
with artifact.staging(Path(sys.argv[2])) as partial:
    (partial / "sub").mkdir()
    (partial / "sub" / "content").write_text("new")
    artifact.write_artifact(partial, "test", recipe_sha256="", parents={})
print(steps)
"""


def replace_dying_at(folder: Path, step: int) -> subprocess.CompletedProcess:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CRASHING, root, str(folder), str(step)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_killed_at_any_step_the_old_folder_or_the_new_one_is_there(tmp_path):
    outcomes = []
    step = 0
    while True:
        step += 1
        folder = tmp_path / str(step) / "model"
        put(folder, "old")
        done = replace_dying_at(folder, step)
        outcomes.append(held(folder))
        put(folder, "third")  # and the leftovers of the crash are in nobody's way
        assert held(folder) == "third"
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) == step - 1 > 10  # the last run counted every step, so each was tried
    assert outcomes == sorted(outcomes, reverse=True)  # old until one moment, new ever after
    assert set(outcomes) == {"old", "new"}


def test_killed_at_any_step_a_first_folder_is_whole_or_absent(tmp_path):
    seen = set()
    for step in range(1, 100):
        folder = tmp_path / str(step) / "model"
        done = replace_dying_at(folder, step)
        try:
            assert held(folder) == "new"
            seen.add("whole")
        except UserError as error:
            assert "not there or not finished" in str(error)
            seen.add("absent")
        if done.returncode == 0:
            break
    assert seen == {"absent", "whole"}


def test_an_error_in_the_block_leaves_the_old_folder_and_no_litter(tmp_path):
    put(tmp_path / "model", "old")
    with pytest.raises(ValueError, match="planted"), staging(tmp_path / "model") as partial:
        (partial / "half").write_text("x")
        raise ValueError("planted")
    assert held(tmp_path / "model") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Every file and folder of the staging folder is fsynced before the rename, and the parent after it."""
    order = []
    paths = {}
    real_open, real_fsync, real_rename = os.open, os.fsync, Path.rename

    def open_(path, *rest, **options):
        descriptor = real_open(path, *rest, **options)
        paths[descriptor] = str(path)
        return descriptor

    def fsync(descriptor):
        order.append(paths.get(descriptor, "?"))
        real_fsync(descriptor)

    def rename(self, target):
        order.append(f"{self.name} -> {Path(target).name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    put(tmp_path / "model", "new")
    renamed = order.index("model.partial -> model")
    partial = tmp_path / "model.partial"
    for needed in (partial / "sub" / "content", partial / "artifact.json", partial / "sub", partial):
        assert str(needed) in order[:renamed], needed
    assert str(tmp_path) in order[renamed:]


def test_recover_prefers_the_new_folder(tmp_path):
    for place, content in (("model", "new"), ("model.previous", "old")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "content").write_text(content)
    recover(tmp_path / "model")
    assert (tmp_path / "model" / "content").read_text() == "new"
    assert not (tmp_path / "model.previous").exists()


def test_recover_puts_the_old_folder_back(tmp_path):
    put(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / "model.previous")
    assert held(tmp_path / "model") == "old"


def test_write_text_killed_before_its_rename_keeps_the_old_text(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def crash(self, target):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(Crash):
            write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    write_text(tmp_path / "a.json", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_json_refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


# ---- one process a folder --------------------------------------------------------------------------------------


def test_a_folder_is_held_by_one_at_a_time_and_for_all_ranks(tmp_path, monkeypatch):
    with alone_in(tmp_path / "stage"):
        with pytest.raises(UserError, match=r"another process is at work in .*stage"), alone_in(tmp_path / "stage"):
            raise AssertionError("held twice")
        monkeypatch.setenv("RANK", "1")
        with alone_in(tmp_path / "stage"), alone_in(tmp_path / "other"):
            monkeypatch.delenv("RANK")
    with alone_in(tmp_path / "stage"):
        assert list((tmp_path / "stage").iterdir()) == []  # the lock is no file


@pytest.mark.parametrize(("said", "goes_on"), [(errno.EBADF, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_worked_on_and_a_broken_one_is_not(tmp_path, monkeypatch, said, goes_on):
    def flock(descriptor, operation):
        raise OSError(said, os.strerror(said))

    monkeypatch.setattr(artifact.fcntl, "flock", flock)
    try:
        with alone_in(tmp_path):
            assert goes_on
    except OSError as error:
        assert error.errno == said and not goes_on


# ---- hashes ----------------------------------------------------------------------------------------------------


def test_hash_sees_names_bytes_and_places(tmp_path):
    def tree(name, files):
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        return hash_tree(tmp_path / name)

    base = tree("base", {"a": "1", "b": "2"})
    assert tree("same", {"b": "2", "a": "1"}) == base
    others = [tree("moved", {"a": "1", "sub/b": "2"}), tree("swapped", {"a": "2", "b": "1"}),
              tree("more", {"a": "1", "b": "2", "c": ""}), tree("longer", {"a": "1", "b": "2 "})]  # fmt: skip
    assert len({base, *others}) == 5


def test_evidence_and_cards_do_not_change_the_content_hash(tmp_path):
    put(tmp_path / "model", "x")
    before = content_hash(tmp_path / "model")
    add_evidence(tmp_path / "model", {"what": "speed", "metrics": {"ms": 3.0}})
    add_evidence(tmp_path / "model", {"what": "speed", "metrics": {"ms": 2.0}})
    (tmp_path / "model" / "README.md").write_text("card")
    assert hash_tree(tmp_path / "model") == before == content_hash(tmp_path / "model")
    assert read_artifact(tmp_path / "model")["evidence"] == [{"what": "speed", "metrics": {"ms": 2.0}}]


def test_a_foreign_folder_is_hashed_as_it_is(tmp_path):
    put(tmp_path / "model", "x")
    recorded = content_hash(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "foreign")
    (tmp_path / "foreign" / artifact.ARTIFACT_FILE).unlink()
    assert content_hash(tmp_path / "foreign") == recorded


# ---- reading ---------------------------------------------------------------------------------------------------


def test_an_unfinished_folder_and_another_kind_are_the_users_to_mend(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="half is not there or not finished"):
        read_artifact(tmp_path / "half")
    put(tmp_path / "model", "x")
    with pytest.raises(UserError, match="is of kind 'test'\nNeeded: kind 'model'"):
        read_artifact(tmp_path / "model", "model")


def test_record_says_what_it_was_made_from(tmp_path):
    with staging(tmp_path / "model") as partial:
        write_artifact(partial, "model", recipe_sha256="abc", parents={"data": "d"}, evidence=[{"what": "v"}],
                       about={"parameters": 3})  # fmt: skip
    record = json.loads((tmp_path / "model" / "artifact.json").read_text())
    assert {key: record[key] for key in ("kind", "recipe_sha256", "parents", "evidence", "about")} == {
        "kind": "model",
        "recipe_sha256": "abc",
        "parents": {"data": "d"},
        "evidence": [{"what": "v"}],
        "about": {"parameters": 3},
    }
    assert record["versions"]["numpy"]
