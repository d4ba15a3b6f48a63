"""Accelerators and their nodes, with numbers from data sheets or from a user's file. Imports no torch."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from maskalign.errors import UsageError
from maskalign.runtime.accelerators import PEAK_TFLOPS


@dataclass(frozen=True)
class Device:
    """One accelerator and its links.

    Attributes:
        name: name of the accelerator.
        memory_gib: memory that programs can allocate, GiB.
        bandwidth_gbs: memory bandwidth, GB/s.
        bf16_tflops: dense peak with bfloat16 operands and float32 accumulation, TFLOP/s.
        fp32_tflops: dense peak of float32 matmuls as they are set here (TF32, see runtime/device.py), TFLOP/s.
        intra_node_gbs: bandwidth from one accelerator to the others of its node, in one direction, GB/s.
        inter_node_gbs: bandwidth of the network port of one accelerator, in one direction, GB/s.
        watts: power limit of the accelerator, without the rest of the node.
        per_node: number of accelerators in a node.
        source: the origin of the numbers.
    """

    name: str
    memory_gib: float
    bandwidth_gbs: float
    bf16_tflops: float
    fp32_tflops: float
    intra_node_gbs: float
    inter_node_gbs: float
    watts: float
    per_node: int = 8
    source: str = ""

    @property
    def captures(self):
        """Whether steps are captured as CUDA graphs. On AMD's devices, Python launches all operations."""
        return not self.name.startswith(("MI", "AMD"))


# Memory is the amount that the driver reports, rounded down to GiB; the data sheets have 80, 80, 141, 180 and 192 GB.
# Links are half of the bidirectional bandwidth in data sheets. Network ports are those of the vendor's node (DGX A100:
# 200 Gb/s per GPU; DGX H100, H200, B200 and AMD's reference platform: 400 Gb/s).
DEVICES = {
    "a100": Device(
        "A100 SXM 80 GB", 79, 2039, *PEAK_TFLOPS["A100"], 300, 25, 400,
        source="NVIDIA A100 80GB data sheet (SXM), DGX A100 data sheet",
    ),
    "h100": Device(
        "H100 SXM", 79, 3350, *PEAK_TFLOPS["H100"], 450, 50, 700,
        source="NVIDIA H100 data sheet (SXM), DGX H100 data sheet",
    ),
    "h200": Device(
        "H200 SXM", 139, 4800, *PEAK_TFLOPS["H200"], 450, 50, 700,
        source="NVIDIA H200 data sheet (SXM), DGX H200 data sheet",
    ),
    "b200": Device(
        "B200 SXM", 178, 7700, *PEAK_TFLOPS["B200"], 900, 50, 1000,
        source="NVIDIA Blackwell data sheet (HGX B200), DGX B200 data sheet",
    ),
    "mi300x": Device(
        "MI300X", 191, 5300, *PEAK_TFLOPS["MI300X"], 448, 50, 750,
        source="AMD Instinct MI300X data sheet (float32: the matrix rate)",
    ),
}  # fmt: skip


def load_device(name):
    """Load a device by its name, or from a YAML file with the fields of `Device`.

    Args:
        name: one of `DEVICES`, or the path of a .yaml file.

    Raises:
        UsageError: the name is unknown, or a field of the file is missing or invalid.
    """
    key = str(name).lower()
    if key in DEVICES:
        return DEVICES[key]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        near = get_close_matches(key, DEVICES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"--device: there is no {str(name)!r}; {hint}names are {', '.join(DEVICES)}, or a .yaml file")
    return _read_device(path)


def _read_device(path):
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--device: {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--device: {path} is not valid YAML ({str(error).splitlines()[0]})") from None
    known = {entry.name: entry.type for entry in fields(Device)}
    if not isinstance(values, dict):
        raise UsageError(f"--device: {path} must contain `name: value` lines with {', '.join(known)}")
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}"
            raise UsageError(f"--device: {path}: there is no field {key!r}{hint}")
    missing = [entry.name for entry in fields(Device) if entry.name not in values and entry.name not in OPTIONAL]
    if missing:
        raise UsageError(f"--device: {path} lacks {', '.join(missing)}")
    for key, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if known[key] is not str and not (number and 0 < value < float("inf")):
            raise UsageError(f"--device: {path}: {key} is {value!r}, must be a number above 0")
        if key == "per_node" and value != int(value):
            raise UsageError(f"--device: {path}: per_node is {value!r}, must be an integer")
    return Device(**{key: known[key](value) for key, value in values.items()})


OPTIONAL = ("per_node", "source")
