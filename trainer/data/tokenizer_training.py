"""Trains tokenizers (wordpiece, byte_level_bpe, unigram, character), to the same bytes on every run with the same text.
Which text they see, and how the result is wrapped and saved, is left to `tokenizer`."""

import json
from collections import Counter
from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trainer.config import Tokenizer as TokenizerConfig
from trainer.errors import UserError

Texts = Callable[[], Iterable[str]]
"""The training text; called once for each pass over it."""

# The order gives the ids. BERT's and RoBERTa's names, which models of these families expect.
BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
# Characters that are rarer than one in ten thousand together become unknown (SentencePiece keeps 0.9995 by default;
# assumed: source code and names are worth more of the vocabulary).
_CHARACTER_COVERAGE = 0.9999
# How GPT-2 splits text, without English contractions and with combining marks kept on their letters: a space belongs
# to the word that follows it, and the pieces put together are the text again.
_WORDS = Regex(r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+")
# Scores are sums in an order that changes from run to run; the noise is in the 14th digit.
_UNIGRAM_SCORE_DIGITS = 6


def train(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """A tokenizer of kind `config.type`, with special tokens in its vocabulary but not yet marked as special.

    Raises UserError when the vocabulary cannot be as small as asked, or holds nothing beside special tokens.
    """
    make = {"wordpiece": _wordpiece, "byte_level_bpe": _byte_level_bpe, "unigram": _unigram, "character": _character}
    assert config.type is not None
    tokenizer = make[config.type](config, texts)
    specials = specials_of(config.type)
    if tokenizer.get_vocab_size() <= len(specials):
        raise UserError("the trained vocabulary holds only special tokens", "training text with words", "add data")
    return tokenizer


def specials_of(kind: str) -> list[str]:
    """Special tokens of a trained kind, in the order of their ids from 0."""
    roles = BERT_SPECIALS if kind == "wordpiece" else ROBERTA_SPECIALS
    return list(dict.fromkeys(roles.values()))


def bert_pipeline(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer around a WordPiece vocabulary that holds its five special tokens (Devlin et al. 2018)."""
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def byte_level_pipeline(model: models.BPE) -> Tokenizer:
    """GPT-2's tokenizer around a BPE model over bytes; it loses nothing and knows every text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wordpiece(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """Two passes. The library numbers the pieces inside words (`##x`) in the order of a hash map that is new in each
    process, and decides between equally frequent pairs by number. So the first pass only finds these pieces, and the
    second is given them in a fixed order, as if they were special tokens."""
    specials = specials_of("wordpiece")
    draft = bert_pipeline({token: index for index, token in enumerate(specials)}, config.lowercase)
    room = (config.vocab_size - len(specials)) // 2  # a character can need two entries: x and ##x
    alphabet = [each for each in _alphabet(_character_counts(draft, texts()), room) if not each.isspace()]

    def trained(first: list[str], size: int) -> dict[str, int]:
        draft.train_from_iterator(
            texts(),
            trainers.WordPieceTrainer(
                vocab_size=size,
                special_tokens=first,
                initial_alphabet=alphabet,
                limit_alphabet=len(alphabet),
                show_progress=False,
            ),
        )
        return draft.get_vocab(with_added_tokens=False)

    inside = sorted(piece for piece in trained(specials, len(specials)) if piece.startswith("##") and len(piece) == 3)
    draft = bert_pipeline({token: index for index, token in enumerate(specials)}, config.lowercase)
    return bert_pipeline(trained(specials + inside, config.vocab_size), config.lowercase)


def _byte_level_bpe(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    specials, alphabet = specials_of("byte_level_bpe"), sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(specials) + len(alphabet)
    if config.vocab_size < least:
        raise UserError(
            f"prepare.tokenizer.vocab_size is {config.vocab_size}",
            f"at least {least} for byte_level_bpe: 256 bytes and {len(specials)} special tokens",
            "raise it",
        )
    tokenizer = byte_level_pipeline(models.BPE())
    _set_folding(tokenizer, config.lowercase)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _unigram(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """The library is asked for more pieces than needed, and the last cut is made here: its own is decided by noise
    where pieces are equally likely."""
    specials = specials_of("unigram")
    room = config.vocab_size - len(specials)
    draft = _unigram_pipeline([(token, 0.0) for token in specials], config.lowercase)
    counts = _character_counts(draft, texts())
    alphabet = {each.replace(" ", "▁") for each in _alphabet(counts, room // 2)}
    trainer = trainers.UnigramTrainer(
        # It keeps every character, also those that are cut away here, and refuses a size that they do not fit into.
        vocab_size=config.vocab_size + max(config.vocab_size // 10, 1) + len(counts),
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(texts(), trainer)
    pieces = _unigram_pieces(draft, alphabet, set(specials))
    letters = [entry for entry in pieces if len(entry[0]) == 1]
    longer = [entry for entry in pieces if len(entry[0]) > 1][: max(room - len(letters), 0)]
    chosen = sorted(letters + longer, key=_by_score)
    return _unigram_pipeline([(token, 0.0) for token in specials] + chosen, config.lowercase)


def _unigram_pieces(trained: Tokenizer, alphabet: set[str], specials: set[str]) -> list[tuple[str, float]]:
    """Pieces over the alphabet with rounded scores, the likeliest first, equal ones by their text."""
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [(piece, round(score, _UNIGRAM_SCORE_DIGITS)) for piece, score in vocab if piece not in specials]
    return sorted((entry for entry in pieces if alphabet.issuperset(entry[0])), key=_by_score)


def _by_score(entry: tuple[str, float]) -> tuple[float, str]:
    return -entry[1], entry[0]


def _unigram_pipeline(vocab: list[tuple[str, float]], lowercase: bool) -> Tokenizer:
    unknown = [piece for piece, _ in vocab].index("<unk>")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    _set_folding(tokenizer, lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def _character(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """BPE without merges: what is left of it is one token a character, and <unk> for one never seen."""
    specials = specials_of("character")
    tokenizer = Tokenizer(models.BPE())
    _set_folding(tokenizer, config.lowercase)
    characters = sorted(_character_counts(tokenizer, texts()))
    vocab = {token: index for index, token in enumerate(specials + characters)}
    tokenizer.model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", cache_capacity=0)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _set_folding(tokenizer: Tokenizer, lowercase: bool) -> None:
    if lowercase:  # what BertNormalizer does for `lowercase`
        steps = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(steps)


def _normalized(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterable[str]:
    normalizer = tokenizer.normalizer
    return texts if normalizer is None else map(normalizer.normalize_str, texts)


def _character_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in _normalized(tokenizer, texts):
        counts.update(text)
    return counts


def _alphabet(counts: Counter[str], room: int) -> list[str]:
    """The most frequent characters that cover `_CHARACTER_COVERAGE` of the text, at most `room`, by code point.

    The library can limit the alphabet itself, but drops equally rare characters in the order of a hash map.
    """
    wanted, covered, chosen = _CHARACTER_COVERAGE * counts.total(), 0, []
    for character, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if covered >= wanted or len(chosen) >= room:
            break
        chosen.append(character)
        covered += count
    return sorted(chosen)
