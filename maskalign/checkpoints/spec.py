"""What is kept of a model beside its weights: what rebuilds it, and what is known about it. Imports no torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import List, Optional


@dataclass(frozen=True)
class ModelSpec:
    """What a run takes from its data and teachers: `build_model` rebuilds the model from it and the settings.

    A checkpoint keeps it in state.json, under `facts`.

    Attributes:
        input_size, in_channels, num_classes: of the model's input.
        teacher_dims: width of every teacher's tokens.
        class_dim: of the class token; None without one.
        position_grid: as for `SiT`.
        teachers: names of the teachers that the model is aligned with; None in checkpoints that do not say.
        class_names: of the data set. latent: the entry of its manifest, None for pixels.
        data: what `training.continuing.data_record` keeps of the data; None in checkpoints from before that was kept.
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
        """The `facts` of a checkpoint; goes through JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts):
        """From the `facts` of a checkpoint of this version, an earlier or a later one."""
        return cls(**{entry.name: facts[entry.name] for entry in fields(cls) if entry.name in facts})


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a model that was loaded, for those who draw with it, measure it or export it.

    Attributes:
        name: of the run or the file.
        step: optimizer steps done; None where unknown.
        ema: whether the weights are the moving average.
        path: of the interpolant, `linear` or `cosine`.
        class_names: None where unknown.
        latent: the `latent` entry of the data set's manifest; None for pixels, or where unknown.
        vae: the decoder of latents that the run or the publisher names, or None.
        teachers: names of the teachers that the model was aligned with; empty where unknown.
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
        """The name, with the step where it is known."""
        return self.name if self.step is None else f"{self.name}, step {self.step}"

    @property
    def vae_name(self):
        """The VAE of the latents as far as it is known: the one that was named, else that of the data set, or None."""
        return self.vae or (self.latent or {}).get("name")
