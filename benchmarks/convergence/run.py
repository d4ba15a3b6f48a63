"""One run of `benchmarks.convergence`, as a process: train with the normal trainer, then measure the checkpoints.

    RUN/job.json            definition of the run: settings, steps, points, measurements
    RUN/quality-STEP.json   the measurements at a point; the run is finished when all these files exist
    RUN/config.yaml, metrics.csv, checkpoints/ ...   as in any run of `maskalign train`

The process can be stopped or killed at any moment. When it is started again, the trainer resumes from its newest
checkpoint, and measurements that exist are not repeated. All checkpoints except the last are removed after they are
measured, unless the job keeps them.
"""

import json
import shutil
import sys
from pathlib import Path

from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import write_atomically

JOB = "job.json"


def quality_path(run_dir, step):
    return Path(run_dir, f"quality-{step:08d}.json")


def is_finished(run_dir):
    """True if every point of the run has been measured."""
    job = read_job(run_dir)
    return job is not None and all(quality_path(run_dir, step).is_file() for step in job["points"])


def read_job(run_dir):
    """The definition of the run, or None if it has not been started."""
    path = Path(run_dir, JOB)
    return json.loads(path.read_text()) if path.is_file() else None


def settings_of(job):
    """The settings that define a run: its whole job, flag by flag, without the paths of the checkout and the folder."""
    flags, values = job["arguments"][::2], job["arguments"][1::2]
    own = {flag: value for flag, value in zip(flags, values, strict=True) if flag not in ("--config", "--run_dir")}
    return {**{key: value for key, value in job.items() if key != "arguments"}, **own}


def write_job(run_dir, job):
    """Set up a run folder, or check that an existing folder has the same run.

    Raises:
        UsageError: the folder has a run with other settings.
    """
    job, old = json.loads(json.dumps(job)), read_job(run_dir)
    before, now = settings_of(old or job), settings_of(job)
    if before != now:
        other = next(key for key in {**now, **before} if now.get(key) != before.get(key))
        raise UsageError(
            f"{run_dir} holds a run with another {other} ({before.get(other)}, now {now.get(other)}); remove it, or "
            "give another --work"
        )
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(str(Path(run_dir, JOB)), json.dumps(job, indent=1).encode())


def work(run_dir):
    """Complete the remaining work of a run; returns True if it is finished, and False if a signal stopped it."""
    import torch

    from maskalign.checkpoints.layout import complete_checkpoints
    from maskalign.config import parse_config
    from maskalign.training.preflight import check_data
    from maskalign.training.trainer import train

    job = read_job(run_dir)
    torch.set_num_threads(job["threads"])
    config = parse_config(job["arguments"])
    there = {path.name: path for path in complete_checkpoints(run_dir)}
    if f"step_{job['steps']:08d}" not in there and not train(config, *check_data(config))["finished"]:
        return False
    from benchmarks.convergence.quality import Heldout

    heldout = Heldout(*job["data"], job.get("classifier"))
    for step in job["points"]:
        if not quality_path(run_dir, step).is_file():
            measure(run_dir, step, job, config, heldout)
    for path in complete_checkpoints(run_dir)[:-1]:
        if not job["keep"]:
            shutil.rmtree(path)
    return True


def measure(run_dir, step, job, config, heldout):
    """Write the measurements of one point: with averaged weights, and the velocity loss of the weights themselves."""
    from benchmarks.convergence.quality import heldout_losses, sample_distances
    from maskalign.checkpoints import load_model

    folder, path = Path(run_dir, "checkpoints", f"step_{step:08d}"), config.objective.path
    model = load_model(folder, ema=False)
    found = heldout_losses(model, heldout, job["times"], path)
    rows = [[f"raw_{metric}", at, value] for (metric, at), value in found.items() if metric.startswith("velocity")]
    model = load_model(folder)
    rows += [[*key, value] for key, value in heldout_losses(model, heldout, job["times"], path).items()]
    if step in job["sample_points"]:
        found = sample_distances(model, heldout, job["samples"], job["sampler_steps"], path, precision_of(config))
        rows += [[metric, "", value] for metric, value in found.items()]
    if step == job["steps"] and job.get("gap_images"):
        from benchmarks.convergence.papers import paper_measures

        found = paper_measures(model, heldout, job["gap_images"], path)
        rows += [[metric, "", value] for metric, value in found.items()]
    write_atomically(str(quality_path(run_dir, step)), json.dumps(rows).encode())


def precision_of(config):
    """The precision of the samples, which is that of training, as for the previews of `maskalign train`."""
    import torch

    from maskalign.runtime.device import compute_dtype

    return "bf16" if compute_dtype(config.training.precision, torch.device("cpu")) == torch.bfloat16 else "fp32"


def main(run_dir):
    try:
        finished = work(run_dir)
    except (RunError, UsageError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
