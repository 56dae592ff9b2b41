"""All that the forms of one model are held against, made once: cases, the source's outputs, and its quality.
The comparisons are `parity`'s and `task_gate`'s; what happens to a form that fails is the stage's.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from export import labelled
from export.bench_inputs import METRICS, quality_batches
from export.cache import cache_cases
from export.calibration import FindText, calibration_batches, needed_tokens
from export.cases import Case, Documents, full_rows, make_cases
from export.cross_cases import decoder_cases
from export.files import hashes
from export.fp8 import check_rounded
from export.io_spec import IoSpec
from export.parity import check_parity
from export.precision import check_overflow
from export.probe import MOST_TOKENS
from export.runners import OnnxRunner, Runner, open_runner, open_torch, open_torch_pair, usable_threads
from export.scores import Scores, score
from export.task_gate import check_quality
from trainer.environment import launch_command
from trainer.export_config import Export, Precision

_UNPADDED = (2, 16)  # batch and length


class Gates:
    """The gates of one graph of a model folder. What `find` finds must be in none of the `documents`."""

    def __init__(
        self, folder: Path, spec: IoSpec, settings: Export, documents: Documents, find: FindText, seed: int
    ) -> None:
        self.folder, self.spec, self.settings, self.documents = folder, spec, settings, documents
        self.find, self.seed = find, seed
        source = self._open(folder, documents, seed)
        self.expected = [source.run(case.inputs) for case in self.cases]
        # What an encoder-decoder is for takes both of its graphs: `TaskGate` of the whole is the stage's to ask.
        self.task = None if spec.cross else TaskGate(folder, spec, settings, documents, seed, source)

    def _open(self, folder: Path, documents: Documents, seed: int) -> Runner:
        """The source of this graph; makes the cases on the way."""
        spec, longest = self.spec, self.settings.parity.max_length
        if spec.encoder is not None:
            pair = open_torch_pair(folder, usable_threads())
            self.cases = decoder_cases(documents, spec, pair, longest, seed)
            return pair.decoder
        source = (
            open_torch_pair(folder, usable_threads()).encoder if spec.cross else open_torch(folder, usable_threads())
        )
        self.cases = make_cases(documents, spec, self.settings.parity.shapes, longest, seed)
        if spec.cache is not None:
            self.cases += cache_cases(documents, spec, source, longest, seed)
        return source

    @cached_property
    def calibration(self) -> list[dict[str, Any]]:
        """The batches whose ranges `make_variant` wants; UserError where there is too little text for them."""
        spec, settings = self.spec, self.settings
        if spec.encoder is None:
            return calibration_batches(self.find, spec, settings.calibration)
        text = self.find(needed_tokens(spec, settings.calibration))
        pair = open_torch_pair(self.folder, usable_threads())
        return [case.inputs for case in decoder_cases(text, spec, pair, settings.parity.max_length, self.seed + 1)]

    def probed(self) -> list[Case]:
        """What a fault is searched for with: first a case without padding, so that every position of every inner value
        counts, then the gate's own, as some faults show only with padding or after a past."""
        small = [case for case in self.cases if case.inputs["input_ids"].size <= MOST_TOKENS]
        if self.spec.encoder is None:
            return [full_rows(self.documents, self.spec, *_UNPADDED), *small]
        # Of one text with a past neither its own tokens nor those of the text that was read are padded.
        return sorted(small, key=lambda case: len(case.inputs["input_ids"]) > 1 or not case.past_tokens)

    def check(self, what: str, variant: Precision, file: Path, candidate: OnnxRunner) -> list[dict[str, Any]]:
        """Evidence that `candidate`, opened from `file`, passed; GateFailed at the first miss."""
        tolerance = getattr(self.settings.parity, variant)
        if variant == "fp16":
            check_overflow(what, file, self.cases, usable_threads())
        if variant == "fp8":
            check_rounded(what, file)
        passed = check_parity(what, self.spec, candidate, self.cases, self.expected, tolerance)
        head = {"what": f"{self.spec.prefix}parity_{variant}", **hashes(file), "command": launch_command()}
        return [head | passed, *(self.task.check(what, variant, [file], candidate) if self.task else [])]


class TaskGate:
    """The gate on what a model is for, of which all its graphs together have a share to keep."""

    def __init__(
        self,
        folder: Path,
        spec: IoSpec,
        settings: Export,
        documents: Documents,
        seed: int,
        source: Runner | None = None,
    ) -> None:
        """`source`: the model folder in PyTorch, where it is open already."""
        self.wanted = settings.quality
        self.score = self._scorer(folder, spec, documents, seed)
        self.quality = None
        if self.score:
            self.quality = self.score(source or open_runner(folder, "eager", usable_threads(), spec=spec))

    def _scorer(self, folder: Path, spec: IoSpec, documents: Documents, seed: int) -> Callable[[Runner], Scores] | None:
        """What measures the quality that must be kept; None for a head that has none without labelled text."""
        wanted = self.wanted
        if wanted is None:
            return None
        if spec.task in labelled.METRICS and wanted.labelled:
            return labelled.labelled_scorer(folder, spec, wanted.labelled, wanted.sequences)
        if spec.task not in METRICS:
            return None
        length = min(wanted.sequence_length, spec.max_length)
        batches = quality_batches(documents, spec, folder, length, wanted.sequences, seed)
        return lambda runner: score(runner, batches, METRICS[spec.task])

    def check(self, what: str, variant: Precision, files: Sequence[Path], candidate: Runner) -> list[dict[str, Any]]:
        """Evidence that `candidate`, opened from `files` (of an encoder-decoder the encoder's first), keeps its share,
        or none where there is nothing to measure; GateFailed where it does not."""
        if not (self.wanted and self.score and self.quality):
            return []
        passed = check_quality(what, self.quality, self.score(candidate), self.wanted.share)
        *encoder, own = map(hashes, files)
        beside = {"encoder": encoder[0]} if encoder else {}
        return [{"what": f"quality_{variant}", **own, **beside, "command": launch_command(), **passed}]
