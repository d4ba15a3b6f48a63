"""The records of a run: metrics.csv, TensorBoard, the progress bar, evaluation.csv and curves.png."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskalign.config import as_plain
from maskalign.evaluation import history
from maskalign.training.logs import MetricsFile, draw_curves, read_metrics

BAR_UNITS = 1000  # length of the progress bar


class RunLog:
    """The open logs of a run. Every rank has this object, and only rank 0 writes.

    Args:
        config: `Config`.
        step: the step that the run resumes from; later rows of an earlier attempt are removed.
        seconds: seconds of training done before.
        is_main: True if this rank writes.
    """

    def __init__(self, config, step, seconds, is_main):
        self.run_dir, self.training, self.is_main = Path(config.run_dir), config.training, is_main
        self.metrics = MetricsFile(self.run_dir / "metrics.csv", step) if is_main else None
        self.writers = self._open_writers(config, step) if is_main else []
        self.bar = self._bar(step, seconds)

    def _open_writers(self, config, step):
        """The loggers of `training.loggers`, each with `add_scalars`, `add_image` and `close`."""
        writers = []
        if "tensorboard" in self.training.loggers:
            from maskalign.training.event_file import EventFile

            writers.append(EventFile(self.run_dir / "tensorboard", purge_step=step + 1))
        if "wandb" in self.training.loggers:
            from maskalign.training.wandb_log import WandbLog

            writers.append(WandbLog(self.run_dir, as_plain(config)))
        return writers

    def _bar(self, step, seconds):
        """A progress bar; the remaining time comes first, so that it is visible on narrow terminals."""
        layout = "{desc}: {percentage:3.0f}%|{bar:14}| {remaining} left{postfix}"
        return tqdm(
            total=BAR_UNITS,
            initial=self._units(step, seconds),
            desc="train",
            bar_format=layout,
            disable=not self.training.progress or not self.is_main,
        )

    def _units(self, step, seconds):
        """The share of the run that is done, in units of the bar, by whichever of the two limits is closer."""
        done = step / self.training.max_steps
        if self.training.max_seconds is not None:
            done = max(done, seconds / self.training.max_seconds)
        return round(BAR_UNITS * min(1.0, done))

    def advance(self, step, seconds):
        """Update the progress bar.

        Args:
            step: number of steps done.
            seconds: seconds of training done.
        """
        self.bar.update(self._units(step, seconds) - self.bar.n)

    def interval(self, row, seconds):
        """Log the steps since the last row.

        Args:
            row: dict with the keys `logs.COLUMNS`.
            seconds: the time that these steps took.
        """
        if not self.is_main:
            return
        self.metrics.write(row)
        self._scalars("train", row["step"], {key: value for key, value in row.items() if key != "step"})
        if not self.training.progress:
            print(self._line(row), flush=True)
        self.bar.set_postfix_str(
            f"step {row['step']}, {row['images_per_second']:.1f} images/s, loss {row['loss']:.4f}, "
            f"cosine {-row['align_loss']:.3f}, {row['tflops']:.3g} TFLOP/s, MFU {row['mfu']:.0%}, "
            f"waiting {row['data_wait'] / seconds:.0%} for data, {row['comm_seconds'] / seconds:.0%} in communication, "
            f"{row['peak_memory_mib'] / 1024:.1f} GiB"
        )

    def _line(self, row):
        """A row as one line of text, for log files, where a progress bar is not readable."""
        training = self.training
        until = f" of {training.max_steps}" if training.max_seconds is None else ""
        time = f", {row['time']:.0f} s" + (f" of {training.max_seconds:.0f} s" if training.max_seconds else "")
        parts = [f"step {row['step']}{until}{time}", f"loss {row['loss']:.4f}", f"velocity {row['velocity_loss']:.4f}"]
        if row["class_velocity_loss"]:
            parts.append(f"class token {row['class_velocity_loss']:.4f}")
        if row["align_weight"]:
            parts.append(f"cosine {-row['align_loss']:.3f}")
        parts += [f"lr {row['lr']:.3g}", f"{row['images_per_second']:.1f} images/s"]
        parts += [f"{row['skipped_steps']} steps skipped"] if row["skipped_steps"] else []
        parts += [f"{row['bad_samples']} bad samples"] if row["bad_samples"] else []
        return ", ".join(parts)

    def samples(self, step, sheet):
        """Log a sheet of samples, a Pillow image."""
        if not self.is_main:
            return
        self._draw_curves()
        for writer in self.writers:
            writer.add_image("samples", np.asarray(sheet), step)

    def evaluation(self, step, seconds, found):
        """Log an evaluation: dict from a measure's name to its value."""
        if not self.is_main:
            return
        history.add_to_history(self.run_dir / history.FILE_NAME, {"step": step, "time": seconds, **found})
        self._scalars("evaluate", step, found)
        self._draw_curves()

    def close(self):
        self.bar.close()
        for file in (self.metrics, *self.writers):
            if file is not None:
                file.close()

    def _scalars(self, group, step, values):
        for writer in self.writers:
            writer.add_scalars({f"{group}/{key}": value for key, value in values.items()}, step)

    def _draw_curves(self):
        rows = read_metrics(self.run_dir / "metrics.csv")
        evaluations = history.read_history(self.run_dir / history.FILE_NAME)
        draw_curves(rows, self.run_dir / "curves.png", str(self.run_dir), evaluations)
