"""Reads a recipe from YAML and dotted overrides, reports all its problems at once, and writes it resolved.
What the keys mean is `config`'s business."""

import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError

from trainer.config import Recipe
from trainer.errors import UserError

Location = tuple[int | str, ...]


def find_recipe(name: str) -> Path:
    """Path of a recipe given as a file or as the name of one that ships with lmworks."""
    if Path(name).is_file():
        return Path(name)
    shipped = {
        Path(entry.name).stem: Path(str(entry))
        for entry in resources.files("trainer.recipes").iterdir()
        if entry.name.endswith(".yaml")
    }
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"no recipe {name!r}{hint}", f"a YAML file, or one of: {', '.join(sorted(shipped))}", "check the path"
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of file or shipped name `name`, with `key.path=value` overrides applied on top.

    Raises UserError that lists every problem with file, line and the nearest valid key.
    """
    path = find_recipe(name)
    tree = _read_yaml(path)
    overridden = [_apply_override(tree, override) for override in overrides]
    try:
        return Recipe.model_validate(_plain(tree))
    except ValidationError as error:
        found = [_describe(problem, path, tree, overridden) for problem in error.errors()]
        lines = [text for _, text in sorted(found)]
    plural = "s" if len(lines) > 1 else ""
    raise UserError("\n".join([f"{len(lines)} problem{plural} in recipe {path}:", *(f"  {line}" for line in lines)]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it again gives an equal recipe."""
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] - keep the schema's order
    out = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def recipe_hash(part: BaseModel) -> str:
    """sha256 of a recipe or a section of it, independent of key order and formatting."""
    canonical = json.dumps(part.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def _read_yaml(path: Path) -> CommentedMap:
    yaml = YAML(typ="rt")  # YAML 1.2: `3e-4` is a number and `no` a word; duplicate keys are errors
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {str(error.problem).split(chr(10))[0]}", "valid YAML 1.2, each key once") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8", "a YAML file in UTF-8") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: holds {type(tree).__name__}, not a mapping", "keys such as run_dir and pretrain")
    return tree


def _apply_override(tree: CommentedMap, override: str) -> tuple[Location, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"override {override!r} has no '='", "key.path=value, such as pretrain.optim.learning_rate=3e-4"
        )
    parts: Location = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    try:
        value = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        raise UserError(f"override {override!r}: {error.problem}", "a YAML value after '='") from None
    node: Any = tree
    for part in parts[:-1]:
        node = _child(node, part, override)
    if isinstance(node, CommentedSeq) and not (isinstance(parts[-1], int) and parts[-1] < len(node)):
        raise UserError(f"override {override!r}: the list has {len(node)} entries", "a position in the list")
    node[parts[-1]] = value
    return parts, override


def _child(node: Any, part: int | str, override: str) -> Any:
    if isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
        return node[part]
    if isinstance(node, CommentedMap):
        if node.get(part) is None:
            node[part] = CommentedMap()
        if isinstance(node[part], CommentedMap | CommentedSeq):
            return node[part]
    raise UserError(f"override {override!r}: nothing to set below {part!r}", "a path of keys that the recipe has")


def _plain(node: Any) -> Any:
    if isinstance(node, CommentedMap):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value) for value in node]
    return node


def _describe(
    problem: Any, path: Path, tree: CommentedMap, overridden: Iterable[tuple[Location, str]]
) -> tuple[int, str]:
    """Line number and text for one of pydantic's findings: where, which key, what is wrong, the nearest valid key."""
    location = tuple(part for part in problem["loc"] if not _is_union_tag(part, problem["loc"], tree))
    line = _line(tree, location)
    where = f"{path}:{line}"
    for target, override in overridden:
        if location[: len(target)] == target:
            where = f"override {override!r}"
    dotted = ".".join(str(part) for part in location) or "the recipe"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _keys_at(location[:-1], tree), n=1)
        hint = (
            f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(_keys_at(location[:-1], tree)))}"
        )
        return line, f"{where}: {dotted}: unknown key{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    shown = "" if isinstance(found, dict | list | BaseModel) or problem["type"] == "missing" else f" (found {found!r})"
    return line, f"{where}: {dotted}: {message}{shown}"


def _is_union_tag(part: int | str, location: Sequence[int | str], tree: CommentedMap) -> bool:
    """pydantic puts a union's tag (`masked_lm`) into the path, where the file has no such level."""
    index = list(location).index(part)
    parent = _at(tree, tuple(location[:index]))
    return isinstance(parent, CommentedMap) and part not in parent and parent.get("name") == part


def _at(tree: Any, location: Location) -> Any:
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _line(tree: CommentedMap, location: Location) -> int:
    """Line (from 1) of the deepest part of `location` that the file has."""
    line, node = 1, tree
    for part in location:
        if not isinstance(node, CommentedMap | CommentedSeq) or part not in (
            node if isinstance(node, CommentedMap) else range(len(node))
        ):
            break
        position = node.lc.data.get(part) if node.lc.data else None
        line = position[0] + 1 if position else line
        node = node[part]
    return line


def _keys_at(location: Location, tree: CommentedMap) -> list[str]:
    """Keys that the schema knows at `location`."""
    schema: Any = TypeAdapter(Recipe).json_schema()
    definitions = schema.get("$defs", {})
    options = [schema]
    for index, part in enumerate(location):
        options = [child for option in options for child in _expand(_schema_child(option, part), definitions)]
        chosen = _at(tree, (*location[: index + 1], "name"))
        if chosen is not None:  # a union chosen by `name`: look only into the alternative that was chosen
            named = [o for o in options if o.get("properties", {}).get("name", {}).get("const") == chosen]
            options = named or options
    return sorted({key for option in options for key in option.get("properties", {})})


def _schema_child(schema: Any, part: int | str) -> Any:
    return schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})


def _expand(schema: Any, definitions: Any) -> list[Any]:
    """A schema node with its references and alternatives resolved."""
    if "$ref" in schema:
        return _expand(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    alternatives = schema.get("anyOf", []) + schema.get("oneOf", [])
    return [node for option in alternatives for node in _expand(option, definitions)] or [schema]
