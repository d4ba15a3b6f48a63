"""Teachers: frozen image encoders whose tokens the student is aligned with.

teacher = load_teacher("efficientnet-lite0")    # or dinov2-b, timm:MODEL; several: load_teachers("a,b")
z = teacher(images)                             # (B, 3, H, W) uint8 -> (B, tokens, dim) float32
z, r = teacher.tokens_and_class(images)         # and the class token (B, class_dim) float32
"""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "parse_teachers": ".config.teacher_names",
        "Teacher": "teacher",
        "load_teacher": "teacher",
        "load_teachers": "teacher",
        "load_teacher_like": "teacher",
        "resample_tokens": "tokens",
        "normalize_tokens": "tokens",
        "quantize_rows": "tokens",
        "standardize_class_token": "tokens",
    },
)
