"""Measures what the rest of the plan predicts: real steps of the recipe's model on this machine, on random tokens.
One process, no launcher and no prepared data; the strategies that shard are not measured here.

On a GPU the peak is torch's own count. On a CPU it is summed from the allocations that torch's profiler records, and
what autograd holds is counted tensor by tensor, each storage once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.attention import attention_dropout, choose_attention
from trainer.config import MaskedLM, Recipe
from trainer.data.masking import masking
from trainer.data.packing import PackedRows, StreamRows
from trainer.data.shards import TokenShards
from trainer.data.stream import Batch, BatchPlan, TrainStream
from trainer.data.tokenizer_training import BERT_SPECIALS, ROBERTA_SPECIALS, specials_of
from trainer.engine.optim import build_optimizer
from trainer.errors import UserError
from trainer.heads import choose_loss_plan
from trainer.models import LanguageModel, build, checkpoint_layers, decay_groups, load_tokenizer
from trainer.objectives.language_model import language_model
from trainer.planning.activations import CrossEntropy, Numerics, activations
from trainer.planning.case import plain_case
from trainer.planning.memory import footprint, kept_weight_copies, standard_strategies
from trainer.planning.workload import Workload, workloads
from trainer.session import framing_for

_MICRO_STEPS = 2  # from the second on, gradients of all parameters are there beside the activations


@dataclass(frozen=True)
class Measured:
    """Bytes, and the kernels that they were measured with."""

    attention: str
    cross_entropy: CrossEntropy
    weights: int
    gradients: int
    optimizer: int
    saved: int  # by autograd at the end of a forward pass, parameters not counted
    peak: int


def probe(recipe: Recipe) -> dict[str, Any]:
    """Parts of the pretrain stage's memory, predicted for one process and measured, with the prediction's error."""
    if recipe.pretrain is None:
        raise UserError("--probe: the recipe has no `pretrain` section", "one whose model can be built and run")
    workload = workloads(recipe)[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said: list[str] = []
    measured = measure(recipe, workload, device, said.append)
    case = plain_case(workload, cuda=device.type == "cuda")
    dense_mask = measured.attention == "sdpa"
    batch = replace(case.batch, dense_mask=dense_mask, cross_entropy=measured.cross_entropy)
    case = replace(case, batch=batch)
    strategy = standard_strategies()[0]  # ddp
    peak = footprint(case, 1, strategy)
    numerics = Numerics.of(case.precision, strategy.autocast(case.precision), case.cuda)
    held = activations(case.shape, numerics, case.batch)
    pairs = {
        "weights": (peak.states.weights, measured.weights),
        "gradients": (peak.states.gradients, measured.gradients),
        "optimizer state": (peak.states.moments, measured.optimizer),
        "activations": (held.saved + kept_weight_copies(case.shape, numerics, case.batch), measured.saved),
        "peak": (peak.total, measured.peak),
    }
    return {
        "device": torch.cuda.get_device_name(device) if case.cuda else "CPU",
        "what": f"{case.batch.rows} rows of {case.batch.length} tokens, {case.precision}",
        "parts": [
            {"part": part, "predicted_bytes": predicted, "measured_bytes": real, "error": predicted / real - 1}
            for part, (predicted, real) in pairs.items()
        ],
        "notes": said,
    }


def measure(recipe: Recipe, workload: Workload, device: torch.device, say: Callable[[str], None]) -> Measured:
    """Two optimizer steps of two micro-batches each; the second is measured, and then what a forward pass keeps."""
    optim = workload.training.optim
    tokenizer = tokenizer_of(recipe, workload)
    module, attention, cross_entropy = _module(recipe, workload, tokenizer, device, say)
    groups = decay_groups(module, optim.weight_decay)
    optimizer = build_optimizer(optim, groups, say, device_type=device.type, offload=False, sharded=False)
    batches = [batch.to(device) for batch in random_batches(recipe, workload, tokenizer)]
    autocast = _autocast(workload.training.precision, device)

    def micro_steps() -> None:
        for batch in batches:
            counts = {"targets": float(batch.num_targets), "tokens": float(batch.num_tokens)}
            with autocast:
                loss = language_model(module, batch).divided(counts)
            loss.backward()

    def step() -> None:
        micro_steps()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = _peak_bytes(step, device, _bytes_of(module.parameters()) + _bytes_of(_state(optimizer)))
    micro_steps()
    gradients = _bytes_of(p.grad for p in module.parameters() if p.grad is not None)
    saved: dict[int, torch.UntypedStorage] = {}
    with recorded(saved), autocast:
        language_model(module, batches[-1])
    return Measured(
        attention=attention,
        cross_entropy=cross_entropy,
        weights=_bytes_of(module.parameters()),
        gradients=gradients,
        optimizer=_bytes_of(_state(optimizer)),
        saved=kept_bytes(saved, module),
        peak=peak,
    )


def _module(
    recipe: Recipe,
    workload: Workload,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[LanguageModel, str, CrossEntropy]:
    """The model as `session` prepares it, its attention kernel, and how its logits are made."""
    stage, training = recipe.pretrain, workload.training
    assert stage is not None
    model = build(stage.model, tokenizer, stage.objective.name == "causal_lm", stage.longest_row, recipe.seed)
    isolated, dropout = workload.data.packing == "isolate", attention_dropout(model.config)
    kernel = choose_attention(training.attention, model, isolated, device, training.precision, dropout, say)
    targets = plain_case(workload, cuda=False).batch.targets
    plan = choose_loss_plan(training.cross_entropy, model, targets, False, device, say)
    if training.gradient_checkpointing:
        checkpoint_layers(model)
    kind: CrossEntropy = "liger" if plan.liger else "chunked" if plan.parts > 1 else "full"
    return LanguageModel(model, kernel, plan).to(device).train(), kernel, kind


def kept_bytes(saved: Mapping[int, torch.UntypedStorage], module: nn.Module) -> int:
    """Bytes of recorded storages that are not the module's parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    return sum(storage.nbytes() for place, storage in saved.items() if place not in own)


@contextmanager
def recorded(saved: dict[int, torch.UntypedStorage]) -> Iterator[None]:
    """Fills `saved` with the storages that autograd keeps, by their address; holding them keeps addresses apart."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _peak_bytes(step: Any, device: torch.device, at_rest: int) -> int:
    """Most bytes in tensors while `step` runs; `at_rest`: what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return at_rest + int(np.cumsum(changes).max())


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision in ("fp32", "tf32"):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def random_batches(recipe: Recipe, workload: Workload, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Micro-batches of random tokens, made by the data code; a packed row holds two documents of half its length."""
    rows, length = workload.training.micro_batch_size, workload.data.sequence_length
    causal = workload.objective.name == "causal_lm"
    framing = framing_for(tokenizer, causal, length)
    text = length // 2 - framing.overhead + (causal and framing.begin is None)
    documents = 2 * rows * (_MICRO_STEPS + 1) + 4
    tokens = np.random.default_rng(recipe.seed).integers(len(tokenizer), size=documents * text)
    manifest = {
        "sources": [{"name": "random", "weight": 1.0}],
        "splits": {"train": {"shards": [{"source": "random"}]}},
        "end_of_document": None,
    }
    shards = TokenShards(manifest, "train", [(np.full(documents, text), tokens)])
    made = (PackedRows if workload.data.packing == "isolate" else StreamRows)(shards, framing, recipe.seed)
    mask = None
    if isinstance(workload.objective, MaskedLM):
        mask = masking(tokenizer, workload.objective.mlm_probability, False, recipe.seed)
    plan = BatchPlan(_MICRO_STEPS * rows, rows, rank=0, world=1)
    return TrainStream(made, mask, plan, recipe.seed).micro_batches(0)


def tokenizer_of(recipe: Recipe, workload: Workload) -> PreTrainedTokenizerBase:
    """The prepared tokenizer, else one with as many entries and the special tokens of its kind."""
    if (recipe.tokenizer_dir / "tokenizer_config.json").is_file():
        return load_tokenizer(recipe.tokenizer_dir)
    kind = (recipe.prepare.tokenizer.type if recipe.prepare else None) or "byte_level_bpe"
    kind = "wordpiece" if workload.objective.name == "masked_lm" and recipe.prepare is None else kind
    specials = specials_of(kind)
    if workload.shape.vocabulary <= len(specials):
        raise UserError(f"a vocabulary of {workload.shape.vocabulary} entries", f"more than {len(specials)}")
    entries = specials + [f"w{number}" for number in range(workload.shape.vocabulary - len(specials))]
    roles = BERT_SPECIALS if kind == "wordpiece" else ROBERTA_SPECIALS
    backend = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, roles["unk_token"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
