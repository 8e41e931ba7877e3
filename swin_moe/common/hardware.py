"""The makers' figures for GPUs and their links, and the time of collectives by them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

GIB, GB = 2**30, 10**9


@dataclass(frozen=True)
class Device:
    """One GPU of a node as it is usually built.

    Attributes:
        memory: bytes.
        half: dense FLOP/s of matrix products in bf16 or fp16.
        fp32: the same, with TF32 off.
        hbm: bytes/s of its memory.
        link: bytes/s to the other GPUs of the node, one direction.
        network: bytes/s to other nodes, one direction, per GPU.
        source: of the figures.
        has_bf16: it computes in bf16 and TF32, as GPUs do from A100 on.
    """

    memory: int
    half: float
    fp32: float
    hbm: float
    link: float
    network: float
    source: str
    has_bf16: bool = True

    def peak(self, half: bool, tf32: bool) -> float:
        """Return the FLOP/s in 16 bits, or in fp32; TF32 runs at half of the rate in 16 bits."""
        if half:
            return self.half
        return max(self.half / 2, self.fp32) if tf32 and self.has_bf16 else self.fp32


def _gpu(
    gib: float, half: float, fp32: float, hbm: float, link: float, network: float, source: str
) -> Device:
    """Return a device from GiB of memory, TFLOP/s and GB/s."""
    return Device(
        int(gib * GIB), half * 1e12, fp32 * 1e12, hbm * GB, link * GB, network * GB, source
    )


# Memory is what CUDA reports, a little below the name. Networks: DGX or HGX systems with a 400 Gb/s
# adapter per GPU (A100: 200 Gb/s); cards without NVLink: PCIe, and 100 Gb/s shared by four.
GPUS = {
    "v100": replace(
        _gpu(31.7, 125, 15.7, 900, 150, 12.5, "NVIDIA V100 data sheet (fp16), DGX-1"),
        has_bf16=False,
    ),
    "a100-40": _gpu(39.4, 312, 19.5, 1555, 300, 25, "NVIDIA A100 data sheet, DGX A100"),
    "a100-80": _gpu(79.1, 312, 19.5, 2039, 300, 25, "NVIDIA A100 data sheet, DGX A100"),
    "h100": _gpu(79.1, 989, 67, 3350, 450, 50, "NVIDIA H100 SXM data sheet, DGX H100"),
    "h200": _gpu(139.8, 989, 67, 4800, 450, 50, "NVIDIA H200 data sheet, DGX H200"),
    "b200": _gpu(178, 2250, 75, 7700, 900, 50, "NVIDIA Blackwell data sheet, DGX B200"),
    "l40s": _gpu(44.4, 362, 91.6, 864, 32, 3.1, "NVIDIA L40S data sheet, PCIe 4"),
    "rtx4090": _gpu(23.5, 165, 82.6, 1008, 32, 3.1, "NVIDIA Ada whitepaper (fp32 sums), PCIe 4"),
}
NAMES = (*GPUS, "cpu")


def device(name: str) -> Device:
    """Return a GPU by name; ``cpu`` is a process of this machine, whose speed is a guess.

    Raises:
        ValueError: no such name.
    """
    if name == "cpu":
        memory = psutil.virtual_memory().total
        cores = psutil.cpu_count(logical=False) or 1
        return Device(
            memory, cores * 5e10, cores * 5e10, 2e10, 1e10, 1.25e9, "this machine's memory",
            has_bf16=False,
        )  # fmt: skip
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: unknown; there are {', '.join(NAMES)}")
    return GPUS[name]


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs, or of CPU processes that share their node's memory."""

    name: str
    nodes: int
    per_node: int

    @property
    def device(self) -> Device:
        return device(self.name)

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    @property
    def memory(self) -> int:
        """Bytes per rank."""
        return self.device.memory // (self.per_node if self.name == "cpu" else 1)

    def seconds(self, kind: str, sent: float, ranks: int, stride: int = 1) -> float:
        """Return the seconds of a collective among ``ranks`` ranks, every ``stride``-th of all.

        A ring's traffic, which also bounds other algorithms, gives the time: an all-reduce moves
        its bytes 2·(n − 1)/n times over the slowest link, others (n − 1)/n times. Rings over nodes
        use the adapters of all GPUs of a node; an all-to-all sends a rank's remote rows by its own.

        Args:
            kind: ``all_reduce``, ``all_to_all`` or another collective.
            sent: bytes of each rank.
        """
        if ranks <= 1 or not sent:
            return 0.0
        inside = min(max(self.per_node // stride, 1), ranks)
        share = (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
        link, network = self.device.link, self.device.network
        if inside == ranks:
            return share * sent / link
        if kind == "all_to_all":
            return max(
                (inside - 1) / ranks * sent / link, (ranks - inside) / ranks * sent / network
            )
        return max(share * sent / link, share * sent / (network * inside))
