"""Package metadata. `kernels/` sits at the top of the tree and installs as `d2r_fast.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "cattrs>=24.1",
    "envpool==1.2.5",
    "gymnasium>=1.1",
    "matplotlib>=3.8",
    "metaworld==3.1.1",
    "psutil>=5.9",
    "tensorboard>=2.16",
    "tqdm>=4.66",
    "tyro>=0.9",
]
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-benchmark>=4",
    "ruff>=0.5",
    'triton>=3.6; platform_system == "Linux"',
    "types-psutil",
]

setup(
    name="d2r_fast",
    version="0.1.0",
    description="Dynamic Depth Routing (D2R, AAAI 2024): fast modular multi-task reinforcement learning on Meta-World",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["d2r_fast", "d2r_fast.*"]), "d2r_fast.kernels"],
    package_dir={"d2r_fast.kernels": "kernels"},
    package_data={"d2r_fast": ["py.typed"]},
    # The network and its operations need only these; everything that trains is in the extra.
    install_requires=["numpy>=1.26", "torch>=2.11"],
    extras_require={"train": TRAIN, "dev": TRAIN + DEV},
    entry_points={"console_scripts": ["d2r = d2r_fast.cli:main"]},
)
