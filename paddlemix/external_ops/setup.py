# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Builds and installs the operators: `python setup.py install` in this folder; build.py does so in a temporary one.

They are compiled for CUDA too where Paddle is a CUDA build and nvcc is found, unless EMU3_OPS_CUDA=0 is set; for the
architectures in PADDLE_CUDA_ARCH_LIST ("80;90"), else those of the cards that are there, else 8.0 and 9.0.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

try:
    import paddle
    from paddle.utils.cpp_extension import CppExtension, CUDAExtension, setup
except ModuleNotFoundError as error:
    sys.exit(f"external_ops: {sys.executable} has no {error.name}: run this with the Python of your environment")

compiler = os.environ.get("CXX") or "g++"
if shutil.which(shlex.split(compiler)[0]) is None:
    sys.exit(
        f"external_ops: no C++ compiler {compiler!r} was found: install g++ (Debian, Ubuntu: apt install g++), or name "
        "one in CXX"
    )
if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
    sys.exit("external_ops: Python's headers are missing: install them (Debian, Ubuntu: apt install python3-dev)")
os.chdir(Path(__file__).resolve().parent)
DEFAULT_ARCHITECTURES = "80;90"


def nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def card_architectures():
    cards = (paddle.device.cuda.get_device_capability(i) for i in range(paddle.device.cuda.device_count()))
    return ";".join(sorted({f"{major}{minor}" for major, minor in cards}))


cuda = os.environ.get("EMU3_OPS_CUDA") != "0" and paddle.is_compiled_with_cuda() and nvcc() is not None
if cuda:  # Paddle's CUDAExtension makes nvcc's options of it
    os.environ["PADDLE_CUDA_ARCH_LIST"] = (
        os.environ.get("PADDLE_CUDA_ARCH_LIST") or card_architectures() or DEFAULT_ARCHITECTURES
    )
print(f"external_ops: CUDA for {os.environ['PADDLE_CUDA_ARCH_LIST']}" if cuda else "external_ops: for a CPU")

# Paddle's OpenMP and no second one: so the operators have Paddle's number of threads
libraries = Path(paddle.__file__).parent / "libs"
openmp = [f"-L{libraries}", "-l:libiomp5.so"] if (libraries / "libiomp5.so").exists() else ["-fopenmp"]

flags = ["-O3", "-std=c++17"]
# -fno-trapping-math lets the compiler make vectors of a choice between floats; without contraction a loop's vectors and
# its tail round alike, so that a value does not depend on its place. Python's own options ask for -g, which takes a
# third of the time.
only_cxx = ["-fopenmp", "-fno-trapping-math", "-ffp-contract=off", "-g0"]
extension = CUDAExtension if cuda else CppExtension
setup(
    name="emu3_ops",
    version="0.1.0",
    py_modules=["fused_ln", "fast_ln"],  # the names under which PaddleNLP imports them
    package_dir={"": "modules"},
    ext_modules=extension(
        sources=sorted(
            str(path) for kind in ("cc", "cu") if kind == "cc" or cuda for path in Path().glob(f"*/*.{kind}")
        ),
        depends=[str(path) for kind in ("h", "cuh") for path in Path().rglob(f"*.{kind}")],
        include_dirs=[os.getcwd()],
        extra_compile_args={"cxx": [*flags, *only_cxx], "nvcc": flags},
        extra_link_args=openmp,
    ),
)
