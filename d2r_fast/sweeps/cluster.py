"""Ray, kept quiet: a cluster of this machine alone for as long as a sweep takes, or one that is there."""

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when Ray is imported.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning; the worker hides the GPUs of a run without one
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, workers would copy the working directory
}
# Workers exchange a few numbers; Ray refuses less.
_OBJECT_STORE_BYTES = 80 * 2**20
_ANSWER_SECONDS = 5.0
# Ray gives its processes half a minute to start, which is not always enough where others use the machine.
_ATTEMPTS = 3


def _import_ray() -> Any:
    """The module. ImportError, in one line: it is not installed."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError("needs Ray, which is not installed: pip install 'd2r_fast[sweep]'") from None
    return ray


def check_address(address: str | None) -> None:
    """ValueError: not `auto` or HOST:PORT. ConnectionError: nothing answers there."""
    if address is None or address == "auto":
        return
    match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if match is None:
        raise ValueError(f"--address: expected auto or HOST:PORT of a Ray cluster's head, got {address!r}")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--address: nothing answers at {address}: {error}") from error


@contextmanager
def cluster(address: str | None, cpus: int, gpus: float) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of this machine that ends with the block.

    ConnectionError: there is no cluster, or not one that this Ray can talk to. ValueError: none of its machines has
    `cpus` cores and `gpus` GPUs.
    """
    check_address(address)
    if address is None:
        # Ray listens on every network that the machine is on: without the token, others could run code here.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = _import_ray()
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    embedded = None
    if address is None:
        # Its sockets lie there, and their paths may be 107 characters long: not in a TMPDIR of any length.
        embedded = Path(tempfile.mkdtemp(prefix="d2r-ray-", dir="/tmp"))
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": str(embedded),
            "_node_ip_address": "127.0.0.2",  # the loopback; Ray replaces 127.0.0.1 by the machine's own address
            # Runs get SIGTERM when their worker ends, and save; Ray would kill them.
            "_system_config": {"kill_child_processes_on_worker_exit": False},
        }
    try:
        _connect(ray, options)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in machines):
            there = "; ".join(f"{has.get('CPU', 0):g} cores, {has.get('GPU', 0):g} GPUs" for has in machines)
            raise ValueError(f"--cpus, --gpus: expected what one machine has ({there}), got {cpus} and {gpus:g}")
        yield ray
    finally:
        ray.shutdown()
        if embedded is not None:
            shutil.rmtree(embedded, ignore_errors=True)


def _connect(ray: Any, options: dict[str, Any]) -> None:
    local = options["address"] == "local"
    for left in reversed(range(_ATTEMPTS if local else 1)):
        try:
            ray.init(**options)
            # Else a machine that is lost fills the terminal; the run that it had tells of it.
            ray._private.worker._worker_logs_enabled = False
            return
        except Exception as error:  # of many types, some plain Exception
            ray.shutdown()
            if left == 0:
                where = "does not start on this machine" if local else f"does not reach {options['address']}"
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ConnectionError(f"Ray {where}: {reason}") from error
