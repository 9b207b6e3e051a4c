"""Compile report: registers, shared memory and spills of every kernel on both architectures. A spill is a failure.

usage: python -m bench.kernels NVCC
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ARCHS = ("sm_80", "sm_90a")
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-cubin", "-o", os.devnull, "-Xptxas", "-v")
LAYOUTS = ("Layout", "Specialists")  # the structs that describe the dynamic shared memory of a kernel
SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
CONFIG = re.compile(r"<(Config<[\w ]+, \d+, \w+>)[,>]")


def with_probes(source: Path) -> str:
    """The source, plus one empty kernel per configuration whose name holds the size of its dynamic shared memory: the
    compiler reports names, but not what a launch will ask for."""
    text, code = f'#include "{source}"\n', source.read_text()
    widths = re.findall(r"Config<T, (\d+)>", (SOURCES / "dispatch.h").read_text())
    for layout in LAYOUTS:
        if not re.search(rf"struct {layout} : C {{(?:(?!\n}};).)*struct Shared {{", code, re.DOTALL):
            continue
        text += f"namespace mita {{ template <class C, int bytes> __global__ void {layout}_probe() {{}}\n"
        for dtype, width, groups in product(("__nv_bfloat16", "__half", "float", "Tf32"), widths, ("false", "true")):
            if groups == "true" and ("_" not in dtype or int(width) > 128) or (layout, groups) == ("Specialists", "false"):
                continue
            config = f"Config<{dtype}, {width}, {groups}>"
            text += f"template __global__ void {layout}_probe<{config}, sizeof({layout}<{config}>::Shared)>();\n"
        text += "}\n"
    return text


def report(nvcc: str, source: Path, arch: str) -> list[tuple[str, ...]]:
    """File, kernel, architecture, registers, shared memory, stack and spills of each kernel of one file."""
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder, source.name)
        probed.write_text(with_probes(source))
        command = [nvcc, *FLAGS, f"-arch={arch}", f"-I{SOURCES}", str(probed)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    entries = list(ENTRY.finditer(result.stderr))
    mangled = "\n".join(entry["name"] for entry in entries)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [re.sub(r"\(anonymous namespace\)::|mita::|^void |__nv_|\((?:int|bool)\)", "", name) for name in names]
    names = [re.sub(r"\(.*\)$", "", name).replace(" >", ">") for name in names]
    probes = [name for name in names if "_probe<" in name]
    dynamic = {(name.split("_probe<")[0], CONFIG.search(name)[1]): int(name.rstrip(">").split(", ")[-1]) for name in probes}
    sized_by_input = set(re.findall(r"(\w+_kernel)\([^;{]*\{(?:(?!\n\}).)*?extern __shared__", source.read_text(), re.DOTALL))

    rows = []
    for name, entry in zip(names, entries):
        if name in probes:
            continue
        static = re.search(r"(\d+) bytes smem", entry["rest"])
        config = CONFIG.search(name)
        key = LAYOUTS["specialists" in name], config and config[1]
        shared = str((int(static[1]) if static else 0) + dynamic.get(key, 0))
        if key not in dynamic and name.split("<")[0] in sized_by_input:
            shared += " + by input"
        spilled = int(entry["stores"]) + int(entry["loads"])
        rows.append((source.name, name, arch, entry["registers"], shared, entry["stack"], str(spilled)))
    return rows


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("make kernels needs nvcc: install the CUDA toolkit or set CUDA_HOME")
    jobs = [(sys.argv[1], source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in ARCHS]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        rows = sorted(row for part in pool.map(lambda job: report(*job), jobs) for row in part)
    table = [("file", "kernel", "arch", "registers", "shared bytes", "stack", "spilled bytes"), *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print(" | ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())
    spilling = [row for row in rows if row[-1] != "0"]
    print(f"{len(rows)} kernels for {' and '.join(ARCHS)}, {len(spilling)} of them spill")
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()
