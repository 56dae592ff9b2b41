"""Arrays: the recipes of a grid of settings, each with a run folder of its own, and one table of what came out.
How an array is submitted is submit.py's business."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from trainer.config import Recipe
from trainer.errors import UserError
from trainer.recipe_file import dump_recipe


@dataclass(frozen=True)
class Element:
    """One point of the grid."""

    name: str  # such as `seed=1 pretrain.optim.learning_rate=3e-4`
    recipe: Recipe


def shares_data(axes: Sequence[str]) -> bool:
    """Whether all elements take the data and tokenizer of one prepare stage, as no axis is about it."""
    return not any(axis.split("=")[0].split(".")[0] == "prepare" for axis in axes)


def elements(recipe: Recipe, axes: Sequence[str]) -> list[Element]:
    """The product of axes such as `seed=0,1,2`; nothing where there is none."""
    if not axes:
        return []
    if any(axis.startswith("prepare_dir=") for axis in axes) or (recipe.prepare_dir and not shares_data(axes)):
        raise UserError(
            "--array over the data, and prepare_dir, which says whose data is taken",
            "one or the other",
            "for several prepare_dir submit several chains, each with a run_dir of its own",
        )
    if shares_data(axes) and recipe.prepare_dir is None:
        recipe = recipe.model_copy(update={"prepare_dir": recipe.stage_dir("prepare")})
    points = [list(_values(axis)) for axis in axes]
    return [_element(recipe, number, point) for number, point in enumerate(itertools.product(*points))]


def _values(axis: str) -> Iterator[tuple[str, str]]:
    key, _, values = axis.partition("=")
    if not key or not values:
        raise UserError(f"--array {axis!r}", "key=value,value", "such as --array seed=0,1,2")
    if key.split(".")[0] == "slurm":
        raise UserError(
            f"--array {axis!r}", "keys that change a run: all elements are jobs of one shape", "leave it out"
        )
    yield from ((key, value) for value in values.split(","))


def _element(recipe: Recipe, number: int, point: Sequence[tuple[str, str]]) -> Element:
    tree = YAML(typ="safe").load(dump_recipe(recipe))
    for key, value in point:
        _put(tree, key, YAML(typ="safe").load(value))
    tree["run_dir"] = str(element_dir(recipe.run_dir, number))
    try:
        made = Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValueError as error:
        raise UserError(f"--array gives a recipe that does not hold: {error}", "keys and values of a recipe") from None
    return Element(" ".join(f"{key}={value}" for key, value in point), made)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"--array {key}: nothing to set below {part!r}", "a path of keys that the recipe has")
    tree[last] = value


def element_dir(run_dir: Path, number: int) -> Path:
    """Run folder of one element."""
    return run_dir / "array" / str(number)
