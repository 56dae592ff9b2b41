"""The walls of the house, read from the imports: who may import whom, and what must stay light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trainer", "export", "slurm")

# A third-party package (and what lies below it) -> the files or folders that may import it.
WALLS = {
    "accelerate": ("trainer/engine/",),
    "deepspeed": ("trainer/engine/",),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
    "onnxscript": ("export/",),
    "tensorrt": ("export/tensorrt_library.py",),
    "tensorrt_rtx": ("export/tensorrt_library.py",),
    "pynvml": ("export/energy.py",),
    # What runs inside the server has its own imports, and lmworks' own code none of them.
    "triton_python_backend_utils": ("export/triton_models/",),
    "tritonclient": ("export/triton_models/client.py",),
    "torch.utils.tensorboard": ("trainer/engine/metrics.py",),
    "wandb": ("trainer/engine/metrics.py",),
    "mlflow": ("trainer/engine/metrics.py",),
    "torch.distributed": ("trainer/engine/", "trainer/environment.py", "slurm/preflight.py"),
}
# These stand on nothing heavy, so that --dry-run answers at once on a login node.
LIGHT = (
    "trainer/__init__.py",
    "trainer/__main__.py",
    "trainer/config.py",
    "trainer/sections.py",
    "trainer/export_config.py",
    "trainer/slurm_config.py",
    "trainer/serving_config.py",
    "trainer/errors.py",
    "trainer/artifact.py",
    "trainer/environment.py",
    "trainer/recipe_file.py",
    "trainer/schema.py",
    "trainer/doctor.py",
    "trainer/chain.py",
    "trainer/data/__init__.py",
    "trainer/data/files.py",
    "trainer/data/bytestream.py",
    "trainer/engine/__init__.py",
    "trainer/engine/launch.py",
    "trainer/engine/zero.py",
    "trainer/engine/zero_facts.py",
    "trainer/plan.py",
    "trainer/planning/__init__.py",
    "trainer/planning/activations.py",
    "trainer/planning/case.py",
    "trainer/planning/cost.py",
    "trainer/planning/hardware.py",
    "trainer/planning/memory.py",
    "trainer/planning/shapes.py",
    "trainer/planning/workload.py",
    "slurm/__init__.py",
    "slurm/cancel.py",
    "slurm/commands.py",
    "slurm/frozen.py",
    "slurm/grid.py",
    "slurm/ledger.py",
    "slurm/preflight.py",
    "slurm/rank.py",
    "slurm/script.py",
    "slurm/site.py",
    "slurm/status.py",
    "slurm/submit.py",
)
HEAVY = ("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "onnx", "onnxruntime", "tensorflow")
# Lower numbers may not import higher ones; what is not listed is a stage or a piece of one, on top of all.
FLOORS = (
    ("trainer/errors.py", "trainer/sections.py"),
    ("trainer/export_config.py", "trainer/slurm_config.py"),
    ("trainer/serving_config.py",),
    ("trainer/config.py", "trainer/engine/launch.py", "trainer/engine/zero_facts.py"),
    ("trainer/recipe_file.py", "trainer/artifact.py"),
    ("trainer/environment.py", "trainer/data/"),
    ("trainer/attention.py", "trainer/heads.py"),
    ("trainer/models.py",),
    ("trainer/students.py", "trainer/objectives/"),
    ("trainer/engine/lamb.py", "trainer/engine/fragments.py", "trainer/engine/ranks.py", "trainer/engine/precision.py"),
    ("trainer/engine/optim.py", "trainer/engine/zero.py", "trainer/engine/strategy.py"),
    ("trainer/engine/replicated.py", "trainer/engine/fsdp2.py", "trainer/engine/zero_strategy.py"),
    ("trainer/engine/engine.py",),
    (
        "trainer/engine/metrics.py",
        "trainer/engine/checkpoint.py",
        "trainer/engine/trouble.py",
        "trainer/engine/consolidate.py",
    ),
    ("trainer/engine/loop.py",),
    ("trainer/session.py",),
)
EXPORT_MAY_IMPORT = ("trainer.errors", "trainer.config", "trainer.export_config", "trainer.serving_config",
                     "trainer.artifact", "trainer.recipe_file", "trainer.models",
                     "trainer.data", "trainer.environment", "trainer.__main__")  # fmt: skip

SLURM_MAY_IMPORT = ("trainer.errors", "trainer.sections", "trainer.config", "trainer.slurm_config", "trainer.artifact",
                    "trainer.recipe_file", "trainer.environment", "trainer.engine.launch", "trainer.engine.zero",
                    "trainer.chain", "trainer.__main__")  # fmt: skip


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` gives a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, inside_functions)


def imported_by(path: Path, inside_functions: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions))


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def wall_breaks(path: str, names: set[str]) -> list[str]:
    return [
        f"{path} imports {name}"
        for name in sorted(names)
        for package, allowed in WALLS.items()
        if is_below(name, package) and not any(path == place or path.startswith(place) for place in allowed if place)
    ]


def floor(path: str) -> int:
    for number, places in enumerate(FLOORS):
        if any(path == place or (place.endswith("/") and path.startswith(place)) for place in places):
            return number
    return len(FLOORS)


def module_file(name: str) -> str | None:
    """Path of one of our modules, None for a name within one and for everything foreign."""
    base = ROOT.joinpath(*name.split("."))
    found = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    return found.relative_to(ROOT).as_posix() if found else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_walls(path):
    name = path.relative_to(ROOT).as_posix()
    names = imported_by(path)
    assert wall_breaks(name, names) == []
    ours = {imported for imported in names if imported.split(".")[0] in PACKAGES}
    if name.startswith("trainer/"):
        assert [one for one in sorted(ours) if not is_below(one, "trainer")] == [], "trainer imports only trainer"
        files = {file for one in ours if (file := module_file(one)) and not file.endswith("__init__.py")}
        assert [file for file in sorted(files) if floor(file) > floor(name)] == [], "imports go downwards"
    if name.startswith("export/"):
        allowed = (*EXPORT_MAY_IMPORT, "export")
        outside = [one for one in sorted(ours) if one != "trainer" and not any(is_below(one, a) for a in allowed)]
        assert outside == [], f"export imports only {', '.join(allowed)}"
    if name.startswith("slurm/"):
        allowed = (*SLURM_MAY_IMPORT, "slurm")
        outside = [
            one
            for one in sorted(ours)
            if one not in ("trainer", "trainer.engine") and not any(is_below(one, a) for a in allowed)
        ]
        assert outside == [], f"slurm imports only {', '.join(allowed)}"
    if name in LIGHT:
        at_once = imported_by(path, inside_functions=False)
        heavy = [one for one in sorted(at_once) if one.split(".")[0] in HEAVY]
        assert heavy == [], f"{name} is read on login nodes"


def test_no_file_is_named_like_a_dependency():
    shadowing = {
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "onnx",
        "datasets",
        "tokenizers",
        "json",
        "tensorrt",
    }
    assert [path for path in sources() if path.stem in shadowing] == []


PLANTED = {
    "import accelerate": "trainer/pretrain.py",
    "def f():\n    from deepspeed.ops import adam": "trainer/models.py",
    "import onnx.helper": "trainer/pretrain.py",
    "from torch import distributed": "trainer/models.py",
    "import torch.distributed as dist": "export/bench.py",
    "import tensorrt": "export/export.py",
    "import tritonclient.grpc": "export/serve.py",
    "try:\n    import wandb\nexcept ImportError:\n    pass": "trainer/session.py",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_break_is_seen(source):
    assert wall_breaks(PLANTED[source], set(imports(ast.parse(source)))) != []


def test_names_that_only_begin_alike_are_no_break():
    names = set(imports(ast.parse("import onnxlike\nfrom torch.distributions import Normal")))
    assert wall_breaks("trainer/models.py", names) == []


def run_and_list_modules(*arguments: str) -> tuple[set[str], str]:
    """Modules that one command of lmworks imports, and what it prints."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('MODULES', ' '.join(sys.modules), file=sys.stderr))\n"
        "from trainer.__main__ import main\n"
        f"raise SystemExit(main({list(arguments)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("MODULES "))
    return set(line.split()[1:]), done.stdout


@pytest.mark.parametrize(
    "verb", ["run", "plan", "prepare", "pretrain", "distill", "export", "bench", "pack", "tensorrt", "report"]
)
def test_dry_run_imports_nothing_heavy(verb):
    section = ["tensorrt.tf32=false"] * (verb == "tensorrt")  # quickstart has none: not every machine has the library
    modules, printed = run_and_list_modules(verb, "quickstart", *section, "--dry-run")
    assert "run_dir: runs/quickstart" in printed
    assert sorted(modules & {*HEAVY, "numpy", "matplotlib", "pyarrow"}) == []


def test_plan_imports_nothing_heavy():
    modules, printed = run_and_list_modules("plan", "quickstart")
    assert "parameters     5,364,480" in printed
    assert sorted(modules & {*HEAVY, "numpy", "matplotlib", "pyarrow"}) == []


def test_submit_imports_nothing_heavy():
    modules, printed = run_and_list_modules("submit", "quickstart", "--dry-run")
    assert "#SBATCH --job-name=quickstart-pretrain" in printed
    assert sorted(modules & {*HEAVY, "numpy", "matplotlib", "pyarrow"}) == []


def test_schema_imports_nothing_heavy():
    modules, printed = run_and_list_modules("schema")
    assert '"properties"' in printed
    assert sorted(modules & {*HEAVY, "numpy"}) == []
