"""Time and memory of a step with each parallel plan. All plans are measured in one run and take turns.

    python -m benchmarks.parallel [--preset SiT-B/2] [--ranks 2] [--batch-size 8] [--plans ddp,fsdp,zero2] [--rounds N]

starts torchrun itself. A step is forward, backward, gradient reduction, clip, AdamW and EMA on random latents 4x32x32
and cached teacher features 256x768 in memory, with a class token for recipes that denoise one.

All plans run in the same processes and take turns, in another order every round. A time is the median over rounds of
the slowest rank's step, and a ratio is the median of the ratios to the first plan within a round. CPU seconds are those
of all threads of the busiest rank; they depend little on other programs on the machine. Communication is the share of a
profiled step in which a collective was running.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "ddp": ["--parallel.plan", "ddp"],
    "fsdp": ["--parallel.plan", "fsdp"],
    "zero2": ["--parallel.plan", "fsdp", "--parallel.reshard_after_forward", "false"],
    "hsdp": ["--parallel.plan", "hsdp"],
}
COLUMNS = ["plan", "seconds", "low", "high", "ratio", "cpu_seconds", "cpu_ratio", "communication", "state_mib"]
COLUMNS += ["rounds", "about"]


class Case:
    """One plan's model, optimizer and step, always on the same batch."""

    def __init__(self, name, options):
        import torch

        from benchmarks.steps.cases import recipe_settings
        from maskalign.checkpoints.build import build_model
        from maskalign.checkpoints.spec import ModelSpec
        from maskalign.config import parse_config
        from maskalign.training.compiling import prepare_blocks
        from maskalign.training.optimizer import Optimizer
        from maskalign.training.parallel import make_placement
        from maskalign.training.plans import Plan
        from maskalign.training.step import TrainStep
        from maskalign.training.throughput import Throughput

        world = int(os.environ["WORLD_SIZE"])
        argv = recipe_settings(options.recipe, options.preset, options.keep) + SETTINGS[name]
        argv += ["--training.batch_size", str(options.batch_size * world), "--training.precision", options.precision]
        argv += ["--training.compile", str(options.compile).lower(), "--training.accumulation", "1"]
        config = parse_config(argv)
        self.name = name
        self.placement = make_placement(config.training, config.parallel)
        class_dim = 768 if config.model.class_token else None
        spec = ModelSpec(input_size=32, in_channels=4, num_classes=1000, teacher_dims=[768], class_dim=class_dim)
        with torch.device("meta"):
            model = build_model(config, spec)
        plan = Plan(model, config, self.placement)
        model.to_empty(device=self.placement.device).reset_parameters(0)
        self.optimizer = Optimizer(model, config.optimizer, self.placement.dtype, fused=True)
        prepare_blocks(model, config)
        self.train_step = TrainStep(model, self.optimizer, config, self.placement, plan)
        self.throughput = Throughput(model, config, self.placement)
        self.plan = plan
        size, device = options.batch_size, self.placement.device
        generator = torch.Generator().manual_seed(self.placement.rank)
        rows = 256 + (class_dim is not None)  # the class token is the first row
        self.batch = (
            torch.randn(size, 4, 32, 32, generator=generator).to(device),
            torch.randint(1000, (size,), generator=generator).to(device),
            [torch.randint(-127, 128, (size, rows, 768), generator=generator, dtype=torch.int8).to(device)],
        )
        self.class_token = torch.randn(size, class_dim, generator=generator).to(device) if class_dim else None
        self.first_slot = size * self.placement.rank
        self.number = 0

    def step(self, profiled=False):
        """(seconds, CPU seconds) of one step, each the maximum over the ranks."""
        self.number += 1
        if profiled:
            self.throughput.until_sample = 0
        run = self.throughput.run if profiled else lambda step, *args, **kwargs: step(*args, **kwargs)
        self.plan.wait()
        start, cpu = time.perf_counter(), time.process_time()
        own = {"first_slot": self.first_slot, "class_token": self.class_token}
        result = run(self.train_step, self.number, 0.0, *self.batch, **own)
        float(result.loss)
        return self.plan.max_over_ranks(time.perf_counter() - start, time.process_time() - cpu)

    def state_mib(self):
        """MiB of weights, averages and moments on this rank."""
        locals_of = [t.to_local() if hasattr(t, "to_local") else t for t in self.optimizer.tensors().values()]
        return sum(t.numel() * t.element_size() for t in locals_of) / 2**20


def measure(options):
    """The table's rows, the same on every rank."""
    from maskalign.runtime.device import find_device, tune_host

    tune_host(find_device("auto"))
    cases = [Case(name, options) for name in options.plans]
    for case in cases:
        case.step()
        case.step(profiled=True)
    seconds = {case.name: [] for case in cases}
    for number in range(options.rounds):
        shift = number % len(cases)
        for case in cases[shift:] + cases[:shift]:
            seconds[case.name].append(case.step())
        if cases[0].placement.is_main:
            print(
                f"round {number + 1}:",
                {name: [round(x, 2) for x in times[-1]] for name, times in seconds.items()},
                flush=True,
            )
    first = seconds[options.plans[0]]
    settings = (
        f"{options.preset} {options.recipe} keep {options.keep:g} {options.precision}, "
        f"batch {options.batch_size} per rank, {options.ranks} ranks, {cases[0].placement.device.type}, "
        f"compile {options.compile}"
    )
    rows = []
    for case in cases:
        own, cpu = (sorted(column) for column in zip(*seconds[case.name], strict=True))
        pairs = list(zip(seconds[case.name], first, strict=True))
        ratio, cpu_ratio = (statistics.median(a[k] / b[k] for a, b in pairs) for k in (0, 1))
        figures = [statistics.median(own), own[0], own[-1], ratio, statistics.median(cpu), cpu_ratio]
        figures += [case.throughput.share_in_communication, case.state_mib()]
        rows.append([case.name, *(round(figure, 4) for figure in figures), options.rounds, settings])
    return rows, cases[0].placement.is_main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="SiT-B/2")
    parser.add_argument("--recipe", default="maskalign")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank")
    parser.add_argument("--plans", default="ddp,fsdp", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    unknown = [name for name in options.plans if name not in SETTINGS]
    if unknown:
        parser.error(f"--plans: there is no {unknown[0]!r}; choose among {', '.join(SETTINGS)}")
    if "WORLD_SIZE" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        sys.exit(subprocess.run([*torchrun, "-m", "benchmarks.parallel", *sys.argv[1:]]).returncode)
    rows, is_main = measure(options)
    if is_main:
        print(rows[0][-1])
        print(f"{'plan':8} {'seconds':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'in comm.':>9} {'state MiB':>10}")
        for name, seconds, _, _, ratio, cpu, cpu_ratio, share, state, *_ in rows:
            print(f"{name:8} {seconds:8.2f} {ratio:6.2f} {cpu:7.2f} {cpu_ratio:6.2f} {share:9.0%} {state:10.0f}")
        options.out.mkdir(parents=True, exist_ok=True)
        path = (
            options.out / f"parallel-{options.preset.replace('/', '-')}-{options.precision}-b{options.batch_size}.csv"
        )
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        print(path)

    from maskalign.runtime.ranks import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
