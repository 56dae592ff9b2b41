"""The `submit` verb: a recipe's stages as a chain of jobs, each after the one before, checked before any is submitted.
What a job does is in its script (script.py, job.sh); what became of it is asked by status.py."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm import commands, frozen
from slurm.grid import Element, elements, shares_data
from slurm.ledger import Ledger
from slurm.script import StageJob, common, render
from slurm.site import Site, load_site
from trainer import chain
from trainer.artifact import alone_in
from trainer.config import Recipe, Training
from trainer.errors import UserError
from trainer.recipe_file import require_section
from trainer.slurm_config import Slurm

STAGES = (*chain.STAGES, "report")  # what `lmworks run` does, in its order


def run(recipe: Recipe, *, stages: Sequence[str], site: str, array: Sequence[str], dry_run: bool) -> None:
    """Submit `stages`, by default all that the recipe has; `dry_run` prints the scripts instead."""
    where = load_site(site)
    cells = elements(recipe, array)
    jobs = plan(recipe, stages, where, len(cells), ("prepare",) if shares_data(array) else ())
    scripts = {job.stage: render(job, where) for job in jobs}
    if dry_run:
        for stage, text in scripts.items():
            print(f"# ==== {stage}.sbatch\n{text.removesuffix(common())}# ... and what ends every script, below")
        print(f"# ==== the end of every script\n{common()}")
        return
    with alone_in(jobs[0].folder):
        _submit(recipe, jobs, scripts, cells)


def _submit(recipe: Recipe, jobs: Sequence[StageJob], scripts: dict[str, str], cells: Sequence[Element]) -> None:
    folder = jobs[0].folder
    ledger = Ledger.read(folder)
    _refuse_second_chain(ledger, recipe)
    _warn_of_slow_saves(jobs)
    paths = [ledger.write_script(stage, text) for stage, text in scripts.items()]
    for path in paths:
        commands.check(path)  # before the copy of the code, which would stay behind
    frozen.freeze(folder, _recipes(recipe, cells), jobs[0].code)
    ledger.elements = [cell.name for cell in cells]
    _submit_chain(jobs, paths, ledger)
    for job in jobs:
        print(f"{job.stage}: job {ledger.jobs[job.stage]}, log {ledger.log(job.stage, job.name, bool(job.elements))}")
    print(f"look: lmworks status {recipe.run_dir}\nstop: lmworks cancel {recipe.run_dir}")


def plan(
    recipe: Recipe, stages: Sequence[str], site: Site, array_elements: int = 0, shared: Sequence[str] = ()
) -> list[StageJob]:
    """The jobs, in the chain's order; of an array's stages those that are `shared` run once for all elements.

    UserError for a stage that is not there or ranks that do not divide a batch.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UserError(f"no stage {unknown[0]!r}", f"some of {', '.join(STAGES)}", "or key=value for the recipe")
    for stage in stages:
        if stage != "report":
            require_section(recipe, stage)
    if "prepare" in stages and recipe.prepare_dir is not None:
        raise UserError(
            f"prepare with prepare_dir {recipe.prepare_dir}, which is another run's", "one of the two", "leave one out"
        )
    taken = {"prepare"} if recipe.prepare_dir is not None else set()
    there = [stage for stage in STAGES if stage == "report" or getattr(recipe, stage) is not None]
    there = [stage for stage in there if (stage in stages if stages else stage not in taken)]
    jobs = [_job(recipe, stage, site, 0 if stage in shared else array_elements) for stage in there]
    for job in jobs:
        if job.trains:
            _require_whole_batches(getattr(recipe, job.stage), job)
        _require_room(job, site)
    return jobs


def _require_room(job: StageJob, site: Site) -> None:
    """UserError for what SLURM would take and never do well."""
    cpus = job.job.cpus_per_node or (site.cpus_per_node if job.trains else None)
    if job.job.min_nodes and cpus and not site.exclusive:
        raise UserError(
            f"{job.stage}: min_nodes with {cpus} CPUs a node", "whole nodes", "set exclusive: true in the site file"
        )
    limit_s = 60 * (job.job.time_minutes or job.slurm.time_minutes)
    if job.slurm.notice_s >= limit_s:
        raise UserError(
            f"{job.stage}: slurm.notice_s is {job.slurm.notice_s}, and the whole start has {limit_s} s",
            "a notice that comes after work has begun",
            "raise time_minutes, or lower notice_s",
        )


def _job(recipe: Recipe, stage: str, site: Site, array_elements: int) -> StageJob:
    folder = recipe.run_dir.absolute() / "slurm"
    if any(ord(letter) < 32 or letter in "\\" for letter in str(folder)):
        raise UserError(f"run_dir {str(recipe.run_dir)!r}", "a path without backslashes and line ends", "rename it")
    wanted = recipe.slurm or Slurm()
    job = getattr(wanted, stage)
    all_of_them, one = site.gpus_per_node, min(1, site.gpus_per_node)
    default = {"pretrain": all_of_them, "distill": all_of_them, "bench": one, "tensorrt": one}
    return StageJob(
        name=f"{recipe.run_dir.name}-{stage}".replace("%", "_"),
        stage=stage,
        job=job,
        slurm=wanted,
        gpus_per_node=default.get(stage, 0) if job.gpus_per_node is None else job.gpus_per_node,
        workdir=Path.cwd(),
        folder=folder,
        code=folder / frozen.code_name(),
        python=site.python or (sys.executable if site.container.kind == "none" else "python3"),
        elements=array_elements,
        reads=(recipe.prepare_dir.absolute(),) if recipe.prepare_dir else (),
    )


def _require_whole_batches(section: Training, job: StageJob) -> None:
    """UserError where a batch does not fall evenly to the ranks of any number of nodes that the job may get."""
    ranks = job.ranks_per_node
    phases = getattr(section, "phases", ())
    for number in range(1 + len(phases)):
        part = section.phase_training(number) if phases else section  # type: ignore[attr-defined] - pretrain has it
        for nodes in range(job.job.fewest_nodes, job.job.nodes + 1):
            at_once = nodes * ranks * part.micro_batch_size
            if part.global_batch_size % at_once:
                raise UserError(
                    f"{job.stage}: global_batch_size {part.global_batch_size} on {nodes} x {ranks} ranks of "
                    f"micro_batch_size {part.micro_batch_size}",
                    f"a multiple of {at_once}",
                    "change the batch, or slurm's nodes, min_nodes, ranks_per_node",
                )


def _recipes(recipe: Recipe, cells: Sequence[Element]) -> dict[str, Recipe]:
    return {"recipe.yaml": recipe} | {f"recipe-{number}.yaml": cell.recipe for number, cell in enumerate(cells)}


def _refuse_second_chain(ledger: Ledger, recipe: Recipe) -> None:
    live = commands.unfinished(list(ledger.jobs.values()))
    if live:
        raise UserError(
            f"jobs {', '.join(live)} of {recipe.run_dir} are not over",
            "one chain at a time in a run folder",
            f"lmworks cancel {recipe.run_dir}, or take another run_dir",
        )


def _warn_of_slow_saves(jobs: Sequence[StageJob]) -> None:
    """Say what the last stop took, where it was longer than the notice is now, or never ended; of an array the longest.

    Elements of an array leave `<stage>-<number>.…`, other jobs `<stage>.…`.
    """
    for job in jobs:
        notice = f"slurm.notice_s is {job.slurm.notice_s}"
        lasted = [int(path.read_text().strip() or 0) for path in _notes(job, "last_stop_s")]
        if _notes(job, "stopping"):
            print(f"warning: {job.stage} was ended while it saved at its last stop; {notice}", file=sys.stderr)
        elif max(lasted, default=0) > job.slurm.notice_s:
            print(f"warning: {job.stage} took {max(lasted)} s to save at its last stop; {notice}", file=sys.stderr)


def _notes(job: StageJob, kind: str) -> list[Path]:
    return [*job.folder.glob(f"{job.stage}.{kind}"), *job.folder.glob(f"{job.stage}-[0-9]*.{kind}")]


def _submit_chain(jobs: Sequence[StageJob], paths: Sequence[Path], ledger: Ledger) -> None:
    """Submit the jobs, each noted at once; if SLURM refuses one, those before it are cancelled."""
    ledger.jobs = {}
    try:
        for job, path, before in zip(jobs, paths, itertools.chain([None], jobs), strict=False):
            after = ledger.jobs[before.stage] if before else None
            each = bool(job.elements and before and before.elements)
            ledger.jobs[job.stage] = commands.submit(path, after, each)
            ledger.write()
    except UserError:
        commands.cancel(list(ledger.jobs.values()))
        raise
