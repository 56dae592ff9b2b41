"""Triton's Python backend as a stand-in for its ONNX Runtime backend, which the server of `lmworks serve` lacks.
It runs in the server, without lmworks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        here = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(here / "model.onnx", options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.row_by_row = "lmworks.room_in_past" in metadata  # several tokens after a past: of one text only
        config = json.loads(args["model_config"])
        self.inputs = [port["name"] for port in config["input"]]
        self.outputs = [port["name"] for port in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One call for all requests: Triton's dynamic batching brings together only those of one shape."""
        rows = [self._arrays(request) for request in requests]
        feeds = {
            name: np.concatenate(column) for name, column in zip(self.inputs, zip(*rows, strict=True), strict=True)
        }
        try:
            outputs = self._run(feeds)
        except Exception as problem:  # ONNX Runtime's errors have no class in common
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))] * len(requests)
        ends = np.cumsum([row[0].shape[0] for row in rows])[:-1]
        parts = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.outputs, part, strict=True)])
                for part in parts]  # fmt: skip

    def _run(self, feeds: dict[str, np.ndarray]) -> list[Any]:
        if not self.row_by_row or feeds["input_ids"].shape[1] in (1, feeds["attention_mask"].shape[1]):
            return list(self.session.run(self.outputs, feeds))
        rows = [
            self.session.run(self.outputs, {name: value[row : row + 1] for name, value in feeds.items()})
            for row in range(len(feeds["input_ids"]))
        ]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    def _arrays(self, request: Any) -> list[np.ndarray]:
        return [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
