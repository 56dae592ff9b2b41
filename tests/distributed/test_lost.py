"""What a fault of hardware or network means, by what torch, gloo, NCCL and CUDA say of it: exit code 71."""

import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.distributed.test_ranks import ROOT, environment
from trainer.__main__ import main
from trainer.engine import ranks as ranks_module
from trainer.engine.engine import Engine
from trainer.engine.ranks import Ranks
from trainer.errors import RankLost

# Their own words; torch's "CUDA error" goes on over several lines.
GONE = [
    "Timed out waiting 600000ms for recv operation to complete",
    "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:41234",
    "NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a network error, NCCL version 2.27.5",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27",
    "NCCL communicator was aborted on rank 1.",
    "connect to [10.0.0.7]:41234: No route to host",
]
DEVICE_FAILED = [
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
]


@pytest.fixture
def of_two(monkeypatch):
    """Rank 0 of two, over a store in memory that rank 1 never comes to."""
    monkeypatch.setattr(ranks_module, "_NOTICE_S", 0.0)
    if dist.is_initialized():  # an earlier test in this process
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 2, timeout_s=5.0)
    dist.destroy_process_group()


@pytest.mark.parametrize("text", GONE)
def test_a_rank_that_is_gone_is_named(of_two, text):
    with (
        pytest.raises(RankLost, match=r"waited for rank 1 \(last seen at the start\): ") as error,
        of_two.naming_the_lost(),
    ):
        raise RuntimeError(text)
    assert text in str(error.value)


@pytest.mark.parametrize("text", DEVICE_FAILED)
def test_a_gpu_that_failed_is_this_ranks_own_and_none_is_waited_for(text):
    own = "rank 0, at the start: its GPU failed: CUDA error: un"
    with pytest.raises(RankLost, match=own) as error, Ranks(0, 1, timeout_s=5.0).naming_the_lost():
        raise RuntimeError(text)
    assert "asynchronously" not in str(error.value)


@pytest.mark.parametrize("text", ["CUDA out of memory", "mat1 and mat2 shapes cannot be multiplied", ""])
def test_another_error_stays_what_it_is(of_two, text):
    error = RuntimeError(text)
    with pytest.raises(RuntimeError) as seen, of_two.naming_the_lost():
        raise error
    assert seen.value is error


def test_a_gpu_that_fails_while_the_model_is_wired_ends_the_run_so(written_recipe, monkeypatch, capfd):
    def fails(*_):
        raise RuntimeError(DEVICE_FAILED[0])

    monkeypatch.setattr(Engine, "prepare", fails)
    assert main(["pretrain", str(written_recipe())]) == 71
    said = capfd.readouterr().err
    assert "its GPU failed" in said and "Traceback" not in said


def test_ranks_that_never_come_together_are_said(written_recipe):
    """Rank 0 of two, started alone: the store it holds waits for the other one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.pretrain", str(written_recipe(micro_batch_size=4)),
         "pretrain.engine.collective_timeout_s=3"],
        env=environment() | alone, capture_output=True, text=True, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 71, done.stderr[-3000:]
    assert "never came together: Timed out" in done.stderr and "1/2 clients joined" in done.stderr
    assert "Traceback" not in done.stderr
