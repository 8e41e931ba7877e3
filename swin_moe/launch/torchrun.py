"""torchrun with our agent: ``python -m swin_moe.launch.torchrun`` takes the options of torchrun."""

import os
import sys

from ..common.signals import watch
from ..common.writing import open_streams


def main() -> int:
    watch()  # the imports take seconds
    open_streams()
    # NumPy's pool of threads would be there before the fork server is, and no thread survives that.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .elastic import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
