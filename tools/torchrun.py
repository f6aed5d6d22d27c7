"""torchrun, but the last word is that of the rank which has failed.

    python tools/torchrun.py --standalone --nproc_per_node 2 dpo_train.py …

takes torchrun's arguments, starts its ranks and passes on its signals. torchrun itself would print
a table and a traceback of its own below a stage's message, and always end with exit code 1. Here:

    a rank has failed          its exit code, so that 75 (interrupted) reaches the caller
    a rank was killed          128 + the signal, and which rank and signal it was
    this process was told      128 + the signal, when all ranks have ended
      to stop

LOGLEVEL=WARNING shows torchrun's log, with when which rank ended.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from records import Stop
from stage import causes, run

KILLED = 128  # a shell's exit code for a process that a signal has ended is this and the signal


def refuse(message: str) -> NoReturn:
    """torchrun's parser would print all of its arguments, too."""
    raise Stop(
        f"torchrun: {message}. Correct NPROC or TORCHRUN_ARGS; torchrun --help explains them."
    )


def leave_as(failure: ChildFailedError) -> NoReturn:
    """End as the first rank that has failed."""
    rank, first = failure.get_first_failure()
    if first.exitcode > 0:
        sys.exit(first.exitcode)
    killer = signal.Signals(-first.exitcode)
    hint = " The system does so when memory runs out." if killer == signal.SIGKILL else ""
    print(f"error: rank {rank} was killed ({killer.name}).{hint}", file=sys.stderr)
    sys.exit(KILLED + killer)


def main():
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # it says of every rank how it ended, when the rank has
    parser = torchrun.get_args_parser()
    parser.error = refuse
    try:
        torchrun.run(parser.parse_args())
    except ChildFailedError as failure:
        leave_as(failure)
    except SignalException as stopped:
        sys.exit(KILLED + stopped.sigval)
    except (ValueError, AssertionError, RuntimeError, RendezvousError) as wrong:
        *_, first = causes(wrong)
        refuse(str(first).partition("\n")[0].rstrip(".?"))


if __name__ == "__main__":
    run(main)
