"""Started by torchrun: `maskalign train` in which one rank does something bad before a step, on the first start only.

torchrun ... train_with_faults.py hang|stop|kill|fail RANK STEP TRAIN-ARGUMENTS...
"""

import os
import signal
import sys
import time

from maskalign.cli import main
from maskalign.training import trainer
from maskalign.training.step import TrainStep

FAULT, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own = TrainStep.__call__


def step(self, number, *args, **kwargs):
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if number == STEP and self.placement.rank == RANK and first_start:
        if FAULT == "hang":
            time.sleep(600)
        elif FAULT == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif FAULT == "fail":
            raise trainer.RunError(f"a fault of rank {RANK}")
    if FAULT == "slow":
        time.sleep(0.05)
    return own(self, number, *args, **kwargs)


TrainStep.__call__ = step
main(["train", *sys.argv[4:]])
