"""The trainer: the training loop, optimizer, checkpoints, schedules and logs."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "train": "trainer",
        "TrainStep": "step",
        "Optimizer": "optimizer",
    },
)
