"""Sends texts to a packed model that Triton serves, and prints the answers: python client.py TEXT…

Needs: pip install 'tritonclient[grpc,http]'. Nothing here is particular to lmworks.
"""

import argparse
import json
from typing import Any

import numpy as np

MODEL = "{{ ensemble }}"


def ask(client: Any, module: Any, texts: list[str], model: str = MODEL) -> list[Any]:
    """Answers to `texts`, sent in one request; tritonclient's InferenceServerException for a text that is refused."""
    array = np.array([[text.encode("utf-8")] for text in texts], dtype=object)
    sent = module.InferInput("TEXT", list(array.shape), "BYTES")
    sent.set_data_from_numpy(array)
    answers = client.infer(model, [sent]).as_numpy("ANSWER")
    return [json.loads(answer) for answer in answers.reshape(-1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Ask {MODEL}, one answer a text.")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--url", help="default localhost:8001 (grpc) or localhost:8000 (http)")
    arguments = parser.parse_args()
    if arguments.protocol == "grpc":
        import tritonclient.grpc as module  # pyright: ignore[reportMissingImports] - the user's, not lmworks'
    else:
        import tritonclient.http as module  # pyright: ignore[reportMissingImports]
    url = arguments.url or {"grpc": "localhost:8001", "http": "localhost:8000"}[arguments.protocol]
    for answer in ask(module.InferenceServerClient(url), module, arguments.texts):
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    main()
