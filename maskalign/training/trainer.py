"""The training loop: read, step, log, sample, save; stop on signals, and resume from a checkpoint."""

import logging
import os
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.layout import ASIDE, FOLDER, complete_checkpoints, read_state
from maskalign.checkpoints.loading import load_tensors, read_config
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import TokenBudget, dump_config, model_sizes
from maskalign.data import ShardStream
from maskalign.data.stream.position import merge_states
from maskalign.errors import RunError, UsageError
from maskalign.evaluation import history
from maskalign.evaluation.periodic import PeriodicEvaluation
from maskalign.runtime.device import tune_host
from maskalign.runtime.files import disk_reason, is_disk_error, write_atomically
from maskalign.runtime.lock import locked
from maskalign.runtime.ranks import leave_ranks
from maskalign.teachers.features import Features
from maskalign.training.compiling import check_compile, prepare_blocks
from maskalign.training.continuing import changed_settings, check_spec, check_stream, data_record
from maskalign.training.failures import Stop, Watchdog, clear_requeue, lost_contact, mark_requeue
from maskalign.training.logs import peak_memory_mib
from maskalign.training.optimizer import Optimizer
from maskalign.training.parallel import make_placement
from maskalign.training.plans import Plan, prepare_teacher
from maskalign.training.previews import Previews
from maskalign.training.run_log import RunLog
from maskalign.training.saving import Saver
from maskalign.training.starting import find_resume, start_line, warn_of_full_subset, warn_of_short_average
from maskalign.training.step import TrainStep
from maskalign.training.throughput import TeacherShare, Throughput
from maskalign.training.transfer import init_from

log = logging.getLogger(__name__)


def train(config, manifest, facts):
    """Train a model, or resume a run.

    Args:
        config: `Config`.
        manifest: the data set's `Manifest`.
        facts: `config.DataFacts` of the settings with this manifest.

    Returns:
        dict with step, seconds of training, run_dir and whether the run is `finished`.

    Raises:
        UsageError: the settings cannot work.
        RunError: the training failed.
    """
    failed = True
    watchdog = Watchdog(config.training.timeout)
    try:
        with own_folder(config), Stop() as stop:
            result = Trainer(config, manifest, facts, stop, watchdog).run()
        failed = False
        return result
    except Exception as error:
        if is_disk_error(error) and not isinstance(error, (UsageError, RunError)):
            raise RunError(disk_line(config.run_dir, error)) from None
        lost = lost_contact(error, watchdog)
        if lost is None:
            raise
        if watchdog.was_told():
            raise SystemExit(1) from None
        raise lost from None
    finally:
        leave_ranks(failed)


@contextmanager
def own_folder(config):
    """Context that locks the run's folder against other runs; rank 0 does this for all ranks."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    # torchrun may restart ranks shortly before the last process on another node has ended.
    patience = 10.0 if "TORCHELASTIC_RUN_ID" in os.environ else 1.0
    lock = locked(config.run_dir, "maskalign train", "run_dir", patience)
    try:
        lock.__enter__()
    except OSError as error:
        if is_disk_error(error):
            raise
        raise UsageError(f"run_dir: {config.run_dir} cannot be written to ({error.strerror}); choose another") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def disk_line(run_dir, error):
    """One line about a full or unwritable disk: the newest checkpoint, and what to do."""
    complete = complete_checkpoints(run_dir)
    kept, remedy = "there is no complete checkpoint yet", "the same command begins again"
    if complete:
        kept, remedy = f"{complete[-1].name} is the newest complete checkpoint", "the same command resumes from it"
    return f"{run_dir}: cannot be written to ({disk_reason(error)}); {kept}; free space, and {remedy}"


class Trainer:
    """Builds the parts of a run and runs the training loop.

    Args:
        config, manifest, facts: as in `train`.
        stop: `Stop`; by default a new one.
        watchdog: `Watchdog`; by default a new one.
    """

    def __init__(self, config, manifest, facts, stop=None, watchdog=None):
        self.config = config
        self.manifest = manifest
        self.placement = make_placement(config.training, config.parallel)
        self.stop, self.watchdog = stop or Stop(), watchdog or Watchdog(config.training.timeout)
        if self.placement.world_size > 1:
            self.stop.join()
            self.watchdog.join()
        self.device = self.placement.device
        tune_host(self.device)
        self.run_dir = Path(config.run_dir)
        resume = find_resume(config, self.placement)
        state = read_state(resume) if resume else None
        before = ModelSpec.from_dict(state["facts"]) if resume else None
        changes = []
        if resume:
            changes = changed_settings(resume, read_config(resume), config)
        if config.training.compile:
            check_compile(self.device)

        grid = (facts.input_size // model_sizes(config)["patch_size"],) * 2
        self.features = Features(
            config, manifest, facts.teachers, grid, self.device, class_token=facts.class_token,
            prepare=lambda network: prepare_teacher(network, config, self.placement),
        )  # fmt: skip
        self.stream = ShardStream(
            config.data.path,
            batch_size=config.training.batch_size,
            seed=config.seed,
            rank=self.placement.rank,
            world_size=self.placement.world_size,
            num_workers=config.data.num_workers,
            max_bad_fraction=config.data.max_bad_fraction,
            allow_pipe=config.data.allow_pipe,
            cache_dir=config.data.cache_dir,
            fields=self._fields(),
        )
        self.spec = ModelSpec(
            input_size=facts.input_size,
            in_channels=facts.in_channels,
            num_classes=facts.num_classes,
            teacher_dims=self.features.dims,
            class_dim=self.features.class_dim,
            position_grid=before.position_grid if resume else None,  # `init_from` may change it
            teachers=[name for name, _ in facts.teachers],
            class_names=manifest.class_names,
            latent=manifest.latent,
            data=data_record(config, self.stream.manifests, facts),
        )
        # All checks that can reject the run come before the model is built.
        if resume:
            check_spec(resume, before, self.spec)
            changes += check_stream(resume, state["stream"], self.stream, config, before)
        # The model is built on the meta device, then sharded, then initialized. It need not fit on one device this way,
        # and all plans start from the same weights.
        with torch.device("meta"):
            self.model = build_model(config, self.spec)
        self.plan = Plan(self.model, config, self.placement)
        self.model.to_empty(device=self.device).reset_parameters(config.seed)
        # Lines to print before the first step.
        self.notes = [start_line(config, manifest, facts, self.stream.num_samples, self.model, self.placement)]
        if config.training.init_from and not resume:
            self.notes.append(init_from(self.model, config.training.init_from, config, self.spec))
            self.spec = replace(self.spec, position_grid=self.model.position_grid)
        self.optimizer = Optimizer(
            self.model, config.optimizer, self.placement.dtype, config.parallel.ema_on_cpu, fused=True
        )
        self.step = 0
        self.seconds = 0.0  # of training, without samples and checkpoints
        self.skipped_steps = 0
        self.bad_samples = 0
        if resume:
            self._resume(resume, state)
            self.notes.append(f"resumed from step {self.step} of {resume}")
            if config.training.init_from:
                self.notes.append("training.init_from: not read, since the run resumes from its own checkpoint")
            if changes:
                self.notes.append(f"changed since step {self.step}: {', '.join(changes)}")
        if self.placement.is_main:
            warn_of_full_subset(TokenBudget(config.method, self.model))
        prepare_blocks(self.model, config)
        self.train_step = TrainStep(self.model, self.optimizer, config, self.placement, self.plan, manifest.latent)
        self.throughput = Throughput(self.model, config, self.placement)
        precision = "bf16" if self.placement.dtype == torch.bfloat16 else "fp32"
        self.previews = Previews(config, self.spec, self.device, precision)
        self.evaluation = None
        if config.evaluate.every and (self.placement.is_main or self.plan.sharded):
            self.evaluation = PeriodicEvaluation(
                config, self.spec, manifest, self.device, precision, self.previews.decoder
            )
        training = config.training
        self.saver = Saver(self.run_dir, training.keep_checkpoints, training.keep_every, training.async_checkpoint)

    def _fields(self):
        """The fields of a sample that a step needs. With stored latents, for example, images are not decoded."""
        fields = self.features.fields
        if self.manifest.latent is not None:
            fields.append("moments")
        if self.manifest.latent is None or self.features.needs_images:
            fields.append("image")
        return fields

    def _resume(self, path, state):
        load_tensors(path, self.optimizer.tensors())
        self.optimizer.after_load()
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self.bad_samples = state["bad_samples"] if self.placement.is_main else 0  # each rank counts its own
        self.stream.load_state_dict(state["stream"])

    def run(self):
        if self.progress() >= 1:
            self._say(f"{self.run_dir}: this run is complete at step {self.step}; raise training.max_steps to continue")
            if self.placement.is_main:
                clear_requeue(self.run_dir)
            self.watchdog.close()
            return self._result(finished=True)
        self._prepare_run_dir()
        for line in self.notes:
            self._say(line)
        warned = self.placement.is_main and warn_of_short_average(self.config.optimizer, self.config.training.max_steps)
        try:
            with closing(RunLog(self.config, self.step, self.seconds, self.placement.is_main)) as self.log:
                self._loop()
            self.train_step.close()
            self.watchdog.enter("save")
            self.stop.finish()
            self.saver.wait()
        finally:
            self.watchdog.close()
            self.saver.settle()
        finished = self.progress() >= 1
        if self.placement.is_main and not warned:
            warn_of_short_average(self.config.optimizer, self.step)
        if finished:
            self._say(f"done: step {self.step} in {self.seconds:.0f} s of training; see {self.run_dir}")
        else:
            if self.stop.wants_requeue and self.placement.is_main:
                mark_requeue(self.run_dir, self.step)
            saved = f"at step {self.step}, saved in {self.run_dir / FOLDER}" if self.step else "before step 1"
            self._say(f"stopped {saved}; with training.resume auto the same command resumes")
        return self._result(finished)

    def _say(self, line):
        if self.placement.is_main:
            self.log_line(line)

    def log_line(self, line):
        """Print a line at once, above the progress bar where there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def _result(self, finished):
        return {"step": self.step, "seconds": self.seconds, "run_dir": str(self.run_dir), "finished": finished}

    def progress(self):
        """Share of the run that is done, in [0, 1]: the larger one of the shares of steps and of time."""
        training = self.config.training
        share = self.step / training.max_steps
        if training.max_seconds is not None:
            share = max(share, self.seconds / training.max_seconds)
        return min(1.0, share)

    def _prepare_run_dir(self):
        self.config_yaml = dump_config(self.config)
        if not self.placement.is_main:
            return
        try:
            (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
            if self.config.training.resume == "restart" and not self.step:
                for name in ("metrics.csv", history.FILE_NAME):
                    if (self.run_dir / name).exists():
                        os.replace(self.run_dir / name, self.run_dir / (ASIDE + name))
            write_atomically(self.run_dir / "config.yaml", self.config_yaml.encode())
            clear_requeue(self.run_dir)
            history.drop_after(self.run_dir / history.FILE_NAME, self.step)
            moved = self.saver.clear(self.step)
            if moved:
                log.warning("%s: later checkpoints were set aside: %s", self.run_dir, ", ".join(moved))
        except OSError as error:
            if is_disk_error(error):
                raise
            raise UsageError(
                f"run_dir: {self.run_dir} cannot be written to ({error.strerror}); choose another"
            ) from None

    def step_inputs(self, batch):
        """The keyword arguments of `TrainStep` for a batch of the stream, on the device."""
        if self.manifest.latent is not None:
            inputs = batch["moments"].to(self.device, non_blocking=True)
        else:
            inputs = batch["image"].to(self.device, non_blocking=True).float() / 127.5 - 1
        teachers, class_token = self.features(batch)
        return {
            "inputs": inputs,
            "labels": batch["label"].to(self.device, non_blocking=True),
            "teachers": teachers,
            "class_token": class_token,
            "first_slot": batch["slot"],
        }

    def _loop(self):
        training = self.config.training
        zeros = dict(dtype=torch.float64, device=self.device)
        sums, healthy = torch.zeros(5, **zeros), torch.zeros((), **zeros)
        in_a_row = torch.zeros((), **zeros)
        since = {"seconds": self.seconds, "step": self.step, "wait": self.stream.wait_seconds}
        # This reads from the device, so it is done as rarely as `max_nonfinite` permits, and at least at every log row.
        check_every = min(training.log_every, training.max_nonfinite)
        teacher_share = TeacherShare(self.device, self.features.needs_images, self._hint)
        batches = iter(self.stream)
        stop = self.stop.agree()  # a signal may have arrived while the model was built
        while self.progress() < 1 and not stop:
            start = time.perf_counter()
            self.watchdog.enter("data", self.step)
            batch = next(batches)
            self.watchdog.enter("step")
            self.bad_samples += batch["bad"]
            with teacher_share.features():
                given = self.step_inputs(batch)
            with teacher_share.step():
                result = self.throughput.run(self.train_step, self.step, self.progress(), **given)
            self.throughput.count(result.kept, result.drawn, result.align_weight > 0 and len(given["teachers"]) > 0)
            good = ~result.skipped
            losses = [result.loss, result.velocity_loss, result.align_loss, result.class_velocity_loss]
            sums += torch.where(good, torch.stack([*losses, result.grad_norm.float()]).double(), 0)
            healthy += good
            in_a_row = torch.where(good, 0, in_a_row + 1)
            self.step += 1
            last = self.step >= training.max_steps
            if self.step % check_every == 0 or last:
                self._check_finite(in_a_row)
            self.seconds += time.perf_counter() - start
            if training.max_seconds is not None:
                self.seconds = self.plan.from_rank_0(self.seconds)  # so that all ranks stop at the same step
            last = last or self.progress() >= 1
            stop = self.stop.agree()

            # The first step is logged too, for users who watch the start of a run.
            if self.step % training.log_every == 0 or last or self.step == 1 or stop:
                steps = self.step - since["step"]
                self._log(result, sums, healthy, steps, since)
                sums.zero_()
                healthy.zero_()
                since = {"seconds": self.seconds, "step": self.step, "wait": self.stream.wait_seconds}
            self.log.advance(self.step, self.seconds)
            if self.step % training.checkpoint_every == 0 or last or stop:
                self._save()
            if self.evaluation is not None and (last or self.step % self.config.evaluate.every == 0):
                self._evaluate()
            if last or (training.sample_every and self.step % training.sample_every == 0):
                self._sample()

    def _hint(self, share):
        names = ", ".join(source.name for source in self.features.sources if source.teacher is not None)
        self._say(
            f"computing the features of {names} takes {share:.0%} of a step; maskalign data encode "
            f"--data {self.manifest.root} --teacher {names.replace(' ', '')} computes them once"
        )

    def _check_finite(self, in_a_row):
        count = int(in_a_row)
        if count >= self.config.training.max_nonfinite:
            raise RunError(
                f"the loss or its gradient was not finite in {count} steps in a row, the last one step {self.step}; "
                "lower optimizer.lr, or use training.precision fp32, and resume from the last checkpoint"
            )

    def _log(self, result, sums, healthy, steps, since):
        bad = self.plan.sum_over_ranks(self.bad_samples)
        wait, memory = self.plan.max_over_ranks(self.stream.wait_seconds - since["wait"], peak_memory_mib(self.device))
        good = int(healthy)
        self.skipped_steps += steps - good
        means = sums / max(good, 1) if good else sums * float("nan")
        loss, velocity, alignment, class_velocity, norm = means.tolist()
        seconds = max(self.seconds - since["seconds"], 1e-9)
        row = {
            "step": self.step,
            "time": self.seconds,
            "loss": loss,
            "velocity_loss": velocity,
            "align_loss": alignment,
            "class_velocity_loss": class_velocity,
            "grad_norm": norm,
            "lr": result.lr,
            "keep_ratio": result.kept / self.model.num_tokens,
            "align_weight": result.align_weight,
            "images_per_second": steps * self.config.training.batch_size / seconds,
            **self.throughput.interval(seconds),
            "peak_memory_mib": memory,
            "data_wait": wait,
            "epoch": self.step * self.config.training.batch_size // self.stream.num_samples,
            "skipped_steps": self.skipped_steps,
            "bad_samples": bad,
        }
        self.log.interval(row, seconds)

    def _save(self):
        self.watchdog.enter("save")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "bad_samples": self.bad_samples,
            "seed": self.config.seed,
            "facts": self.spec.to_dict(),
            "stream": self.stream.state_dict(),
        }
        self.saver.save(self.step, self.optimizer.tensors(), state, self.config_yaml, merge=merge_ranks)
        self.watchdog.enter("step")

    def _sample(self):
        if not (self.placement.is_main or self.plan.sharded):
            return
        self.watchdog.enter("sample")
        path = self.run_dir / "samples" / f"step_{self.step:08d}.png"
        with self.optimizer.averaged():
            sheet = self.previews.draw(self.model, self.step, path if self.placement.is_main else None)
        self.log.samples(self.step, sheet)

    def _evaluate(self):
        if not (self.placement.is_main or self.plan.sharded):
            return
        self.watchdog.enter("evaluate")
        with self.optimizer.averaged():
            found = self.evaluation.measure(self.model, self.placement.is_main)
        self.log.evaluation(self.step, self.seconds, found)


def merge_ranks(states):
    """Merge the states of all ranks into the one to save; each has its own part of the stream and bad samples."""
    stream = merge_states(state["stream"] for state in states)
    return states[0] | {"stream": stream, "bad_samples": sum(state["bad_samples"] for state in states)}
