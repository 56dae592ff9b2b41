"""The tokenizer of a recipe: trained or loaded, checked, saved as a folder that transformers opens, and measured.
How each kind is trained is in `tokenizer_training`; where token ids are stored is the business of `shards`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.config import Tokenizer as TokenizerConfig
from trainer.data.tokenizer_training import (
    BERT_SPECIALS,
    ROBERTA_SPECIALS,
    Texts,
    bert_pipeline,
    byte_level_pipeline,
    train,
)
from trainer.errors import UserError

# Encodings of a batch are held at once, at about 100 bytes a token.
_BATCH_CHARACTERS = 1 << 21
# A folder's own description of its tokenizer; without it transformers guesses (and folds case where it should not).
_CONFIG_FILE = "tokenizer_config.json"
_PROBE = "Hello, World! 12 + 3.5\n    def naïve(x):\treturn 'Ärger' # 東京  😀 <s> [MASK]"


def train_tokenizer(config: TokenizerConfig, texts: Texts) -> PreTrainedTokenizerFast:
    """Train a tokenizer of kind `config.type` on the text. Same text, same bytes.

    wordpiece has BERT's special tokens and puts [CLS] and [SEP] around a text. The others have RoBERTa's, and nothing
    around a text, because a causal model must be able to go on where it ends. Raises UserError as `train` does.
    """
    roles = BERT_SPECIALS if config.type == "wordpiece" else ROBERTA_SPECIALS
    return _checked(_wrap(train(config, texts), roles), f"the trained {config.type} tokenizer")


def load_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer at `config.path`: tokenizer.json, vocab.txt, or a folder with those, with vocab.json and
    merges.txt, or with tokenizer_config.json (a model folder). Raises UserError for anything else."""
    path = config.path
    assert path is not None
    if path.is_dir():
        path = _known_file(path)
    if not path.is_file():
        raise UserError(f"prepare.tokenizer.path: {path} is not there", "a tokenizer file or folder", "check the path")
    if config.lowercase and path.suffix != ".txt":
        raise UserError(
            f"prepare.tokenizer.lowercase is set, but {path} brings its own rule",
            "lowercase with a trained tokenizer or a vocab.txt",
            "leave it out",
        )
    return _checked(_open(path, config.lowercase), str(path))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that AutoTokenizer opens without a network; UserError if it comes back as another tokenizer."""
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    before, after = (encoding_backend(each).encode(_PROBE).ids for each in (tokenizer, again))
    if before != after or len(again) != len(tokenizer) or again.all_special_ids != tokenizer.all_special_ids:
        raise UserError(
            f"transformers does not give back the tokenizer that was saved in {folder}",
            "a tokenizer that survives save_pretrained",
            "give its tokenizer.json as prepare.tokenizer.path",
        )


def encoding_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer for plain text: nothing cut, padded or put around it, and `[MASK]` written in a text is
    read as these characters, not as the special token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # type: ignore[assignment] - the stub knows only setting one
    backend.encode_special_tokens = True
    return backend


def encode(backend: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each text with its token ids, in order; encoded in batches by all threads."""
    for batch in _batches(texts):
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        yield from zip(batch, (encoding.ids for encoding in encodings), strict=True)


@dataclass
class TokenizerQuality:
    """Counts over text that the tokenizer was not trained on."""

    unknown_id: int | None
    tokens: int = 0
    unknown: int = 0
    words: int = 0
    utf8_bytes: int = 0

    def add(self, text: str, ids: list[int]) -> None:
        """Count one document; its words are what whitespace separates."""
        self.tokens += len(ids)
        self.unknown += 0 if self.unknown_id is None else ids.count(self.unknown_id)
        self.words += len(text.split())
        self.utf8_bytes += len(text.encode("utf-8"))

    def metrics(self) -> dict[str, float]:
        """Tokens a word, bytes a token, and the share of tokens that are unknown."""
        return {
            "fertility_tokens_per_word": self.tokens / max(self.words, 1),
            "bytes_per_token": self.utf8_bytes / max(self.tokens, 1),
            "unknown_rate": self.unknown / max(self.tokens, 1),
        }


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _known_file(folder: Path) -> Path:
    """The file in a folder that says best what the tokenizer is."""
    for names in ([_CONFIG_FILE], ["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"]):
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    raise UserError(
        f"prepare.tokenizer.path: no tokenizer in {folder}",
        "tokenizer_config.json, tokenizer.json, vocab.json with merges.txt, or vocab.txt",
        "check the path; a SentencePiece .model is not read, its tokenizer.json is",
    )


def _open(path: Path, lowercase: bool) -> PreTrainedTokenizerFast:
    if path.suffix == ".txt":
        return _open_wordpiece(path, lowercase)
    try:
        if path.name == _CONFIG_FILE:
            return AutoTokenizer.from_pretrained(path.parent, local_files_only=True)
        if path.name == "vocab.json":
            merges = path.with_name("merges.txt")
            backend = byte_level_pipeline(models.BPE.from_file(str(path), str(merges)))
        else:
            backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise UserError(f"{path} cannot be opened as a tokenizer: {error}", "a tokenizer that loads") from error
    return _wrap(backend, _roles(backend, path))


def _open_wordpiece(path: Path, lowercase: bool) -> PreTrainedTokenizerFast:
    pieces = path.read_text(encoding="utf-8").split("\n")
    if pieces[-1] == "":
        pieces.pop()
    vocab = {piece.removesuffix("\r"): index for index, piece in enumerate(pieces)}
    missing = [token for token in BERT_SPECIALS.values() if token not in vocab]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}", "a BERT vocabulary, one piece a line")
    return _wrap(bert_pipeline(vocab, lowercase), BERT_SPECIALS)


def _roles(backend: Tokenizer, path: Path) -> dict[str, str]:
    """A bare tokenizer.json does not say which special token does what; the families are told apart by their names."""
    end = "<|endoftext|>"
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for roles in (BERT_SPECIALS, ROBERTA_SPECIALS, llama, {"bos_token": end, "eos_token": end}):
        if all(backend.token_to_id(token) is not None for token in roles.values()):
            return roles
    raise UserError(
        f"{path} has none of the known sets of special tokens (BERT, RoBERTa, Llama, GPT-2)",
        "to know which token pads, masks and ends a document",
        f"give a folder with {_CONFIG_FILE}",
    )


def _wrap(backend: Tokenizer, roles: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        # No token_type_ids: DistilBERT and ModernBERT refuse them, and GPT-2 adds word embeddings for them.
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )


def _checked(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    """UserError unless the tokenizer is a fast one with ids from 0 without gaps."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name} opens as {type(tokenizer).__name__}", "a tokenizer with a tokenizer.json")
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        gap = next((index for index, number in enumerate(ids) if index != number), len(ids))
        raise UserError(f"{name}: id {gap} is missing or there twice", "ids from 0 without gaps", "mend the vocabulary")
    return tokenizer
