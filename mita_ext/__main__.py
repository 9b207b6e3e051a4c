"""What was built, what is running, and whether they fit: python -m mita_ext"""

import platform
import re

import torch

from . import __version__
from ._C import build_info


def covers(arch: str, capability: tuple[int, int]) -> bool:
    """Does code for `arch` run here? Binaries run on the same major version, PTX on all later ones; 9.0a on 9.0 alone."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    if not match:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3]:
        return capability == built
    return capability >= built and (bool(match[4]) or capability[0] == built[0])


def gpu_lines(info: dict) -> list[str]:
    """The visible GPUs, and for each whether this build has code for it; the remedy where not."""
    if not torch.cuda.is_available():
        return ["GPU            none visible: the CPU backend is used"]
    lines = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        arch = f"{capability[0]}.{capability[1]}"
        line = f"GPU {i}          {torch.cuda.get_device_name(i)}, compute capability {arch}: "
        if not info["cuda"]:
            remedy = "no CUDA code in this build; rebuild with MITA_EXT_CUDA=1 (it says what is missing)"
        elif capability < (8, 0):
            remedy = "too old, the kernels need 8.0 or newer; use the CPU backend"
        elif fitting := [built for built in info["archs"] if covers(built, capability)]:
            remedy = f"covered by {', '.join(fitting)}"
        else:
            remedy = f"not covered; rebuild with TORCH_CUDA_ARCH_LIST={arch}"
        lines.append(line + remedy)
    return lines


def main() -> None:
    info = build_info()
    cuda = f"CUDA {info['cuda_version']} for {', '.join(info['archs'])}" if info["cuda"] else "CPU only"
    print(f"mita_ext       {__version__}, {cuda}")
    print(f"python         {platform.python_version()}")
    print(f"torch          {torch.__version__} running, {info['torch_version']} built against")
    print(f"torch's CUDA   {torch.version.cuda or 'none: a CPU build of torch'}")
    print(*gpu_lines(info), sep="\n")
    if info["cuda"]:
        dims = info["head_dims"]
        print(f"on CUDA        {', '.join(info['dtypes'])}; head dims {dims[0]}, {dims[1]}, ... {dims[-1]}")
    threads = torch.get_num_threads() if info["openmp"] else 1
    print(f"on the CPU     bfloat16, float16, float32, float64; any head dim; threads: {threads}")
    if not info["cuda"]:
        print("remedy         for CUDA kernels: install nvcc and a CUDA build of torch, then rebuild with MITA_EXT_CUDA=1")


if __name__ == "__main__":
    main()
