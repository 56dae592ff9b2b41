"""The fp8 form: what is rounded and to what, how far it may be off, and faults that the gates and the audit catch."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export import export as stage
from export import fp8
from export.audit import audit, read_layers
from export.calibration import calibration_batches
from export.cases import make_cases
from export.fp8 import angles, check_rounded, round_products
from export.io_spec import read_spec
from export.parity import check_parity
from export.runners import open_onnx, open_torch
from export.to_tensorrt import Builder, capabilities_for, products
from tests.export.test_tensorrt import SETTINGS as ENGINE
from trainer.artifact import read_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Export, Parity

E4M3 = TensorProto.FLOAT8E4M3FN
# Random weights make near-ties of all logits, so that fp8 is judged here by its error alone.
LOOSE = Parity().fp8.model_copy(update={"min_top1": 0.0})
