"""All-to-all of rows with counts known to every rank: in one step, or within and then across nodes.

The two steps (https://arxiv.org/abs/2206.03382, section 3, "2DH") merge messages, so that few large
ones cross the network instead of many small ones. First the ranks of a node swap rows, after which
its rank l holds all rows for the ranks l of all nodes. Then the ranks l of all nodes swap. The way
back mirrors this.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Group


class Pending:
    """A running collective, which keeps its tensors until :meth:`wait`.

    PyTorch gives the memory of a tensor without references to the next one of the same stream. The
    steps run on another stream, or on another thread, and may still read or write it.

    Args:
        wait: makes the host, or on CUDA the current stream, wait for the steps.
        held: tensors that the steps read and write.
    """

    def __init__(self, wait: Callable[[], object], *held: Tensor) -> None:
        self._wait, self.held = wait, held

    def wait(self) -> None:
        """Wait; then the output may be used (on CUDA: by the current stream)."""
        self._wait()
        self.held = ()


class AllToAll:
    """One exchange of rows and its way back.

    Args:
        counts: [W, W] int64 on the host, rows from each rank to each; the same on every rank.

    Attributes:
        sent, received: numbers of rows that this rank sends and receives.
    """

    def __init__(self, counts: Tensor, group: Group) -> None:
        self.group = group
        self.to = counts[group.rank]
        self.by = counts[:, group.rank]
        self.sent, self.received = int(self.to.sum()), int(self.by.sum())
        if group.intra is not None:
            node, local = divmod(group.rank, group.intra.size)
            mine = counts.view(-1, group.intra.size, counts.shape[1])[node]
            # [L, N]: rows of this node's ranks to the ranks of all nodes with this local rank.
            self.middle = mine.view(group.intra.size, -1, group.intra.size)[:, :, local]

    def start(self, x: Tensor, out: Tensor, back: bool = False) -> Pending:
        """Send rows x [sent, ...], sorted by rank, into out [received, ...], sorted by rank.

        Args:
            back: the way back, with ``sent`` and ``received`` swapped.
        """
        x = x.contiguous()
        if self.group.intra is None:
            to, by = (self.by, self.to) if back else (self.to, self.by)
            work = _exchange(x, out, to, by, self.group, wait=False)
            assert work is not None
            return Pending(work.wait, x, out)
        step = self._back if back else self._forth
        return _in_background(lambda: step(x, out), x, out)

    # Grad mode is per thread: the worker thread would record these steps.
    @torch.inference_mode()
    def _forth(self, x: Tensor, out: Tensor) -> None:
        intra, inter = self._groups()
        to = self.to.view(inter.size, intra.size)
        by = self.by.view(inter.size, intra.size)
        x = _swap(x, to)  # sorted by local rank, then by node
        within = x.new_empty((int(self.middle.sum()), *x.shape[1:]))
        _exchange(x, within, to.sum(0), self.middle.sum(1), intra)
        within = _swap(within, self.middle)
        _exchange(within, out, self.middle.sum(0), by.sum(1), inter)

    @torch.inference_mode()
    def _back(self, x: Tensor, out: Tensor) -> None:
        intra, inter = self._groups()
        to = self.to.view(inter.size, intra.size)
        by = self.by.view(inter.size, intra.size)
        within = x.new_empty((int(self.middle.sum()), *x.shape[1:]))
        _exchange(x, within, by.sum(1), self.middle.sum(0), inter)
        within = _swap(within, self.middle.t())
        swapped = torch.empty_like(out)
        _exchange(within, swapped, self.middle.sum(1), to.sum(0), intra)
        out.copy_(_swap(swapped, to.t()))

    def _groups(self) -> tuple[Group, Group]:
        assert self.group.intra is not None
        assert self.group.inter is not None
        return self.group.intra, self.group.inter


def _exchange(
    x: Tensor, out: Tensor, to: Tensor, by: Tensor, group: Group, wait: bool = True
) -> dist.Work | None:
    """Exchange rows x, which must be contiguous; without ``wait`` the caller keeps x and out."""
    work: dist.Work | None = dist.all_to_all_single(
        out, x, by.tolist(), to.tolist(), group=group.handle, async_op=not wait
    )
    return work


def _swap(rows: Tensor, counts: Tensor) -> Tensor:
    """Reorder runs of rows from (a, b) to (b, a).

    Args:
        counts: [A, B], lengths of the runs.
    """
    columns = counts.shape[1]
    runs = rows.split(counts.flatten().tolist())
    return torch.cat([run for b in range(columns) for run in runs[b::columns]])


def _in_background(steps: Callable[[], None], x: Tensor, out: Tensor) -> Pending:
    """Run ``steps``, which read x and write out, while this thread goes on.

    All ranks start their exchanges in the same order. One worker keeps that order, so that no two
    exchanges deadlock.
    """
    if not x.is_cuda:
        return Pending(_worker().submit(steps).result, x, out)
    device = x.device
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        steps()
    done = torch.cuda.Event()  # not the whole stream: later exchanges follow on it
    done.record(side)
    return Pending(lambda: torch.cuda.current_stream(device).wait_event(done), x, out)


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="all-to-all")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
