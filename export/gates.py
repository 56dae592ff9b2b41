"""All that the forms of one model are held against, made once: cases, the source's outputs, and its quality.
The comparisons are `parity`'s and `task_gate`'s; what happens to a form that fails is the stage's.
"""

from pathlib import Path
from typing import Any

from export.bench_inputs import METRICS, quality_batches
from export.cache import cache_cases
from export.cases import Documents, make_cases
from export.files import hashes
from export.io_spec import IoSpec
from export.parity import check_parity
from export.precision import check_overflow
from export.runners import OnnxRunner, open_torch, usable_threads
from export.scores import score
from export.task_gate import check_quality
from trainer.environment import launch_command
from trainer.export_config import Export, Precision, Quality


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
        self.metric = METRICS.get(spec.task) if settings.quality else None
        if self.metric:
            assert settings.quality is not None
            self.batches = self._quality_batches(folder, documents, settings.quality, seed)
            self.quality = score(source, self.batches, self.metric)

    def _quality_batches(self, folder: Path, documents: Documents, wanted: Quality, seed: int) -> list[dict[str, Any]]:
        length = min(wanted.sequence_length, self.spec.max_length)
        return quality_batches(documents, self.spec, folder, length, wanted.sequences, seed)

    def check(self, what: str, variant: Precision, file: Path, candidate: OnnxRunner) -> list[dict[str, Any]]:
        """Evidence that `candidate`, opened from `file`, passed; GateFailed at the first miss."""
        tolerance = getattr(self.settings.parity, variant)
        if variant == "fp16":
            check_overflow(what, file, self.cases, usable_threads())
        found = {"parity": check_parity(what, self.spec, candidate, self.cases, self.expected, tolerance)}
        if self.metric:
            assert self.settings.quality is not None
            scores = score(candidate, self.batches, self.metric)
            found["quality"] = check_quality(what, self.quality, scores, self.settings.quality.share)
        head = {**hashes(file), "command": launch_command()}
        return [{"what": f"{gate}_{variant}", **head, **passed} for gate, passed in found.items()]
