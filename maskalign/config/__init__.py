"""The settings of a run: the typed tree, its rules, and how it is read from YAML and the command line."""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.config.parsing import dump_config as dump_config
    from maskalign.config.parsing import load_config as load_config
    from maskalign.config.settings import Config as Config

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
        "Schedule": "schedules",
        "TeacherConfig": "settings",
        "TrainingConfig": "settings",
        "TokenBudget": "schedules",
        "as_schedule": "schedules",
        "keep_count": "schedules",
        "schedule_value": "schedules",
        "model_sizes": "settings",
        "shard_ranks": "checks",
        "validate": "checks",
        "validate_with_data": "checks",
        "DataFacts": "checks",
        "validate_with_ranks": "checks",
        "all_keys": "parsing",
        "as_plain": "parsing",
        "dump_config": "parsing",
        "load_config": "parsing",
        "make_config_parser": "parsing",
        "parse_config": "parsing",
    },
)
