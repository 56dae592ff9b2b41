"""What one GPU and its place in a cluster can do, from datasheets. Peaks of matrix products are `environment`'s table;
the largest share of them that training reaches is an assumption of `cost`."""

from dataclasses import dataclass

from trainer.environment import peak_flops
from trainer.errors import UserError

GPUS_PER_NODE = 8  # DGX and HGX boards of all the GPUs here that have NVLink (V100: DGX-1)

# Share of a link's datasheet rate that a ring collective reaches: 78 % measured on an A100 node, 82 % on an H200 node
# without NVLS (Bekman, ml-engineering, network/README.md, all-reduce of 16 GiB).
LINK_EFFICIENCY = 0.8

# Taken by the CUDA context, NCCL's channels and cuBLAS workspaces; assumed. What a card holds beyond its datasheet's
# decimal gigabytes (an H200 of 141 GB shows 150.1e9 bytes) is left to the allocator's fragments.
RESERVE_BYTES = 1.0 * 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    device_name: str  # as torch names it, the key of environment's table of peaks
    memory_gb: float  # decimal, as on the datasheet
    memory_tb_s: float
    link_gb_s: float  # one direction, to the other GPUs of a node
    network_gb_s: float  # one direction, this GPU's share of a node's network

    @property
    def usable_bytes(self) -> float:
        return self.memory_gb * 1e9 - RESERVE_BYTES

    def peak_flops(self, precision: str) -> float:
        """Dense peak in FLOP/s; UserError for a precision that the GPU has no units for."""
        if precision == "tf32":  # half the 16-bit peak on every GPU since the A100 (its datasheet: 156 of 312 TFLOP/s)
            found = peak_flops(self.device_name, "bf16")
            found = found / 2 if found else None
        else:
            found = peak_flops(self.device_name, "bf16" if precision == "fp8" else precision)
        if found is None:
            raise UserError(
                f"precision {precision} on {self.name}: no datasheet peak",
                "a precision the GPU multiplies in" + (", fp16 or fp32" if self.name == "v100" else ""),
                "change precision, or --gpu",
            )
        return found

    def bandwidth_gb_s(self, gpus: int) -> float:
        """Rate at which a ring over `gpus` moves bytes past one of them: the slowest link it crosses."""
        datasheet = self.link_gb_s if gpus <= GPUS_PER_NODE else min(self.link_gb_s, self.network_gb_s)
        return datasheet * LINK_EFFICIENCY


_A100 = "NVIDIA A100-SXM4-80GB"
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 datasheet (2021): HBM2 1,555 GB/s, HBM2e 2,039 GB/s (SXM), NVLink 600 GB/s both ways together.
        # DGX A100 datasheet: 8 x 200 Gb/s, one a GPU.
        Gpu("a100-40", _A100, 40, 1.555, 300, 25),
        Gpu("a100-80", _A100, 80, 2.039, 300, 25),
        # NVIDIA H100 datasheet (2023), SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s. DGX H100 datasheet: 8 x 400 Gb/s.
        Gpu("h100", "NVIDIA H100 80GB HBM3", 80, 3.35, 450, 50),
        # NVIDIA H200 datasheet (2024), SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200 datasheet: 8 x 400 Gb/s.
        Gpu("h200", "NVIDIA H200", 141, 4.8, 450, 50),
        # NVIDIA HGX B200 and DGX B200 datasheets (2024): 1,440 GB and 64 TB/s for eight, NVLink 1.8 TB/s, 8 x 400 Gb/s.
        Gpu("b200", "NVIDIA B200", 180, 8.0, 900, 50),
        # NVIDIA L40S datasheet (2023): 48 GB, 864 GB/s, PCIe 4.0 x16 (32 GB/s one way), no NVLink. Network: assumed
        # 2 x 200 Gb/s for a node of eight.
        Gpu("l40s", "NVIDIA L40S", 48, 0.864, 32, 6.25),
        # NVIDIA Ada GPU architecture whitepaper, appendix A: 24 GB, 1,008 GB/s; PCIe 4.0 x16. Network: assumed 100 Gb/s
        # for a node of eight.
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1.008, 32, 1.5625),
        # NVIDIA Tesla V100 datasheet (2020), SXM2: 32 GB, 900 GB/s, NVLink 300 GB/s. DGX-1 datasheet: 4 x 100 Gb/s for
        # eight GPUs.
        Gpu("v100", "Tesla V100-SXM2-32GB", 32, 0.9, 150, 6.25),
    )
}
