"""The settings of a run: the typed tree, its rules, and how it is read from YAML and the command line."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Config": "settings",
        "DataConfig": "settings",
        "EvaluateConfig": "settings",
        "MethodConfig": "settings",
        "ModelConfig": "settings",
        "ObjectiveConfig": "settings",
        "OptimizerConfig": "settings",
        "ParallelConfig": "settings",
        "PreviewConfig": "settings",
        "Schedule": "settings",
        "TeacherConfig": "settings",
        "TrainingConfig": "settings",
        "as_schedule": "settings",
        "model_sizes": "settings",
        "shard_ranks": "checks",
        "validate": "checks",
        "validate_with_data": "checks",
        "validate_with_ranks": "checks",
        "all_keys": "parsing",
        "dump_config": "parsing",
        "load_config": "parsing",
        "make_config_parser": "parsing",
        "parse_config": "parsing",
    },
)
