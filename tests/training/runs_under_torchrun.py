"""Started by torchrun: several runs one after another in the same processes, since starting them is what takes long.

    torchrun ... runs_under_torchrun.py CASES.json

CASES.json is a list of {"argv": [...], "poison": step or null, "backend": of torch.compile}. With `poison` the last
rank's images of that step are NaN. Each run's folder gets a file `ranks.json`: per rank a digest of the whole weights,
and the steps that were skipped.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from maskalign.config import parse_config
from maskalign.runtime import ranks
from maskalign.training import compiling, trainer
from maskalign.training.preflight import check_data
from maskalign.training.step import TrainStep


def run(case):
    config = parse_config(case["argv"])
    compiling.BACKEND = case.get("backend", "inductor")
    own, skipped, seen = TrainStep.__call__, [], {}

    def step(self, number, progress, inputs, *args, **kwargs):
        if number == case.get("poison") and dist.get_rank() == dist.get_world_size() - 1:
            inputs = inputs * float("nan")
        result = own(self, number, progress, inputs, *args, **kwargs)
        if result.skipped:
            skipped.append(number)
        seen["model"] = self.model
        return result

    TrainStep.__call__ = step
    try:
        trainer.train(config, *check_data(config))
    finally:
        TrainStep.__call__ = own
    digest = hashlib.sha256()
    for parameter in seen["model"].parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(whole.detach().float().numpy().tobytes())
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, {"digest": digest.hexdigest(), "skipped": skipped})
    if dist.get_rank() == 0:
        Path(config.run_dir, "ranks.json").write_text(json.dumps(digests))


def main():
    ranks.join_ranks(torch.device("cpu"))
    trainer.leave_ranks = lambda failed: None  # one process group for all runs
    for case in json.loads(Path(sys.argv[1]).read_text()):
        torch._dynamo.reset()
        run(case)
    dist.destroy_process_group()


main()
