"""Convert a budget of seconds to a number of steps in `benchmarks.convergence`.

A phase is a part of a run in which the number of kept tokens and the alignment do not change, so that all its steps
take the same time. The phases of all recipes are timed in one process in turns, in another order every round. A time is
stored as its median ratio to a step of full-token REPA in the same round, with the median time of REPA's step. The time
of a run of n steps is then defined as the sum over its steps, so it does not depend on the load of the machine during
the run. With one thread on a CPU, the clock is the CPU time of the process, on which other jobs have little effect.
Otherwise it is the wall clock, and the machine must be idle.
"""

import gc
import json
import random
import statistics
import time
from itertools import accumulate
from typing import NamedTuple

from benchmarks.convergence.recipes import recipe_config
from maskalign.config import as_schedule, keep_count, model_sizes, schedule_value
from maskalign.errors import UsageError
from maskalign.runtime.files import write_atomically

EMPTY = {"about": "", "clock": "", "threads": 0, "repa_key": "", "repa_seconds": 0.0, "steps": {}}


class Phase(NamedTuple):
    """keep: number of tokens on the route; aligned: True with an alignment loss; align: aligned tokens, or None."""

    keep: int
    aligned: bool
    align: int | None


def phase_at(config, tokens, progress):
    """The `Phase` of a recipe at a share of its training."""
    method = config.method
    keep = keep_count(schedule_value(method.keep_ratio, progress), tokens, method.keep_multiple)
    aligned = schedule_value(method.align_weight, progress) > 0
    share = None if method.align_ratio is None or not aligned else schedule_value(method.align_ratio, progress)
    return Phase(keep, aligned, share)


def phases(config, tokens, resolution=1000):
    """dict from every phase of a recipe to the first share of training in which it occurs."""
    found = {}
    for step in range(resolution):
        found.setdefault(phase_at(config, tokens, step / resolution), step / resolution)
    return found


def key_of(config, phase):
    """All settings that a step's time depends on, as text; phases with equal keys are timed once."""
    method, training = config.method, config.training
    sizes = model_sizes(config)
    ever = as_schedule(method.align_weight)
    parts = {
        **{name: value for name, value in vars(config.model).items() if name != "preset"},
        **sizes,
        "teachers": config.teacher.names if max(ever.ends) > 0 or config.model.class_token else [],
        "route": method.route if isinstance(method.route, str) else list(method.route),
        "restore": method.restore,
        "subset": method.subset,
        "batch": training.batch_size,
        "accumulation": training.accumulation,
        "precision": training.precision,
        "compile": training.compile,
        "phase": list(phase),
    }
    for name, mixer in (("mixer_hidden", "token_mlp"), ("mixer_layers", "attention")):
        if parts["mixer"] != mixer:
            parts.pop(name)
    return json.dumps(parts, sort_keys=True)


class Calibration:
    """Seconds of a step by phase, from the file that `calibrate` writes.

    Args:
        entries: the content of the file.
    """

    def __init__(self, entries):
        self.entries = entries

    @classmethod
    def load(cls, path):
        """Read the file; an empty calibration if it does not exist."""
        if not path.is_file():
            return cls(dict(EMPTY))
        return cls(json.loads(path.read_text()))

    def missing(self, configs, tokens):
        """Names of the recipes (of a dict name -> `Config`) with a phase that has not been timed."""
        return [
            name
            for name, config in configs.items()
            if any(key_of(config, phase) not in self.entries["steps"] for phase in phases(config, tokens))
        ]

    def phase_seconds(self, config, phase):
        """Seconds of one step in a phase."""
        entry = self.entries["steps"].get(key_of(config, phase))
        if entry is None:
            raise UsageError("a recipe's steps have not been timed; run the same command with --calibrate first")
        return entry["x_repa"] * self.entries["repa_seconds"]

    def seconds(self, config, tokens, steps):
        """The seconds after 0, 1, ..., `steps` steps of a run of `steps` steps."""
        times = (self.phase_seconds(config, phase_at(config, tokens, step / steps)) for step in range(steps))
        return list(accumulate(times, initial=0.0))

    def steps_within(self, config, tokens, budget, multiple=1, resolution=2000):
        """The largest number of steps, a multiple of `multiple`, whose whole run takes at most `budget` seconds."""
        mean = statistics.fmean(
            self.phase_seconds(config, phase_at(config, tokens, part / resolution)) for part in range(resolution)
        )
        steps = int(budget / mean) // multiple * multiple
        while self.seconds(config, tokens, steps + multiple)[-1] <= budget:
            steps += multiple
        while steps and self.seconds(config, tokens, steps)[-1] > budget:
            steps -= multiple
        if not steps:
            raise UsageError(f"--budget: {budget:g} s is less than {multiple} steps of {mean:.3g} s; give more")
        return steps


class TimedStep:
    """A step in one phase of a recipe, as in the trainer: read the batch, compute the features, run the step."""

    def __init__(self, trainer, batches, progress):
        self.trainer, self.batches, self.progress, self.count = trainer, batches, progress, 0

    def __call__(self):
        given = self.trainer.step_inputs(next(self.batches))
        result = self.trainer.train_step(self.count, self.progress, **given)
        self.count += 1
        return float(result.loss)


def calibrate(recipes, path, *, threads, rounds=15, warmup=2, again=False, machine="", say=print):
    """Time the phases that are not in the file yet, in turns with REPA's, and write the file.

    Args:
        recipes: dict name -> (settings, overrides of recipe_config); it must include "repa".
        path: the JSON file.
        threads: CPU threads of the later runs.
        rounds, warmup: number of timed steps of every phase, and of steps before them.
        again: time all phases again, and ignore the content of the file.
        machine: a line of text about the machine.
        say: function that prints a line of progress.

    Returns:
        Calibration.
    """
    import torch

    from maskalign.training.preflight import check_data
    from maskalign.training.trainer import Trainer

    torch.set_num_threads(threads)
    old = Calibration(dict(EMPTY)) if again else Calibration.load(path)
    steps, trainers, cases, labels = dict(old.entries["steps"]), {}, {}, {}
    repa_key = None
    for name, (settings, overrides) in recipes.items():
        config = recipe_config(settings, **overrides)
        manifest, facts = check_data(config)
        tokens = (facts.input_size // model_sizes(config)["patch_size"]) ** 2
        for phase, progress in phases(config, tokens).items():
            key = key_of(config, phase)
            if name == "repa":
                repa_key = key
            elif key in steps or key in cases:
                continue
            if name not in trainers:
                trainer = Trainer(config, manifest, facts)
                trainers[name] = trainer, iter(trainer.stream)
            cases[key] = TimedStep(*trainers[name], progress)
            labels[key] = f"{name} {phase.keep}/{tokens}" + ("" if phase.aligned else " no alignment")
    if steps and old.entries["repa_key"] != repa_key:
        raise UsageError(f"{path} holds times of another model or batch; add --recalibrate, or use another --work")
    if set(cases) <= set(steps):
        return old
    own = threads == 1 and not torch.cuda.is_available()
    for number, (key, case) in enumerate(cases.items()):
        say(f"warming up {number + 1}/{len(cases)}: {labels[key]}")
        for _ in range(warmup):
            case()
    taken, walls = {key: [] for key in cases}, []
    order, shuffle = list(cases), random.Random(0)
    for number in range(rounds):
        say(f"round {number + 1}/{rounds}")
        shuffle.shuffle(order)
        for key in order:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            cases[key]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[key].append(cpu if own else wall)
            walls.append(wall / max(cpu, 1e-9))
    for key, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, taken[repa_key], strict=True))
        if key in steps:
            continue
        steps[key] = {
            "label": labels[key],
            "x_repa": statistics.median(ratios),
            "x_repa_p10": ratios[round(0.1 * (len(ratios) - 1))],
            "x_repa_p90": ratios[round(0.9 * (len(ratios) - 1))],
            "rounds": rounds,
        }
    entries = {
        "about": old.entries["about"] or machine,
        "clock": old.entries["clock"] or ("CPU time of one thread" if own else "wall clock"),
        "threads": threads,
        # With one thread, a ratio much above 1 means that the machine had other work during the timing.
        "wall_over_cpu": statistics.median(walls),
        "repa_key": repa_key,
        "repa_seconds": old.entries["repa_seconds"] or statistics.median(taken[repa_key]),
        "steps": steps,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), json.dumps(entries, indent=1).encode())
    return Calibration(entries)
