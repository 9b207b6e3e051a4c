"""Where the time goes: each stage by itself next to its floor, their sum next to the whole, and every kernel's own time.

python3 -m bench.bench_stages --cases B,D2 --out bench/results/stages.json
python3 -m bench.bench_stages --cases B --once       one profiled forward and backward, for bench/profile.sh
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .bench_attention import mita, save, start_report
from .cases import CASES, INPUTS, Case, make_inputs
from .check import check
from .timing import device_time, floor_ms, flush_l2

FORWARD = ("pool", "landmark_topk", "route", "expert_attention")
BACKWARD = ("expert_attention_backward", "landmark_topk_backward", "pool_backward")


def stage_calls(case: Case, inputs) -> dict[str, Callable]:
    """Every op of the package on the tensors that it meets inside a forward and backward of this case."""
    ops = torch.ops.mita_ext
    query, key, value = inputs
    scale, pooling = case.D**-0.5, case.normal_form
    landmark_scale = scale * case.D**-0.5
    dout = torch.randn_like(query)

    scales = True, scale, landmark_scale
    forward = query, key, value, None, *pooling, case.K, 1, *scales
    out, lse, landmarks, indices, experts, groups, compressed, landmark_lse = ops.attention(*forward)
    selected = query, key, value, landmarks, compressed, indices, experts
    saved = query, key, value, landmarks, indices, experts, groups, compressed, landmark_lse, out, lse
    return {
        "pool": lambda: ops.pool(query, *pooling),
        "landmark_topk": lambda: ops.landmark_topk(landmarks, key, value, case.K, scale),
        "route": lambda: ops.route(query, landmarks, 1),
        "expert_attention": lambda: ops.expert_attention(*selected, *scales),
        "forward": lambda: ops.attention(*forward),
        "expert_attention_backward": lambda: ops.expert_attention_backward(dout, None, *selected, out, lse, *scales),
        "landmark_topk_backward": lambda: ops.landmark_topk_backward(
            compressed, None, landmarks, key, value, compressed, landmark_lse, scale
        ),
        "pool_backward": lambda: ops.pool_backward(landmarks, case.N, *pooling),
        "backward": lambda: ops.attention_backward(dout, None, *saved, True, *pooling, *scales, True, True),
    }


def kernel_times(fn: Callable, repeats: int = 20) -> dict[str, dict]:
    """Kernel name -> median us and launches per call, from the device's own trace (CUPTI), each call with a cold L2."""

    def trace(body: Callable) -> dict[str, list[float]]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            for _ in range(repeats):
                body()
            torch.cuda.synchronize()
        times = defaultdict(list)
        for event in recorded.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                times[event.name].append(event.time_range.elapsed_us())
        return times

    def call() -> None:
        flush_l2()
        fn()

    fn()
    overhead = trace(flush_l2)
    kernels = {name: times for name, times in trace(call).items() if name not in overhead}
    return {
        short_name(name): {"median_us": statistics.median(t), "launches": len(t) / repeats, "us_per_call": sum(t) / repeats}
        for name, t in kernels.items()
    }


def short_name(kernel: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|^void |\bmita::", "", kernel)
    return re.sub(r"\((?![^<]*>).*$", "", name)[:70]


def bench_case(case: Case, kind: str, samples: int, ceiling: dict) -> dict:
    inputs = make_inputs(case, kind)
    result = {"case": case.name, "inputs": kind, "correctness": check(case, inputs), "stages": {}, "kernels": {}}
    print(f"\n{case.name} {kind}: {case.about}{'' if result['correctness']['ok'] else '   FAIL: wrong result'}")
    print(f"{'stage':<28} | {'us':>9} | {'p10-p90':>19} | {'GB/s':>6} | {'TFLOP/s':>7} | {'floor us':>8} | {'x floor':>7}")

    calls, work = stage_calls(case, inputs), case.stages | case.work
    for direction, stages in (("forward", FORWARD), ("backward", BACKWARD)):
        for name in (*stages, direction):
            timed = result["stages"][name] = device_time(calls[name], samples)
            (moved, flops), us = work[name], 1e3 * timed["median_ms"]
            timed |= {"bytes": moved, "flops": flops, "GB_s": moved / us / 1e3, "TFLOP_s": flops / us / 1e6}
            timed |= {"floor_us": 1e3 * floor_ms(work[name], ceiling)}
            timed |= {"times_floor": us / timed["floor_us"]}
            spread = f"{1e3 * timed['p10_ms']:.1f}-{1e3 * timed['p90_ms']:.1f}"
            label = f"{direction}, as one op" if name == direction else name
            print(
                f"{label:<28} | {us:>9.1f} | {spread:>19} | {timed['GB_s']:>6.0f} | {timed['TFLOP_s']:>7.1f} | "
                f"{timed['floor_us']:>8.1f} | {timed['times_floor']:>7.2f}",
                flush=True,
            )
        total = sum(1e3 * result["stages"][name]["median_ms"] for name in stages)
        print(f"{f'sum of {len(stages)} stages':<28} | {total:>9.1f}")

    for direction in ("forward", "backward"):
        kernels = result["kernels"][direction] = kernel_times(calls[direction])
        print(f"{f'kernels, {direction}':<70} | {'us':>9} | launches")
        for name, times in kernels.items():
            print(f"{name:<70} | {times['median_us']:>9.1f} | {times['launches']:g}")
        print(f"{'sum per call':<70} | {sum(times['us_per_call'] for times in kernels.values()):>9.1f}", flush=True)
    return result


def once(case: Case, kind: str) -> None:
    """A warm-up, then one forward and backward between cudaProfilerStart and cudaProfilerStop."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(case, kind)]
    dout = torch.randn_like(inputs[0])
    for profiled in (False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        torch.autograd.grad(mita(case)(*inputs), inputs, dout)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--inputs", default="normal", help="of " + ",".join(INPUTS))
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--once", action="store_true", help="no times: run each case once under a profiler")
    parser.add_argument("--commit", help="what is measured; default: $MITA_COMMIT, else git")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()

    chosen = [(CASES[name], kind) for name in args.cases.split(",") for kind in args.inputs.split(",")]
    if args.once:
        for case, kind in chosen:
            once(case, kind)
        return 0
    report = start_report(args.commit)
    report["stages"] = []
    for case, kind in chosen:
        report["stages"].append(bench_case(case, kind, args.samples, report["ceilings"]))
        save(report, args.out)
    return 0 if all(result["correctness"]["ok"] for result in report["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
