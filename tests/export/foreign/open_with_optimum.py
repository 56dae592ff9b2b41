"""What optimum makes of exported folders: logits, and greedy text of models that write. Runs where optimum is, with two
paths: of the JSON that says what is asked, and of the JSON that answers it."""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForMaskedLM

asked, answer = map(Path, sys.argv[1:])
found = []
for one in json.loads(asked.read_text()):
    kind = ORTModelForCausalLM if one["new"] else ORTModelForMaskedLM
    model = kind.from_pretrained(one["folder"], file_name=one["file"])
    inputs = {name: torch.tensor(value) for name, value in one["inputs"].items()}
    made = {"logits": model(**inputs).logits.tolist()}
    if one["new"]:
        inputs.pop("position_ids")  # `generate` counts them itself, from the mask
        settings = {"max_new_tokens": one["new"], "do_sample": False, "pad_token_id": one["pad"]}
        made["tokens"] = model.generate(**inputs, **settings).tolist()
    found.append(made)
answer.write_text(json.dumps(found))
