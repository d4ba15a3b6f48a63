"""Build a model from settings and a `ModelSpec`. Both are in a checkpoint, so this needs no data."""

from maskalign.config import model_sizes
from maskalign.models.flash import flash_package
from maskalign.models.sit import SiT


def build_model(config, spec):
    """Build the student of a run.

    Args:
        config: `Config`.
        spec: `ModelSpec`.

    Returns:
        SiT in float32 with initial weights from torch's global generator.

    Raises:
        ValueError: the settings have a class token, but the spec does not have its width.
    """
    sizes = model_sizes(config)
    model, method = config.model, config.method
    if model.class_token and spec.class_dim is None:
        raise ValueError("model.class_token needs the spec's class_dim; without it another model would be built")
    # A trained model also loads without the package flash_attn; training requires it (preflight.py).
    attention = "auto" if model.attention == "flash_attn" and flash_package() is None else model.attention
    return SiT(
        input_size=spec.input_size,
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        teacher_dims=spec.teacher_dims,
        class_dim=spec.class_dim,
        position_grid=spec.position_grid,
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
