"""The schema that editors get: every key of a recipe, with type, bound and meaning."""

import json

import pytest

from trainer.__main__ import main
from trainer.config import Recipe


@pytest.fixture
def schema(capsys):
    assert main(["schema"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prints_the_schema_of_a_recipe(schema):
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["required"] == ["run_dir"]
    assert schema["title"] == "Recipe"


def test_every_field_an_editor_may_suggest_has_a_type(schema):
    for name, part in schema["$defs"].items():
        for key, field in part["properties"].items():
            assert {"type", "anyOf", "oneOf", "$ref", "const", "enum", "allOf"} & set(field), f"{name}.{key}"


def test_unknown_keys_are_refused_everywhere(schema):
    parts = [schema, *schema["$defs"].values()]
    assert len(parts) > 15
    assert [part["title"] for part in parts if part["additionalProperties"] is not False] == []


def test_bounds_and_meanings_reach_the_editor(schema):
    share = schema["$defs"]["MaskedLM"]["properties"]["mlm_probability"]
    assert (share["exclusiveMinimum"], share["exclusiveMaximum"], share["default"]) == (0.0, 1.0, 0.15)
    assert "Share of tokens" in share["description"]
