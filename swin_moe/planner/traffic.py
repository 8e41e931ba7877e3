"""Counts the bytes that a rank passes to collectives in an update with DeepSpeed 0.19.

A reduction, a scatter and an all-to-all count their input, a gather its output. Messages of a few
numbers are left out: the guard's, norms, overflow flags and logging.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig, MoEConfig
from .flops import expert_rows
from .states import LIVE, PERSISTENT, ParameterGroup


@dataclass(frozen=True)
class Message:
    """The messages of one kind and content in an update.

    Attributes:
        kind: ``all_reduce``, ``reduce_scatter``, ``all_gather`` or ``all_to_all``.
        group: ``world``, ``expert`` or ``expert_data``, see :class:`~swin_moe.distributed.World`.
        what: the content, for tables.
        sent: bytes.
        overlaps: it travels while gradients or the next layers are computed.
    """

    kind: str
    group: str
    what: str
    sent: int
    overlaps: bool = False


def traffic(
    groups: list[ParameterGroup], *, stage: int, half: bool, accumulation: int
) -> list[Message]:
    """Return the messages with the gradients and weights of an update.

    ZeRO 1 and 2 reduce every gradient on all ranks (``use_multi_rank_bucket_allreduce``), and a
    rank keeps its part. ZeRO-1 reduces once an update, ZeRO-2 and 3 in each micro-step.

    Args:
        groups: of the rank.
        stage: of ZeRO.
        half: weights and gradients are bf16 or fp16 (from ZeRO-1 on), otherwise fp32.
        accumulation: micro-steps of an update.
    """
    width = 2 if half and stage else 4
    messages, most = [], max(g.replicas for g in groups)
    for expert in (False, True):
        own = [g for g in groups if g.expert == expert]
        name = "expert_data" if expert and own and own[0].replicas < most else "world"
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
    half: bool,
    accumulation: int,
    padded: bool,
) -> list[Message]:
    """Return the messages with the rows of an update to the experts and back, and their gradients.

    Args:
        model: sizes.
        moe: routing and capacity.
        expert_parallel_size: ranks of an expert group.
        images: of a micro-batch.
        half: rows are bf16 or fp16, otherwise fp32.
        accumulation: micro-steps of an update.
        padded: experts get their full capacity.
    """
    if expert_parallel_size == 1 or not moe.enabled:
        return []
    height, width = model.token_grid
    sent = 0  # elements
    shards = max(expert_parallel_size // moe.num_experts, 1)
    for stage, blocks in enumerate(moe.blocks):
        tokens = -(-height // 2**stage) * -(-width // 2**stage)
        rows = expert_rows(moe, images, tokens, padded) * shards
        again = sum(block < model.recomputed_blocks(stage) for block in blocks)
        # There and back, in forward, backward, and the recomputation of a block.
        sent += (4 * len(blocks) + 2 * again) * rows * (model.embed_dim << stage)
    size = accumulation * (2 if half else 4)
    return [Message("all_to_all", "expert", "rows of tokens", size * sent)]
