"""How long training waits for a checkpoint: written in the background, or written immediately.

    python -m benchmarks.checkpoints --preset SiT-S/2 --out benchmarks/results/checkpoints.csv

One process saves the whole state of a SiT (weights, average, moments). Both ways take turns. A save is timed from the
call to the return (blocked) and until it is committed on the disk (total). The first round, which allocates buffers, is
not counted.
"""

import argparse
import csv
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path


def measure(preset, folder, rounds):
    """List of rows: preset, way, round, mib, blocked_s, total_s."""
    import torch

    from maskalign.config import OptimizerConfig
    from maskalign.models import SiT
    from maskalign.runtime.device import tune_host
    from maskalign.training.optimizer import Optimizer
    from maskalign.training.saving import Saver

    tune_host(torch.device("cpu"))
    model = SiT.from_preset(preset, input_size=32, in_channels=4, num_classes=1000, teacher_dims=[768])
    tensors = Optimizer(model, OptimizerConfig()).tensors()
    mib = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    savers = {
        way: Saver(Path(folder, way), keep=1, background=way == "background") for way in ("at once", "background")
    }
    rows = []
    for number in range(rounds + 1):
        for way, saver in savers.items():
            start = time.perf_counter()
            saver.save(number + 1, tensors, {"step": number + 1}, "")
            blocked = time.perf_counter() - start
            saver.wait()
            total = time.perf_counter() - start
            if number:
                rows.append([preset, way, number, round(mib), round(blocked, 4), round(total, 4)])
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="SiT-S/2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write the checkpoints; by default a temporary folder")
    parser.add_argument("--out", default="benchmarks/results/checkpoints.csv")
    args = parser.parse_args(argv)
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        rows = measure(args.preset, folder, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        csv.writer(file).writerows([["preset", "way", "round", "mib", "blocked_s", "total_s"], *rows])
    middle = {way: statistics.median(r[4] for r in rows if r[1] == way) for way in ("at once", "background")}
    ratio = middle["background"] / middle["at once"]
    print(f"{args.preset}, {rows[0][3]} MiB: at once {middle['at once']:.3f} s, in the background training waits")
    print(f"{middle['background']:.3f} s, {ratio:.3f} of it (medians of {args.rounds}, in turns)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
