"""Things many tests need: where public data lies, tokens that stand in for a prepared corpus, a tiny tokenizer."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Files that take longest, first: two are run at a time, and the last one should not run alone.
LONGEST = (
    "test_strategies.py",
    "test_resume.py",
    "test_cluster.py",
    "test_export.py",
    "test_ranks.py",
    "test_end_to_end.py",
    "test_optim.py",
    "test_prepare.py",
    "test_lamb.py",
    "test_tensorrt.py",
    "test_serve.py",
    "test_seq2seq.py",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="replace the golden losses by what is seen now")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("LMWORKS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("public data not here: set LMWORKS_DATA to a folder that has it")
    return folder


@dataclass
class TokensInMemory:
    """What packing and streams ask of TokenShards, over lists of tokens."""

    documents: list[list[int]]
    sources: list[dict] = field(default_factory=lambda: [{"name": "text-0", "weight": 1.0}])
    end_of_document: int | None = None
    source_D: np.ndarray | None = None
    split: str = "train"

    def __post_init__(self):
        self.lengths_D = np.array([len(document) for document in self.documents], dtype=np.int64)
        if self.source_D is None:
            self.source_D = np.zeros(len(self.documents), dtype=np.uint16)
        self.manifest = {"end_of_document": self.end_of_document}
        digests = [hashlib.blake2b(repr(document).encode(), digest_size=8).digest() for document in self.documents]
        self.digests_D = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)

    def __len__(self):
        return len(self.documents)

    def read(self, document, start=0, stop=None):
        return np.array(self.documents[document][start:stop], dtype=np.int64)


@pytest.fixture
def tokens_in_memory():
    return TokensInMemory


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of 100 entries: 5 special, 55 that begin words, 40 that continue them."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = specials + [f"w{n}" for n in range(55)] + [f"##c{n}" for n in range(40)]
    backend = Tokenizer(models.WordPiece({token: n for n, token in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, specials, strict=True)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """200 text files of sentences that a small model can learn something from: each word suggests the next."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghij"), size=draw.integers(2, 7))) for _ in range(300)]
    for number in range(200):
        at, text = int(draw.integers(300)), []
        for _ in range(int(draw.integers(8, 120))):
            at = (at * 7 + int(draw.integers(3))) % 300
            text.append(words[at])
        (folder / f"{number:03d}.txt").write_text(" ".join(text))
    return folder


TINY_MODELS = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


@pytest.fixture(scope="session")
def tiny_recipe(corpus):
    """Makes the tree of a complete tiny recipe, to be changed and written by a test."""

    def make(run_dir: Path, architecture: str = "bert") -> dict:
        causal = architecture == "gpt2"
        return {
            "run_dir": str(run_dir),
            "seed": 7,
            "prepare": {
                "sources": [{"type": "text", "paths": [str(corpus)]}],
                "tokenizer": {"type": "byte_level_bpe" if causal else "wordpiece", "vocab_size": 400},
                "validation_fraction": 0.1,
            },
            "pretrain": {
                "model": {"architecture": architecture, "config": dict(TINY_MODELS[architecture])},
                "objective": {"name": "causal_lm" if causal else "masked_lm"},
                "data": {"sequence_length": 32},
                "max_steps": 12,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "optim": {"learning_rate": 5e-3},
                "eval_every_steps": 6,
                "eval_sequences": 16,
                "log_every_steps": 1,
                "save_every_steps": 4,
            },
            "distill": {
                "student": {"every": 2},
                "max_steps": 6,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "eval_every_steps": 6,
                "eval_sequences": 16,
                "log_every_steps": 1,
                "save_every_steps": 3,
            },
        }

    return make


@pytest.fixture(scope="session")
def prepared(tiny_recipe, tmp_path_factory):
    """Run folders with tokenizer and shards, one for each architecture; tests copy what they need from them."""
    from trainer.config import Recipe
    from trainer.prepare import run

    made = {}
    for architecture in TINY_MODELS:
        folder = tmp_path_factory.mktemp(f"prepared-{architecture}")
        run(Recipe.model_validate(tiny_recipe(folder, architecture)))
        made[architecture] = folder
    return made


@pytest.fixture
def written_recipe(tiny_recipe, prepared, tmp_path):
    """Writes a recipe whose data is already prepared; returns its path. Keyword arguments change `pretrain`."""
    import json
    import shutil

    def write(architecture: str = "bert", name: str = "run", **pretrain) -> Path:
        run_dir = tmp_path / name
        shutil.copytree(prepared[architecture] / "prepare", run_dir / "prepare")
        tree = tiny_recipe(run_dir, architecture)
        tree["pretrain"].update(pretrain)
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        return path

    return write


@pytest.fixture(scope="session", autouse=True)
def one_thread_from_the_start():
    """Also for what is made once for many tests, such as models that are trained."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, on a busy machine OpenMP's barriers cost them much, and sums that are to
    be equal bit for bit in two processes must be added in one order. Set anew for each test: runners change it."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
