"""TensorRT (10, 11) and TensorRT-RTX as Python modules, and the place that engines depend on.
Nothing else imports them; building is `to_tensorrt`'s, running `tensorrt_runner`'s.
"""

from types import ModuleType
from typing import Any

from export.engine_files import Place
from trainer.environment import gpu_driver, gpus
from trainer.errors import UserError


def load_library(name: str) -> ModuleType:
    """TensorRT's Python module; UserError where it is not installed."""
    try:
        if name == "tensorrt":
            import tensorrt as library  # pyright: ignore[reportMissingImports]
        else:
            import tensorrt_rtx as library  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        do = {"tensorrt": "pip install tensorrt (10 or 11)", "tensorrt_rtx": "pip install 'lmworks[rtx]'"}[name]
        raise UserError(f"{name} cannot be imported: {error}", name, do) from None
    return library


def this_place(name: str, library: ModuleType) -> Place:
    """What engines that are built here, or run here, depend on."""
    seen = gpus()
    first = seen[0] if seen else {"compute_capability": None, "name": None}
    return Place(name, library.__version__, first["compute_capability"], first["name"], gpu_driver() if seen else None)


def messages_of(library: ModuleType) -> Any:
    """A logger that keeps everything: errors for the user, and the description of the layers."""

    class Messages(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity, message))

        def text(self) -> str:
            return "\n".join(message for _, message in self.lines)

        def errors(self) -> list[str]:
            grave = (library.Logger.Severity.ERROR, library.Logger.Severity.INTERNAL_ERROR)
            return [message for severity, message in self.lines if severity in grave]

    return Messages()
