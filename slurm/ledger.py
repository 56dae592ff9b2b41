"""`<run_dir>/slurm/jobs.json`: which jobs a run folder has, and where their scripts and logs are.
What the jobs do now is SLURM's to say, see status.py."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trainer.artifact import write_json, write_text


@dataclass
class Ledger:
    """The last chain that was submitted for a run folder."""

    folder: Path
    jobs: dict[str, str] = field(default_factory=dict)  # stage -> id
    elements: list[str] = field(default_factory=list)  # of an array: what each was told, such as `seed=1`

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """The ledger of `<run_dir>/slurm`, empty if nothing was submitted there."""
        path = folder / "jobs.json"
        return cls(folder, **json.loads(path.read_text())) if path.is_file() else cls(folder)

    def write(self) -> None:
        """Replace the file."""
        write_json(self.folder / "jobs.json", {"jobs": self.jobs, "elements": self.elements})

    def write_script(self, stage: str, text: str) -> Path:
        """Write a stage's script; returns its path."""
        path = self.folder / f"{stage}.sbatch"
        write_text(path, text)
        return path

    def log(self, stage: str, name: str, is_array: bool) -> Path:
        """Where a stage's job writes."""
        end = "_<element>" if is_array else ""
        return self.folder / f"{name}-{self.jobs[stage]}{end}.log"

    def logs(self, stage: str) -> list[Path]:
        """What there is of a stage's logs, the element's own for an array."""
        job = self.jobs[stage]
        return sorted(
            path for path in self.folder.glob(f"*-{job}*.log") if path.stem.endswith(job) or f"-{job}_" in path.stem
        )
