"""Kill a run with kill -9 at random moments, with 1, 2 and 4 ranks in turn. It must end like an undisturbed run.

    python -m benchmarks.kill_and_resume --data datasets/openmoji32 --out runs/kills

Every start of the killed run has another number of ranks and loader processes, and another plan. At the end two things
are checked and printed: the difference of the final loss from that of the undisturbed run, and that every epoch has
used each sample's key exactly once (steps that were repeated after a kill must have used the same keys both times). The
whole process tree is killed at a random moment, during start-up, a step or a save. kill_and_resume.csv has a row per
start; the last row is the start that finished the run.
"""

import argparse
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

LAYOUTS = [  # ranks, plan, loader processes per rank
    (1, "none", 0),
    (2, "ddp", 1),
    (4, "hsdp", 0),
    (2, "fsdp", 2),
    (1, "none", 2),
]
MODEL = """--model.depth 2 --model.width 32 --model.heads 2 --model.patch_size 4 --model.mixer_hidden 8
--model.projector_dim 16 --method.align_depth 1 --teacher.names [efficientnet-lite0] --optimizer.lr 0.0003
--training.log_every 1 --training.sample_every 0 --training.precision fp32 --training.progress false
--training.tensorboard false --preview.per_class 1 --preview.steps 1 --preview.classes 2""".split()


def settings(data, run_dir, steps, batch):
    own = ["--data.path", data, "--run_dir", run_dir, "--training.max_steps", steps, "--training.batch_size", batch]
    return [*MODEL, *(str(word) for word in own), "--training.checkpoint_every", "3"]


def start(argv, ranks, log, pause=0.0):
    """Start a run on some ranks. It writes the keys that it reads to files in the folder `log`, and its output there to
    `output.txt`.

    `pause` is a pause in seconds before each step, because so small a model would otherwise finish before the kill.
    """
    log.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.kill_and_resume", "--worker", str(log), str(pause), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log / "output.txt", "a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=Path(__file__).resolve().parent.parent
        )


def work(log, pause, argv):
    """`maskalign train`, which also writes the keys of each step's batch as lines of JSON before it is used."""
    from maskalign.cli import main
    from maskalign.training import trainer

    file = open(Path(log, f"keys-{os.getpid()}.jsonl"), "a")

    class Watched(trainer.ShardStream):
        def __iter__(self):
            for batch in super().__iter__():
                # `served` counts the images of the whole job, including this batch.
                file.write(json.dumps([self.served // self.batch_size - 1, batch["key"]]) + "\n")
                file.flush()
                time.sleep(pause)
                yield batch

    trainer.ShardStream = Watched
    main(["train", *argv])


def seen_keys(log):
    """dict from step, from 0, to a list of tuples of keys, one for each time that a rank did the step."""
    seen = {}
    for path in sorted(log.glob("keys-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                step, keys = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            seen.setdefault(step, []).append(tuple(keys))
    return seen


def tree(pid):
    """The ids of a process and all its descendants."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill(process):
    """Kill the whole tree with kill -9. It is stopped first, because a live launcher would start further ranks."""
    stopped = []
    while new := [pid for pid in tree(process.pid) if pid not in stopped]:
        send(new, signal.SIGSTOP)
        stopped += new
    send(stopped, signal.SIGKILL)
    process.wait()


def losses(run_dir):
    path = Path(run_dir, "metrics.csv")
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row.get("bad_samples")}


def campaign(data, out, steps=200, kills=20, batch=8, seed=0, say=print):
    """Run the undisturbed and the killed run, and compare them.

    Returns:
        dict with kills, starts (rows of start, ranks, plan, workers, end, step), steps, loss, killed_loss, relative
        (relative difference of the final losses), relative_of_any_step (the largest such difference), samples, epochs,
        and `wrong`: a list of the failed checks as text.
    """
    rng, out = random.Random(seed), Path(out)
    shutil.rmtree(out, ignore_errors=True)
    whole, killed = out / "whole", out / "killed"
    if start(settings(data, whole, steps, batch), 1, out / "whole-log").wait() != 0:
        raise SystemExit(f"the undisturbed run failed; see {out / 'whole-log' / 'output.txt'}")
    log, done, starts = out / "killed-log", 0, []
    while True:
        ranks, plan, workers = LAYOUTS[len(starts) % len(LAYOUTS)]
        starts.append({"start": len(starts) + 1, "ranks": ranks, "plan": plan, "workers": workers})
        own = ["--parallel.plan", plan, "--data.num_workers", str(workers)]
        own += ["--parallel.shard_size", "2"] if plan == "hsdp" else []
        pause = 0.1 if done < kills else 0.0
        process = start([*settings(data, killed, steps, batch), *own], ranks, log, pause)
        if done < kills:
            before = max(losses(killed), default=0)
            target = before + rng.randint(1, max(1, 2 * (steps - before) // (kills - done + 1)))
            target = min(target, steps - 2)
            if rng.random() < 0.15:  # in the start-up
                time.sleep(rng.uniform(0.5, 6))
            else:
                while process.poll() is None and max(losses(killed), default=0) < target:
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 0.2))
            if process.poll() is None:
                kill(process)
                done += 1
                starts[-1] |= {"end": "killed", "step": max(losses(killed), default=0)}
                say(f"kill {done} of {kills}: {ranks} rank(s), at step {starts[-1]['step']}", flush=True)
                continue
        elif process.wait() == 0:
            break
        if process.returncode != 0:
            raise SystemExit(f"a start on {ranks} rank(s) failed by itself; see {log / 'output.txt'}")
        break
    starts[-1] |= {"end": "finished", "step": steps}
    return {"kills": done, "starts": starts} | compare(whole, killed, out, steps, batch, data)


def compare(whole, killed, out, steps, batch, data):
    expected, got, wrong = losses(whole), losses(killed), []
    relative = abs(got[steps] - expected[steps]) / abs(expected[steps])
    if relative > 1e-5:
        wrong.append(f"the final loss is {got[steps]}, undisturbed {expected[steps]}")
    samples = json.loads(Path(data, "manifest.json").read_text())["num_samples"]
    reference, seen = seen_keys(out / "whole-log"), seen_keys(out / "killed-log")
    total = Counter()
    for step in range(steps):
        own = {key for keys in reference[step] for key in keys}
        times = Counter(key for keys in seen.get(step, []) for key in keys)
        if set(times) != own or len(own) != batch:
            wrong.append(f"step {step + 1} had other samples than the undisturbed run")
        total.update(own)
    # Every epoch must have each sample once, so after complete epochs all keys have been read equally often.
    for epoch in range(steps * batch // samples):
        first, last = math.ceil(epoch * samples / batch), (epoch + 1) * samples // batch
        keys = Counter(key for step in range(first, last) for batch_keys in reference[step] for key in batch_keys)
        if max(keys.values()) > 1 or (samples % batch == 0 and len(keys) != samples):
            wrong.append(f"epoch {epoch} did not have each of its samples exactly once")
    most = max(abs(got[step] - loss) / abs(loss) for step, loss in expected.items())
    found = {"steps": steps, "loss": expected[steps], "killed_loss": got[steps], "relative": relative}
    found["relative_of_any_step"] = most
    return found | {"samples": samples, "epochs": steps * batch / samples, "wrong": wrong}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return work(argv[1], float(argv[2]), argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of a data set with features of efficientnet-lite0")
    parser.add_argument("--out", default="runs/kills", help="folder for the two runs; it is emptied first")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="a multiple of 4; it should divide the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--results", default="benchmarks/results", help="folder for kill_and_resume.csv")
    args = parser.parse_args(argv)
    result = campaign(args.data, args.out, args.steps, args.kills, args.batch, args.seed)
    starts = result.pop("starts")
    summary = {**result, "starts": len(starts), "seed": args.seed}
    for key, value in summary.items():
        print(f"{key:12} {value}")
    summary["wrong"] = "; ".join(summary["wrong"])
    with open(Path(args.results, "kill_and_resume.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*starts[-1], *summary])
        writer.writeheader()
        writer.writerows({**row, **(summary if row is starts[-1] else {})} for row in starts)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
