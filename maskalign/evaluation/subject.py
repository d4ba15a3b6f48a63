"""What is evaluated: a model, or pictures that are there already."""

from pathlib import Path
from typing import NamedTuple, Optional

from maskalign.config import Config
from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureArchive, PictureDataSet, PictureFolder
from maskalign.training.checkpoint import find, load_model
from maskalign.training.export import load_any

WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


class Subject(NamedTuple):
    """A model to evaluate.

    kind: `run`, `checkpoint` or `file`. model: the `SiT`. about: what `sampling.command.load` knows of it. config: of
    the run, None for a file. folder: where its report goes, None for a file; stem: the report's name.
    """

    kind: str
    model: object
    about: dict
    config: Optional[Config]
    folder: Optional[Path]
    stem: str = "evaluation"


def is_model(path):
    """Whether a path is a run, a checkpoint or a file of weights.

    Raises:
        UsageError: nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in ("checkpoints", "COMPLETE", "state.json"))
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a run, a checkpoint, a folder of pictures or an .npz")
    return path.suffix in WEIGHT_FILES


def open_pictures(path):
    """(kind, pictures) of a folder, a data set or an .npz.

    Raises:
        UsageError: it is none of them, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return "data set", PictureDataSet(str(path))
        return "folder", PictureFolder(path)
    if path.suffix != ".npz":
        raise UsageError(f"{path}: cannot tell what this is; give a run, a checkpoint, a folder of pictures or an .npz")
    return "npz", PictureArchive(path)


def load_subject(path, ema=True):
    """The model of a run (its newest checkpoint), of a checkpoint, or of a .pt or .safetensors file.

    Raises:
        UsageError: nothing there that can be loaded.
    """
    path = Path(path)
    if not path.is_dir():
        model, about = load_any(path, ema)
        return Subject("file", model, about | {"ema": ema}, None, None)
    checkpoint = find(path)
    model, config, step = load_model(checkpoint, ema)
    about = {key: model.facts[key] for key in ("class_names", "latent", "teachers")}
    about |= {"step": step, "ema": ema, "path": config.objective.path, "vae": config.preview.vae}
    run = path if checkpoint != path else path.resolve().parent.parent
    about["name"] = run.resolve().name
    if checkpoint != path:
        return Subject("run", model, about, config, run)
    return Subject("checkpoint", model, about, config, run, f"evaluation-{path.resolve().name}")
