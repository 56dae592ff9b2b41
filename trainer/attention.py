"""The attention kernels that a model can train with, and what each is given so that the documents of a row stay apart.
Which rows there are is the data code's business; the models and most kernels are transformers'.

Shapes: B rows, T tokens in a row, P documents in all rows, H heads, K key heads, D size of a head.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from torch.torch_version import TorchVersion
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from trainer.data.stream import Batch
from trainer.errors import UserError

Kernel = Literal["sdpa", "flex_attention", "flash_attention_2", "varlen"]

# Position 0 of these is padding_idx + 1 (transformers/models/roberta/modeling_roberta.py: position ids of an input).
_OFFSET_POSITIONS = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer")
# Architectures for which every kernel is held against the others by a test; `auto` tries nothing new on the rest.
_TESTED = ("bert", "distilbert", "roberta", "modernbert", "gpt2", "llama")
_DROPOUT_KEYS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
# Kernels that take the documents one after the other, by where each begins, instead of a mask.
_BY_BOUNDARIES = ("varlen", "flash_attention_2")
# Queries that one block of those kernels covers at the most: a longest document rounded up to it costs nothing, and
# compiled code sees fewer different numbers.
_QUERY_BLOCK = 128


def choose_attention(
    wanted: str,
    model: PreTrainedModel,
    isolated: bool,
    device: torch.device,
    precision: str,
    dropout: float,
    say: Callable[[str], None],
) -> Kernel:
    """Sets and returns the kernel for `attention: wanted`; auto takes the fastest that is right here, and says why.

    `dropout` is that of the attention weights while training, 0 for a model that is not trained. UserError for a
    kernel that is missing, or that cannot be right here.
    """
    if wanted == "auto":
        kernel, why = _automatic(model.config, isolated, device, precision, dropout)
        say(f"attention auto: {kernel} ({why})")
    else:
        kernel = cast(Kernel, wanted)
        obstacle = _obstacle(kernel, model.config, device, precision, dropout)
        if obstacle:
            raise UserError(f"attention {kernel}: {obstacle}", "a kernel that runs here", "use attention: auto or sdpa")
    _set(model, kernel)
    return kernel


def attention_dropout(config: PretrainedConfig) -> float:
    """Share of the attention weights that is dropped in training, under any of transformers' names for it."""
    return max([float(getattr(config, key, None) or 0.0) for key in _DROPOUT_KEYS])


def _automatic(
    config: PretrainedConfig, isolated: bool, device: torch.device, precision: str, dropout: float
) -> tuple[Kernel, str]:
    if device.type != "cuda":
        return "sdpa", f"the one that trains on {device.type}"
    if not isolated:
        return "sdpa", "rows without borders need no mask, so torch takes its flash kernel by itself"
    if config.model_type not in _TESTED:
        return "sdpa", f"right for any architecture; the faster ones are tested for {', '.join(_TESTED)}"
    obstacles = []
    for kernel in _BY_BOUNDARIES:
        obstacle = _obstacle(kernel, config, device, precision, dropout)
        if obstacle is None:
            return kernel, "computes nothing between documents" + "".join(f"; {other}" for other in obstacles)
        obstacles.append(f"no {kernel}: {obstacle}")
    return "sdpa", "with a dense mask; " + "; ".join(obstacles)


def _obstacle(
    kernel: Kernel, config: PretrainedConfig, device: torch.device, precision: str, dropout: float
) -> str | None:
    """Why the kernel cannot be used here; None if it can."""
    if kernel == "sdpa":
        return None
    if device.type != "cuda":
        return f"it does not train on {device.type}"  # flex_attention runs forward on a CPU, and has no backward there
    if dropout and kernel != "flash_attention_2":
        return f"it has no dropout, and the model's attention has {dropout:g} (set it to 0 in model.config)"
    if kernel == "flex_attention":
        return None
    if precision not in ("bf16", "fp16"):
        return f"it multiplies in bf16 or fp16, not in {precision}"
    if kernel == "flash_attention_2" and not is_flash_attn_2_available():
        return "no package flash-attn"
    # torch 2.13's has window_size and enable_gqa, which models with sliding windows and shared key heads need.
    if kernel == "varlen" and (TorchVersion(torch.__version__) < "2.13" or torch.version.hip):
        return f"torch {torch.__version__} has no varlen_attn for an NVIDIA GPU that takes all we give it"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"it takes heads of a multiple of 8 up to 256, not {head_size}" if head_size % 8 or head_size > 256 else None


def _set(model: PreTrainedModel, kernel: Kernel) -> None:
    if kernel == "varlen":
        AttentionInterface.register("varlen", varlen_attention)
    try:
        model.set_attn_implementation(kernel)
        reason = "its code does not go through transformers' AttentionInterface"
    except (ValueError, ImportError) as error:
        reason = str(error)
    if (
        model.config._attn_implementation != kernel
    ):  # transformers only warns of some models that it leaves as they were
        raise UserError(
            f"attention {kernel}: transformers does not offer it for {model.config.model_type} ({reason})",
            "a kernel that the architecture takes",
            "use attention: auto or sdpa",
        )


def varlen_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """torch's varlen_attn in the form that transformers calls an attention function; returns [B, T, H, D].

    `cu_seq_lens_q` [P + 1] says where documents begin in the rows one after the other, `max_length_q` how long one is
    at the most. A window of w reaches w - 1 tokens back, and forward if the model is not causal, as in transformers'
    flash attention. UserError for what the kernel would leave out without a word.
    """
    ignored = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or dropout or ignored:
        raise UserError(
            f"attention varlen: {type(module).__name__} calls for what it cannot do ({', '.join(ignored) or 'a mask'})",
            "documents given by their borders, without dropout, mask or changed scores",
            "use attention: sdpa",
        )
    kind = query_BHTD.device.type  # rotary positions leave queries and keys in float32 under autocast
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_BHTD.dtype
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query_BHTD, key_BKTD, value_BKTD))
    back = -1 if sliding_window is None else sliding_window - 1
    ahead = 0 if (module.is_causal if is_causal is None else is_causal) else back
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(back, ahead),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unflatten(0, (query_BHTD.shape[0], query_BHTD.shape[2])), None


def packed_inputs(config: PretrainedConfig, causal: bool, kernel: Kernel, batch: Batch) -> dict[str, Any]:
    """Positions, and the mask or borders by which `kernel` keeps the documents of a row apart.

    Padding is a document of its own (a token that sees nothing at all is NaN in some kernels). With borders the rows
    are taken one after the other as one long row: transformers would find borders in position ids too, but only where
    B = 1. With a mask, causal models of transformers do find them there; encoders get [B, 1, T, T].
    """
    inputs: dict[str, Any] = {}
    if kernel in _BY_BOUNDARIES:
        longest = -(-batch.longest // _QUERY_BLOCK) * _QUERY_BLOCK
        inputs |= {"cu_seq_lens_q": batch.boundaries, "cu_seq_lens_k": batch.boundaries}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    if not batch.isolated:
        return inputs
    inputs["position_ids"] = batch.positions + position_offset(config.model_type, config.pad_token_id)
    if causal or kernel in _BY_BOUNDARIES:
        return inputs
    mask = _block_mask if kernel == "flex_attention" else _dense_mask
    if config.model_type != "modernbert":
        return inputs | {"attention_mask": mask(batch.segments, None)}
    full, sliding = mask(batch.segments, None), mask(batch.segments, config.sliding_window)
    return inputs | {"attention_mask": {"full_attention": full, "sliding_attention": sliding}}


def position_offset(architecture: str, pad_token_id: int | None) -> int:
    """Rows of the position table that stand before position 0."""
    return (pad_token_id or 0) + 1 if architecture in _OFFSET_POSITIONS else 0


def _dense_mask(segments: Tensor, window: int | None) -> Tensor:
    """[B, 1, T, T]: True where a token sees another, of its own document and within `window` tokens.

    On a GPU a mask rules out SDPA's flash kernel (check_for_attn_mask in torch's sdp_utils.cpp): cuDNN's or the
    memory-efficient one runs, over all T * T.
    """
    same_B1TT = segments[:, None, :, None] == segments[:, None, None, :]
    if window is None:
        return same_B1TT
    at_T = torch.arange(segments.shape[1], device=segments.device)
    return same_B1TT & ((at_T[:, None] - at_T[None, :]).abs() <= window)


def _block_mask(segments: Tensor, window: int | None) -> BlockMask:
    """The same as `_dense_mask`, by blocks, of which empty ones are skipped."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segments[row, query] == segments[row, key]
        return same if window is None else same & ((query - key).abs() <= window)

    rows, length = segments.shape
    return create_block_mask(sees, rows, None, length, length, device=segments.device)


def check_isolation(model: nn.Module, config: PretrainedConfig, precision: str, rows: int, length: int) -> None:
    """UserError if a document of a packed row changes what the model says about its neighbour.

    Runs rows of two documents, in the kernel and precision that training will have. Not every architecture takes
    packed rows; one that does not would train on mixed contexts without any other sign. `model` is a LanguageModel.
    """
    half = length // 2
    device = next(model.parameters()).device
    tokens = torch.arange(2 * half, device=device).remainder(max(2, config.vocab_size - 1))
    first, second = tokens[:half], tokens[half:]
    at_start = torch.arange(half, device=device)[-8:]  # a few tokens that see the most
    at_second = at_start + half
    training = model.training
    with torch.no_grad():
        model.eval()
        one, again, other, moved = (
            _logits(model, torch.cat(documents).repeat(rows, 1), places)
            for documents, places in (
                ((first, second), at_second),
                ((first, second), at_second),
                ((first.flip(0), second), at_second),
                ((second, first), at_start),
            )
        )
    model.train(training)
    noise, leak = (one - again).abs().max().item(), (one - other).abs().max().item()
    shift = (one - moved).abs().max().item() / max(1.0, one.abs().max().item())
    # The neighbour's text enters no sum, not even its rounding. Standing elsewhere in the row does change rounding:
    # below 1e-5 in float32 (seen), while a wrong position moves logits by 1e-2 and up; half precision rounds to 2^-9.
    if leak > noise or shift > (1e-3 if precision == "fp32" else 0.05):
        raise UserError(
            f"architecture {config.model_type!r} mixes the documents of a packed row (logits move by "
            f"{max(leak, shift):.2g})",
            "one whose attention stays inside a document",
            "use bert, distilbert, roberta, modernbert, gpt2, llama, or data.packing: concatenate for a causal model",
        )


def _logits(model: nn.Module, input_ids: Tensor, places_N: Tensor) -> Tensor:
    """Logits [N, V] at places of the first row; each row holds two documents of equal length."""
    rows, length = input_ids.shape
    at_T = torch.arange(length, device=input_ids.device)
    batch = Batch(
        input_ids=input_ids,
        segments=(at_T.div(length // 2, rounding_mode="floor") + 1).expand(rows, -1),
        positions=at_T.remainder(length // 2).expand(rows, -1),
        boundaries=torch.arange(0, rows * length + 1, length // 2, device=input_ids.device, dtype=torch.int32),
        longest=length // 2,
        target_places=places_N,
        targets=places_N,
        sample_ids=(),
        num_tokens=input_ids.numel(),
        isolated=True,
    )
    return model(batch=batch, score=lambda logits_NV, part: {"logits": logits_NV})["logits"]
