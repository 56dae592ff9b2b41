"""The `schema` verb: prints the recipe's JSON Schema, which editors take for completion and checks.
What the schema says is `config`'s business."""

import json

from trainer.__main__ import stage_main
from trainer.recipe_file import json_schema


def run() -> None:
    """Print the JSON Schema of a recipe to stdout."""
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    stage_main("schema")
