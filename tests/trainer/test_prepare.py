"""The prepare stage as a whole: what it leaves, the same each time, and that no kill leaves half of it."""

import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from trainer import prepare
from trainer.__main__ import main
from trainer.artifact import hash_file, hash_tree, read_artifact
from trainer.config import Recipe
from trainer.data.corpus import document_digest, rank_of
from trainer.data.shards import TokenShards
from trainer.errors import UserError

REPOSITORY = Path(__file__).parents[2]

# Every file operation below the run folder raises an audit event. One child counts them in an unbroken run; each other
# child kills itself at one of them, the parent looks what is left, and a last child runs to the end.
KILLER = """
import json, os, signal, sys
from pathlib import Path
from trainer import prepare
from trainer.artifact import hash_tree, read_artifact
from trainer.errors import UserError
from trainer.recipe_file import load_recipe

recipe_file, root, instants = sys.argv[1], sys.argv[2], int(sys.argv[3])

def child(run_dir, kill_at=None, overrides=()):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        log = []
        def count(event, arguments):
            if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                return
            below = any(isinstance(a, (str, os.PathLike)) and str(a).startswith(run_dir) for a in arguments)
            if not below and event not in ("os.remove", "os.rmdir"):  # rmtree names what it removes by folder handle
                return
            log.append(event)
            if len(log) - 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        prepare.run(load_recipe(recipe_file, ["run_dir=" + run_dir, *overrides]))
        os.write(writer, json.dumps(log).encode())
        os._exit(0)
    os.close(writer)
    log = b""
    while part := os.read(reader, 65536):
        log += part
    os.close(reader)
    return os.WTERMSIG(os.waitpid(pid, 0)[1]), json.loads(log or "[]")

def state(run_dir):
    found = {}
    for name, kind in (("data", "token_shards"), ("tokenizer", "tokenizer")):
        folder = Path(run_dir, "prepare", name)
        try:
            record = read_artifact(folder, kind)
            found[name] = hash_tree(folder) if hash_tree(folder) == record["content_sha256"] else "damaged"
        except UserError:
            found[name] = None
    return found

def whole(run_dir):
    folder = Path(run_dir)
    return {str(p.relative_to(folder)): p.read_bytes().hex() for p in sorted(folder.rglob("*")) if p.is_file()}

os.makedirs(root)  # else the first child makes it and counts one more operation than the others
OLD = ["prepare.validation_fraction=0.4"]
unbroken, old = root + "/unbroken", root + "/old"
died, fresh_events = child(unbroken)
assert died == 0
child(old, overrides=OLD)
before, after = state(old), state(unbroken)
_, over_events = child(old)
killed = []
for fresh, events in ((True, fresh_events), (False, over_events)):
    renames = [i for i, event in enumerate(events) if event == "os.rename"]
    spread = [round(i * (len(events) - 1) / (instants - 1)) for i in range(instants)]
    first_of_kind = [events.index(event) for event in set(events)]
    for instant in sorted({*renames, *spread, *first_of_kind}):
        run_dir = f"{root}/{'fresh' if fresh else 'over'}-{instant}"
        if not fresh:
            child(run_dir, overrides=OLD)
        died, _ = child(run_dir, kill_at=instant)
        left = state(run_dir)
        again, _ = child(run_dir)
        killed.append({"fresh": fresh, "at": events[instant], "died": died, "left": left, "again": again,
                       "same": whole(run_dir) == whole(unbroken)})
print(json.dumps({"before": before, "after": after, "killed": killed}))
"""


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(200)]
    rows = [{"text": " ".join(random.choice(words, 30))} for _ in range(200)]
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join([*lines, lines[0], '{"text": "x"}', "{"]) + "\n")
    for number in range(5):
        (folder / f"{number}.txt").write_text("\n\n".join(" ".join(random.choice(words, 20)) for _ in range(10)))


def write_recipe(tmp_path: Path, **tokenizer) -> Path:
    write_texts(tmp_path / "texts")
    tokenizer = tokenizer or {"type": "wordpiece", "vocab_size": 200}
    section = {
        "sources": [
            {"type": "jsonl", "name": "rows", "paths": [str(tmp_path / "texts")], "on_bad_document": "skip"},
            {"type": "text", "paths": [f"{tmp_path}/texts/*.txt"], "document": "block", "weight": 0.5},
        ],
        "tokenizer": tokenizer,
        "validation_fraction": 0.2,
        "min_document_characters": 3,
        "max_shard_tokens": 2048,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "prepare": section}))
    return path


def recipe_of(path: Path, **keys) -> Recipe:
    return Recipe.model_validate(json.loads(path.read_text()) | keys)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_says_what_is_there(tmp_path, capsys):
    path = write_recipe(tmp_path)
    assert main(["prepare", str(path)]) == 0
    recipe = recipe_of(path)
    manifest = json.loads((recipe.data_dir / "manifest.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_dir, local_files_only=True)
    rows, blocks = manifest["sources"]
    assert (rows["name"], rows["files"], rows["documents_read"], rows["documents_kept"]) == ("rows", 1, 203, 200)
    assert rows["dropped"] == {"duplicate": 1, "not_json": 1, "too_short": 1}
    assert (blocks["name"], blocks["files"], blocks["documents_kept"], blocks["weight"]) == ("text-2", 5, 50, 0.5)
    assert (manifest["format"], manifest["end_of_document"]) == ("megatron-indexed", None)
    assert manifest["vocab_size"] == len(tokenizer) <= 200
    assert manifest["tokenizer_sha256"] == hash_tree(recipe.tokenizer_dir)
    assert read_artifact(recipe.data_dir)["parents"] == {"tokenizer": manifest["tokenizer_sha256"]}
    assert not (recipe.data_dir / "spool").exists()

    documents = []
    for split, counts in manifest["splits"].items():
        shards = TokenShards.open(recipe.data_dir, split)
        shards.require_tokenizer(recipe.tokenizer_dir)
        assert (counts["documents"], counts["tokens"]) == (len(shards), shards.lengths_D.sum())
        texts = [tokenizer.decode(shards.read(index)) for index in range(len(shards))]
        assert counts["characters"] == counts["bytes"] == sum(map(len, texts))
        assert shards.digests_D.tolist() == [rank_of(document_digest(text.encode())) for text in texts]
        documents += texts
        for shard in counts["shards"]:
            assert shard["tokens"] <= 2048
            parts = ("bin", "idx", "digests")
            hashes = {part: hash_file(recipe.data_dir / f"{shard['file']}.{part}") for part in parts}
            assert shard["sha256"] == hashes
    lines = (tmp_path / "texts" / "a.jsonl").read_text().split("\n")[:200]
    texts = [text for number in range(5) for text in (tmp_path / "texts" / f"{number}.txt").read_text().split("\n\n")]
    assert sorted(documents) == sorted([json.loads(line)["text"] for line in lines] + texts)

    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for expected in ("1 duplicate, 1 not_json, 1 too_short", "203", f"{manifest['splits']['train']['tokens']:,}"):
        assert expected in printed


def test_each_document_ends_with_the_end_of_document(tmp_path):
    path = write_recipe(tmp_path, type="byte_level_bpe", vocab_size=300)
    recipe = recipe_of(path)
    prepare.run(recipe)
    shards = TokenShards.open(recipe.data_dir, "train")
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_dir)
    assert shards.manifest["end_of_document"] == tokenizer.eos_token_id == 2
    for index in range(len(shards)):
        assert np.flatnonzero(shards.read(index) == 2).tolist() == [shards.lengths_D[index] - 1]


def test_quality_is_measured_without_the_end_of_document(tmp_path):
    path = write_recipe(tmp_path, type="character")
    recipe = recipe_of(path)
    prepare.run(recipe)
    manifest = json.loads((recipe.data_dir / "manifest.json").read_text())
    assert manifest["tokenizer"]["bytes_per_token"] == 1 and manifest["tokenizer"]["unknown_rate"] == 0
    counts = manifest["splits"]["validation"]
    assert counts["tokens"] == counts["characters"] + counts["documents"]


def test_the_tokenizer_does_not_see_validation_text(tmp_path):
    (tmp_path / "t").write_text("aaa bbb")
    (tmp_path / "v").write_text("aaa zzz")
    sources = [{"type": "text", "paths": [str(tmp_path / name)], "split": split} for name, split in SPLIT_FILES]
    recipe = Recipe.model_validate(
        {"run_dir": tmp_path / "run", "prepare": {"sources": sources, "tokenizer": {"type": "character"}}}
    )
    prepare.run(recipe)
    manifest = json.loads((recipe.data_dir / "manifest.json").read_text())
    assert manifest["vocab_size"] == 5 + len(set("ab "))
    assert manifest["tokenizer"]["unknown_rate"] == pytest.approx(3 / 7)


SPLIT_FILES = (("t", "train"), ("v", "validation"))


def test_documents_without_tokens_are_dropped_and_counted(tmp_path):
    (tmp_path / "t").write_text("\u200b\u200b\n\nthe cat\n\nthe mat\n")
    (tmp_path / "v").write_text("the hat\n")
    sources = [
        {"type": "text", "paths": [str(tmp_path / name)], "split": split, "document": "block"}
        for name, split in SPLIT_FILES
    ]
    section = {"sources": sources, "tokenizer": {"type": "wordpiece", "vocab_size": 50}}
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "prepare": section})
    prepare.run(recipe)
    shards = TokenShards.open(recipe.data_dir, "train")
    assert len(shards) == 2 and shards.sources[0]["dropped"] == {"no_tokens": 1}
    (tmp_path / "v").write_text("\u200b\n")
    with pytest.raises(UserError, match=r"no validation documents.*2 no_tokens"):
        prepare.run(recipe)
    assert len(TokenShards.open(recipe.data_dir, "train")) == 2  # what was there before is still there


def test_a_loaded_tokenizer_is_taken_as_it_is(tmp_path):
    path = write_recipe(tmp_path)
    recipe = recipe_of(path)
    prepare.run(recipe)
    section = json.loads(path.read_text())["prepare"] | {"tokenizer": {"path": str(recipe.tokenizer_dir)}}
    loaded = recipe_of(path, run_dir=str(tmp_path / "again"), prepare=section)
    prepare.run(loaded)
    for split in ("train", "validation"):
        first, second = TokenShards.open(recipe.data_dir, split), TokenShards.open(loaded.data_dir, split)
        assert [first.read(i).tolist() for i in range(len(first))] == [
            second.read(i).tolist() for i in range(len(first))
        ]
    assert read_artifact(loaded.tokenizer_dir)["parents"] == {"loaded_from": first.manifest["tokenizer_sha256"]}


def test_two_runs_give_the_same_bytes(tmp_path):
    path = write_recipe(tmp_path)
    for run, hash_seed in (("one", "1"), ("two", "2")):
        (tmp_path / run).mkdir()  # and the same command, which is a part of the evidence
        command = [sys.executable, "-m", "trainer.prepare", str(path), "run_dir=."]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": hash_seed}
        environment["PYTHONPATH"] = str(REPOSITORY)
        done = subprocess.run(command, cwd=tmp_path / run, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) > 10


def test_a_kill_leaves_nothing_half_and_the_next_run_ends_alike(tmp_path):
    path = write_recipe(tmp_path)
    command = [sys.executable, "-c", KILLER, str(path), str(tmp_path / "runs"), "5"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().split("\n")[-1])
    assert len(found["killed"]) >= 20
    assert found["before"]["data"] != found["after"]["data"]
    for kill in found["killed"]:
        for name in ("data", "tokenizer"):
            allowed = [None if kill["fresh"] else found["before"][name], found["after"][name]]
            assert kill["left"][name] in allowed, kill
        assert kill["again"] == 0 and kill["same"], kill
    assert [kill for kill in found["killed"] if kill["died"] != signal.SIGKILL] == []
    assert {"os.rename", "open", "os.remove"} <= {kill["at"] for kill in found["killed"]}
    assert any(kill["left"]["data"] is None for kill in found["killed"])


class Stop(Exception):
    """Stands for a signal at this point; what a SIGKILL leaves is the same, and is in the test above."""


@pytest.fixture
def stopped(monkeypatch):
    """A function that runs prepare and stops it before a call of a function of trainer."""

    def run_until(recipe: Recipe, where: str, calls: int) -> None:
        original = pkgutil.resolve_name(f"trainer.{where}")
        left = iter(range(calls))

        def counted(*arguments, **keys):
            if next(left, None) is None:
                raise Stop
            return original(*arguments, **keys)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(f"trainer.{where}", counted)
            prepare.run(recipe)
        assert not recipe.data_dir.exists()

    return run_until


@pytest.fixture
def work(monkeypatch):
    """A function that runs prepare to its end and counts the calls of what costs time."""

    def run(recipe: Recipe) -> list[int]:
        counts = [0, 0, 0]
        for index, where in enumerate(("data.corpus.read_file", "prepare.train_tokenizer", "data.shards.write_index")):
            original = pkgutil.resolve_name(f"trainer.{where}")

            def counted(*arguments, index=index, original=original, **keys):
                counts[index] += 1
                return original(*arguments, **keys)

            monkeypatch.setattr(f"trainer.{where}", counted)
        prepare.run(recipe)
        monkeypatch.undo()
        return counts

    return run


def result(recipe: Recipe) -> dict[str, str]:
    """Everything that prepare wrote, but for the names of the recipe and its command."""
    return {name: digest for name, digest in files(recipe.run_dir).items() if "artifact.json" not in name}


@pytest.fixture
def recipe_and_whole(tmp_path) -> tuple[Recipe, dict[str, str]]:
    """A recipe of 6 files, and what an unbroken run makes of it: 1 tokenizer and 11 shards."""
    path = write_recipe(tmp_path)
    unbroken = recipe_of(path, run_dir=str(tmp_path / "unbroken"))
    prepare.run(unbroken)
    return recipe_of(path), result(unbroken)


@pytest.mark.parametrize(
    ("where", "calls", "left"),
    [
        ("data.corpus.read_file", 0, [6, 1, 11]),
        ("data.corpus.read_file", 3, [3, 1, 11]),
        ("prepare.train_tokenizer", 0, [0, 1, 11]),
        ("data.shards.write_index", 0, [0, 0, 11]),
        ("data.shards.write_index", 2, [0, 0, 9]),
        ("data.shards.write_index", 9, [0, 0, 2]),  # in the second split
        ("prepare.write_artifact", 0, [0, 0, 0]),
        ("artifact.sync_tree", 0, [0, 0, 0]),
    ],
)
def test_an_interrupted_run_is_gone_on_with(recipe_and_whole, stopped, work, where, calls, left):
    recipe, whole = recipe_and_whole
    stopped(recipe, where, calls)
    assert work(recipe) == left
    assert result(recipe) == whole
    assert sorted(path.name for path in recipe.data_dir.parent.iterdir()) == ["data", "tokenizer"]


def test_it_is_gone_on_with_after_each_of_several_stops(recipe_and_whole, stopped, work, capsys):
    recipe, whole = recipe_and_whole
    for where in ("data.corpus.read_file", "data.corpus.read_file", "data.shards.write_index"):
        stopped(recipe, where, 2)
    stopped(recipe, "data.shards.write_index", 1)
    capsys.readouterr()
    assert work(recipe) == [0, 0, 8]
    assert result(recipe) == whole
    assert "it had finished 6 files, 1 tokenizer, 3 shards" in capsys.readouterr().out


def unfinished(recipe: Recipe) -> Path:
    return recipe.data_dir.with_name("unfinished")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (lambda folder: damage(folder / "spool" / "train-0"), [6, 1, 11]),
        (lambda folder: (folder / "spool" / "train-1").unlink(), [6, 1, 11]),
        (lambda folder: damage(folder / "tokenizer" / "tokenizer.json"), [0, 1, 11]),
        (lambda folder: damage(folder / "shards" / "train" / "rows-00001.bin"), [0, 0, 10]),
        (lambda folder: (folder / "shards" / "train" / "rows-00000.idx").unlink(), [0, 0, 11]),
        (lambda folder: (folder / "journal.jsonl").write_bytes(b"\0" * 100), [6, 1, 11]),
        (lambda folder: (folder / "journal.jsonl").open("a").write('{"step": "sha'), [0, 0, 9]),
    ],
    ids=["spool", "no spool", "tokenizer", "shard", "no index", "journal", "cut line"],
)
def test_what_is_not_as_it_was_left_is_made_again(recipe_and_whole, stopped, work, spoil, left):
    recipe, whole = recipe_and_whole
    stopped(recipe, "data.shards.write_index", 2)
    spoil(unfinished(recipe))
    assert work(recipe) == left
    assert result(recipe) == whole


def test_changed_files_and_recipes_are_not_taken_over(recipe_and_whole, stopped, work, tmp_path):
    recipe, whole = recipe_and_whole
    stopped(recipe, "data.shards.write_index", 4)
    file = tmp_path / "texts" / "1.txt"
    file.write_text(file.read_text() + "\n\none more block of words")
    assert work(recipe) == [4, 1, 11]  # 1.txt is the third of 6
    assert result(recipe) != whole
    changed = recipe_of(tmp_path / "recipe.yaml", run_dir=str(tmp_path / "changed"))
    prepare.run(changed)
    assert result(recipe) == result(changed)

    section = recipe.prepare.model_copy(update={"max_shard_tokens": 100_000})
    stopped(changed.model_copy(update={"run_dir": tmp_path / "other"}), "data.shards.write_index", 4)
    other = changed.model_copy(update={"run_dir": tmp_path / "other", "prepare": section})
    assert work(other) == [6, 1, 4]
    assert len(list(other.data_dir.rglob("*.bin"))) == 4


HOLDER = """
import sys
from pathlib import Path
from trainer.artifact import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("verb", ["prepare", "run"])
def test_a_second_process_in_the_same_folder_is_told(tmp_path, capsys, verb):
    path = write_recipe(tmp_path, type="character")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "prepare")],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    assert main([verb, str(path)]) == 69
    assert f"lmworks {verb}: another process is at work in {tmp_path}/run/prepare" in capsys.readouterr().err
    holder.kill()  # whatever ends the process ends its hold
    holder.wait()
    assert main([verb, str(path)]) == 0
    assert sorted(file.name for file in (tmp_path / "run" / "prepare").iterdir()) == ["data", "tokenizer"]


def test_the_evidence_names_the_recipe(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, type="character")
    monkeypatch.chdir(tmp_path)
    command = ["lmworks", "prepare", str(path), "prepare.validation_fraction=0.3"]
    monkeypatch.setattr(sys, "argv", command)
    assert main(command[1:]) == 0
    (evidence,) = read_artifact(recipe_of(path).tokenizer_dir)["evidence"]
    assert evidence["command"] == "lmworks prepare recipe.yaml prepare.validation_fraction=0.3"


@pytest.mark.parametrize(("rank", "works"), [("0", True), ("1", False)])
def test_only_rank_0_works(tmp_path, monkeypatch, rank, works):
    recipe = recipe_of(write_recipe(tmp_path, type="character"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    prepare.run(recipe)
    assert recipe.data_dir.exists() == works


def test_errors_are_one_message_and_leave_nothing(tmp_path, capsys):
    path = write_recipe(tmp_path)
    (tmp_path / "texts" / "bad.txt").write_bytes(b"good\n\xff\n")
    assert main(["prepare", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/texts/bad.txt:2" in message and "text-2" in message and "on_bad_document: skip" in message
    left = [path.name for path in (tmp_path / "run" / "prepare").iterdir()]
    assert left == ["unfinished"]  # what was read before it: the next run goes on from there
    lost = f"prepare.tokenizer={{path: {tmp_path}/lost.json}}"
    assert main(["prepare", str(path), lost]) == 2 and "lost.json is not there" in capsys.readouterr().err
    with pytest.raises(UserError, match="no `prepare` section"):
        prepare.run(Recipe(run_dir=tmp_path))
