"""The position of a stream as plain data: read back with care, and joined from the states of all ranks."""

from typing import Any, Dict, Iterable, Mapping

from maskalign.errors import UsageError

STATE_VERSION = 1
MOST_BAD_IN_STATE = 20_000  # 0.3 MB; beyond that a resumed run names some bad samples again


def parse_state(state, here):
    """Read what `ShardStream.state_dict` gave.

    Args:
        state: the dict.
        here: {"version", "data", "seed", "streams", "group"} of the stream that will continue; None fits anything.

    Returns:
        (streams, group, served, positions: {stream: one position per data set}, bad: list of tuples).

    Raises:
        UsageError: it is no such state, or one of other data or settings.
    """
    try:
        there = {
            "version": state["version"],
            "data": list(state["data"]),
            **{name: int(state[name]) for name in ("seed", "streams", "group", "served")},
        }
        positions = {
            int(stream): [int(p) for p in position]
            for stream, position in zip(state["stream"], state["position"], strict=True)
        }
        bad = [tuple(int(i) for i in place) for place in state["bad"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"not a stream's state ({type(error).__name__}: {error}); give state_dict()") from None
    for name, value in here.items():
        if value is not None and there[name] != value:
            what = {"data": "data set"}.get(name, name)
            raise UsageError(f"the stream's state has another {what}: {there[name]}, here it is {value}")
    return there["streams"], there["group"], there["served"], positions, bad


def merge_states(states: Iterable[Mapping[str, Any]]) -> Dict[str, Any]:
    """One state for the whole job from the states of all its ranks, taken after the same step.

    Raises:
        UsageError: none given, or they are not of the same job and step.
    """
    states = list(states)
    if not states:
        raise UsageError("merge_states: give the states of all ranks")
    positions, bad = {}, {}
    for state in states:
        for key in ("version", "data", "seed", "streams", "group", "served"):
            if state[key] != states[0][key]:
                raise UsageError(f"merge_states: {key} differs: {states[0][key]} and {state[key]}; save at one step")
        positions.update(zip(state["stream"], state["position"], strict=True))
        bad.update(dict.fromkeys(tuple(place) for place in state["bad"]))
    streams = sorted(positions)
    return dict(states[0]) | {
        "stream": streams,
        "position": [list(positions[stream]) for stream in streams],
        "bad": [list(place) for place in sorted(bad)][:MOST_BAD_IN_STATE],
    }
