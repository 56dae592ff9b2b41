"""All that the forms of one model are held against, made once: cases, the source's outputs, and its quality.
The comparisons are `parity`'s and `task_gate`'s; what happens to a form that fails is the stage's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from export import labelled
from export.bench_inputs import METRICS, quality_batches
from export.cache import cache_cases
from export.cases import Documents, make_cases
from export.files import hashes
from export.io_spec import IoSpec
from export.parity import check_parity
from export.precision import check_overflow
from export.runners import OnnxRunner, Runner, open_torch, usable_threads
from export.scores import Scores, score
from export.task_gate import check_quality
from trainer.environment import launch_command
from trainer.export_config import Export, Precision


class Gates:
    """The gates of one model folder."""

    def __init__(self, folder: Path, spec: IoSpec, settings: Export, documents: Documents, seed: int) -> None:
        self.spec, self.settings = spec, settings
        source = open_torch(folder, usable_threads())
        longest = settings.parity.max_length
        self.cases = make_cases(documents, spec, settings.parity.shapes, longest, seed)
        if spec.cache is not None:
            self.cases += cache_cases(documents, spec, source, longest, seed)
        self.expected = [source.run(case.inputs) for case in self.cases]
        self.score = self._scorer(folder, documents, seed)
        self.quality = self.score(source) if self.score else None

    def _scorer(self, folder: Path, documents: Documents, seed: int) -> Callable[[Runner], Scores] | None:
        """What measures the quality that must be kept; None for a head that has none without labelled text."""
        wanted, spec = self.settings.quality, self.spec
        if wanted is None:
            return None
        if spec.task in labelled.METRICS and wanted.labelled:
            return labelled.labelled_scorer(folder, spec, wanted.labelled, wanted.sequences)
        if spec.task not in METRICS:
            return None
        length = min(wanted.sequence_length, spec.max_length)
        batches = quality_batches(documents, spec, folder, length, wanted.sequences, seed)
        return lambda runner: score(runner, batches, METRICS[spec.task])

    def check(self, what: str, variant: Precision, file: Path, candidate: OnnxRunner) -> list[dict[str, Any]]:
        """Evidence that `candidate`, opened from `file`, passed; GateFailed at the first miss."""
        tolerance = getattr(self.settings.parity, variant)
        if variant == "fp16":
            check_overflow(what, file, self.cases, usable_threads())
        found = {"parity": check_parity(what, self.spec, candidate, self.cases, self.expected, tolerance)}
        if self.score and self.quality:
            assert self.settings.quality is not None
            found["quality"] = check_quality(what, self.quality, self.score(candidate), self.settings.quality.share)
        head = {**hashes(file), "command": launch_command()}
        return [{"what": f"{gate}_{variant}", **head, **passed} for gate, passed in found.items()]
