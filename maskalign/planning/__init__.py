"""Planning: memory, FLOPs, communication, time and energy of a run, without its hardware and its data."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "DEVICES": "devices",
        "Device": "devices",
        "load_device": "devices",
        "Options": "options",
        "plan_run": "estimate",
        "schedule_phases": "work",
        "trace_step": "trace",
    },
)
