"""Engines on a GPU: a cache that stays there, through several profiles."""

import importlib.util

import pytest
import torch

from export.engine_files import plan_name, write_manifest
from export.engine_proof import prove_engine
from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.runners import open_onnx
from export.tensorrt_runner import open_engine
from export.to_tensorrt import Builder
from tests.export.conftest import documents, model_folder, raw_graph  # noqa: F401 - fixtures
from tests.export.test_device_cache import PROFILES, PROMPTS, SEEDS
from trainer.export_config import Fp32Tolerance, Parity
from trainer.serving_config import TensorRT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BUILT = {"variant": "fp32", "version_compatible": False, "hardware_compatibility": "none"}


@pytest.mark.parametrize("name", SEEDS)
def test_a_cache_on_the_gpu_gives_the_graphs_texts(name, model_folder, raw_graph, documents, tmp_path):  # noqa: F811
    library = "tensorrt" if importlib.util.find_spec("tensorrt") else "tensorrt_rtx"
    pytest.importorskip(library)
    builder = Builder(library)
    own = builder.place.compute_capability
    if builder.ahead_of_time and f"SM{own.replace('.', '')}" not in builder.library.ComputeCapability.__members__:
        pytest.skip(f"{library} {builder.place.library_version} does not build for {own}")
    folder, graph = model_folder(name, SEEDS[name]), raw_graph(name, SEEDS[name])
    spec, plan = read_spec(folder), tmp_path / plan_name("fp32", own)
    made, _ = builder.build(graph, spec, TensorRT(library=library, profiles=PROFILES), own)
    plan.write_bytes(made)
    write_manifest(plan, builder.place, graph, BUILT)
    engine, source = open_engine(plan, spec, graph), open_onnx(graph, 1)
    found = prove_engine(name, spec, engine, source, documents, Parity(), Fp32Tolerance(relative_rms=1e-3))
    assert found["metrics"]["tokens_on_device"] == spec.max_length
    assert generate(engine, spec, PROMPTS, Sampling(40)) == generate(source, spec, PROMPTS, Sampling(40))
