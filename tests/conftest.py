"""Things many tests need: where public data lies, tokens that stand in for a prepared corpus, a tiny tokenizer."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


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

    def __post_init__(self):
        self.lengths_D = np.array([len(document) for document in self.documents], dtype=np.int64)
        if self.source_D is None:
            self.source_D = np.zeros(len(self.documents), dtype=np.uint16)
        self.manifest = {"end_of_document": self.end_of_document}

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
