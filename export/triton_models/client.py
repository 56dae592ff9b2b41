"""Sends texts to a packed model that Triton serves, and prints the answers: python client.py TEXT…
A model that answers questions takes pairs: python client.py QUESTION CONTEXT…

Needs: pip install 'tritonclient[grpc,http]'. Nothing here is particular to lmworks.
"""

import argparse
import json
from typing import Any

import numpy as np

MODEL = "{{ ensemble }}"
INPUTS = ["TEXT"]


def ask(client: Any, module: Any, rows: list[Any], model: str = MODEL, inputs: list[str] = INPUTS) -> list[Any]:
    """Answers to `rows`, sent in one request: a text each, or one text for each of `inputs`.

    tritonclient's InferenceServerException for a text that is refused.
    """
    sent = []
    table = [[row] if isinstance(row, str) else row for row in rows]
    for name, column in zip(inputs, zip(*table, strict=True), strict=True):
        array = np.array([[text.encode("utf-8")] for text in column], dtype=object)
        sent.append(module.InferInput(name, list(array.shape), "BYTES"))
        sent[-1].set_data_from_numpy(array)
    answers = client.infer(model, sent)
    embeddings = answers.as_numpy("EMBEDDING")  # the others answer in JSON
    return (
        embeddings.tolist() if embeddings is not None else [json.loads(one) for one in answers.as_numpy("ANSWER")[:, 0]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Ask {MODEL}, one answer a text.")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--url", help="default localhost:8001 (grpc) or localhost:8000 (http)")
    arguments = parser.parse_args()
    if len(arguments.texts) % len(INPUTS):
        parser.error(f"a row has {len(INPUTS)} texts: {', '.join(INPUTS)}")
    if arguments.protocol == "grpc":
        import tritonclient.grpc as module  # pyright: ignore[reportMissingImports] - the user's, not lmworks'
    else:
        import tritonclient.http as module  # pyright: ignore[reportMissingImports]
    url = arguments.url or {"grpc": "localhost:8001", "http": "localhost:8000"}[arguments.protocol]
    rows = list(zip(*[iter(arguments.texts)] * len(INPUTS), strict=True))
    for answer in ask(module.InferenceServerClient(url), module, rows):
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    main()
