"""`d2r info`: versions, devices, backends and networks."""

import platform
from importlib import metadata, util
from typing import Any

import torch

from d2r_fast.commands.arguments import require_no_arguments
from d2r_fast.commands.networks import describe
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.ops.backends import availability


def run(args: list[str]) -> int:
    """Print them. ValueError: there are arguments."""
    require_no_arguments(args)
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in ("d2r_fast", "torch", "triton", "numpy", "envpool", "metaworld", "mujoco", "gymnasium"):
        print(f"{package:<10} {_version(package)}")
    print(f"cpu        {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(i)
            print(
                f"gpu {i}      {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            )
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        print(f"gpu        none: {why}")
    for name, state in availability().items():
        print(f"backend    {name}: {state}")
    for config in NET_CONFIGS.values():
        print(f"network    {describe(config(), 10)} on MT10")
    return 0


def _version(package: str) -> str:
    if package == "torch":  # with its build, which the package's metadata may lack: 2.13.0+cu130
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "on the path, not installed" if util.find_spec(package) else "not installed"
