"""What a cluster is called and wants, in a file of its own: names, GPUs, modules, container, network.
The size of a job is the recipe's `slurm` section; both meet in the batch script, see script.py."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.errors import UserError
from trainer.recipe_file import load_strict
from trainer.sections import Section

# Text of one line without what SLURM's own reading of #SBATCH lines gives a meaning to and cannot escape.
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\\]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Container(Section):
    """Where the ranks run."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: NVIDIA's plug-in of srun, on enroot. apptainer: `apptainer exec`."""
    image: Text | None = None
    mounts: tuple[Text, ...] = ()
    """SOURCE or SOURCE:TARGET, beside the folder of submission and the run folder, which are always there."""

    @model_validator(mode="after")
    def _image_where_needed(self) -> "Container":
        if (self.kind == "none") != (self.image is None):
            raise ValueError("kind pyxis and apptainer need an image, and kind none takes no image")
        if self.kind == "none" and self.mounts:
            raise ValueError("mounts belong to a container")
        return self


class Site(Section):
    """One cluster, or one way to use it."""

    account: Text | None = None
    partition: Text | None = None
    cpu_partition: Text | None = None
    """For stages that ask for no GPUs; by default `partition`."""
    qos: Text | None = None
    constraint: Text | None = None
    reservation: Text | None = None
    exclude: Text | None = None
    """Nodes that are not to be used."""
    exclusive: bool = False
    """Whole nodes for stages that train."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """The option by which GPUs are asked for."""
    gpu_type: Text | None = None
    """Its name in SLURM, where a partition has several."""
    cpus_per_node: PositiveInt | None = None
    """For stages that train."""
    directives: tuple[Annotated[Text, Field(pattern=r"^--[a-z][a-z-]*(=.*)?$")], ...] = ()
    """Other options of sbatch, such as `--mail-type=END`."""
    setup: tuple[str, ...] = ()
    """Lines of bash that run before everything else: `module load cuda/12.8`, `source ~/venv/bin/activate`."""
    python: Text | None = None
    """The interpreter; by default the one that submits, and `python3` in a container."""
    container: Container = Container()
    scratch: Text | None = None
    """Folder on a node's own disk, for temporary files."""
    network_interface: Text | None = None
    """For NCCL and gloo, where a node has several."""
    min_all_reduce_gb_s: Annotated[float, Field(ge=0)] = 0.0
    """What the preflight's all-reduce between nodes must reach, in GB/s past one node (one rank a node, 64 MiB); the
    log says what it reaches on a good day. Where it does not, a node that is slow with each neighbour is excluded."""
    environment: dict[Name, str] = {}
    """Variables such as NCCL_IB_HCA."""


def load_site(name: str) -> Site:
    """The checked site of a file, or of the name of one that ships with lmworks; UserError lists all problems."""
    shipped = {
        Path(entry.name).stem: Path(str(entry))
        for entry in resources.files("slurm.sites").iterdir()
        if entry.name.endswith(".yaml")
    }
    path = Path(name) if Path(name).is_file() else shipped.get(name)
    if path is None:
        raise UserError(f"no site {name!r}", f"a YAML file, or one of: {', '.join(sorted(shipped))}", "check --site")
    return load_strict(path, Site, "site file")
