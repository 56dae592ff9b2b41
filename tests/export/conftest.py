"""Tiny models of every supported architecture, with a tokenizer, built from configs: weights large enough that every
layer, position and mask shows in the logits."""

import contextlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from export.bench_inputs import quality_batches
from export.io_spec import TASKS, read_spec
from export.to_onnx import export_graph, load_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 300
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MAX_LENGTH = 72  # a prompt of 5 and 64 steps fit
_TEXT = "def add(first, second):\n    return first + second\n\nclass Point:\n    x = 0\n    y = 1\n"
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_BERT = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
}
_DISTIL = {"vocab_size": VOCABULARY, "n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 0}
_GPT2 = {"vocab_size": VOCABULARY, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": MAX_LENGTH}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_MODERN = {**_BERT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}

PACKED = ("bert", "gpt2", "bert_classifier", "roberta_tokens", "bert_answers", "bert_features")
# Models whose tokenizer puts texts between [CLS] and [SEP], as their answers are places in these.
_FRAMED = ("roberta_tokens", "bert_answers", "bert_features")
CONFIGS = {
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**_BERT)),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(max_position_embeddings=MAX_LENGTH, **_DISTIL),
    ),
    "roberta": (
        hf.RobertaForMaskedLM,
        lambda: hf.RobertaConfig(**{**_BERT, "max_position_embeddings": MAX_LENGTH + 1}),
    ),
    "modernbert": (hf.ModernBertForMaskedLM, lambda: hf.ModernBertConfig(**_MODERN, **_without(_IDS, "pad_token_id"))),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT2, **_without(_IDS, "pad_token_id"))),
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_LLAMA, **_without(_IDS, "pad_token_id"))),
    "mistral": (
        hf.MistralForCausalLM,
        lambda: hf.MistralConfig(**_LLAMA, **_without(_IDS, "pad_token_id"), sliding_window=8),
    ),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_LLAMA, **_without(_IDS, "pad_token_id"))),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_LLAMA, **_without(_IDS, "pad_token_id"), head_dim=16)),
    "bert_classifier": (hf.BertForSequenceClassification, lambda: hf.BertConfig(num_labels=3, **_BERT)),
    "bert_features": (hf.BertModel, lambda: hf.BertConfig(**_BERT)),
    "roberta_tokens": (
        hf.RobertaForTokenClassification,
        lambda: hf.RobertaConfig(
            **{**_BERT, "max_position_embeddings": MAX_LENGTH + 1},
            id2label=dict(enumerate(TAGS)),
            label2id={tag: index for index, tag in enumerate(TAGS)},
        ),
    ),
    "bert_answers": (hf.BertForQuestionAnswering, lambda: hf.BertConfig(**_BERT)),
}
# T5's heads are together narrower than the model, BART's encoder is less deep than its decoder (transformers 5.23
# itself makes no text with such a T5).
_T5 = {"vocab_size": VOCABULARY, "num_layers": 2, "num_decoder_layers": 2, "d_model": 32, "d_kv": 8, "num_heads": 3,
       "d_ff": 64, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
       "n_positions": MAX_LENGTH, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}  # fmt: skip
_BART = {"vocab_size": VOCABULARY, "encoder_layers": 1, "decoder_layers": 2, "d_model": 32,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, **_IDS,
         "max_position_embeddings": MAX_LENGTH, "decoder_start_token_id": 3, "forced_eos_token_id": 3}  # fmt: skip
PAIRS = {
    "t5": (hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5)),
    "mt5": (hf.MT5ForConditionalGeneration, lambda: hf.MT5Config(**_T5)),
    "bart": (hf.BartForConditionalGeneration, lambda: hf.BartConfig(**_BART)),
}


def _of_head(architecture: str) -> tuple:
    """Class and config of an encoder with that head, the encoder as in `CONFIGS`."""
    encoder = next(name for name in CONFIGS if architecture.lower().startswith(name))

    def config():
        made = CONFIGS[encoder][1]()
        made.num_labels = 2 if architecture.endswith("QuestionAnswering") else 3
        return made

    return getattr(hf, architecture), config


# The encoders with heads that are exported, other than those above, by architecture.
_BUILT = {kind.__name__ for kind, _ in (CONFIGS | PAIRS).values()}
HEADS = {architecture: _of_head(architecture) for architecture in TASKS if architecture not in _BUILT}
# So much wider than the tables are their other matrices: a tied head would have them repeat one token for ever.
_WIDER = {"t5": 3, "mt5": 3, "bart": 6}


def _without(values: dict, key: str) -> dict:
    return {name: value for name, value in values.items() if name != key}


def architectures(*slow: str) -> list:
    """Names of all, those that say again what another one says among the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in CONFIGS]


def build_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A model whose weights are drawn anew and wide."""
    kind, config = (CONFIGS | PAIRS | HEADS)[name]
    model = kind(config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            norm_scale = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.normal_(float(norm_scale), 0.1, generator=generator)
        tables = {id(table.weight) for table in model.modules() if isinstance(table, torch.nn.Embedding)}
        for parameter in model.parameters():
            if parameter.ndim == 2 and id(parameter) not in tables:
                parameter.mul_(_WIDER.get(name, 1))
    model.tie_weights()
    return model


def build_tokenizer(framed: bool = False) -> hf.PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [_TEXT], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if framed:
        ends = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
        inner.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", *(["token_type_ids"] if framed else []), "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a tiny model by name and seed, built once."""
    root = tmp_path_factory.mktemp("models")

    def give(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        if not folder.exists():
            build_model(name, seed).save_pretrained(folder)
            build_tokenizer(name in _FRAMED).save_pretrained(folder)
        return folder

    return give


@pytest.fixture(scope="session")
def raw_graph(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives `model.onnx` of a tiny model by name and seed, exported once. Not to be written to."""
    root = tmp_path_factory.mktemp("graphs")

    def give(name: str, seed: int = 0) -> Path:
        path = root / f"{name}-{seed}" / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            folder = model_folder(name, seed)
            spec = read_spec(folder)
            export_graph(load_model(folder, spec), spec, path, 20)
        return path

    return give


# What `exported_folder` passed. Random weights make near-ties of all logits: int8 is judged here by its error alone.
GATES = {"parity": {"shapes": [[3, 9]], "int8": {"relative_rms": 0.15, "min_top1": 0.0}}, "quality": None}


@pytest.fixture(scope="session")
def exported_folder(model_folder, documents, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the export folder (fp32 and int8, past the gate) of a tiny model by name, made once; not to be changed."""
    from export.export import export_model
    from trainer.config import Recipe
    from trainer.export_config import Export

    root = tmp_path_factory.mktemp("exported")
    settings = Export.model_validate(GATES)

    def give(name: str) -> Path:
        folder = root / "export" / name
        if not folder.exists():
            export_model(Recipe(run_dir=root), settings, name, model_folder(name), documents)
        return folder

    return give


@pytest.fixture(scope="session")
def packed(exported_folder, model_folder, tmp_path_factory) -> Path:
    """A folder with the packed folders of every task, fp32."""
    from export import pack
    from trainer.config import Recipe

    root = tmp_path_factory.mktemp("packing")
    for name in PACKED:
        shutil.copytree(exported_folder(name), root / "export" / name)
    export = GATES | {"models": {name: str(model_folder(name)) for name in PACKED}}
    pack.run(Recipe.model_validate({"run_dir": root, "export": export, "pack": {"variant": "fp32", "top_k": 3}}))
    return root / "pack"


@pytest.fixture(scope="session")
def builder():
    """TensorRT-RTX, which builds engines without a GPU."""
    from export.to_tensorrt import Builder

    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    return Builder("tensorrt_rtx")


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Path:
    """Where the Triton server is installed: about ten seconds, from the package index."""
    from export import serve
    from export.triton_image import triton_image
    from trainer.errors import UserError

    folder = tmp_path_factory.mktemp("serve") / "environment"
    try:
        serve.ensure_environment(folder, triton_image())
    except UserError as problem:
        pytest.skip(f"no Triton server: {str(problem).splitlines()[0]}")
    return folder


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def documents() -> list[np.ndarray]:
    """Token ids of a few documents of unequal length."""
    tokenizer = build_tokenizer()
    texts = [_TEXT * repeats + f"# {repeats}\n" for repeats in (1, 3, 9)]
    return [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in texts]


@pytest.fixture(scope="session")
def pieces(documents) -> list[np.ndarray]:
    """Short documents of unequal lengths, so that batches of them are padded."""
    text, random = np.tile(np.concatenate(documents), 2), np.random.default_rng(0)
    ends = random.integers(8, 20, size=len(text) // 16).cumsum()
    return [piece for piece in np.split(text, ends) if len(piece) >= 8]


@pytest.fixture(scope="session")
def trained_pair(pieces, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a tiny encoder-decoder that learnt the documents' text, the later half of a row from the
    earlier: random weights have no quality that a fault could cost."""
    root = tmp_path_factory.mktemp("trained")

    def give(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(1)
            kind, config = PAIRS[name]
            # Of the wide weights that `build_model` draws BART learns little, and how little depends on the CPU.
            model = kind(config()) if name == "bart" else build_model(name, 1)
            build_tokenizer().save_pretrained(folder)
            model.save_pretrained(folder)
            batches = quality_batches(pieces, read_spec(folder), folder, 16, 40, seed=0)
            how = {"steps": 600, "rate": 2e-3, "warmup": 100} if name == "bart" else {"steps": 150}
            learn(model.train(), batches, **how)
            model.eval().save_pretrained(folder)
        return folder

    return give


# int8 of models this small is far off at some positions; what it keeps of the quality is what is held.
PAIR_GATES = {
    "variants": ["fp32", "int8"],
    "quality": {"sequences": 40, "sequence_length": 16, "share": 0.95},
    "parity": {"shapes": [[3, 9]], "int8": {"relative_rms": 0.4, "min_top1": 0.0}},
}


@pytest.fixture(scope="session")
def exported_pair(trained_pair, pieces, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the export folder (fp32 and int8, past both gates) of a trained encoder-decoder; not to be changed."""
    from export.export import export_model
    from trainer.config import Recipe
    from trainer.export_config import Export

    root = tmp_path_factory.mktemp("exported_pairs")

    def give(name: str) -> Path:
        folder = root / "export" / name
        if not folder.exists():
            settings = Export.model_validate(PAIR_GATES)
            export_model(Recipe(run_dir=root), settings, name, trained_pair(name), pieces)
        return folder

    return give


def learn(
    model: torch.nn.Module, batches: list[dict[str, np.ndarray]], steps: int, rate: float = 1e-2, warmup: int = 1
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warmup)
        batch = {key: torch.from_numpy(value) for key, value in batches[step % len(batches)].items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
