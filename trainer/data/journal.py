"""What an interrupted prepare had finished, so that the next one goes on from there: one line of JSON a step.
What a step was, and how it is taken over, is the business of who wrote it down."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from trainer.artifact import write_text


class Journal:
    """Steps in the order in which they ended. A run that begins again asks for each before it does it.

    `recall` gives what was noted of the next step if it was the one that is asked for; the first step that is noted
    anew ends the memory. A step's files need no fsync: whoever takes them over looks whether they are as noted.
    """

    def __init__(self, folder: Path, begun_with: Mapping[str, Any]) -> None:
        """The journal of the work in `folder`, which is emptied if it was begun with something else."""
        self._path = folder / "journal.jsonl"
        self._file: TextIO | None = None
        self._next = 0
        self._steps = _whole_lines(self._path)
        if self.recall("begin", begun_with) is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.note("begin", begun_with, {})

    def left(self) -> Counter[str]:
        """How many steps of each kind are still to be recalled."""
        return Counter(step["step"] for step in self._steps[self._next :])

    def recall(self, kind: str, about: Any) -> dict[str, Any] | None:
        """What was noted of the next step, or None if that is another one."""
        if self._next == len(self._steps):
            return None
        step = self._steps[self._next]
        if (step["step"], step["about"]) != (kind, about):
            return None
        self._next += 1
        return step["state"]

    def forget(self, steps: int) -> None:
        """Drop the last `steps` that were recalled, and all after them: they do not hold."""
        self._next -= steps
        del self._steps[self._next :]

    def note(self, kind: str, about: Any, state: Mapping[str, Any]) -> None:
        """Write down a step that ended."""
        if self._file is None:  # the first new one: what was not taken over goes
            self.forget(0)
            write_text(self._path, "".join(json.dumps(step) + "\n" for step in self._steps))
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": kind, "about": about, "state": state}) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that a kill cut, or that a node took with it."""
    *lines, _cut = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [""]
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps
