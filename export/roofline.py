"""The least time that a call can take on this machine, by what it multiplies and what it reads, and the share reached.
The machine's rates are `machine_rates`'; nothing is run here.

The roofline of Williams et al. 2009: the larger of operations over the machine's rate and bytes over its bandwidth.
Operations: 2 N + 4 L D T a token (PaLM, arXiv:2204.02311, appendix B, forward part), padding included, as it is
computed too. Bytes: the weights that multiply, once a call, and a decoder's cache; activations are left out, so that
the limit is never too high.
Shape letters: N parameters that multiply, L layers, D heads times their size, T tokens seen, B batch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.io_spec import IoSpec
from trainer.export_config import ENGINES

_LOOKED_UP = r"embed|\bwte\b|\bwpe\b|\bshared\b|relative_attention_bias|final_logits_bias"
# What an encoder-decoder's encoder graph multiplies by: its own matrices, and those of the decoder's that make keys and
# values of what was encoded.
_ENCODING = r"\bencoder\.|EncDecAttention\.[kv]\.|encoder_attn\.[kv]_proj"
# They see one token of a row, or nothing of them is exported.
_ONCE_A_ROW = {"classification": "pooler|classifier", "feature_extraction": "pooler"}
_CACHE_BYTES = 4  # fp32, in every form
# Which product does the work, by the backend's name; int4 products take int8 activations (quantize.py).
_KINDS = {"onnx_int8": "int8", "onnx_int8_static": "int8", "onnx_int4": "int8", "onnx_fp16": "fp16",
          "onnx_bf16": "bf16", "tensorrt_fp16": "fp16", "tensorrt_bf16": "bf16",
          "tensorrt_int8_static": "int8", "tensorrt_fp8": "fp8"}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one call of a model needs, by the sizes of the model."""

    multiplying: int  # N
    share_read: float  # of the parameters in the file: those that multiply
    layers: int
    width: int  # D
    cache_width: int  # heads of keys and values times their size; 0 for an encoder
    encoder: "Work | None" = None
    """Of an encoder-decoder, whose other figures are the decoder's."""

    def operations(self, tokens: float, seen: float) -> tuple[float, float]:
        """Of the weights' products, and of attention, for so many tokens that see `seen` tokens each."""
        return 2.0 * self.multiplying * tokens, 4.0 * self.layers * self.width * seen * tokens

    def cache_bytes(self, rows: float, kept: float) -> float:
        """Keys and values of `kept` tokens in each of so many rows."""
        return 2.0 * self.layers * self.cache_width * kept * rows * _CACHE_BYTES


def work_of(model: Path, spec: IoSpec) -> Work | None:
    """The work of a model folder; None for one without safetensors."""
    from safetensors import safe_open
    from transformers import AutoConfig

    shapes: dict[str, list[int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    if not shapes:
        return None
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    once = _ONCE_A_ROW.get(spec.task, "(?!)")
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    matrices = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not re.search(_LOOKED_UP, name) and not re.search(once, name)
    }
    if spec.encoder is not None:
        return _work_of_pair(matrices, total, spec, config)
    multiplying = sum(int(np.prod(shape)) for shape in matrices.values())
    if spec.task in ("masked_lm", "causal_lm"):
        multiplying += _tied_head(matrices, spec, config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Work(
        multiplying=multiplying,
        share_read=min(1.0, multiplying / total),
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * size,
        cache_width=spec.cache.heads * spec.cache.head_size if spec.cache else 0,
    )


def _tied_head(matrices: Mapping[str, list[int]], spec: IoSpec, config: Any) -> int:
    """Parameters of a head that is the table of embeddings; 0 where it has a matrix of its own."""
    own = any(shape[0] == spec.vocab_size for shape in matrices.values())
    return 0 if own else spec.vocab_size * config.hidden_size


def _work_of_pair(matrices: Mapping[str, list[int]], total: int, spec: IoSpec, config: Any) -> Work:
    assert spec.cross is not None
    encoding = sum(int(np.prod(shape)) for name, shape in matrices.items() if re.search(_ENCODING, name))
    decoding = sum(int(np.prod(shape)) for shape in matrices.values()) - encoding
    decoding += _tied_head(matrices, spec, config)
    width, layers = spec.cross.heads * spec.cross.head_size, getattr(config, "encoder_layers", config.num_hidden_layers)
    encoder = Work(encoding, min(1.0, encoding / total), layers, width, 0)
    return Work(decoding, min(1.0, decoding / total), spec.cross.layers, width, width, encoder)


def least_s(
    work: Work, backend: str, file_bytes: float, rates: Mapping[str, Any], tokens: float, seen: float, cache: float = 0
) -> tuple[float, str] | None:
    """Seconds that the limit allows for one call, and which limit binds; None where a rate was not measured.

    `tokens` of all rows are computed, each seeing `seen`; `cache` bytes are read or written. Attention multiplies in
    fp32 also where weights are int8. Products for which no rate of their own was measured count as fp32, but for those
    of an engine, which really multiplies in what it was built for: None.
    """
    fp32, bandwidth = rates.get("fp32_per_s"), rates.get("bytes_per_s")
    if not fp32 or not bandwidth:
        return None
    kind = _KINDS.get(backend, "fp32")
    matrices, attention = work.operations(tokens, seen)
    own = rates.get(f"{kind}_per_s") or (fp32 if backend not in ENGINES else None)
    if own is None:
        return None
    compute_s = matrices / own + attention / (fp32 if kind == "int8" else own)
    memory_s = (file_bytes * work.share_read + cache) / bandwidth
    return max((compute_s, "compute"), (memory_s, "memory"))


def limit_of(row: Mapping[str, Any], work: Work, rates: Mapping[str, Any]) -> dict[str, Any]:
    """`limit_share`, the least time over the measured one, and `limit`, the one that binds; nothing where not known.

    `row`: one of the grid, or of a decoder's steps, for which the cache is that of the middle step. A row of the
    grid of an encoder-decoder is the encoder's call and the decoder's first step; the limit named is the slower one's.
    """
    batch, decoding = row["batch_size"], "prompt_tokens" in row
    taken_ms = row.get("token_ms" if decoding else "p50_ms")
    if not taken_ms or not row["file_mib"]:
        return {}
    tokens = batch if decoding else row["padded_tokens"]
    seen = row["prompt_tokens"] + row["new_tokens"] / 2 if decoding else tokens / batch
    file_bytes, least = row["file_mib"] * 2**20, []
    if work.encoder is not None and not decoding:  # it is run first, then the decoder takes one token for each text
        least.append(least_s(work.encoder, row["backend"], file_bytes, rates, tokens, seen))
        tokens = batch
    cache = work.cache_bytes(batch, seen)
    least.append(least_s(work, row["backend"], file_bytes, rates, tokens, seen, cache))
    known = [one for one in least if one is not None]
    if not known:
        return {}
    return {"limit_share": sum(seconds for seconds, _ in known) * 1e3 / taken_ms, "limit": max(known)[1]}
