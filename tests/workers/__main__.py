"""``python -m tests.workers NAME FOLDER`` runs a rank of a worker, which writes to the folder."""

import sys
from importlib import import_module
from pathlib import Path

from swin_moe import distributed
from swin_moe.common import ranks

import_module(f"tests.workers.{sys.argv[1]}").work(Path(sys.argv[2]))
distributed.barrier()
distributed.shutdown()
ranks.leave(0)
