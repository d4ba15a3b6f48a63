"""Whether a teacher's weights are available: a local file, the cache, or the hub. Imports nothing heavy."""

import os

from maskalign.config.teacher_names import DINOV2_SIZES
from maskalign.errors import UsageError
from maskalign.runtime.hub import check_hub

SOURCES = ("hub", "random")


def dinov2_model(name):
    """timm's name of the model behind "dinov2-b" and its siblings, with the tag of its weights."""
    return f"vit_{DINOV2_SIZES[name.removeprefix('dinov2-')]}_patch14_dinov2.lvd142m"


WITHOUT_HUB = (
    "its weights, a .safetensors or .pth file (teacher.weights in training, --weights of data encode, "
    "--teacher-weights of evaluate), or use the teacher efficientnet-lite0, which is installed"
)


def check_weights(name, weights):
    """Raise a UsageError where a teacher's weights are not available; quick, and without importing torch.

    Args:
        name: the teacher, a valid name.
        weights: as for `load_teacher`.
    """
    if weights is not None and weights not in SOURCES:
        if not os.path.isfile(weights):
            raise UsageError(f"teacher {name}: there is no weights file {weights} (or say hub or random)")
    elif name.startswith("dinov2-") and weights != "random":
        check_hub(f"teacher {name}", f"timm/{dinov2_model(name)}", WITHOUT_HUB)
