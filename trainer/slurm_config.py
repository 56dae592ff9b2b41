"""The `slurm` section of a recipe: how large each stage's job is, for how long, and how often it may start again.
What a cluster is called and wants is not a recipe's business: that is in a site file, see slurm/site.py."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from trainer.sections import Section


class Job(Section):
    """The allocation of one stage; what is not given comes from the site file."""

    nodes: PositiveInt = 1
    min_nodes: PositiveInt | None = None
    """Start, and start again after a failure, with as few nodes as this if the rest are not to be had."""
    ranks_per_node: PositiveInt | None = None
    """By default one for each GPU, and one where there is none."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """By default the site's for pretrain and distill, one for bench and tensorrt, none for the others."""
    cpus_per_node: PositiveInt | None = None
    memory_gib: PositiveInt | None = None
    """Of each node."""
    time_minutes: PositiveInt | None = None
    """Limit of one start; the job goes on in another when it is over."""

    @model_validator(mode="after")
    def _fewest_is_not_more(self) -> "Job":
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        return self

    @property
    def fewest_nodes(self) -> int:
        """Nodes that the job does with if it must."""
        return self.min_nodes or self.nodes


class Slurm(Section):
    """Jobs of the stages on a SLURM cluster."""

    time_minutes: PositiveInt = 60
    """Limit of one start of a stage that has none of its own."""
    notice_s: Annotated[int, Field(ge=10, le=65535)] = 120
    """Time between the signal and the end of the job: what saving a checkpoint may take."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """How many starts in a row may end without a newer checkpoint and be followed by another, whatever ended them: a
    signal, a lost rank, a dead node. A run that gets on is started as often as it takes."""
    preflight: bool = True
    """Look at the nodes before ranks are started on several or on GPUs; one that is not fit is named and excluded."""
    prepare: Job = Job()
    pretrain: Job = Job()
    distill: Job = Job()
    export: Job = Job()
    bench: Job = Job()
    tensorrt: Job = Job()
    pack: Job = Job()
    report: Job = Job()

    @model_validator(mode="after")
    def _only_training_spreads(self) -> "Slurm":
        for stage in ("prepare", "export", "bench", "tensorrt", "pack", "report"):
            job = getattr(self, stage)
            if job.nodes > 1 or (job.ranks_per_node or 1) > 1:
                raise ValueError(f"{stage} runs as one process: it takes neither nodes nor ranks_per_node")
        return self
