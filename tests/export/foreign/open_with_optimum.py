"""What optimum makes of exported folders: logits, and greedy text of models that write. Runs where optimum is, with two
paths: of the JSON that says what is asked, and of the JSON that answers it."""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForMaskedLM, ORTModelForSeq2SeqLM

KINDS = {"bert": ORTModelForMaskedLM, "gpt2": ORTModelForCausalLM, "llama": ORTModelForCausalLM}

asked, answer = map(Path, sys.argv[1:])
found = []
for one in json.loads(asked.read_text()):
    inputs, made = {name: torch.tensor(value) for name, value in one["inputs"].items()}, {}
    if one["name"] in KINDS:
        model = KINDS[one["name"]].from_pretrained(one["folder"], file_name=one["file"])
        made["logits"] = model(**inputs).logits.tolist()
    else:
        model = ORTModelForSeq2SeqLM.from_pretrained(one["folder"], subfolder="onnx")
    if one["new"]:
        inputs.pop("position_ids", None)  # `generate` counts them itself, from the mask
        settings = {"max_new_tokens": one["new"], "do_sample": False, "pad_token_id": one["pad"]}
        made["tokens"] = model.generate(**inputs, **settings).tolist()
    found.append(made)
answer.write_text(json.dumps(found))
