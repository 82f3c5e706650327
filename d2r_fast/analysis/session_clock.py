"""The clock of a run that stopped and went on: each session's begins anew."""

from typing import Any

SESSION_CLOCK = "wall"
"""Of a record's "time", which is counted from the start of each session."""


def training_seconds(records: list[dict[str, Any]]) -> list[float]:
    """Seconds of training up to each record of a run, over all its sessions.

    What a session did after its last record is not counted, nor what it had to do again.
    """
    seconds, before, last = {}, 0.0, 0.0
    for i in sorted(range(len(records)), key=lambda i: (records[i]["steps"], records[i]["kind"] == "eval")):
        wall = records[i].get("time", {}).get(SESSION_CLOCK, last)
        if wall < last:
            before += last
        last = wall
        seconds[i] = before + wall
    return [seconds[i] for i in range(len(records))]
