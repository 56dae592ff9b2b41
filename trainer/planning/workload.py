"""What a recipe asks for, stage by stage, in the sizes that the rest of the plan counts with.
Everything comes from the recipe and from small files (a tokenizer, a config.json); weights and data are not opened.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import Data, Distill, Objective, Pretrain, Recipe, Student, Training
from trainer.config import Tokenizer as TokenizerConfig
from trainer.errors import UserError
from trainer.planning.shapes import FAMILIES, Shape, shape_of

# A recipe cannot say how many characters its text has; assumed (tinyshakespeare has 65, English with accents 150).
_CHARACTERS = 256


@dataclass(frozen=True)
class Workload:
    """One training stage."""

    stage: str
    training: Training
    data: Data
    objective: Objective
    shape: Shape
    teacher: Shape | None
    notes: tuple[str, ...]  # what was assumed or left out

    @property
    def target_share(self) -> float:
        """Share of the tokens that are targets."""
        return self.objective.mlm_probability if self.objective.name == "masked_lm" else 1.0

    @property
    def step_tokens(self) -> int:
        return self.training.global_batch_size * self.data.sequence_length


def workloads(recipe: Recipe) -> list[Workload]:
    """The recipe's training stages; UserError if it has none, or if the sizes of a model are not known."""
    found = list(_pretrain(recipe, recipe.pretrain)) if recipe.pretrain else []
    if recipe.distill:
        found.append(_distill(recipe, recipe.distill))
    if not found:
        raise UserError("the recipe trains nothing", "a `pretrain` or a `distill` section")
    return found


def _pretrain(recipe: Recipe, stage: Pretrain) -> Iterator[Workload]:
    """One for each phase."""
    shape, notes = _pretrained_shape(recipe, stage)
    _check_objective(shape, stage.objective)
    for number in range(1 + len(stage.phases)):
        name = f"pretrain, phase {number + 1}" if stage.phases else "pretrain"
        training, data = stage.phase_training(number), stage.phase_data(number)
        yield Workload(name, training, data, stage.objective, shape, None, notes)


def _distill(recipe: Recipe, stage: Distill) -> Workload:
    objective = stage.objective or (recipe.pretrain.objective if recipe.pretrain else None)
    data = stage.data or (recipe.pretrain.data if recipe.pretrain else None)
    if objective is None or data is None:
        raise UserError("distill.objective and distill.data are not given", "both, where there is no pretrain section")
    folder = stage.teacher or recipe.model_dir("pretrain")
    if (folder / "config.json").is_file():
        teacher, notes = _shape_in(folder)
    elif stage.teacher is None and recipe.pretrain is not None:
        teacher, notes = _pretrained_shape(recipe, recipe.pretrain)
    else:
        raise UserError(f"{folder} holds no model", "a teacher's folder with config.json", "check distill.teacher")
    shape, more = _student(recipe, stage.student, teacher, data.sequence_length)
    _check_objective(shape, objective)
    return Workload("distill", stage, data, objective, shape, teacher, tuple(dict.fromkeys(notes + more)))


def _pretrained_shape(recipe: Recipe, stage: Pretrain) -> tuple[Shape, tuple[str, ...]]:
    if stage.model.init_from is not None:
        return _shape_in(stage.model.init_from)
    assert stage.model.architecture is not None
    return _new_shape(recipe, stage.model.architecture, stage.model.config, stage.longest_row)


def _student(recipe: Recipe, student: Student, teacher: Shape, length: int) -> tuple[Shape, tuple[str, ...]]:
    """The shape that `distill.make_student` builds."""
    architecture = student.architecture or teacher.architecture
    if student.config:
        return _new_shape(recipe, architecture, student.config, length)
    layers = len(student.keep_layers or range(0, teacher.layers, student.every or 1))
    if architecture == teacher.architecture:
        return replace(teacher, layers=layers), ()
    if (teacher.architecture, architecture) != ("bert", "distilbert"):
        raise UserError(f"layers of a {teacher.architecture} teacher cannot become a {architecture}")
    config = {
        "vocab_size": teacher.vocabulary,
        "dim": teacher.hidden,
        "n_layers": layers,
        "n_heads": teacher.heads,
        "hidden_dim": teacher.inner,
        "max_position_embeddings": teacher.position_rows,
        "activation": teacher.activation,
        "dropout": teacher.hidden_dropout,
        "attention_dropout": teacher.attention_dropout,
    }
    return shape_of(architecture, config)


def _new_shape(
    recipe: Recipe, architecture: str, config: Mapping[str, Any], length: int
) -> tuple[Shape, tuple[str, ...]]:
    """What `models.make_config` builds: the tokenizer's vocabulary, and positions for `length`, unless given."""
    entries, pad, notes = (config["vocab_size"], None, ()) if "vocab_size" in config else _vocabulary(recipe)
    sizes: dict[str, Any] = {"vocab_size": entries}
    if not {"max_position_embeddings", "n_positions"} & set(config):
        # RoBERTa's position 0 stands in row pad_token_id + 1; 1 is its own, and that of our byte-level tokenizers.
        sizes["max_position_embeddings"] = length + ((1 if pad is None else pad) + 1) * (architecture == "roberta")
    shape, unread = shape_of(architecture, {**sizes, **config})
    return shape, notes + _unread(unread)


def _shape_in(folder: Path) -> tuple[Shape, tuple[str, ...]]:
    """The shape of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no model", "a folder with config.json", "check the path")
    config = json.loads(path.read_text(encoding="utf-8"))
    family = FAMILIES.get(config.get("model_type", ""))
    known = {key: value for key, value in config.items() if family is None or key in family.defaults}
    shape, _ = shape_of(config.get("model_type", "none"), known)  # what else stands there is transformers' own
    return shape, ()


def _unread(keys: tuple[str, ...]) -> tuple[str, ...]:
    return (f"model.config keys that the plan does not look at: {', '.join(sorted(keys))}",) if keys else ()


def _vocabulary(recipe: Recipe) -> tuple[int, int | None, tuple[str, ...]]:
    """Entries of the recipe's tokenizer, the id of its padding token if known, and what was assumed."""
    prepared = recipe.tokenizer_dir / "tokenizer.json"
    if prepared.is_file():
        return (*_tokenizer_json(prepared), ())
    if recipe.prepare is None:
        raise UserError(
            "the size of the vocabulary is not known: the recipe has no `prepare` section",
            "a tokenizer, prepared or described",
            "set pretrain.model.config.vocab_size",
        )
    tokenizer = recipe.prepare.tokenizer
    if tokenizer.path is not None:
        return (*_tokenizer_at(tokenizer.path), ())
    return _trained(tokenizer)


def _trained(tokenizer: TokenizerConfig) -> tuple[int, int | None, tuple[str, ...]]:
    """A tokenizer that prepare will train (data/tokenizer_training.py: padding is 0 in wordpiece, 1 in the others)."""
    if tokenizer.type == "character":
        return _CHARACTERS, 1, (f"vocabulary: {_CHARACTERS} characters, assumed; prepare counts them",)
    return tokenizer.vocab_size, 0 if tokenizer.type == "wordpiece" else 1, ()


def _tokenizer_at(path: Path) -> tuple[int, int | None]:
    if path.is_dir():
        names = ("tokenizer.json", "vocab.json", "vocab.txt")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(
            f"prepare.tokenizer.path: no tokenizer.json, vocab.json or vocab.txt at {path}",
            "a tokenizer's vocabulary",
            "check the path, or set pretrain.model.config.vocab_size",
        )
    if path.suffix == ".txt":
        return len([line for line in path.read_text(encoding="utf-8").split("\n") if line]), 0
    if path.name == "vocab.json":
        return len(json.loads(path.read_text(encoding="utf-8"))), None
    return _tokenizer_json(path)


def _tokenizer_json(path: Path) -> tuple[int, int | None]:
    """Entries of a tokenizer.json, added ones included, and the id of its padding token."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]  # a mapping, or [piece, score] pairs of a unigram model
    pieces = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", [])}
    pad = next((added[name] for name in ("[PAD]", "<pad>") if name in added), None)
    return len(pieces | set(added)), pad


def _check_objective(shape: Shape, objective: Objective) -> None:
    if shape.family.causal != (objective.name == "causal_lm"):
        raise UserError(
            f"transformers has no {objective.name} model of architecture {shape.architecture!r}", "another architecture"
        )
