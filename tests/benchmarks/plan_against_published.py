"""The plan's formulas against published figures: memory tables, throughput and utilisation, micro-batches that ran.

    python tests/benchmarks/plan_against_published.py [--out FILE]

Each row has the published value, what our formula makes of the same setting, and the error in per cent. Where a source
counts otherwise than we do, the row stays and says why. Nothing is measured here.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.planning.activations import MicroBatch, Numerics, block_bytes
from trainer.planning.case import Case
from trainer.planning.cost import flops_per_token, recomputed_flops_per_token
from trainer.planning.hardware import GPUS
from trainer.planning.memory import largest_micro_batch, standard_strategies, states
from trainer.planning.shapes import Shape, shape_of

RESULT = Path(__file__).parent / "results" / "plan_against_published.json"
STRATEGIES = {strategy.name: strategy for strategy in standard_strategies()}


@dataclass(frozen=True)
class Point:
    kind: str
    what: str
    unit: str
    published: float
    ours: float
    source: str
    note: str = ""

    @property
    def error_percent(self) -> float:
        return 100.0 * (self.ours / self.published - 1.0)


def points() -> list[Point]:
    return [*zero_table(), *deepspeed_estimator(), *selective_recompute(), *llm_foundry(), *megatron(), *others()]


# ---- memory ----------------------------------------------------------------------------------------------------


def zero_table() -> Iterator[Point]:
    """ZeRO, figure 1: 7.5B parameters on 64 GPUs, mixed precision, Adam; decimal GB, printed to one place."""
    published = {"ddp / zero0": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}
    for name, gb in published.items():
        ours = states(7.5e9, 64, STRATEGIES[name], "bf16").total / 1e9
        yield Point("memory: states", f"ZeRO paper, 7.5B on 64 GPUs, {name}", "GB", gb, ours, "arXiv:1910.02054")


def deepspeed_estimator() -> Iterator[Point]:
    """T5-3b on one node of eight (DeepSpeed docs/code-docs/source/memory.rst), in GiB."""
    parameters = 2851e6
    source = "DeepSpeed memory.rst"
    rows = (
        ("zero2_offload", 5.31, ""),
        ("zero2", 15.93, "it counts 4 + 16/n bytes a parameter: all 16-bit gradients, though stage 2 divides them"),
        ("zero3", 6.10, "it counts 18/n; ours is the paper's 16/n, and 4/n more at the update, which it leaves out"),
    )
    for name, gib, note in rows:
        held = states(parameters, 8, STRATEGIES[name], "bf16")
        ours = (held.total + held.update) / 2**30
        yield Point("memory: states", f"DeepSpeed estimator, T5-3b on 8 GPUs, {name}", "GiB", gib, ours, source, note)


def selective_recompute() -> Iterator[Point]:
    """Korthikanti et al. 2022, figure 1: activations of the first pipeline stage, with sequence parallelism and
    attention recomputed, which leaves 34 bytes x tokens x D a block. Ours: a bert block in 16 bits."""
    rows = (  # name, layers, hidden, heads, micro-batch, GiB, share of layers in flight by interleaved pipelining
        ("22B", 48, 6144, 64, 4, 9.5625, 1.0),
        ("175B", 96, 12288, 96, 1, 12.3515625, 1 + 7 / 24),
        ("530B", 105, 20480, 128, 1, 23.076171875, 1 + 34 / 105),
        ("1T", 128, 25600, 160, 1, 26.5625, 1.0),
    )
    for name, layers, hidden, heads, rows_, gib, in_flight in rows:
        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
        shape, _ = shape_of("bert", sizes | {"num_hidden_layers": layers})
        batch = MicroBatch(rows=rows_, length=2048, targets=0, isolated=False)
        block = block_bytes(shape, Numerics.of("bf16", autocast=False, cuda=True), batch)
        ours = block * layers * in_flight / 8 / 2**30  # tensor parallel 8
        yield Point("memory: activations", f"Megatron {name}, first stage", "GiB", gib, ours, "arXiv:2205.05198 fig. 1")


# ---- throughput ------------------------------------------------------------------------------------------------


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, length: int) -> Shape:
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": vocabulary, "n_positions": length}
    return shape_of("gpt2", sizes)[0]


# llm-foundry scripts/train/yamls/pretrain/mpt-*.yaml: layers, hidden, heads. Vocabulary 50,368.
MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
# llm-foundry scripts/train/benchmarking/README.md at 8c8dd48: model, sequence length, GPUs, type, micro-batch,
# activation checkpointing, tokens/s a GPU, MFU in %, parameters. amp_bf16, FULL_SHARD.
LLM_FOUNDRY = (
    ("125m", 2048, 8, "a100-80", 40, False, 142830, 44.79, 125311488),
    ("125m", 512, 8, "a100-80", 128, False, 165681, 42.56, 124131840),
    ("350m", 2048, 8, "a100-80", 32, False, 58782, 51.62, 355985408),
    ("350m", 8192, 8, "a100-80", 8, False, 36569, 53.8, 362276864),
    ("760m", 2048, 8, "a100-80", 24, False, 32434, 56.85, 760470528),
    ("1b", 2048, 8, "a100-80", 14, False, 20513, 59.86, 1315950592),
    ("1b", 1024, 8, "a100-80", 18, False, 22112, 60.15, 1313853440),
    ("3b", 2048, 8, "a100-80", 10, False, 10811, 62.11, 2651837440),
    ("7b", 2048, 8, "a100-80", 6, False, 4641, 64.23, 6658859008),
    ("13b", 2048, 8, "a100-80", 2, False, 2262, 59.57, 12853954560),
    ("13b", 4096, 8, "a100-80", 10, True, 2060, 57.62, 12864440320),
    ("30b", 2048, 8, "a100-80", 3, True, 916, 55.3, 29975214080),
    ("760m", 1024, 8, "h100", 48, False, 78581, 39.76, 758897664),
    ("1b", 2048, 8, "h100", 14, False, 45455, 41.82, 1315950592),
    ("3b", 512, 8, "h100", 40, False, 27965, 46.32, 2647905280),
    ("7b", 2048, 8, "h100", 6, False, 10643, 46.44, 6658859008),
    ("13b", 2048, 8, "h100", 2, False, 4792, 39.79, 12853954560),
    ("7b", 8192, 8, "h100", 8, True, 6935, 37.14, 6684024832),
    ("70b", 2048, 64, "h100", 8, True, 1039, 42.57, 64862437376),
)


def llm_foundry() -> Iterator[Point]:
    source = "llm-foundry benchmarking README"
    for name, length, gpus, gpu, _, _, tokens_per_s, mfu, parameters in LLM_FOUNDRY:
        shape = gpt(*MPT[name], 50368, length)
        what = f"MPT-{name}, {gpus} x {gpu}, T {length}"
        yield Point("parameters", what, "", parameters, shape.parameters().total, source)
        ours = 100.0 * tokens_per_s * flops_per_token(shape, length) / GPUS[gpu].peak_flops("bf16")
        note = "its N holds the position table, ours does not"
        yield Point("MFU", what, "%", mfu, ours, source, note)


def megatron() -> Iterator[Point]:
    """Iteration times of arXiv:2205.05198 table 5 (calculon's llm/validation.py) against the MFU of Megatron-LM's
    README; days for 300B tokens against the TFLOP/s beside them (arXiv:2104.04473, table 2)."""
    peak = GPUS["a100-80"].peak_flops("bf16")
    for name, shape, gpus, batch, seconds, mfu in (
        ("22B", gpt(48, 6144, 64, 51200, 2048), 8, 4, 1.10, 41.5),
        ("175B", gpt(96, 12288, 96, 51200, 2048), 64, 64, 13.75, 51.4),
        ("530B", gpt(105, 20480, 128, 51200, 2048), 280, 280, 37.83, 56.0),
        ("1T", gpt(128, 25600, 160, 51200, 2048), 512, 512, 71.49, 56.3),
    ):
        ours = 100.0 * batch * 2048 * flops_per_token(shape, 2048) / (seconds * gpus * peak)
        yield Point("MFU", f"Megatron {name}, {gpus} A100", "%", mfu, ours, "arXiv:2205.05198 tab. 5")
    large, larger = gpt(96, 12288, 96, 51200, 2048), gpt(105, 20480, 128, 51200, 2048)
    for name, shape, gpus, days, tflops in (
        ("PTD 174.6B", large, 384, 84, 153),
        ("PTD 174.6B", large, 768, 43, 149),
        ("PTD 174.6B", large, 1536, 23, 141),
        ("PTD 529.6B", larger, 560, 156, 171),
        ("PTD 529.6B", larger, 1120, 80, 167),
        ("PTD 529.6B", larger, 2240, 42, 159),
        ("ZeRO-3 174.6B", large, 384, 90, 144),
        ("ZeRO-3 174.6B", large, 768, 74, 88),
        ("ZeRO-3 174.6B", large, 1536, 74, 44),
        ("ZeRO-3 529.6B", larger, 640, 169, 138),
        ("ZeRO-3 529.6B", larger, 1120, 137, 98),
        ("ZeRO-3 529.6B", larger, 2240, 140, 48),
    ):
        flops = flops_per_token(shape, 2048) + recomputed_flops_per_token(shape, 2048)
        ours = 300e9 * flops / (days * 86400 * gpus) / 1e12
        yield Point("TFLOP/s", f"{name}, {gpus} A100", "", tflops, ours, "arXiv:2104.04473 tab. 2", "days are rounded")


def others() -> Iterator[Point]:
    bert, _ = shape_of(
        "bert", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    )
    for length, rows_per_s, tflops in ((128, 272, 64), (512, 52, 53)):
        tokens_per_s = rows_per_s * length
        what, source = f"BERT-large, V100, T {length}", "DeepSpeed 2020-05-28-fastest-bert-training"
        note = "its head works at masked tokens only (15 % assumed)"
        ours = tokens_per_s * flops_per_token(bert, length, 0.15) / 1e12
        yield Point("TFLOP/s", what, "", tflops, ours, source, note)
    bloom = gpt(70, 14336, 112, 250880, 2048)
    flops = flops_per_token(bloom, 2048) + recomputed_flops_per_token(bloom, 2048)
    ours = 2048 * 2048 * flops / 105 / 384 / 1e12
    yield Point("TFLOP/s", "BLOOM-176B, 384 A100, 105 s a step", "", 149.5, ours, "bigscience tr11 chronicles")


# ---- micro-batches that ran ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A published micro-batch, and the largest one that the plan lets through on that GPU."""

    what: str
    published: int
    largest: int

    @property
    def allowed(self) -> bool:
        return self.largest >= self.published


def micro_batches() -> list[Ran]:
    """llm-foundry's settings: FSDP over fp32 shards with 16-bit compute, flash attention, no dropout; MPT's block is
    GPT-2's with torch's own gelu. Their micro-batches ran; whether one row more would have run is not published.

    Where the plan lets less through, logits are most of the memory: MPT's loss is flash-attn's fused kernel (loss_fn:
    fused_crossentropy), which keeps no fp32 log-probabilities; the plan counts torch's own cross entropy, as we train.
    """
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu"}
    strategy = STRATEGIES["fsdp2"]
    found = []
    for name, length, gpus, gpu, rows, checkpointing, *_ in LLM_FOUNDRY:
        layers, hidden, heads = MPT[name]
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 50368, "n_positions": length}
        shape, _ = shape_of("gpt2", sizes | plain)
        batch = MicroBatch(1, length, length, isolated=False, checkpointing=checkpointing)
        case = Case(shape, "bf16", "adamw", batch)
        largest = largest_micro_batch(case, gpus, strategy, GPUS[gpu].usable_bytes)
        found.append(Ran(f"MPT-{name}, {gpus} x {gpu}, T {length}" + ", AC" * checkpointing, rows, largest))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    all_points, ran = points(), micro_batches()
    console = Console(width=150)
    table = Table("kind", "what", "published", "ours", "error", "source")
    for point in all_points:
        numbers = [f"{value:,.4g} {point.unit}" for value in (point.published, point.ours)]
        table.add_row(point.kind, point.what, *numbers, f"{point.error_percent:+.2f} %", point.source)
    console.print(table)
    fits = Table("micro-batches that ran", "published", "largest by the plan", "allowed")
    for one in ran:
        fits.add_row(one.what, str(one.published), str(one.largest), "yes" if one.allowed else "[red]no[/red]")
    console.print(fits)
    content = {
        "command": "python tests/benchmarks/plan_against_published.py",
        "points": [asdict(point) | {"error_percent": round(point.error_percent, 3)} for point in all_points],
        "micro_batches": [asdict(one) | {"allowed": one.allowed} for one in ran],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
