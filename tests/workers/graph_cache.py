"""Compiles a block by inductor, and writes how many graphs came from the cache."""

import json
import os
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from swin_moe.common.host import keep_graphs
from swin_moe.models.graphs import BlockGraphs
from tests.models.test_graphs import assert_same, build, images, step


def work(folder: Path) -> None:
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    keep_graphs()
    model = build(depths=[1])
    expected = step(model, images())
    graphs = BlockGraphs(model, print)
    with graphs.recording():
        model(images())
    graphs.compile()
    assert_same(step(model, images()), expected)
    assert (folder / "cache/swin_moe/graphs").is_dir()
    torch._inductor.async_compile.shutdown_compile_workers()
    found = counters["inductor"]
    kinds = {kind: found[f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass")}
    (folder / f"{len(list(folder.glob('*.json')))}.json").write_text(json.dumps(kinds))
