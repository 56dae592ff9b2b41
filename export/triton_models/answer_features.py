"""Triton's Python backend: the network's hidden states to what a text is known by, one vector a token and one a text.
It runs in the server, without lmworks.

Shape letters: B batch, T sequence length, H hidden size.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        names = ("attention_mask", "last_hidden_state")
        mask_BT, hidden_BTH = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names)
        mask_BT1 = mask_BT.astype(np.float32)[:, :, None]
        features_BTH = hidden_BTH.astype(np.float32) * mask_BT1
        mean_BH = features_BTH.sum(axis=1) / mask_BT1.sum(axis=1)
        answer = [pb_utils.Tensor("FEATURES", features_BTH), pb_utils.Tensor("EMBEDDING", mean_BH)]
        return pb_utils.InferenceResponse(answer)
