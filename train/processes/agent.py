"""torchrun, without its page about ranks that have spoken for themselves.

`python -m train.processes.agent ...` takes what torchrun takes.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: list[str]) -> int:
    """Runs the ranks to their end; 1 if one has failed."""
    logging.disable(logging.ERROR)
    try:
        run(parse_args(arguments))
    except ChildFailedError:
        return 1
    except SignalException as told:
        return 128 + int(told.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
