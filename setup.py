"""Builds mita_ext._C; project metadata is in pyproject.toml.

MITA_EXT_CUDA=auto (default): CUDA when nvcc and a CUDA build of torch are there, else CPU only; 1: CUDA or fail; 0: CPU only.
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS and NVCC_THREADS are respected. A GPU is never looked for.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError as error:
    sys.exit(f"mita_ext: building needs torch ({error}); install it, or build without --no-build-isolation")

CPU_SOURCES = ["csrc/ops.cpp", "csrc/autograd.cpp", "csrc/cpu/mita_cpu.cpp"]
KERNELS = "pool pool_route_sm90 pool_route_group_sm90 landmark_scores landmark_topk route group".split()
KERNELS += "expert_attention_fwd expert_attention_sm90 short_attention_fwd short_attention_bwd short_masked_gradient".split()
KERNELS += "masked_gradient attention_gradient_sm90 key_lists key_gradient_sm90".split()
KERNELS += "row_gradient row_gradient_sm90 unit_gradient unit_gradient_sm90 small_gradient reduce".split()
CUDA_SOURCES = ["csrc/cuda/mita_cuda.cpp", *(f"csrc/cuda/{name}.cu" for name in KERNELS)]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
DEFAULT_ARCHS = "8.0+PTX;9.0a"  # without a list torch looks for a GPU, and build machines have none


def find_toolkit():
    """The first directory that holds both nvcc and the headers: an nvcc on PATH may be a wrapper far from them."""
    nvcc = Path(shutil.which("nvcc") or "nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc.parent.parent, nvcc.resolve().parent.parent]
    homes = [Path(home) for home in [*homes, "/usr/local/cuda"] if home]
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), None)


def choose_cuda(mode):
    """(toolkit, its version, ""), or (None, None, why not and what to do about it)."""
    if mode == "0":
        return None, None, "MITA_EXT_CUDA=0"
    if torch.version.cuda is None:
        return None, None, f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if not (home := find_toolkit()):
        return None, None, "no CUDA toolkit in CUDA_HOME, PATH or /usr/local/cuda; install one or set CUDA_HOME"
    banner = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", banner).group(1)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        remedy = "set CUDA_HOME to a toolkit of torch's major version"
        return None, None, f"nvcc is {version} but torch has CUDA {torch.version.cuda}; {remedy}"
    return home, version, ""


if (mode := os.environ.get("MITA_EXT_CUDA", "auto")) not in ("auto", "0", "1"):
    sys.exit(f"mita_ext: MITA_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
toolkit, version, reason = choose_cuda(mode)
if mode == "1" and not toolkit:
    sys.exit(f"mita_ext: MITA_EXT_CUDA=1, but {reason}")
if toolkit:
    archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").replace("Hopper", "9.0+PTX")
    archs = re.sub(r"9\.0(?!a)", "9.0a", archs)  # 9.0 alone has no wgmma
    os.environ.update(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=archs)  # read by torch's cpp_extension, below
print("mita_ext: building for", f"CPU and CUDA {version} ({archs})" if toolkit else f"CPU only: {reason}", file=sys.stderr)

from torch.utils import cpp_extension  # noqa: E402

make_extension = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
extension = make_extension("mita_ext._C", CPU_SOURCES + (CUDA_SOURCES if toolkit else []), depends=HEADERS)
if toolkit:
    facts = [("MITA_CUDA_VERSION", f'"{version}"'), ("MITA_CUDA_ARCHS", f'"{archs}"')]
    extension.define_macros = [("MITA_WITH_CUDA", None), *facts]
# Torch's headers become system headers: warnings are errors here, not there. The .cu files need no include path at all.
system_headers = [flag for path in extension.include_dirs for flag in ("-isystem", path)]
nvcc_threads = ["--threads", os.environ["NVCC_THREADS"]] if os.environ.get("NVCC_THREADS") else []
extension.extra_compile_args = {
    # OpenMP, or at::parallel_for is a plain loop; not linked, so that the threads are torch's own.
    "cxx": ["-O3", "-g0", "-Wall", "-Werror", "-fopenmp", *system_headers],
    "nvcc": ["-O3", "-lineinfo", "-Werror", "all-warnings", *nvcc_threads],
}
extension.include_dirs = []
setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
