"""Joules of a call: the arithmetic over a counter and a clock that are made up, and where it is shown."""

import sys
from types import SimpleNamespace

import pytest

from export import bench_table, energy
from export.bench_worker import measure_decode, measure_row
from export.energy import columns, first_visible, joules_per_call, open_counter
from export.io_spec import read_spec
from export.runners import open_onnx
from export.windows import Settings, SystemClock


class Card:
    """A GPU that draws `watts`, and a clock of which each call takes `call_s`."""

    def __init__(self, watts=200.0, call_s=0.25, users=(0, 1)):
        self.watts, self.call_s, self.now_s, self.calls = watts, call_s, 100.0, 0
        self.found = iter((*users, users[-1]))

    def joules(self):
        return 5e6 + self.watts * self.now_s

    def users(self):
        return next(self.found)

    def wall_s(self):
        return self.now_s

    def call(self):
        self.now_s, self.calls = self.now_s + self.call_s, self.calls + 1


def test_energy_is_what_the_card_used_over_the_calls():
    card = Card()
    assert joules_per_call(card.call, card, card) == pytest.approx(200 * 0.25) and card.calls == 12
    slow = Card(call_s=7.0)
    assert joules_per_call(slow.call, slow, slow) == pytest.approx(1400) and slow.calls == 3


def test_a_request_and_a_token_have_their_parts():
    assert columns(50.0, 8, 400) == {"joules_per_request": 6.25, "joules_per_token": 0.125}
    assert columns("why not", 8, 400) == {"no_energy": "why not"}


@pytest.mark.parametrize("users", [(0, 2), (2, 1)])
def test_no_figure_where_others_compute_too(users):
    card = Card(users=users)
    assert joules_per_call(card.call, card, card) == "another process computed on the same GPU"


def test_no_figure_from_a_counter_that_stands_still():
    card = Card(watts=0.0)
    assert joules_per_call(card.call, card, card) == "the GPU's counter did not move in 3 s"


H100, A100 = ("GPU-aaaa-1", "NVIDIA H100"), ("GPU-bbbb-2", "NVIDIA A100")


@pytest.mark.parametrize(
    ("cards", "visible", "order", "expected"),
    [
        ([H100], None, None, 0),
        ([H100, ("GPU-cccc-3", "NVIDIA H100")], "1,0", None, 1),
        ([H100, A100], "1", "PCI_BUS_ID", 1),
        ([H100, A100], "1", None, "cards of several kinds are here: set CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ([H100, A100], "GPU-bbbb", None, 1),
        ([H100, A100], "GPU-", None, "CUDA_VISIBLE_DEVICES names GPU-, which is no card of NVML's"),
        ([H100], "MIG-1", None, "the card's energy is that of all its MIG parts"),
        ([H100], "3", None, "CUDA_VISIBLE_DEVICES names card 3, NVML has 1"),
    ],
)
def test_whose_counter_it_is(cards, visible, order, expected):
    assert first_visible(cards, visible, order) == expected


class NvmlError(Exception):
    pass


def nvml(monkeypatch, energy_mj):
    def read(handle):
        if energy_mj is None:
            raise NvmlError("Not Supported")
        return energy_mj

    used = iter((100 * 2**20, 350 * 2**20))  # a context of others, then this process's as well
    library = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: b"GPU-aaaa-1",
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100",
        nvmlDeviceGetTotalEnergyConsumption=read,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [1],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=next(used)),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_millijoules_are_read_as_joules(monkeypatch):
    nvml(monkeypatch, 1500)
    counter, reason = open_counter()
    assert (counter.joules(), counter.users(), counter.taken_mib(), reason) == (1.5, 1, 250.0, "")


def test_why_there_is_no_counter(monkeypatch):
    nvml(monkeypatch, None)
    assert open_counter() == (None, "NVML: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_counter() == (None, "pynvml is not installed: pip install nvidia-ml-py")


def test_rows_have_joules_where_there_is_a_counter(model_folder, raw_graph, monkeypatch):
    monkeypatch.setattr(energy, "_STRETCH_S", 0.01)
    settings, spec = Settings(1, 0.005, 3, 0.99), read_spec(model_folder("gpt2"))
    runner, inputs = open_onnx(raw_graph("gpt2"), 1), spec.pad([[5, 6, 7, 8], [9]], 4)
    counter = SimpleNamespace(joules=SystemClock().wall_s, users=lambda: 1, taken_mib=lambda: 42.0)  # one watt
    row = measure_row(runner, inputs, settings, SystemClock(), counter)
    assert row["joules_per_request"] == pytest.approx(row["joules_per_token"] * 5 / 2) and row["joules_per_token"] > 0
    assert row["device_memory_mib"] == 42.0
    assert (
        not {"joules_per_request", "no_energy", "device_memory_mib"}
        & measure_row(runner, inputs, settings, SystemClock()).keys()
    )
    steps = measure_decode(runner, model_folder("gpt2"), inputs["input_ids"][:1], 4, settings, SystemClock(), counter)
    assert steps["joules_per_request"] == pytest.approx(steps["joules_per_token"] * 4)


def test_the_table_has_columns_only_where_there_is_a_figure(capsys):
    row = {"model": "m", "backend": "eager", "batch_size": 1, "sequence_length": 8, "lengths": "full", "status": "ok"}
    parts = {part: [] for part in ("quality", "decode", "load", "no_energy")}
    report = {"machine": {"cpu": "a CPU", "threads": 1}, "noise": {"relative": None, "reason": "none"}} | parts
    bench_table.show(report | {"rows": [row], "no_energy": [{"reason": "pynvml is not installed"}] * 2})
    said = capsys.readouterr().out
    assert "J/request" not in said and said.count("no energy: pynvml is not installed") == 1
    bench_table.show(report | {"rows": [row, row | {"joules_per_request": 0.01234, "joules_per_token": 0.001,
                                                         "device_memory_mib": 1234.0}]})  # fmt: skip
    said = capsys.readouterr().out
    assert "1,234" in said and "J/request" in said and "0.0123" in said and "no energy" not in said
