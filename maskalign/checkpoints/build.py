"""From settings and facts of the data set to a model; the same facts rebuild it from a checkpoint without the data."""

from maskalign.config import model_sizes
from maskalign.models.flash import flash_package
from maskalign.models.sit import SiT


def build_model(config, facts):
    """The student of a run.

    Args:
        config: `Config`.
        facts: dict with input_size, in_channels, num_classes, teacher_dims (one int per teacher) and class_dim (of the
            class token, None for none; runs from before class tokens lack it); position_grid as for `SiT`, None or
            absent for the model's own.

    Returns:
        SiT in float32 with fresh weights from torch's global generator.

    Raises:
        ValueError: the settings ask for a class token, and the facts do not say how many numbers it has.
    """
    sizes = model_sizes(config)
    model, method = config.model, config.method
    if model.class_token and facts.get("class_dim") is None:
        raise ValueError("model.class_token needs the facts' class_dim: another model would be built in silence")
    # A trained model loads anywhere, with the same numbers; training itself has asked for the package (preflight.py).
    attention = "auto" if model.attention == "flash_attn" and flash_package() is None else model.attention
    return SiT(
        input_size=facts["input_size"],
        in_channels=facts["in_channels"],
        num_classes=facts["num_classes"],
        teacher_dims=facts["teacher_dims"],
        class_dim=facts.get("class_dim"),
        position_grid=facts.get("position_grid"),
        **sizes,
        mlp_ratio=model.mlp_ratio,
        qk_norm=model.qk_norm,
        projector=model.projector,
        projector_dim=model.projector_dim,
        mixer=model.mixer,
        mixer_hidden=model.mixer_hidden,
        mixer_layers=model.mixer_layers,
        route=method.route if isinstance(method.route, str) else tuple(method.route),
        restore=method.restore,
        attention=attention,
        fused_adaln=model.fused_adaln,
    )
