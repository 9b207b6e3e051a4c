#!/usr/bin/env bash
# One forward and backward of a case under Nsight Systems (time line, one NVTX range per stage) and Nsight Compute (counters
# of every kernel). The warm-up is left out: the profilers listen between cudaProfilerStart and cudaProfilerStop.
# docs/profiling.md tells how to read both.
#
# usage, from the repository root:  bench/profile.sh [CASE [FOLDER [KERNELS]]]      default: B, build/profile, all in full
# KERNELS, as 'unit_gradient_kernel|row_gradient_kernel': no time line, and of these kernels alone the few sections that say
# what one waits for, as text in FOLDER/CASE.txt.
# Clocks stay as they are (--clock-control none): counters then belong to the times that the benches measure.
set -euo pipefail
case=${1:-B} folder=${2:-build/profile} kernels=${3:-}
mkdir -p "$folder"
program=("${PYTHON:-python3}" -m bench.bench_stages --once --cases "$case")
counters=(ncu --profile-from-start off --clock-control none)

if [ -n "$kernels" ]; then
  sections=(--section SpeedOfLight --section WarpStateStats --section Occupancy --section MemoryWorkloadAnalysis)
  "${counters[@]}" --kernel-name "regex:$kernels" "${sections[@]}" "${program[@]}" | tee "$folder/$case.txt"
  exit
fi
if command -v nsys >/dev/null; then
  nsys profile -t cuda,nvtx --capture-range cudaProfilerApi --capture-range-end stop --force-overwrite true -o "$folder/$case" "${program[@]}"
  nsys stats --report nvtx_gpu_proj_sum --report cuda_gpu_kern_sum "$folder/$case.nsys-rep"
else
  echo "no nsys on the PATH: no time line" >&2
fi
"${counters[@]}" --set full --import-source yes --force-overwrite -o "$folder/$case" "${program[@]}"
ncu --import "$folder/$case.ncu-rep" --page details --print-summary per-kernel
