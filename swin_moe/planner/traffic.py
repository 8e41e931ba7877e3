"""Bytes that a rank hands to collectives in an update, as DeepSpeed 0.19 does it.

Counted are the bytes of what is reduced, scattered (the whole) or sent, and of what a gather
returns. Messages of a few numbers are left out: the guard's, norms, overflow flags and logging.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig, MoEConfig
from .flops import expert_rows
from .states import LIVE, PERSISTENT, ParameterGroup


@dataclass(frozen=True)
class Message:
    """All that a kind of collective carries in an update.

    Attributes:
        kind: ``all_reduce``, ``reduce_scatter``, ``all_gather`` or ``all_to_all``.
        group: ``world``, ``expert`` or ``expert_data``, see :class:`~swin_moe.distributed.World`.
        what: for people.
        overlaps: whether it is on its way while gradients or the next layers are computed.
    """

    kind: str
    group: str
    what: str
    sent: int
    overlaps: bool = False


def traffic(
    groups: list[ParameterGroup], *, stage: int, bf16: bool, accumulation: int
) -> list[Message]:
    """Gradients and weights of an update.

    ZeRO 1 and 2 reduce every gradient on all ranks (``use_multi_rank_bucket_allreduce``): a rank
    keeps its part of it. ZeRO-1 does so once an update, ZeRO-2 and 3 in each micro-step.
    """
    width = 2 if bf16 and stage else 4
    messages = []
    for expert in (False, True):
        own = [g for g in groups if g.expert == expert]
        name = "expert_data" if expert and own and own[0].replicas < _most(groups) else "world"
        elements = sum(g.elements for g in own)
        if not elements:
            continue
        kind = "experts" if expert else "dense"
        if stage < 3:
            times = accumulation if stage == 2 else 1
            reduced = times * width * elements
            messages.append(
                Message("all_reduce", name, f"gradients, {kind}", reduced, overlaps=stage > 0)
            )
        if stage in (1, 2) and own[0].replicas > 1:
            whole = width * sum(g.part * g.replicas for g in own)
            messages.append(Message("all_gather", name, f"updated weights, {kind}", whole))
        if stage == 3:
            messages += _of_shards(own, name, kind, width, accumulation, elements)
    return messages


def _most(groups: list[ParameterGroup]) -> int:
    return max(g.replicas for g in groups)


def _of_shards(
    own: list[ParameterGroup],
    name: str,
    kind: str,
    width: int,
    accumulation: int,
    elements: int,
) -> list[Message]:
    sizes = [(size, g.replicas) for g in own for size in g.sizes]
    padded = [-(-size // n) * n for size, n in sizes]
    small = sum(p for p, (size, _) in zip(padded, sizes, strict=True) if size < PERSISTENT)
    fetches = 1 if elements <= LIVE else 2
    gathered = accumulation * fetches * (sum(padded) - small) + small
    return [
        Message("all_gather", name, f"weights, {kind}", width * gathered, overlaps=True),
        Message(
            "reduce_scatter",
            name,
            f"gradients, {kind}",
            width * accumulation * sum(padded),
            overlaps=True,
        ),
    ]


def exchanged(
    model: ModelConfig,
    moe: MoEConfig,
    *,
    expert_parallel_size: int,
    images: int,
    bf16: bool,
    accumulation: int,
    padded: bool,
) -> list[Message]:
    """Rows of an update's micro-steps to the experts and back, and their gradients."""
    if expert_parallel_size == 1 or not moe.enabled:
        return []
    height, width = model.token_grid
    sent = 0  # elements
    shards = max(expert_parallel_size // moe.num_experts, 1)
    for stage, blocks in enumerate(moe.blocks):
        tokens = -(-height // 2**stage) * -(-width // 2**stage)
        rows = expert_rows(moe, images, tokens, padded) * shards
        again = sum(block < model.recomputed_blocks(stage) for block in blocks)
        # There and back: forward, backward, and where a block is recomputed.
        sent += (4 * len(blocks) + 2 * again) * rows * (model.embed_dim << stage)
    size = accumulation * (2 if bf16 else 4)
    return [Message("all_to_all", "expert", "rows of tokens", size * sent)]
