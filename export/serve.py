"""The serve verb: a packed model on this machine's CPU, in the real Triton server that nvidia-pytriton carries.
The packed folder stays as it is; what differs from a container (its backends) is rewritten in a copy.
"""

import contextlib
import hashlib
import http.client
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from export.hostile import check_folder, check_graph
from export.pack import TRITON_MODELS
from trainer.artifact import hash_tree, in_turn, read_artifact, staging, versions
from trainer.errors import GateFailed, UserError

# tritonserver 2.51.0 with the Python backend only. Its Python API is not used, so that its dependencies are left out.
_SERVER = "nvidia-pytriton==0.7.0"
_NUMPY = "numpy==1.26.4"  # the server's Python backend crashes on arrays of numpy 2
_ENVIRONMENTS = Path.home() / ".cache" / "lmworks" / "triton"  # one folder for each set of requirements
_MARKER = "lmworks-triton.txt"  # the requirements; a folder without it is not ours to replace
_READY_LIMIT_S = 300.0  # assumed: a large model from a slow disk
_INSTALL_LIMIT_S = 900.0  # assumed: another process's, from a slow index
_LOOK_S = 0.1
# What tritonserver 2.51 says of a machine without a GPU, or without CUDA's driver, as errors and a warning.
_NO_GPU = re.compile(
    r"CudaDriverHelper has not been initialized|no pinned memory pool, falling back to non-pinned|"
    r"unable to create stream for \S+: (CUDA driver version is insufficient|no CUDA-capable device)"
)
_STOP_LIMIT_S = 5.0  # that clients with open connections get


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens."""

    address: str
    http_port: int
    grpc_port: int
    metrics_port: int


def run(
    packed: Path,
    address: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    environment: Path | None = None,
) -> None:
    """Serve a packed folder until SIGINT or SIGTERM.

    Raises UserError where the server cannot be installed, a port is taken, or the server ends by itself, and
    GateFailed for a folder that is not what pack left there.
    """
    record = read_packed(packed)
    endpoints = Endpoints(address, http_port, grpc_port, metrics_port)
    _check_ports(endpoints)
    default = _ENVIRONMENTS / hashlib.sha256("\n".join(_requirements()).encode()).hexdigest()[:12]
    site = ensure_environment(environment or default, record["about"]["image"])
    with (
        tempfile.TemporaryDirectory(prefix="lmworks-serve-") as scratch,
        _until_signalled() as stopped,
        serving(packed, site, endpoints, Path(scratch), stopped) as server,
    ):
        if stopped():
            return
        ensemble = record["about"]["models"]["ensemble"]
        Console(highlight=False).print(
            f"{ensemble} answers texts on http://{address}:{http_port} and grpc://{address}:{grpc_port} "
            f"(metrics on {metrics_port}); ask it with {packed / 'client.py'}; Ctrl-C ends it",
            soft_wrap=True,
        )
        while server.poll() is None and not stopped():
            time.sleep(_LOOK_S)
        if stopped():
            return
        raise UserError(
            f"the server ended with status {server.returncode}", "a server that runs on", "read its messages above"
        )


def read_packed(packed: Path) -> dict[str, Any]:
    """The record of a packed folder that may be served; UserError or GateFailed for any other."""
    record = read_artifact(packed, "packed")
    check_folder(packed)
    if hash_tree(packed) != record["content_sha256"]:
        raise GateFailed(f"{packed} is not what pack left there", "the verified files", "pack it again")
    about = record["about"]
    if about["backend"] != "onnxruntime":
        raise UserError(
            f"{packed} is for Triton's {about['backend']} backend",
            f"a GPU and {about['image']}",
            "run `docker compose up` in that folder, or pack with pack.backend=onnxruntime",
        )
    for network in about.get("networks", [about["models"]["network"]]):
        check_graph(packed / "models" / network / "1" / "model.onnx")
    return record


def ensure_environment(folder: Path, image: str) -> Path:
    """site-packages of the server's own environment, made once; UserError where it cannot be installed.

    Waits for another process that is at work on one. One of other requirements is replaced; a folder that holds
    anything else is refused.
    """
    site = folder / "lib" / f"python{_python()}" / "site-packages"
    if _is_made(folder, site):
        return site
    if folder.exists() and not (folder / _MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and no environment of ours", "an empty folder or none", "name another one")
    with in_turn(folder.parent, _INSTALL_LIMIT_S, "installing into"):
        if not _is_made(folder, site):  # or the other one made it
            _make(folder, image)
    return site


def _is_made(folder: Path, site: Path) -> bool:
    made = folder / _MARKER
    return made.is_file() and made.read_text(encoding="utf-8") == _marker() and site.is_dir()


def _marker() -> str:
    return "\n".join(_requirements()) + "\n"


def _make(folder: Path, image: str) -> None:
    _tell(f"installing {', '.join(_requirements())} into {folder}, once")
    with staging(folder) as partial:
        _install(partial, image)
        (partial / _MARKER).write_text(_marker(), encoding="utf-8")


def _tell(what: str) -> None:
    Console(stderr=True, highlight=False).print(what, soft_wrap=True)


def write_served(packed: Path, target: Path) -> None:
    """A model repository for a server that has the Python backend only, from the packed one."""
    shutil.copytree(packed / "models", target)
    for config in target.glob("*/config.pbtxt"):
        text = config.read_text(encoding="utf-8")
        served = text.replace('backend: "onnxruntime"', 'backend: "python"')
        if served != text:
            config.write_text(served.replace("kind: KIND_GPU", "kind: KIND_CPU"), encoding="utf-8")
            shutil.copyfile(TRITON_MODELS / "run_onnx.py", config.parent / "1" / "model.py")


@contextlib.contextmanager
def serving(
    packed: Path, site: Path, endpoints: Endpoints, scratch: Path, stopped: Callable[[], bool] = lambda: False
) -> Iterator[subprocess.Popen[str]]:
    """A server that is ready, or not any more wanted, for as long as the block runs; UserError if it does not become
    ready. What it says is in `scratch`/server.log, and on standard error what is not known to be harmless."""
    write_served(packed, scratch / "models")
    triton = site / "pytriton" / "tritonserver"
    backend = scratch / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    shutil.copy(triton / "python_backend_stubs" / _python() / "triton_python_backend_stub", backend)
    command, environment = _command(triton, endpoints, scratch), _environment(site)
    server = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert server.stderr is not None
    relay = threading.Thread(target=_relay, args=(server.stderr, scratch / "server.log"), daemon=True)
    relay.start()
    try:
        _wait_until_ready(server, endpoints, stopped)
        yield server
    finally:
        _stop(server)
        relay.join(_STOP_LIMIT_S)  # whatever the server leaves behind may hold its end of the pipe


def _relay(lines: Iterable[str], log: Path) -> None:
    """Write what the server says into a file, and show what is more than the lack of a GPU."""
    with log.open("w", encoding="utf-8") as file:
        for line in lines:
            print(line, end="", file=file, flush=True)
            if not _NO_GPU.search(line):
                with contextlib.suppress(OSError):  # nobody looks any more; the server must not wait for that
                    print(line, end="", file=sys.stderr, flush=True)


def _command(triton: Path, endpoints: Endpoints, scratch: Path) -> list[str]:
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={scratch / 'models'}",
        f"--backend-directory={scratch / 'backends'}",
        "--log-info=false",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        f"--exit-timeout-secs={_STOP_LIMIT_S:.0f}",
    ]
    for protocol in ("http", "grpc", "metrics"):
        command.append(f"--{protocol}-port={getattr(endpoints, f'{protocol}_port')}")
        command.append(f"--{protocol}-address={endpoints.address}")
    return command


def _environment(site: Path) -> dict[str, str]:
    """Where the server finds its libraries and Python's.

    The Python inside its backend heeds neither PYTHONHOME nor PYTHONPATH; it takes the first `python3` on PATH for
    itself, and with it the environment that this one belongs to.
    """
    return {
        "PATH": f"{site.parents[2] / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{_libpython().parent}",
        "TMPDIR": tempfile.gettempdir(),
    }


def _wait_until_ready(server: subprocess.Popen[str], endpoints: Endpoints, stopped: Callable[[], bool]) -> None:
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy leads to this machine
    until = time.monotonic() + _READY_LIMIT_S
    while time.monotonic() < until:
        ended = server.poll() is not None
        if stopped():
            return
        if ended:
            raise UserError(
                f"the server ended with status {server.returncode} as it started",
                "a model that loads",
                "read its messages above",
            )
        try:
            ask(f"http://{endpoints.address}:{endpoints.http_port}/v2/health/ready", timeout=1).close()
            return
        except (OSError, http.client.HTTPException):  # not yet
            time.sleep(0.1)
    raise UserError(f"the server is not ready after {_READY_LIMIT_S:.0f} s", "a model that loads", "read its messages")


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(2 * _STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _until_signalled() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come since. They raise nothing: an exception of a second one, in the middle of what
    the first one began, would leave the server running."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_ports(endpoints: Endpoints) -> None:
    for port in (endpoints.http_port, endpoints.grpc_port, endpoints.metrics_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((endpoints.address, port))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"{endpoints.address}:{port} cannot be listened on: {getattr(error, 'strerror', error)}",
                    "three free ports below 65536",
                    "give others: --http-port, --grpc-port, --metrics-port",
                ) from None


def _requirements() -> list[str]:
    installed = versions()
    pinned = [f"{name}=={installed[name]}" if name in installed else name for name in ("onnxruntime", "tokenizers")]
    return [_SERVER, _NUMPY, *pinned]


def _install(folder: Path, image: str) -> None:
    """Make an environment of Python's own and put the server into it."""
    _libpython(image)
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary", ":all:", *_requirements()],
    )  # fmt: skip
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            problem = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
            raise _no_server(f"{_SERVER} cannot be installed here: {problem}", image)


def _libpython(image: str = "") -> Path:
    """Python's shared library, which the server's Python backend is linked against."""
    name = f"libpython{_python()}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR") or "", f"{sys.base_prefix}/lib"]
    found = next((Path(place, name) for place in places if Path(place, name).is_file()), None)
    if found is None:
        raise _no_server(f"this Python has no {name}", image)
    return found


def _no_server(found: str, image: str) -> UserError:
    return UserError(
        f"{found} ({platform.system()} {platform.machine()}, Python {_python()})",
        "Linux on x86-64 with glibc 2.35, Python 3.11 or 3.12 with its shared library, and a package index",
        f"run `docker compose up` in the packed folder: it serves the same in {image or 'a container'}",
    )


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
