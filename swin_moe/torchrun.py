"""torchrun with a one-line report in place of its traceback: ``python -m swin_moe.torchrun``.

It takes torchrun's own options. When a process fails, the process has told why; torchrun would
bury that under a page about itself.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a process that exits by itself has said why
            name = signal.Signals(-failure.exitcode).name
            print(f"swin-moe: error: rank {rank} was killed by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        print(f"swin-moe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
