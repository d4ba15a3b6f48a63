"""The position of a stream as plain data: validated when it is loaded, and merged from the states of all ranks."""

from typing import Any, Dict, Iterable, Mapping

from maskalign.errors import UsageError

STATE_VERSION = 1
MOST_BAD_IN_STATE = 20_000  # 0.3 MB; with more bad samples, a resumed run reports some of them again


def parse_state(state, here):
    """Validate a state returned by `ShardStream.state_dict`.

    Args:
        state: the dict.
        here: {"version", "data", "seed", "streams", "group"} of the stream that will continue; None matches any value.

    Returns:
        (streams, group, served, positions: {stream: one position per data set}, bad: list of tuples).

    Raises:
        UsageError: the state is invalid, or has other data or settings.
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
            raise UsageError(f"the stream's state has another {what}: {there[name]}, this stream has {value}")
    return there["streams"], there["group"], there["served"], positions, bad


def merge_states(states: Iterable[Mapping[str, Any]]) -> Dict[str, Any]:
    """Merge the states of all ranks, taken after the same step, into one state of the whole job.

    Raises:
        UsageError: there is no state, or the states are from different jobs or steps.
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
