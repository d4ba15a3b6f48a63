"""Data about a model that are saved with its weights, to rebuild it and to describe it. Imports no torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import List, Optional


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a model that depend on the data and the teachers.

    `build_model` rebuilds the model from these and the settings. A checkpoint has them in state.json, under `facts`.

    Attributes:
        input_size, in_channels, num_classes: side and channels of the model's input, and number of classes.
        teacher_dims: width of every teacher's tokens.
        class_dim: width of the class token; None without one.
        position_grid: as for `SiT`.
        teachers: names of the teachers that the model is aligned with; None in old checkpoints.
        class_names: names of the data set's classes.
        latent: the `latent` entry of the data set's manifest; None for pixels.
        data: the record from `training.continuing.data_record`; None in old checkpoints.
    """

    input_size: int
    in_channels: int
    num_classes: int
    teacher_dims: List[int]
    class_dim: Optional[int] = None
    position_grid: Optional[int] = None
    teachers: Optional[List[str]] = None
    class_names: Optional[List[str]] = None
    latent: Optional[dict] = None
    data: Optional[dict] = None

    def to_dict(self):
        """The `facts` of a checkpoint, a dict that can be written as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts):
        """Read the `facts` of a checkpoint; unknown entries of other versions are ignored."""
        return cls(**{entry.name: facts[entry.name] for entry in fields(cls) if entry.name in facts})


@dataclass(frozen=True)
class ModelInfo:
    """Information about a loaded model, for sampling, evaluation and export.

    Attributes:
        name: name of the run or the file.
        step: number of optimizer steps done; None if unknown.
        ema: True if the weights are the moving average.
        path: the interpolant's path, `linear` or `cosine`.
        class_names: names of the classes; None if unknown.
        latent: the `latent` entry of the data set's manifest; None for pixels, or if unknown.
        vae: the decoder of latents in the run's settings or from the publisher, or None.
        teachers: names of the teachers that the model was aligned with; empty if unknown.
    """

    name: str = ""
    step: Optional[int] = None
    ema: bool = True
    path: str = "linear"
    class_names: Optional[List[str]] = None
    latent: Optional[dict] = None
    vae: Optional[str] = None
    teachers: List[str] = field(default_factory=list)

    @property
    def label(self):
        """The name, with the step if it is known."""
        return self.name if self.step is None else f"{self.name}, step {self.step}"

    @property
    def vae_name(self):
        """The VAE of the latents: `vae`, else the data set's VAE, or None if unknown."""
        return self.vae or (self.latent or {}).get("name")
