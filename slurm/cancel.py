"""The `cancel` verb: ends the jobs of a run folder that wait or run. What they saved stays."""

from pathlib import Path

from slurm import commands
from slurm.ledger import Ledger
from trainer.errors import UserError


def run(run_dir: Path) -> None:
    """Cancel the last submitted chain; UserError if there is none."""
    ledger = Ledger.read(run_dir / "slurm")
    if not ledger.jobs:
        raise UserError(f"nothing was submitted for {run_dir}", "a run folder with a slurm/jobs.json", "lmworks submit")
    live = commands.unfinished(list(ledger.jobs.values()))
    commands.cancel(live)
    print(f"cancelled: {', '.join(live)}" if live else "no job of this run folder waits or runs")
