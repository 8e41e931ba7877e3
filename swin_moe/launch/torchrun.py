"""torchrun with this package's agent: ``python -m swin_moe.launch.torchrun`` and its options."""

import os
import sys

from ..common.host import use_expandable_segments
from ..common.signals import watch
from ..common.writing import open_streams


def main() -> int:
    watch()  # the imports take seconds
    open_streams()
    use_expandable_segments()
    # NumPy must start no pool of threads before the fork server: threads do not survive a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .elastic import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
