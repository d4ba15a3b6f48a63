"""The options of a plan, and a check that the settings can run with them. Imports no torch."""

from dataclasses import dataclass

from maskalign.config import validate_with_ranks
from maskalign.errors import UsageError
from maskalign.planning.devices import Device


@dataclass(frozen=True)
class Options:
    """Options of a plan.

    Attributes:
        world_size: number of ranks, with one accelerator each.
        device: `Device`.
        efficiency: share of the device's peak that matrix products reach, including the time of elementwise operations.
        link_efficiency: share of the links' bandwidth that collectives reach.
        headroom: share of the memory that is reserved for the driver, communication and fragmentation.
        launch_us: microseconds that Python takes for one launch, if steps are not captured as CUDA graphs. The default
            is
            from the host of an H200: 36.1 ms for a compiled SiT-B/2 step with half of the tokens, for which this plan
            counts 617 launches (benchmarks/results/gpu-step-graphs.csv).
        image_size, num_classes: of a data set that does not exist; None for those of ImageNet.
    """

    world_size: int
    device: Device
    efficiency: float = 0.4
    link_efficiency: float = 0.8
    headroom: float = 0.1
    launch_us: float = 58.0
    image_size: int | None = None
    num_classes: int | None = None

    def __post_init__(self):
        if self.world_size < 1:
            raise UsageError(f"--world-size: {self.world_size} must be at least 1")
        for name in ("efficiency", "link_efficiency"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UsageError(f"--{name.replace('_', '-')}: {value} must be in (0, 1]")
        if not 0 <= self.launch_us < float("inf"):
            raise UsageError(f"--launch-us: {self.launch_us} must be at least 0")
        if not 0 <= self.headroom < 1:
            raise UsageError(f"--headroom: {self.headroom} must be in [0, 1)")

    @property
    def limit(self):
        """Bytes of a device's memory that the plan may use."""
        return self.device.memory_gib * 2**30 * (1 - self.headroom)


def check_ranks(config, options):
    """Check that the settings can run on the ranks of a plan; raises UsageError."""
    ranks = options.world_size
    if config.parallel.plan == "none" and ranks > 1:
        raise UsageError(f"parallel.plan: none runs in one process, not on {ranks} ranks; set ddp, fsdp or hsdp")
    validate_with_ranks(config, ranks, min(ranks, options.device.per_node))
