"""One run of the convergence benchmark that waits after step 3, for a test that stops it in the middle."""

import sys
import time
from pathlib import Path

from benchmarks.convergence import run
from maskalign.training import trainer


class HeldStop(trainer.Stop):
    """Asked before the first step and after each; the answer after step 3 is that to stop, whenever it comes."""

    asked = 0

    def agree(self):
        self.asked += 1
        while self.asked == 4 and not super().agree():
            Path(sys.argv[1], "held").touch()
            time.sleep(0.01)
        return super().agree()


if __name__ == "__main__":
    trainer.Stop = HeldStop
    sys.exit(run.main(sys.argv[1]))
