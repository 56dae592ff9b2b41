"""What the installed DeepSpeed and Accelerate make of the configs and YAMLs that ship; a wheel carries them."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.trainer.engine.zero_cases import CONFIGS, ROOT, SHIPPED, resolve, training
from trainer.config import EngineConfig
from trainer.engine.zero import chosen_zero, load_zero
from trainer.engine.zero_facts import DEPRECATED_ZERO_KEYS, REMOVED_KEYS, TOP_LEVEL_KEYS, ZERO_KEYS
from trainer.errors import UserError


def cases():
    """Configs for DeepSpeed to judge, for one rank, as the oracle is one."""
    recipes = {
        "bf16": training(global_batch_size=6, max_grad_norm=0.25, engine={"nvme_path": Path("/nvme")}),
        "fp32": training(
            precision="fp32", max_grad_norm=None, optim={"name": "lamb"}, engine={"nvme_path": Path("/nvme")}
        ),
    }
    return {(name, kind): resolve(name, recipe, world=1) for name in SHIPPED for kind, recipe in recipes.items()}


@pytest.fixture(scope="module")
def deepspeed_says():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not here: pip install -e '.[deepspeed]'")
    minimal = {"train_batch_size": 1, "zero_optimization": {"stage": 2}}
    removed = {key: changed_tree(minimal, key) for key in REMOVED_KEYS}
    unsafe = {**resolve("zero0", world=1).config, "torch_autocast": {"enabled": False}, "bf16": {"enabled": True}}
    asked = {
        "configs": {f"{name} {kind}": zero.config for (name, kind), zero in cases().items()}
        | removed
        | {"minimal": minimal},
        "engines": {"autocast": resolve("zero0", world=1).config, "bf16 section": unsafe},
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("deepspeed_oracle.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def changed_tree(tree, key):
    *parents, last = key.split(".")
    return tree | ({parents[0]: tree[parents[0]] | {last: 1}} if parents else {last: {}})


def test_deepspeed_takes_what_we_resolve_and_understands_it_as_meant(deepspeed_says):
    for (name, kind), zero in cases().items():
        half = kind == "bf16"
        assert deepspeed_says["configs"][f"{name} {kind}"] == {
            "batch": [6, 2, 3] if half else [16, 2, 8],
            "gradient_clipping": 0.25 if half else 0.0,
            "bf16": half and zero.stage > 0,
            "fp16": False,
            "autocast": "torch.bfloat16" if half and zero.stage == 0 else None,
            "stage": zero.stage,
            "offload": [zero.offload_optimizer, zero.offload_param],
            "reduce_bucket_size": zero.config["zero_optimization"].get("reduce_bucket_size", 500_000_000),
            "untested": not half,
            "force_cpu_optimizer": zero.offload_optimizer == "none",
        }, (name, kind)


def test_our_lists_are_those_of_the_installed_deepspeed(deepspeed_says):
    read = set(deepspeed_says["top_level"]) - {key for key in REMOVED_KEYS if "." not in key}
    assert sorted(read) == sorted(TOP_LEVEL_KEYS)
    assert {key for key, deprecated in deepspeed_says["zero"].items() if not deprecated} == ZERO_KEYS
    assert {key for key, deprecated in deepspeed_says["zero"].items() if deprecated} == set(DEPRECATED_ZERO_KEYS)
    for key in REMOVED_KEYS:
        assert str(deepspeed_says["configs"][key]).startswith("DeepSpeedConfigError"), key


def test_without_zero_the_bf16_section_moves_weights_before_the_first_batch_and_autocast_does_not(deepspeed_says):
    assert deepspeed_says["moved"] == {"autocast": False, "bf16 section": True}


YAMLS = sorted(path.name for path in (CONFIGS / "accelerate").glob("*.yaml"))


def launched(yaml, monkeypatch):
    """What `accelerate launch --config_file` would put into the environment of a rank on the second node."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(CONFIGS / "accelerate" / yaml), "--num_processes", "4", "--machine_rank", "1"]
    words += ["--main_process_ip", "head", "--main_process_port", "29511", "-m", "trainer.pretrain"]
    monkeypatch.setattr(sys, "argv", ["accelerate-launch", *words])
    arguments, defaults, from_yaml = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert not from_yaml and arguments.mixed_precision == "no", "precision is the recipe's"
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)


def test_there_is_a_yaml_for_each_way_to_launch():
    several = {"zero2_multinode", "zero3_multinode", "ddp_multinode", "fsdp2_multinode", "fsdp2"}
    assert set(YAMLS) == {f"{name}.yaml" for name in {*SHIPPED, *several}}


@pytest.mark.parametrize("yaml", YAMLS)
def test_accelerate_takes_the_yamls(yaml, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin

    monkeypatch.chdir(ROOT)
    arguments, environ = launched(yaml, monkeypatch)
    assert arguments.num_machines == (2 if "multinode" in yaml else 1)
    assert arguments.nproc_per_node == ("2" if "multinode" in yaml else "4")
    if "multinode" in yaml:
        assert (arguments.node_rank, arguments.rdzv_backend, arguments.rdzv_endpoint) == (1, "static", "head:29511")
    if not yaml.startswith("zero"):
        assert environ.get("ACCELERATE_USE_FSDP") == ("true" if "fsdp" in yaml else None)
        assert environ.get("FSDP_VERSION") == ("2" if "fsdp" in yaml else None)
        assert chosen_zero(EngineConfig(), environ) is None
        return
    name = yaml.removesuffix(".yaml").removesuffix("_multinode")
    found = chosen_zero(EngineConfig(), environ)
    assert found == f"deepspeed_configs/{name}.json" and load_zero(found) == load_zero(name)
    monkeypatch.setattr(os, "environ", environ)
    resolved = resolve(name)
    plugin = DeepSpeedPlugin(hf_ds_config=resolved.config)  # raises if the YAML says what the JSON owns
    assert plugin.zero_stage == resolved.stage
    assert plugin.zero3_init_flag is (resolved.stage == 3)
    plugin.set_mixed_precision("no" if resolved.stage == 0 else "bf16")
    assert plugin.deepspeed_config == resolved.config | {"steps_per_print": float("inf")}


def test_quantized_gradients_need_a_rank_for_each_gpu_that_is_seen(monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    import torch

    from trainer.engine.engine import Engine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"with 4 rank\(s\) on a node that sees 8 GPUs"):
        Engine._require_rank_for_each_gpu(resolve("zeropp", world=8), 8)
    Engine._require_rank_for_each_gpu(resolve("zero3", world=8), 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # a launcher that says only how many there are in all
    Engine._require_rank_for_each_gpu(resolve("zeropp", world=8), 8)


# ---- what is installed -----------------------------------------------------------------------------------------


def test_a_wheel_carries_the_configs_and_reads_them_without_anything_heavy(tmp_path):
    source = tmp_path / "source"
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", *(ROOT / "trainer").rglob("*.py"), *CONFIGS.rglob("*.*")]:
        copied = source / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    shipped = {path.relative_to(ROOT) for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert shipped == {
        Path(path).relative_to(tmp_path / "site") for path in (tmp_path / "site/deepspeed_configs").rglob("*.*")
    }
    code = (
        "import sys\nfrom trainer.engine import zero\nprint(zero.__file__)\n"
        f"assert all(zero.load_zero(name) for name in {SHIPPED!r})\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert ran.stdout.splitlines() == [str(tmp_path / "site/trainer/engine/zero.py"), "[]"], ran.stderr
