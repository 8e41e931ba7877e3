"""Two processes that differ in one thing, named by the folder; each writes its results."""

import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.config import load_config
from swin_moe.preflight import agreement, links
from swin_moe.preflight.start import check, refuse
from tests.parallel import MICRO, SMALL


def work(folder: Path) -> None:
    case = folder.name
    rank = ranks.environment_rank()[0]
    overrides = [*SMALL, f"train.output={folder}/runs/mine", "parallel.expert_parallel_size=2"]
    collect = agreement.collect

    def another(config):
        facts = dataclasses.replace(collect(config), host=f"node-{rank}", local_rank=0)
        if case == "torch" and rank:
            facts.versions["torch"] = "2.14.1"
        if case == "driver" and rank:
            facts.versions["driver"] = "550.1"
        return facts

    agreement.collect = another
    if rank and case == "config":
        overrides.append("optimizer.base_lr=0.5")
    if rank and case == "expert_parallel":
        overrides.append("parallel.expert_parallel_size=1")
    if case == "folder":  # one path, two folders
        overrides.append("train.output=mine")
        place = folder / ("elsewhere" if rank else "here")
        place.mkdir()
        os.chdir(place)
    config = load_config(MICRO, overrides)
    if rank and case == "clock":
        now = time.time
        links.time.time = lambda: now() + 7.0
    meeting = distributed.connect(3.0 if case == "late" else 60.0)
    if case == "late" and rank:
        time.sleep(8)
        ranks.leave(0)
    found: dict = {}
    try:
        verdict = agreement.agree(config, meeting)
        refuse(verdict)
        world = distributed.init(config.parallel.expert_parallel_size, meeting=meeting)
        checked = check(config, verdict, world, torch.float32)
        found = dataclasses.asdict(checked)
        refuse(agreement.Agreement(checked.facts, checked.problems, checked.warnings))
    except (ValueError, TimeoutError) as error:
        found |= {"error": str(error)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
