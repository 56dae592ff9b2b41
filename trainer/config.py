"""The schema of a recipe: every key a user may write, with its type, bound, unit and meaning.
Export's part is in `export_config`, the server's in `serving_config`; reading YAML is `recipe_file`'s. Nothing here
does I/O or imports torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainer.export_config import Bench, Export
from trainer.sections import Fraction, NonNegative, Positive, Section, Share
from trainer.serving_config import Pack, TensorRT
from trainer.slurm_config import Slurm

# ---- prepare ---------------------------------------------------------------------------------------------------


class Source(Section):
    type: Literal["stdlib", "text", "jsonl", "parquet"]
    """stdlib: the source files of Python's own standard library; the others read `paths`."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Name in reports and shard files; by default type and position, such as `text-1`."""
    paths: tuple[str, ...] = ()
    """Files, folders (searched through) and glob patterns; .gz .xz .zst .bz2 are opened as they are."""
    text_field: str = "text"
    """jsonl and parquet: the field that holds the text."""
    document: Literal["file", "line", "block"] = "file"
    """text: what one document is: a whole file, a line, or a block between blank lines."""
    weight: Positive = 1.0
    """How many times an epoch goes over this source; a fraction takes a fixed part, by the documents' hashes.
    Validation has each document once."""
    split: Literal["hash", "train", "validation"] = "hash"
    """hash: by document hash (see `validation_fraction`); else all documents go to the named split."""
    on_bad_document: Literal["error", "skip"] = "error"
    """A document that cannot be decoded or lacks its text field: stop, or count and report it."""

    @model_validator(mode="after")
    def _paths_fit_type(self) -> "Source":
        if (self.type == "stdlib") == bool(self.paths):
            raise ValueError("source type stdlib takes no paths; every other type needs at least one")
        return self


class Tokenizer(Section):
    type: Literal["wordpiece", "byte_level_bpe", "unigram", "character"] | None = None
    """The kind to train on the training split; leave out to load one from `path`."""
    path: Path | None = None
    """A tokenizer.json, a vocab.txt, a folder with vocab.json and merges.txt, or a model folder."""
    vocab_size: Annotated[int, Field(ge=16, le=2**20)] = 8192
    """Entries including special tokens. `character` takes what the text has and needs no size."""
    lowercase: bool = False
    """Fold case and strip accents, as the uncased BERT models do."""
    max_training_mib: Positive = 256.0
    """Text that the tokenizer is trained on, in MiB, taken in document-hash order."""

    @model_validator(mode="after")
    def _trained_or_loaded(self) -> "Tokenizer":
        if (self.type is None) == (self.path is None):
            raise ValueError("give either `type` (train one) or `path` (load one)")
        ignored = [key for key in self._without_meaning() if key in self.model_fields_set]
        if ignored:
            kind = "a tokenizer from `path`" if self.type is None else f"type {self.type}"
            raise ValueError(f"{' and '.join(ignored)} would change nothing: {kind} brings its own")
        return self

    def _without_meaning(self) -> tuple[str, ...]:
        if self.path is not None:
            return ("vocab_size", "max_training_mib")
        return ("vocab_size",) if self.type == "character" else ()

    @model_serializer(mode="wrap")
    def _only_what_has_a_meaning(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A resolved recipe must load again, so it holds no defaults that would be refused if they were written."""
        return {key: value for key, value in dump(self).items() if key not in self._without_meaning()}


class Prepare(Section):
    """Raw text to tokenizer and token shards."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    tokenizer: Tokenizer
    validation_fraction: Share = 0.01
    """Share of the documents of `split: hash` sources that are held out."""
    deduplicate: bool = True
    """Keep only the first of documents with equal text."""
    min_document_characters: PositiveInt = 1
    """Shorter documents are dropped and counted."""
    max_shard_tokens: Annotated[int, Field(ge=1024)] = 2**28
    """Tokens in one .bin file before the next is opened."""


# ---- training --------------------------------------------------------------------------------------------------


class Optim(Section):
    name: Literal["adamw", "lamb", "lion"] = "adamw"
    backend: Literal["auto", "torch", "torch_foreach", "apex", "deepspeed"] = "auto"
    """Whose implementation: torch (fused AdamW; our LAMB), torch_foreach (AdamW), NVIDIA Apex, DeepSpeed. auto takes
    the fastest that is there and says so."""
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    """For matrices; biases, norms and other one-dimensional parameters are not decayed."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    epsilon: Positive = 1e-8


class Schedule(Section):
    name: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay: length of the last, falling part."""
    min_ratio: Fraction = 0.0
    """Learning rate at the end as a part of the highest."""

    @model_validator(mode="after")
    def _decay_where_needed(self) -> "Schedule":
        if (self.name == "warmup_stable_decay") != (self.decay_steps is not None):
            raise ValueError("decay_steps belongs to warmup_stable_decay, which needs it")
        return self


class EngineConfig(Section):
    """How the work of a step falls to the ranks."""

    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """auto: deepspeed where `zero` or the launcher names a DeepSpeed config, else ddp."""
    zero: str | None = None
    """deepspeed: a name in deepspeed_configs/, such as zero2, or the path of a DeepSpeed JSON of your own."""
    nvme_path: Path | None = None
    """Folder on a node's own NVMe drive, for the configs that offload to one."""
    collective_timeout_s: Positive = 600.0
    """A rank that waits longer than this for the others ends the run, with a dump of what each rank was doing."""

    @model_validator(mode="after")
    def _zero_is_deepspeed(self) -> "EngineConfig":
        if self.zero is not None and self.strategy not in ("auto", "deepspeed"):
            raise ValueError(f"zero belongs to strategy deepspeed, not {self.strategy}")
        return self


class LossSpike(Section):
    """What counts as a spike, and how far to go back (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1)."""

    factor: Annotated[float, Field(gt=1.0)] = 1.5
    """A step's loss above this times the running median is a spike."""
    window_steps: Annotated[int, Field(ge=8)] = 128
    """Steps that the median runs over; none is seen before so many."""
    skip_steps: PositiveInt = 200
    """Batches left out after the spike's own; those between the last checkpoint and the spike are left out too."""
    max_rewinds: PositiveInt = 3


class CheckpointConfig(Section):
    asynchronous: bool = False
    """Write in the background, from a copy in host memory that is taken first."""


class Training(Section):
    """How optimizer steps are taken; the same for every stage that trains."""

    max_steps: PositiveInt
    global_batch_size: PositiveInt
    """Sequences in one optimizer step, over all ranks and accumulated micro-batches."""
    micro_batch_size: PositiveInt
    """Sequences that one rank holds at once."""
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8"] = "fp32"
    """What matrices are multiplied in. Master weights and optimizer state are fp32 always."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile each transformer block and, on a GPU, cross entropy."""
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2", "varlen"] = "auto"
    """Kernel, by transformers' name, or varlen: torch's own flash kernel over documents of any length. auto takes the
    fastest that keeps packed documents apart here, and says so."""
    cross_entropy: Literal["auto", "full", "chunked", "liger"] = "auto"
    """full: all logits at once. chunked: a part of the targets at a time. liger: its fused kernel."""
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_bad_steps: PositiveInt = 3
    """Steps in a row with a non-finite loss or gradient (each is skipped on all ranks) before the run stops."""
    loss_spike: LossSpike | None = None
    """Go back and leave batches out when the loss spikes; null: never."""
    eval_every_steps: PositiveInt = 500
    eval_sequences: PositiveInt | None = 1024
    """Validation rows in one evaluation; null: all."""
    log_every_steps: PositiveInt = 10
    save_every_steps: PositiveInt = 500
    keep_last: PositiveInt = 2
    """Checkpoints kept; older ones are deleted after a newer one is committed."""
    resume: bool = True
    """Go on from the newest whole checkpoint; false: set existing ones aside and start at step 0."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "Training":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}; nearest: {nearest_multiples(self.global_batch_size, self.micro_batch_size)}"
            )
        if self.schedule.warmup_steps + (self.schedule.decay_steps or 0) > self.max_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} + decay_steps {self.schedule.decay_steps or 0} "
                f"exceed max_steps {self.max_steps}"
            )
        return self


# Keys of a stage that trains which may change between two attempts at one run: they move no sample and no number
# (micro_batch_size, the strategy and the kernels: up to the rounding of another order of summation).
FREE_KEYS = frozenset(
    {
        "micro_batch_size",
        "gradient_checkpointing",
        "compile",
        "attention",
        "cross_entropy",
        "engine",
        "checkpoint",
        "max_bad_steps",
        "loss_spike",
        "eval_every_steps",
        "eval_sequences",
        "log_every_steps",
        "save_every_steps",
        "keep_last",
        "resume",
    }
)


def deciding_settings(stage: Training) -> dict[str, Any]:
    """The settings of a stage that its model depends on, as a tree of plain values."""
    settings = _without_free_keys(stage.model_dump(mode="json"))
    settings["optim"] = {key: value for key, value in settings["optim"].items() if key != "backend"}
    if "phases" in settings:
        settings["phases"] = [_without_free_keys(phase) for phase in settings["phases"]]
    return settings


def _without_free_keys(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in FREE_KEYS}


def nearest_multiples(value: int, of: int) -> str:
    """The three multiples of `of` nearest to `value`, as text for a message."""
    middle = max(2, round(value / of))
    return ", ".join(str(of * factor) for factor in (middle - 1, middle, middle + 1))


class MaskedLM(Section):
    name: Literal["masked_lm"]
    mlm_probability: Share = 0.15
    """Share of tokens that are targets (80 % become [MASK], 10 % a random token, 10 % stay)."""
    whole_word: bool = True
    """Mask all pieces of a word together."""


class CausalLM(Section):
    name: Literal["causal_lm"]


Objective = Annotated[MaskedLM | CausalLM, Field(discriminator="name")]


class Data(Section):
    sequence_length: Annotated[int, Field(ge=8)]
    """Tokens in a row."""
    packing: Literal["isolate", "concatenate"] = "isolate"
    """isolate: documents share a row but see only themselves. concatenate (causal models): one long stream
    cut into rows, as GPT-2 was trained."""


class Model(Section):
    architecture: str | None = None
    """A transformers model type, such as bert, distilbert, roberta, modernbert, gpt2, llama."""
    config: dict[str, Any] = {}
    """Keys of that type's transformers config. Vocabulary and special tokens come from the tokenizer."""
    init_from: Path | None = None
    """Continue from this model folder; then `architecture` and `config` stay empty."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.architecture is None) == (self.init_from is None):
            raise ValueError("give either `architecture` (build new) or `init_from` (continue)")
        if self.init_from is not None and self.config:
            raise ValueError("`config` belongs to `architecture`; a model from `init_from` brings its own")
        return self


class Phase(Section):
    """Steps that follow with other settings, on the same model and optimizer state; what is not given stays."""

    max_steps: PositiveInt
    """Steps of this phase."""
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    learning_rate: Positive | None = None
    schedule: Schedule | None = None
    """Counted from this phase's first step."""


class Pretrain(Training):
    """A language model from token shards."""

    model: Model
    objective: Objective
    data: Data
    phases: tuple[Phase, ...] = ()
    """Phases after the first, which is what this section says; BERT's second one has longer rows."""

    @model_validator(mode="after")
    def _concatenate_is_causal(self) -> "Pretrain":
        if self.data.packing == "concatenate" and self.objective.name != "causal_lm":
            raise ValueError("packing: concatenate is for causal_lm; masked_lm rows are packed with `isolate`")
        return self

    @model_validator(mode="after")
    def _phases_hold_together(self) -> "Pretrain":
        for number in range(1, len(self.phases) + 1):
            self.phase_training(number)  # validates it as a section of its own
        return self

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self.max_steps + sum(phase.max_steps for phase in self.phases)

    @property
    def longest_row(self) -> int:
        """Tokens in the longest rows of any phase."""
        return max(self.data.sequence_length, *(phase.sequence_length or 0 for phase in self.phases), 0)

    def phase_training(self, number: int) -> Training:
        """How phase `number` trains (0: what the section itself says)."""
        own = {name: getattr(self, name) for name in Training.model_fields}
        if number:
            phase = self.phases[number - 1]
            own |= {name: value for name in ("max_steps", "global_batch_size", "micro_batch_size", "schedule")
                    if (value := getattr(phase, name)) is not None}  # fmt: skip
            if phase.learning_rate is not None:
                own["optim"] = self.optim.model_copy(update={"learning_rate": phase.learning_rate})
        return Training.model_validate(own)

    def phase_data(self, number: int) -> Data:
        """What rows phase `number` trains on."""
        length = self.phases[number - 1].sequence_length if number else None
        return self.data.model_copy(update={"sequence_length": length}) if length else self.data


class Student(Section):
    architecture: str | None = None
    """Model type; by default the teacher's."""
    keep_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Teacher layers, counted from 0, that become the student's, with their weights."""
    every: Annotated[int, Field(ge=2)] | None = None
    """Take every k-th layer, beginning with the first."""
    config: dict[str, Any] = {}
    """A student of its own shape, from random weights: keys of its transformers config."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        if sum([self.keep_layers is not None, self.every is not None, bool(self.config)]) != 1:
            raise ValueError("give exactly one of `keep_layers`, `every` and `config`")
        return self


class DistillWeights(Section):
    """DistilBERT's weights (Sanh et al. 2019, arXiv:1910.01108; the authors' training command): 5, 2, 1."""

    soft: NonNegative = 5.0
    """KL divergence to the teacher's distribution at `temperature`."""
    hard: NonNegative = 2.0
    """The teacher's own objective on the true targets."""
    hidden: NonNegative = 1.0
    """1 - cosine between the last hidden states of teacher and student."""


class Distill(Training):
    """A small model that imitates a large one, on the large one's data and objective."""

    teacher: Path | None = None
    """Model folder; by default the one of the pretrain stage."""
    student: Student
    temperature: Positive = 2.0
    weights: DistillWeights = DistillWeights()
    objective: Objective | None = None
    """By default pretrain's."""
    data: Data | None = None
    """By default pretrain's."""


class Recipe(Section):
    """The whole life of one model."""

    run_dir: Path
    """Where everything goes: `<run_dir>/<stage>/`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    prepare_dir: Path | None = None
    """Folder of another run's prepare stage, whose data and tokenizer are taken; by default `<run_dir>/prepare`."""
    prepare: Prepare | None = None
    pretrain: Pretrain | None = None
    distill: Distill | None = None
    export: Export | None = None
    bench: Bench | None = None
    tensorrt: TensorRT | None = None
    pack: Pack | None = None
    slurm: Slurm | None = None

    def stage_dir(self, stage: str) -> Path:
        """Folder of one stage's results."""
        return self.run_dir / stage

    @property
    def data_dir(self) -> Path:
        """Token shards and manifest, written by prepare."""
        return (self.prepare_dir or self.stage_dir("prepare")) / "data"

    @property
    def tokenizer_dir(self) -> Path:
        """A tokenizer folder that transformers opens, written by prepare."""
        return (self.prepare_dir or self.stage_dir("prepare")) / "tokenizer"

    def model_dir(self, stage: str) -> Path:
        """ModelDir that a training stage wrote."""
        return self.stage_dir(stage) / "model"

    def exported_models(self) -> dict[str, Path]:
        """Name to model folder of everything that export and bench look at."""
        stages = {"teacher": "pretrain", "student": "distill"}
        chosen = (
            self.export.models
            if self.export and self.export.models
            else {name: None for name, stage in stages.items() if getattr(self, stage) is not None}
        )
        return {name: path or self.model_dir(stages.get(name, name)) for name, path in chosen.items()}
