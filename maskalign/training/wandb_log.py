"""Log a run's curves and images to Weights & Biases: `training.loggers: [tensorboard, wandb]`."""

import json
import os
import secrets
from importlib.util import find_spec
from pathlib import Path

from maskalign.errors import UsageError
from maskalign.runtime.files import write_atomically

FILE_NAME = "wandb.json"  # file in the run folder with the id of the W&B run


def check_wandb():
    """Raise a UsageError if the package is missing or has no API key; does not import the package."""
    if find_spec("wandb") is None:
        raise UsageError("training.loggers: wandb is not installed; pip install 'maskalign[wandb]', or leave it out")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not netrc.is_file() or "wandb" not in netrc.read_text(errors="replace"):
        raise UsageError("training.loggers: wandb has no API key; run wandb login, or set WANDB_MODE=offline")


class WandbLog:
    """A run of Weights & Biases that continues when the run folder's training is resumed.

    The project is WANDB_PROJECT or `maskalign`. WANDB_ENTITY, WANDB_MODE and the package's other variables work as
    usual. Offline files are below RUN/wandb; `wandb sync` uploads them.

    Args:
        run_dir: the run's folder; the id of the W&B run is stored in it.
        settings: dict of all settings, for the page of the run.

    Raises:
        UsageError: W&B rejects the run.
    """

    def __init__(self, run_dir, settings):
        import wandb

        run_dir = Path(run_dir)
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "maskalign"),
                name=run_dir.name,
                id=self._id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"training.loggers: wandb: {reason}; set WANDB_MODE=offline to log without it") from None
        # A resumed run repeats the steps after its checkpoint, so the step is logged as a metric instead of W&B's
        # counter.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def _id(run_dir):
        path = run_dir / FILE_NAME
        if path.exists():
            return json.loads(path.read_text())["id"]
        found = {"id": secrets.token_hex(4)}
        write_atomically(path, json.dumps(found).encode())
        return found["id"]

    def add_scalars(self, values, step):
        """Log the scalars of a step, a dict from tag to number."""
        self.run.log({"step": step, **values})

    def add_image(self, tag, pixels, step):
        """Log an image of a step: pixels (H, W, C), uint8."""
        self.run.log({"step": step, tag: self.wandb.Image(pixels, caption=f"step {step}")})

    def close(self):
        self.run.finish()
