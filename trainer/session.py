"""What every training stage has around its objective: engine, data, checkpoints, log, the loop, the model folder.
Pretraining and distillation differ in the model and the objective they hand in, and in nothing here."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.artifact import content_hash, staging, write_artifact, write_json, write_text
from trainer.attention import Kernel, attention_dropout, check_causality, check_isolation, choose_attention
from trainer.config import Data, MaskedLM, Pretrain, Recipe, Training
from trainer.config import Objective as ObjectiveConfig
from trainer.data.masking import Masking, masking
from trainer.data.packing import Framing, PackedRows, Rows, StreamRows
from trainer.data.shards import TokenShards
from trainer.data.stream import BatchPlan, TrainStream, validation_batches
from trainer.engine.checkpoint import Checkpoints, run_identity
from trainer.engine.consolidate import write_model
from trainer.engine.engine import Engine
from trainer.engine.launch import release_signals, stop_requested, watch_signals
from trainer.engine.loop import Part, Progress, Run, resume, train
from trainer.engine.metrics import Log, Meter
from trainer.engine.optim import build_optimizer
from trainer.engine.ranks import naming_who_never_came
from trainer.engine.trouble import Trouble
from trainer.environment import describe, launch_command, peak_flops
from trainer.errors import Preempted
from trainer.heads import WHOLE, choose_loss_plan
from trainer.models import (
    LanguageModel,
    checkpoint_layers,
    decay_groups,
    load_tokenizer,
    token_id,
    train_flops,
    transformer_layers,
)
from trainer.objectives.loss import Objective
from trainer.recipe_file import dump_recipe, recipe_hash


class Session:
    """One training stage of a recipe, from opened data to a finished model folder."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        training: Training,
        objective: ObjectiveConfig,
        data: Data,
        folder: Path | None = None,
    ) -> None:
        watch_signals()
        transformers_logging.disable_progress_bar()  # the run has one bar, its own
        # torch's own code calls what torch 2.13 renamed, once for each collective.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        self._began = time.perf_counter()
        self._recipe, self._stage, self._training, self._data = recipe, stage, training, data
        self._objective = objective
        self._train_shards = TokenShards.open(recipe.data_dir, "train")
        self._train_shards.require_tokenizer(recipe.tokenizer_dir)
        self._validation_shards = TokenShards.open(recipe.data_dir, "validation")
        self.tokenizer = load_tokenizer(recipe.tokenizer_dir)
        self.causal = objective.name == "causal_lm"
        self._folder = folder or recipe.stage_dir(stage)
        with naming_who_never_came():
            self.engine = Engine(training, self._folder)
        self._batches = tuple(self._batch_plans())  # before a model is built that could not be trained
        steps = training.total_steps if isinstance(training, Pretrain) else training.max_steps
        self._log = Log(self._folder, stage, steps, self.engine.is_main)

    def train(self, model: PreTrainedModel, objective: Objective, parents: Mapping[str, Path]) -> None:
        """Train `model` on `objective` and write the model folder; `parents` are the folders it was made from."""
        inputs = {"data": content_hash(self._recipe.data_dir), "tokenizer": content_hash(self._recipe.tokenizer_dir)}
        inputs |= {name: content_hash(folder) for name, folder in parents.items()}
        with self._log, self.engine.ranks.naming_the_lost():
            run = self.wire(model, objective, inputs)
            metrics = self._train(run)
            if self.engine.is_main:
                self._save_model(model, run, inputs, metrics)
            self._log.event("end", run.last_step, seconds=time.perf_counter() - self._began)
            self._log.say(f"model folder: {self._recipe.model_dir(self._stage)}")
        stopped = self.engine.ranks.agree(stop_requested(), "ending")
        release_signals()
        if stopped:
            raise Preempted(f"a signal came while the model was written; {self._stage} is done")

    def _train(self, run: Run) -> dict[str, float]:
        step = resume(run)
        self._describe_run()  # only now: a refused attempt must not overwrite what the run before was made with
        return train(run, step)

    def wire(self, model: PreTrainedModel, objective: Objective, inputs: dict[str, str]) -> Run:
        """The pieces of the run, ready for its first step; `inputs` are content hashes of what it is made from."""
        training, recipe = self._training, self._recipe
        flops = train_flops(model, self._data.sequence_length)  # before anything is sharded
        self._prepare(model)
        resolved = {"objective": self._objective, "data": self._data}  # distill may have them from pretrain
        identity = run_identity(training.model_copy(update=resolved), recipe.seed, inputs)
        mask = None
        if isinstance(self._objective, MaskedLM):
            mask = masking(self.tokenizer, self._objective.mlm_probability, self._objective.whole_word, recipe.seed)
        return Run(
            training=training,
            seed=recipe.seed,
            engine=self.engine,
            objective=objective,
            parts=tuple(self._parts(mask)),
            checkpoints=Checkpoints(self._folder / "checkpoints", training, identity, self.engine, self._log.say),
            meter=Meter(self.engine, flops, self._peak_flops()),
            log=self._log,
            trouble=Trouble(training, partial(self.engine.ranks.sum, doing="adding up the loss of a step")),
            progress=Progress(),
            bytes_per_token=self._validation_bytes_per_token() if self.causal else None,
        )

    def _parts(self, mask: Masking | None) -> Iterator[Part]:
        """One part, or one for each phase of a pretrain section."""
        section, seed = self._training, self._recipe.seed
        phased = isinstance(section, Pretrain)
        first_step = first_sample = 0
        for number in range(1 + len(section.phases) if phased else 1):
            training = section.phase_training(number) if phased else section
            data = section.phase_data(number) if phased else self._data
            plan = self._batches[number]
            validation = validation_batches(
                self._rows(self._validation_shards, data), mask, plan, training.eval_sequences, seed
            )
            stream = TrainStream(self._rows(self._train_shards, data), mask, plan, seed, self.engine.device)
            yield Part(first_step, first_sample, training, stream, validation)
            first_step += training.max_steps
            first_sample += training.max_steps * training.global_batch_size

    def _batch_plans(self) -> Iterator[BatchPlan]:
        """What each rank takes of a batch, in every phase; UserError for a batch that does not divide."""
        section, ranks = self._training, self.engine.ranks
        for number in range(1 + len(section.phases) if isinstance(section, Pretrain) else 1):
            training = section.phase_training(number) if isinstance(section, Pretrain) else section
            yield BatchPlan(training.global_batch_size, training.micro_batch_size, ranks.rank, self.engine.world)

    def _rows(self, shards: TokenShards, data: Data) -> Rows:
        framing = framing_for(self.tokenizer, self.causal, data.sequence_length)
        kind = PackedRows if data.packing == "isolate" else StreamRows
        return kind(shards, framing, self._recipe.seed)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        optim, engine = self._training.optim, self.engine
        return build_optimizer(
            optim,
            decay_groups(module, optim.weight_decay),
            self._log.say,
            device_type=engine.device.type,
            offload=engine.offloads_optimizer,
            sharded=engine.sharded,
        )

    def _prepare(self, model: PreTrainedModel) -> None:
        """Give the model its kernels, and it and its optimizer to the engine."""
        training, say = self._training, self._log.say
        plan = choose_loss_plan(
            training.cross_entropy, model, self._most_targets(), self._stage == "distill", self.engine.device, say
        )
        plan = plan._replace(compiled=training.compile and self.engine.device.type == "cuda")
        module = LanguageModel(model, self._kernel(model, attention_dropout(model.config)), plan)
        if training.gradient_checkpointing:
            checkpoint_layers(model)
        fp8 = training.precision == "fp8"
        if fp8:  # its layers scale whole tensors, in which every document moves the rounding of all: looked at before
            self._check_attention(module.to(self.engine.device), model)
        self.engine.prepare(module, self._build_optimizer, model.config.hidden_size)
        if not fp8:
            self._check_attention(self.engine.unwrapped, model)
        if training.compile:  # after the check, so that nothing is compiled for its few short rows
            # All layers share one cache, and the default of 8 does not hold ModernBERT's three kinds in their shapes.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for layer in transformer_layers(model):
                layer.compile()

    def frozen(self, model: PreTrainedModel) -> LanguageModel:
        """A teacher: where the engine holds it, with the kernel that suits it, and never trained."""
        module = LanguageModel(model, self._kernel(model, dropout=0.0, whose="teacher's "), WHOLE)
        module.eval().requires_grad_(False)
        with self.engine.ranks.naming_the_lost():  # rank 0 alone reads the weights, and may have ended over them
            self._log.say(f"teacher: {self.engine.hold_frozen(module)}")
            self._check_attention(module, model)
        return module

    def _kernel(self, model: PreTrainedModel, dropout: float, whose: str = "") -> Kernel:
        return choose_attention(
            self._training.attention,
            model,
            self._data.packing == "isolate",
            self.engine.device,
            self._training.precision,
            dropout,
            lambda text: self._log.say(whose + text),
        )

    def _check_attention(self, module: nn.Module, model: PreTrainedModel) -> None:
        if self.causal:
            with self.engine.autocast():
                check_causality(module, model.config, self._data.packing == "isolate")
        if self._data.packing != "isolate":
            return
        rows, length = self._training.micro_batch_size, self._data.sequence_length
        # A GPU's kernels depend on the shape, and are quick; one of a CPU is enough.
        if self.engine.device.type == "cpu":
            rows, length = 1, min(16, length)
        with self.engine.autocast():
            check_isolation(module, model.config, self._training.precision, rows, length)

    def _most_targets(self) -> int:
        share = self._objective.mlm_probability if isinstance(self._objective, MaskedLM) else 1.0
        return math.ceil(share * self._training.micro_batch_size * self._longest_row)

    @property
    def _longest_row(self) -> int:
        return self._training.longest_row if isinstance(self._training, Pretrain) else self._data.sequence_length

    def _peak_flops(self) -> float | None:
        """None, and so no MFU, where it is not known, and for distillation, whose teacher's FLOPs nobody counts."""
        if self._stage == "distill":
            return None
        return peak_flops(self._device_name(), self._training.precision)

    def _device_name(self) -> str:
        device = self.engine.device
        if device.type != "cuda":
            return device.type
        return torch.cuda.get_device_name(device)

    def _validation_bytes_per_token(self) -> float:
        split = self._validation_shards.manifest["splits"]["validation"]
        return split["bytes"] / split["tokens"]

    def _describe_run(self) -> None:
        if not self.engine.is_main:
            return
        write_text(self._folder / "recipe.yaml", dump_recipe(self._recipe))
        write_json(self._folder / "environment.json", describe())
        launch = {"command": launch_command(), "device": self._device_name()} | self.engine.described()
        write_json(self._folder / "launch.json", launch)

    def _save_model(
        self, model: PreTrainedModel, run: Run, inputs: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        about = {
            "stage": self._stage,
            "architecture": model.config.model_type,
            "objective": self._objective.name,
            "parameters": sum(math.prod(shape) for shape in self.engine.shapes.values()),
            "sequence_length": self._longest_row,
            "steps": run.last_step,
            "tokens": run.progress.tokens,
        }
        evidence = {"what": "validation", "metrics": dict(metrics), "command": launch_command()}
        files = run.checkpoints.files(run.last_step)
        with staging(self._recipe.model_dir(self._stage)) as folder:
            write_model(folder, model, files, self.engine.shapes)
            self.tokenizer.save_pretrained(folder)
            write_artifact(
                folder,
                "model",
                recipe_sha256=recipe_hash(self._recipe),
                parents=inputs,
                evidence=[evidence],
                about=about,
            )


def framing_for(tokenizer: PreTrainedTokenizerBase, causal: bool, row_length: int) -> Framing:
    """The special tokens that stand around documents: [CLS] and [SEP] for a masked LM, begin-of-sequence for causal."""
    pad = token_id(tokenizer, "pad")
    if pad is None:
        pad = token_id(tokenizer, "eos") or 0  # any id does: padding is seen by nobody and has no target
    if causal:
        return Framing(row_length, True, token_id(tokenizer, "bos"), None, pad)
    return Framing(row_length, False, token_id(tokenizer, "cls"), token_id(tokenizer, "sep"), pad)
