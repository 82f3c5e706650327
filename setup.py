"""Package metadata. `kernels/` at the top of the tree installs as `d2r_fast.kernels`; CMake builds `csrc/`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

TRAIN = [
    "cattrs>=24.1",
    "envpool==1.2.5",
    "gymnasium>=1.1",
    "matplotlib>=3.8",
    "metaworld==3.1.1",
    "plotly>=6.0",
    "psutil>=5.9",
    "safetensors>=0.5",
    "scipy>=1.11",
    "tensorboard>=2.16",
    "tqdm>=4.66",
    "tyro>=0.9",
]
SWEEP = ["ray>=2.40"]
VIDEO = ["imageio-ffmpeg>=0.5"]
WANDB = ["wandb>=0.31"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.10",
    "playwright>=1.45",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "ruff>=0.5",
    'triton>=3.6; platform_system == "Linux"',
    "types-psutil",
]


class BuildPackage(build_py):
    """Without what an earlier build left of modules that have since moved: setuptools packs all that lies there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "d2r_fast", ignore_errors=True)
        super().run()


class BuildCpuLibrary(build_ext):
    """csrc/ to d2r_fast/_cpu.so. Without a C++20 compiler the package installs all the same, and warns at its first use
    of the slow reference: pip shows what is printed here only with -v."""

    def run(self) -> None:
        package = HERE / "d2r_fast" if self.inplace else Path(self.build_lib) / "d2r_fast"
        try:
            self.build_library(Path(self.build_temp).absolute() / "csrc", package)
        except (OSError, subprocess.CalledProcessError) as error:
            (package / "_cpu.so").unlink(missing_ok=True)  # an older one might not fit the package
            output = getattr(error, "stdout", None) or b""
            print(output.decode(errors="replace")[-4000:], file=sys.stderr)
            print(f"d2r_fast: built without the C++ kernels, the slow reference runs instead: {error}", file=sys.stderr)

    def build_library(self, build: Path, package: Path) -> None:
        # A cache from another compiler would keep its paths.
        shutil.rmtree(build, ignore_errors=True)
        # pip puts the cmake of pyproject.toml on PATH, but not the one of a virtual environment that is not activated.
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
        cmake = shutil.which("cmake", path=search) or "cmake"
        for command in (
            [cmake, "-S", str(HERE / "csrc"), "-B", str(build)],
            [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
        ):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        package.mkdir(parents=True, exist_ok=True)
        # Moved into place whole: a process that has the old library open keeps it.
        new = package / "_cpu.so.new"
        shutil.copy(build / "_cpu.so", new)
        new.replace(package / "_cpu.so")

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in (Path(self.build_lib) / "d2r_fast").glob("_cpu.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The library is for this platform, but for any Python; without it the wheel is for any platform too."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).glob("**/_cpu.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    name="d2r_fast",
    version="0.1.0",
    description="Dynamic Depth Routing (D2R, AAAI 2024): fast modular multi-task reinforcement learning on Meta-World",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "csrc/third_party/torch/LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["d2r_fast", "d2r_fast.*"]), "d2r_fast.kernels"],
    package_dir={"d2r_fast.kernels": "kernels"},
    package_data={"d2r_fast": ["py.typed", "analysis/page/*"]},
    ext_modules=[Extension("d2r_fast._cpu", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildCpuLibrary, "bdist_wheel": Wheel},
    # The network and its operations need only these; everything that trains is in the extra.
    install_requires=["numpy>=1.26", "torch>=2.11"],
    extras_require={
        "train": TRAIN,
        "sweep": TRAIN + SWEEP,
        "video": VIDEO,
        "wandb": WANDB,
        "docs": DOCS,
        "dev": TRAIN + SWEEP + VIDEO + WANDB + DOCS + DEV,
    },
    entry_points={"console_scripts": ["d2r = d2r_fast.cli:main"]},
)
