"""Started by torchrun: several runs one after another in the same processes, since starting them is what takes long.

    torchrun ... runs_under_torchrun.py CASES.json

CASES.json is a list of {"argv": [...], "poison": step or null, "backend": of torch.compile, "pretend_graphs": bool,
"refuse_on": rank or null}. With `poison` the last rank's images of that step are NaN. With `pretend_graphs` steps are
captured as in pretended_gpu.py, except on the rank `refuse_on`. Each run's folder gets a file `ranks.json`: per rank a
digest of the whole weights, the steps that were skipped, and how often a step was captured and replayed.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import pretended_gpu  # beside this script
import torch
import torch.distributed as dist

from maskalign.config import parse_config
from maskalign.runtime import ranks
from maskalign.training import compiling, graphs, run_log, trainer
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

    with contextlib.ExitStack() as stack:

        def patch(owner, name, value):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        patch(run_log, "draw_curves", lambda *_: None)  # takes longer than the run
        patch(TrainStep, "__call__", step)
        pretended = pretended_gpu.pretend(patch) if case.get("pretend_graphs") else pretended_gpu.PretendedStep
        if dist.get_rank() == case.get("refuse_on"):
            patch(graphs, "CapturedStep", refuse)
        trainer.train(config, *check_data(config))
    digest = hashlib.sha256()
    for parameter in seen["model"].parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(whole.detach().float().numpy().tobytes())
    digests = [None] * dist.get_world_size()
    counts = {"captures": pretended.captures, "replays": pretended.replays}
    dist.all_gather_object(digests, {"digest": digest.hexdigest(), "skipped": skipped, **counts})
    if dist.get_rank() == 0:
        Path(config.run_dir, "ranks.json").write_text(json.dumps(digests))


def refuse(*_):
    raise RuntimeError("no capture here")


def main():
    ranks.join_ranks(torch.device("cpu"))
    trainer.leave_ranks = lambda failed: None  # one process group for all runs
    for case in json.loads(Path(sys.argv[1]).read_text()):
        torch._dynamo.reset()
        run(case)
    dist.destroy_process_group()


main()
