"""Compare recipes that are trained from the same seeds on the same data for the same time.

    python -m benchmarks.convergence --suite paper --data cifar10-images.zip --work DIR --prepare
    python -m benchmarks.convergence --suite paper --data cifar10-images.zip --work DIR --calibrate
    python -m benchmarks.convergence --suite rates --data cifar10-images.zip --work DIR --budget 120 --jobs 2
    python -m benchmarks.convergence --suite paper --data cifar10-images.zip --work DIR --budget 420 --jobs 2

A recipe consists of a few settings on top of configs/convergence.yaml. It is trained with the trainer of `maskalign
train`. A budget of seconds is converted to a number of steps with step times. `--calibrate` measures these once in
turns, on an otherwise idle machine, and keeps them in WORK. Every run therefore has a fixed number of steps, and its
result does not depend on the load of the machine, the number of --jobs, or interruptions. The x axis "seconds" is this
calibrated training time, without checkpoints, samples and measurements. Schedules are defined in steps and end with the
run.

Each run is a folder below WORK/runs. Run the same command again to resume; finished runs are not repeated. At several
points of each run, these are measured with averaged weights: the velocity loss on all tokens of held-out images by time
step (also with the weights themselves, because an average over too many steps would hide their loss), the alignment
cosine, and the Frechet and kernel distance of samples in the teacher's features. If recipes denoise the teacher's class
token, the distances are measured in the features of a small classifier instead, which the benchmark trains once
(`--prepare`), and losses of models with and without a class token have different names. At the end of a run the paper's
stability gap and the ratio of its heat map are measured too.

The suite `rates` tries --rates for each recipe and writes the best one of each to OUT/rates-DATA.csv. The suite `paper`
uses these rates, and `ablations` uses the rate of `maskalign`. --rate NAME=RATE overrides the file. Both suites also
measure every run after as many steps as the slowest recipe makes in its budget.

The command writes OUT/convergence-SUITE-DATA.csv with one row per number, a .json with the settings, and a .png, and
prints the table. --data takes a folder or archive of images, openmoji, torchvision:CIFAR10, or a built data set.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.convergence import beside_paper
from benchmarks.convergence import run as run_folder
from benchmarks.convergence.classifier import train_classifier
from benchmarks.convergence.clock import Calibration, calibrate, phase_at
from benchmarks.convergence.data import prepare
from benchmarks.convergence.quality import GIVEN_CLASS
from benchmarks.convergence.rates import choice, searched, with_rates, write_rates
from benchmarks.convergence.recipes import BASE, RECIPES, SUITES, arguments, own_recipe, recipe_config
from benchmarks.convergence.report import read_rows, table, write_rows
from benchmarks.report import draw
from maskalign.config import model_sizes, validate_with_data
from maskalign.data.format.manifest import Manifest
from maskalign.errors import RunError, UsageError, one_line

RUN = (sys.executable, "-m", "benchmarks.convergence.run")  # the process of a run; its folder follows
TIMES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--suite", default="final", help=f"of {', '.join(SUITES)}: recipes and seeds")
    add("--recipes", help="recipes instead of the suite's, separated by commas; include repa")
    add("--recipe", action="append", default=[], metavar="'NAME: --key value ...'", help="a further recipe")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all, e.g. model.width=192")
    add("--rates", default="0.002,0.004,0.008", help="learning rates of the suite `rates`, separated by commas")
    add("--rate", action="append", default=[], metavar="NAME=RATE", help="a recipe's learning rate")
    add("--seeds", help="seeds instead of the suite's, separated by commas")
    add("--data", default="torchvision:CIFAR10", help="images, openmoji or a built data set; see above")
    add("--name", help="short name of the data for files; by default from --data")
    add("--images", type=int, help="use about this many training images")
    add("--work", type=Path, default=Path("runs/convergence"), help="folder of data, calibration and runs")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV, JSON and PNG")
    add("--budget", type=float, default=900, help="calibrated seconds of training per run")
    add("--steps", type=int, help="a budget of steps instead, the same for all; needs no calibration")
    add("--prepare", action="store_true", help="build the data and the classifier, then end")
    add("--calibrate", action="store_true", help="time the steps of the recipes that have not been timed, then end")
    add("--recalibrate", action="store_true", help="time all of them again, then exit")
    add("--rounds", type=int, default=15, help="rounds of the calibration")
    add("--points", type=int, default=6, help="number of points of a run (the slowest one) at which it is measured")
    add("--sample-points", type=int, default=3, help="number of points with samples; a divisor of --points")
    add("--samples", type=int, default=1000, help="samples for the distances")
    add("--sampler-steps", type=int, default=25, help="Euler steps for a sample")
    add("--heldout", type=int, default=512, help="held-out images for loss and cosine")
    add("--gap-images", type=int, default=256, help="held-out images for the stability gap and the heat map; 0: none")
    add("--classifier-images", type=int, help="number of training images of the classifier; by default all")
    add("--reference", type=int, default=5000, help="held-out images for the distances")
    add("--jobs", type=int, default=1, help="number of runs at the same time")
    add("--keep-checkpoints", action="store_true", help="keep the checkpoints of all points")
    add("--threads", type=int, default=1, help="CPU threads of a run, and of the calibration")
    add("--report-only", action="store_true", help="only write the files and the table from the finished runs")
    options = parser.parse_args(argv)
    for name in ("budget", "points", "sample_points", "samples", "sampler_steps", "heldout", "reference", "jobs",
                 "threads", "rounds"):  # fmt: skip
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.points % options.sample_points:
        parser.error("--sample-points must divide --points")
    if options.steps is not None and options.steps < options.points:
        parser.error("--steps must be at least --points")
    return options


def chosen_recipes(options):
    """(dict name -> settings, seeds, shares by recipe) for the options."""
    if options.suite not in SUITES:
        raise UsageError(f"--suite: there is no suite {options.suite!r}; there are {', '.join(SUITES)}")
    suite = SUITES[options.suite]
    known = {**RECIPES, **dict(own_recipe(text) for text in options.recipe)}
    given = _given_rates(options, known)
    named = [name.strip() for name in options.recipes.split(",")] if options.recipes else list(suite.recipes)
    for name in named:
        if name not in known:
            raise UsageError(f"--recipes: there is no recipe {name!r}; there are {', '.join(known)}")
    names = dict.fromkeys(named + [name for name in known if name not in RECIPES])
    for word in options.set:
        if "=" not in word:
            raise UsageError(f"--set {word!r}: write KEY=VALUE, e.g. model.width=192")
    base = dict(word.split("=", 1) for word in options.set)
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(",")) if options.seeds else suite.seeds
    except ValueError:
        raise UsageError(f"--seeds: {options.seeds!r} is not a list of whole numbers") from None
    shares = {name: shares for name, shares in suite.shares.items() if name in names}
    recipes = {name: {**base, **known[name]} for name in names}
    if suite.rates == "search":
        recipes = searched(recipes, [rate.strip() for rate in options.rates.split(",")])
    elif suite.rates is not None or given:
        unknown = {} if suite.rates else {name: settings for name, settings in recipes.items() if name not in given}
        asked = {name: settings for name, settings in recipes.items() if name not in unknown}
        recipes = {**recipes, **with_rates(asked, suite.rates or "chosen", rates_path(options), given)}
    return recipes, seeds, shares


def _given_rates(options, known):
    """dict recipe -> rate from --rate."""
    given = {}
    for word in options.rate:
        name, equals, rate = word.partition("=")
        if not equals or name not in known:
            raise UsageError(f"--rate {word!r}: write NAME=RATE, e.g. repa=0.004, with a NAME of a recipe")
        given[name] = rate
    return given


def rates_path(options):
    """Path of the file to which the suite `rates` writes the chosen rates."""
    return options.out / f"rates-{data_name(options)}.csv"


def data_name(options):
    """A short name of the data for files, e.g. cifar10 or openmoji."""
    name = options.name or Path(options.data.split(":")[-1]).name.split(".")[0].lower()
    return name.removesuffix("-images") or "data"


class Benchmark:
    """The options and everything derived from them: data, recipes, their numbers of steps and run folders."""

    def __init__(self, options):
        self.options = options
        self.suite = SUITES.get(options.suite)
        self.recipes, self.seeds, self.shares = chosen_recipes(options)
        self.data = data_name(options)
        for settings in self.recipes.values():
            recipe_config(settings)  # to find mistakes before the data are built
        self.teacher = recipe_config({}).teacher.names[0]
        self.train, self.test = prepare(
            options.data, options.work / "data" / self.data, self.teacher, images=options.images,
            heldout=max(options.heldout, options.reference),
        )  # fmt: skip
        self.classifier = None
        if self.suite.features == "classifier":
            self.classifier = str(Path(self.train).parent / "classifier.pt")
            found = train_classifier(self.train, self.test, self.classifier, images=options.classifier_images, say=say)
            say(f"classifier: {found['accuracy']:.1%} of the held-out images are right")
        self.overrides = {"data__path": self.train}
        self.configs = {name: recipe_config(settings, **self.overrides) for name, settings in self.recipes.items()}
        self.manifest = Manifest.load(self.train)
        config = next(iter(self.configs.values()))
        self.facts = validate_with_data(config, self.manifest)
        self.tokens = (self.facts.input_size // model_sizes(config)["patch_size"]) ** 2
        self.calibration_path = options.work / f"calibration-{self.data}.json"
        self.calibration = Calibration.load(self.calibration_path)

    def calibrate(self):
        base = dict(word.split("=", 1) for word in self.options.set)
        recipes = {"repa": (base, self.overrides)}  # the unit of all times, even if it is not run
        recipes |= {name: (settings, self.overrides) for name, settings in self.recipes.items() if name != "repa"}
        calibrate(
            recipes, self.calibration_path, threads=self.options.threads, rounds=self.options.rounds,
            again=self.options.recalibrate, machine=describe_machine(), say=say,
        )  # fmt: skip
        print(calibration_table(Calibration.load(self.calibration_path)))
        print(f"written: {self.calibration_path}")

    def check_calibration(self):
        if self.options.steps is not None:
            return
        missing = self.calibration.missing(self.configs, self.tokens)
        if missing:
            raise UsageError(
                f"the steps of {', '.join(missing)} have not been timed; run the same command with --calibrate first, "
                "on an otherwise idle machine (or give a budget of --steps)"
            )
        if self.calibration.entries["threads"] != self.options.threads:
            raise UsageError(
                f"--threads {self.options.threads}: the steps were timed with "
                f"{self.calibration.entries['threads']}; add --recalibrate, or give that number"
            )

    def steps_of(self, name, share):
        """Number of steps of a run, a multiple of the number of points."""
        options = self.options
        if options.steps is not None:
            steps = int(options.steps * share) // options.points * options.points
            if not steps:
                raise UsageError(f"--steps {options.steps} is too few for {options.points} points at {share:g} of it")
            return steps
        return self.calibration.steps_within(self.configs[name], self.tokens, options.budget * share, options.points)

    def runs(self):
        """(recipe, seed, share, folder, job) of every run, seed by seed."""
        options, found = self.options, []
        slowest = min(self.steps_of(name, 1.0) for name in self.recipes) if self.suite.equal_steps else None
        unit = f"{options.steps}steps" if options.steps is not None else f"{options.budget:g}s"
        for seed in self.seeds:
            for name, settings in self.recipes.items():
                for share in self.shares.get(name, (1.0,)):
                    steps = self.steps_of(name, share)
                    folder = options.work / "runs" / f"{self.data}-{unit}" / f"{name}-seed{seed}-share{share:g}"
                    found.append((name, seed, share, folder, self._job(settings, seed, steps, folder, slowest)))
        return found

    def _points(self, steps, slowest):
        """(steps between checkpoints, points of measurement, points with samples) of a run.

        The points divide a run into equal parts. If recipes are compared at equal steps, they divide the run of the
        slowest recipe; all other runs have the same points, and continue with the same distance.
        """
        options = self.options
        every, stride = (slowest or steps) // options.points, options.points // options.sample_points
        points = [every * (number + 1) for number in range(steps // every)]
        if slowest is None:
            return every, points, points[stride - 1 :: stride]
        points += [steps] if points[-1] != steps else []
        return every, points, sorted({slowest, steps})

    def _job(self, settings, seed, steps, folder, slowest):
        options = self.options
        every, points, sample_points = self._points(steps, slowest)
        own = {
            "data.path": self.train,
            "seed": seed,
            "run_dir": str(folder),
            "training.max_steps": steps,
            "training.checkpoint_every": every,
            "training.keep_every": every,  # kept until they have been measured
        }
        job = {
            "arguments": ["--config", str(BASE), *arguments({**settings, **own})],
            "steps": steps,
            "points": points,
            "sample_points": sample_points,
            "samples": options.samples,
            "sampler_steps": options.sampler_steps,
            "times": list(TIMES),
            "data": [self.train, self.test, self.teacher, options.heldout, options.reference],
            "keep": options.keep_checkpoints,
            "threads": options.threads,
        }
        if self.classifier is not None:
            job |= {"classifier": self.classifier, "gap_images": options.gap_images}
        return job

    def rows(self):
        """Rows of the CSV: the measurements of the finished runs."""
        rows = []
        for name, seed, share, folder, job in self.runs():
            if not run_folder.is_finished(folder):
                continue
            run_folder.write_job(folder, job)  # raises for a run with other settings
            config, steps = self.configs[name], job["steps"]
            seconds = None
            if not self.calibration.missing({name: config}, self.tokens):
                seconds = self.calibration.seconds(config, self.tokens, steps)
            tflop = self._tflop(config, steps)
            for step in job["points"]:
                values = [tuple(row) for row in json.loads(run_folder.quality_path(folder, step).read_text())]
                losses = ("velocity_loss", "raw_velocity_loss", "cosine")
                for metric in (*losses, *(f"{name}{GIVEN_CLASS}" for name in losses)):
                    each = [value for of, _, value in values if of == metric]
                    values += [(metric, "", sum(each) / len(each))] if each else []
                common = dict(data=self.data, recipe=name, seed=seed, share=float(share), run_steps=steps, step=step)
                common |= dict(seconds="" if seconds is None else seconds[step], tflop=tflop[step])
                rows += [{**common, "metric": metric, "time": at, "value": value} for metric, at, value in values]
        return rows

    def _tflop(self, config, steps):
        """TFLOP of training after 0, 1, ..., `steps` steps."""
        from benchmarks.convergence.flops import step_tflop

        per_phase, total, found = {}, 0.0, [0.0]
        for step in range(steps):
            phase = phase_at(config, self.tokens, step / steps)
            if phase not in per_phase:
                per_phase[phase] = step_tflop(config, self.facts, self.manifest, phase)
            total += per_phase[phase]
            found.append(total)
        return found

    def write(self):
        """CSV, JSON and PNG under --out, and the table."""
        options, rows = self.options, self.rows()
        if not rows:
            print("no run is finished yet")
            return
        options.out.mkdir(parents=True, exist_ok=True)
        stem = str(options.out / f"convergence-{options.suite}-{self.data}") + ("-steps" if options.steps else "")
        write_rows(rows, f"{stem}.csv")
        if self.suite.rates == "search":
            write_rates(choice(rows), rates_path(options))
            print(f"written: {rates_path(options)}")
        record = {
            "command": command_of(options),
            "machine": self.calibration.entries["about"],
            "clock": self.calibration.entries["clock"],
            "wall_over_cpu": self.calibration.entries.get("wall_over_cpu"),
            "images": self.manifest.num_samples,
            "samples": options.samples,
            **self._classifier_record(),
            "recipes": self.recipes,
            "step_seconds": {
                entry["label"]: round(entry["x_repa"] * self.calibration.entries["repa_seconds"], 5)
                for entry in self.calibration.entries["steps"].values()
            },
        }
        Path(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(Path(f"{stem}.csv"))
        print(f"written: {stem}.csv {stem}.json {stem}.png")
        show = table if self.classifier is None else beside_paper.table
        print(show(read_rows(f"{stem}.csv")))

    def _classifier_record(self):
        """The facts about the classifier of the distances for the JSON file; empty without a classifier."""
        if self.classifier is None:
            return {}
        from benchmarks.convergence.quality import Heldout, real_distances

        options = self.options
        found = train_classifier(self.train, self.test, self.classifier)
        heldout = Heldout(self.train, self.test, self.teacher, options.heldout, options.reference, self.classifier)
        return {"classifier": found, "real": real_distances(heldout, self.train, options.samples)}


def command_of(options):
    """The command without the paths of this machine, for publication."""
    data = Path(options.data).name if Path(options.data).exists() else options.data
    limit = f"--steps {options.steps}" if options.steps is not None else f"--budget {options.budget:g}"
    words = [f"python -m benchmarks.convergence --suite {options.suite} --data {data} {limit}"]
    words += [f"--images {options.images}"] if options.images else []
    words += [f"--rates {options.rates}"] if options.suite == "rates" else []
    words += [f"--rate {word}" for word in options.rate]
    words += [f"--seeds {options.seeds}"] if options.seeds else []
    words += [f"--recipes {options.recipes}"] if options.recipes else []
    words += [f"--recipe '{text}'" for text in options.recipe] + [f"--set {word}" for word in options.set]
    for name in ("points", "sample_points", "samples", "sampler_steps", "heldout", "reference"):
        value = getattr(options, name)
        words += [f"--{name.replace('_', '-')} {value}"] if value != parse([]).__dict__[name] else []
    return " ".join(words)


def describe_machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    import torch

    load = f"load average {os.getloadavg()[0]:.1f} when the steps were timed" if hasattr(os, "getloadavg") else ""
    return f"{names[0] if names else 'CPU'}; torch {torch.__version__}; {load}"


def calibration_table(calibration):
    entries = calibration.entries
    lines = [f"{entries['about']}; {entries['clock']}; REPA {entries['repa_seconds']:.3f} s a step"]
    for entry in sorted(entries["steps"].values(), key=lambda entry: entry["label"]):
        spread = f"{entry['x_repa_p10']:.2f}-{entry['x_repa_p90']:.2f}"
        lines.append(f"{entry['label']:<40} {entry['x_repa']:.3f} x REPA  ({spread})")
    return "\n".join(lines)


def say(text):
    print(text, file=sys.stderr, flush=True)


def run_all(runs, jobs):
    """Run the unfinished runs, `jobs` at a time; returns the names of runs that failed."""
    waiting = [(f"{name} seed {seed} share {share:g}", folder, job) for name, seed, share, folder, job in runs]
    for _, folder, job in waiting:
        run_folder.write_job(folder, job)
    waiting = [entry for entry in waiting if not run_folder.is_finished(entry[1])]
    total, running, failed, stopped = len(waiting), {}, [], []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: stopped.append(1)) for number in signals}
    try:
        while (waiting and not stopped) or running:
            while waiting and not stopped and len(running) < jobs:
                name, folder, job = waiting.pop(0)
                say(f"{total - len(waiting)}/{total} {name}: {job['steps']} steps, {folder}")
                running[start(folder, job["threads"])] = name, folder
            if stopped:
                for process in running:
                    process.send_signal(signal.SIGTERM)  # once is enough: they end after the current step
                for process in running:
                    process.wait()
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                name, folder = running.pop(process)
                if process.returncode and not stopped:
                    failed.append(name)
                    lines = (folder / "log.txt").read_text().strip().splitlines()
                    say(f"{name} failed: {lines[-1] if lines else process.returncode}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    return failed


def start(folder, threads):
    """Start the process of one run, with its output in RUN/log.txt. It does not get Ctrl-C, only our SIGTERM."""
    log = open(folder / "log.txt", "a")
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    with log:
        return subprocess.Popen([*RUN, str(folder)], stdout=log, stderr=log, env=environment, start_new_session=True)


def main(argv=None):
    options = parse(argv)
    benchmark = Benchmark(options)
    if options.prepare:
        return
    if options.calibrate or options.recalibrate:
        benchmark.calibrate()
        return
    benchmark.check_calibration()
    failed = [] if options.report_only else run_all(benchmark.runs(), options.jobs)
    benchmark.write()
    if failed:
        raise RunError(f"{len(failed)} runs failed: {', '.join(failed)}; see log.txt in their folders")


def command(argv=None):
    """Call `main` and print its errors in one line; returns the exit status."""
    try:
        main(argv)
    except (UsageError, RunError) as error:
        print(f"benchmarks.convergence: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("benchmarks.convergence: stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0
