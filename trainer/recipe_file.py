"""Reads a recipe from YAML and dotted overrides, reports all its problems at once, and writes it resolved.
What the keys mean is `config`'s business."""

import copy
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from trainer.config import Recipe
from trainer.errors import UserError

Location = tuple[int | str, ...]
Schema = type[BaseModel]
Checked = TypeVar("Checked", bound=BaseModel)
# What each stage needs to be told.
_SECTIONS = {
    "prepare": "its sources and tokenizer",
    "pretrain": "one that says model, objective and data",
    "distill": "one that says which student",
    "export": "`export: {}` for the defaults",
    "bench": "`bench: {}` for the defaults",
    "tensorrt": "`tensorrt: {}` for the defaults",
    "pack": "`pack: {}` for the defaults",
}


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
    return load_strict(find_recipe(name), Recipe, "recipe", overrides)


def load_strict(path: Path, schema: type[Checked], what: str, overrides: Sequence[str] = ()) -> Checked:
    """A YAML file checked against a schema, with overrides applied on top; UserError lists every problem."""
    tree = _read_yaml(path)
    overridden = [_apply_override(tree, override) for override in overrides]
    plain = json.dumps(_plain(tree, path))
    try:  # JSON's strict mode: a list is a tuple and text a path, but `true` is no number and "10" no integer
        return schema.model_validate_json(plain, strict=True)
    except ValidationError as error:
        found = [_describe(problem, path, tree, overridden, schema) for problem in _causes(error.errors())]
        lines = [text for _, text in sorted(found)]
    plural = "s" if len(lines) > 1 else ""
    raise UserError("\n".join([f"{len(lines)} problem{plural} in {what} {path}:", *(f"  {line}" for line in lines)]))


def require_section(recipe: Recipe, stage: str) -> None:
    """UserError if the recipe has no section of this stage."""
    if getattr(recipe, stage) is None:
        raise UserError(f"the recipe has no `{stage}` section", _SECTIONS[stage], "add the section")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it again gives an equal recipe."""
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.width = 2**16  # a key and its value stay on one line, however long a path is: people grep for them
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
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path), "valid YAML 1.2, each key once", with_line=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8", "a YAML file in UTF-8") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: holds {type(tree).__name__}, not a mapping", "keys such as run_dir and pretrain")
    return tree


def _parse(text: str, where: str, needed: str, with_line: bool = False) -> Any:
    yaml = YAML(typ="rt")  # YAML 1.2: `3e-4` is a number and `no` a word; duplicate keys are errors
    try:
        return _unshare(yaml.load(text), where)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and with_line else ""
        raise UserError(f"{where}{line}: {_first_line(error.problem)}", needed) from None
    except (YAMLError, ValueError, RecursionError) as error:  # a control character, 2020-13-45, a thousand brackets
        raise UserError(f"{where}: {_first_line(error)}", needed) from None


def _first_line(problem: Any) -> str:
    return str(problem).split("\n")[0]


def _unshare(node: Any, where: str, seen: set[int] | None = None, above: tuple[int, ...] = ()) -> Any:
    """The tree with a copy for each alias of an anchor, so that an override changes only the key that it names."""
    seen = set() if seen is None else seen
    if not isinstance(node, CommentedMap | CommentedSeq):
        return node
    if id(node) in above:
        raise UserError(f"{where}: an anchor whose value holds itself", "values that end")
    if id(node) in seen:
        node = copy.deepcopy(node)
    seen.add(id(node))
    for key in list(node) if isinstance(node, CommentedMap) else range(len(node)):
        child = node[key]
        unshared = _unshare(child, where, seen, (*above, id(node)))
        if unshared is not child:
            node[key] = unshared
    return node


def _apply_override(tree: CommentedMap, override: str) -> tuple[Location, str]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        what = "has no '='" if not equals else "has an empty key"
        raise UserError(f"override {override!r} {what}", "key.path=value, such as pretrain.optim.learning_rate=3e-4")
    parts: Location = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    value = _parse(text, f"override {override!r}", "a YAML value after '='")
    node: Any = tree
    for part in parts[:-1]:
        node = _child(node, part, override)
    if isinstance(node, CommentedSeq):
        _check_position(node, parts[-1], override)
    node[parts[-1]] = value
    return parts, override


def _child(node: Any, part: int | str, override: str) -> Any:
    if isinstance(node, CommentedSeq):
        _check_position(node, part, override)
        return node[part]
    if node.get(part) is None:
        node[part] = CommentedMap()
    if isinstance(node[part], CommentedMap | CommentedSeq):
        return node[part]
    raise UserError(f"override {override!r}: nothing to set below {part!r}", "a path of keys that the recipe has")


def _check_position(node: CommentedSeq, part: int | str, override: str) -> None:
    if not isinstance(part, int) or part >= len(node):
        entries = "1 entry" if len(node) == 1 else f"{len(node)} entries"
        raise UserError(
            f"override {override!r}: the list has {entries}, none at {part!r}", "a position in it, counted from 0"
        )


def _plain(node: Any, path: Path) -> Any:
    """The tree in JSON's types; UserError for YAML's other ones (dates, binary, sets, tagged values)."""
    if isinstance(node, CommentedMap):
        return {str(key): _plain(_simple(node, key, path), path) for key in node}
    if isinstance(node, CommentedSeq):
        return [_plain(_simple(node, index, path), path) for index in range(len(node))]
    return node


def _simple(node: Any, key: Any, path: Path) -> Any:
    value = node[key]
    if isinstance(value, ScalarBoolean):
        return bool(value)  # ruamel's boolean with an anchor is an int
    if value is None or isinstance(value, CommentedMap | CommentedSeq | str | int | float):
        return value
    line = (node.lc.data or {}).get(key, [node.lc.line])[0] + 1
    raise UserError(
        f"{path}:{line}: {key}: a value of YAML type {type(value).__name__}",
        "text, a number, true, false, null, a list or a mapping",
        "put it into quotes if it is text",
    )


def _causes(problems: list[Any]) -> list[Any]:
    """pydantic's findings without those that follow from another: a list is "too short" if its entries are wrong."""
    places = [problem["loc"] for problem in problems]
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(
            len(place) > len(problem["loc"]) and place[: len(problem["loc"])] == problem["loc"] for place in places
        )
    ]


def _describe(
    problem: Any, path: Path, tree: CommentedMap, overridden: Iterable[tuple[Location, str]], schema: Schema
) -> tuple[int, str]:
    """Line number and text for one of pydantic's findings: where, which key, what is wrong, the nearest valid key."""
    location = tuple(
        part for index, part in enumerate(problem["loc"]) if not _is_union_tag(index, problem["loc"], tree)
    )
    line = _line(tree, location)
    where = f"{path}:{line}"
    place = (*location, "name") if problem["type"] == "union_tag_invalid" else location
    for target, override in overridden:
        below = target[: len(place)] == place and not _is_in_file(tree, place)
        if place[: len(target)] == target or below:
            where = f"override {override!r}"
    return (
        line,
        f"{where}: {'.'.join(str(part) for part in location) or 'the recipe'}: {_say(problem, location, tree, schema)}",
    )


def _say(problem: Any, location: Location, tree: CommentedMap, schema: Schema) -> str:
    """What is wrong, and what is known instead."""
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(str(location[-1]), _keys_at(location[:-1], tree, schema))}"
    if kind.startswith("union_tag"):
        tags = [tag.strip(" '") for tag in problem["ctx"].get("expected_tags", "").split(",")]
        if kind == "union_tag_invalid":
            return f"unknown name {problem['ctx']['tag']!r}{_nearest(problem['ctx']['tag'], tags)}"
        return f"`name` is missing; known: {', '.join(_names_at(location, tree, schema))}"
    message = problem["msg"].removeprefix("Value error, ").removesuffix(" for <class 'pathlib.Path'>")
    shown = "" if isinstance(found, dict | list | BaseModel) or kind == "missing" else f" (found {found!r})"
    return message + shown


def _nearest(found: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _is_union_tag(index: int, location: Sequence[int | str], tree: CommentedMap) -> bool:
    """pydantic puts a union's tag (`masked_lm`) into the path, where the file has no such level."""
    part, parent = location[index], _at(tree, tuple(location[:index]))
    return isinstance(parent, CommentedMap) and part not in parent and parent.get("name") == part


def _is_in_file(tree: CommentedMap, location: Location) -> bool:
    """Whether the file itself has the key, rather than an override that made it."""
    parent = _at(tree, location[:-1])
    return (
        isinstance(parent, CommentedMap | CommentedSeq)
        and location[-1:] != ()
        and location[-1] in (parent.lc.data or {})
    )


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


def _keys_at(location: Location, tree: CommentedMap, schema: Schema) -> list[str]:
    """Keys that the schema knows at `location`."""
    root: Any = TypeAdapter(schema).json_schema()
    definitions = root.get("$defs", {})
    options = [root]
    for index, part in enumerate(location):
        options = [child for option in options for child in _expand(_schema_child(option, part), definitions)]
        chosen = _at(tree, (*location[: index + 1], "name"))
        if chosen is not None:  # a union chosen by `name`: look only into the alternative that was chosen
            named = [o for o in options if o.get("properties", {}).get("name", {}).get("const") == chosen]
            options = named or options
    return sorted({key for option in options for key in option.get("properties", {})})


def _names_at(location: Location, tree: CommentedMap, schema: Schema) -> list[str]:
    """The names of a union's alternatives at `location`."""
    root: Any = TypeAdapter(schema).json_schema()
    options = [root]
    for part in location:
        options = [child for o in options for child in _expand(_schema_child(o, part), root.get("$defs", {}))]
    names = [option.get("properties", {}).get("name", {}).get("const") for option in options]
    return sorted(name for name in names if name)


def _schema_child(schema: Any, part: int | str) -> Any:
    return schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})


def _expand(schema: Any, definitions: Any) -> list[Any]:
    """A schema node with its references and alternatives resolved."""
    if "$ref" in schema:
        return _expand(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    alternatives = schema.get("anyOf", []) + schema.get("oneOf", [])
    return [node for option in alternatives for node in _expand(option, definitions)] or [schema]
