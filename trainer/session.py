"""What every training stage has around its objective: engine, data, checkpoints, log, the loop, the model folder.
Pretraining and distillation differ in the model and the objective they hand in, and in nothing here."""

import time
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.artifact import content_hash, staging, write_artifact, write_json, write_text
from trainer.config import Data, MaskedLM, Recipe, Training
from trainer.config import Objective as ObjectiveConfig
from trainer.data.masking import masking
from trainer.data.packing import Framing, PackedRows, Rows, StreamRows
from trainer.data.shards import TokenShards
from trainer.data.stream import BatchPlan, TrainStream, validation_batches
from trainer.engine.checkpoint import Checkpoints, run_identity
from trainer.engine.engine import Engine
from trainer.engine.launch import release_signals, watch_signals
from trainer.engine.loop import Run, train
from trainer.engine.metrics import Log, Meter
from trainer.engine.optim import build_optimizer
from trainer.environment import describe, launch_command, peak_flops
from trainer.models import (
    LanguageModel,
    check_isolation,
    count_parameters,
    decay_groups,
    load_tokenizer,
    token_id,
    train_flops_per_token,
    transformer_layers,
)
from trainer.objectives.loss import Objective
from trainer.recipe_file import dump_recipe, recipe_hash


class Session:
    """One training stage of a recipe, from opened data to a finished model folder."""

    def __init__(self, recipe: Recipe, stage: str, training: Training, objective: ObjectiveConfig, data: Data) -> None:
        watch_signals()
        transformers_logging.disable_progress_bar()  # the run has one bar, its own
        self._began = time.perf_counter()
        self._recipe, self._stage, self._training, self._data = recipe, stage, training, data
        self._objective = objective
        self._train_shards = TokenShards.open(recipe.data_dir, "train")
        self._train_shards.require_tokenizer(recipe.tokenizer_dir)
        self._validation_shards = TokenShards.open(recipe.data_dir, "validation")
        self.tokenizer = load_tokenizer(recipe.tokenizer_dir)
        self.causal = objective.name == "causal_lm"
        self.engine = Engine(training)
        self._folder = recipe.stage_dir(stage)
        self._plan = BatchPlan(
            training.global_batch_size, training.micro_batch_size, self.engine.rank, self.engine.world
        )
        self._log = Log(self._folder, stage, training.max_steps, self.engine.is_main)

    def train(self, model: PreTrainedModel, objective: Objective, parents: Mapping[str, Path]) -> None:
        """Train `model` on `objective` and write the model folder; `parents` are the folders it was made from."""
        inputs = {"data": content_hash(self._recipe.data_dir), "tokenizer": content_hash(self._recipe.tokenizer_dir)}
        inputs |= {name: content_hash(folder) for name, folder in parents.items()}
        self._describe_run()
        with self._log:
            run = self._wire(model, objective, inputs)
            metrics = train(run)
            if self.engine.is_main:
                self._save_model(model, inputs, metrics, run.meter.tokens)
            self._log.event("end", self._training.max_steps, seconds=time.perf_counter() - self._began)
            self._log.say(f"model folder: {self._recipe.model_dir(self._stage)}")
        self.engine.wait()
        release_signals()

    def _wire(self, model: PreTrainedModel, objective: Objective, inputs: dict[str, str]) -> Run:
        training, recipe = self._training, self._recipe
        module = LanguageModel(model)
        if self._data.packing == "isolate":
            check_isolation(module)
        self._apply_options(model)
        optimizer = build_optimizer(
            training.optim,
            self._groups(module),
            self._log.say,
            device_type=self.engine.device.type,
            offload=False,
            sharded=False,
        )
        self.engine.prepare(module, optimizer)
        identity = run_identity(training, recipe.seed, inputs)
        mask = None
        if isinstance(self._objective, MaskedLM):
            mask = masking(self.tokenizer, self._objective.mlm_probability, self._objective.whole_word, recipe.seed)
        flops = train_flops_per_token(model, self._data.sequence_length)
        return Run(
            training=training,
            seed=recipe.seed,
            engine=self.engine,
            objective=objective,
            stream=TrainStream(self._rows(self._train_shards), mask, self._plan, recipe.seed),
            validation=validation_batches(
                self._rows(self._validation_shards), mask, self._plan, training.eval_sequences, recipe.seed
            ),
            checkpoints=Checkpoints(self._folder / "checkpoints", training, identity, self.engine, self._log.say),
            meter=Meter(self.engine, flops, peak_flops(self._device_name(), training.precision)),
            log=self._log,
            bytes_per_token=self._validation_bytes_per_token() if self.causal else None,
        )

    def _rows(self, shards: TokenShards) -> Rows:
        framing = framing_for(self.tokenizer, self.causal, self._data.sequence_length)
        kind = PackedRows if self._data.packing == "isolate" else StreamRows
        return kind(shards, framing, self._recipe.seed)

    def _groups(self, module: nn.Module) -> list[dict[str, object]]:
        return decay_groups(module, self._training.optim.weight_decay)

    def _apply_options(self, model: PreTrainedModel) -> None:
        if self._training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self._training.compile:
            for layer in transformer_layers(model):
                layer.compile()

    def _device_name(self) -> str:
        device = self.engine.device
        if device.type != "cuda":
            return device.type
        import torch

        return torch.cuda.get_device_name(device)

    def _validation_bytes_per_token(self) -> float:
        split = self._validation_shards.manifest["splits"]["validation"]
        return split["bytes"] / split["tokens"]

    def _describe_run(self) -> None:
        if not self.engine.is_main:
            return
        write_text(self._folder / "recipe.yaml", dump_recipe(self._recipe))
        write_json(self._folder / "environment.json", describe())
        launch = {"command": launch_command(), "ranks": self.engine.world, "device": self._device_name()}
        write_json(self._folder / "launch.json", launch)

    def _save_model(
        self, model: PreTrainedModel, inputs: Mapping[str, str], metrics: Mapping[str, float], tokens: int
    ) -> None:
        about = {
            "stage": self._stage,
            "architecture": model.config.model_type,
            "objective": self._objective.name,
            "parameters": count_parameters(model),
            "sequence_length": self._data.sequence_length,
            "steps": self._training.max_steps,
            "tokens": tokens,
        }
        evidence = {"what": "validation", "metrics": dict(metrics), "command": launch_command()}
        with staging(self._recipe.model_dir(self._stage)) as partial:
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            write_artifact(
                partial,
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
