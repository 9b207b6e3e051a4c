"""mita_ext.attention against its floors, dense attention, plain PyTorch and the authors' code: all of them in one run.

python3 -m bench.bench_attention --cases A,B,C --out bench/results/h100.json
python3 -m bench.bench_attention --sweep --out bench/results/sweep.json       time against N, for bench.plot
python3 -m bench.bench_attention --grid --out bench/results/grid.json         time against M and K
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mita_ext
from mita_ext import reference

from .cases import AUTHORS_SOURCE, CASES, DTYPE, FORMULAS, GRID, GRID_SIZES, INPUTS, SWEEP, Case, make_inputs
from .check import check, repeats_equal
from .timing import ceilings, device_time, environment, floor_ms, host_time, peak_extra_bytes

PEER_BUDGET_S = 1.0  # per number: slow peers get fewer samples, never below 5, and the JSON says how many
DENSE_LIMIT = 65536  # dense attention is quadratic: hours at case E
DIRECTIONS = ("forward", "forward_backward")
MIB = 1 << 20


def mita(case: Case) -> Callable:
    return lambda *inputs: mita_ext.attention(*inputs, topk=case.K, **case.pooling)


def dense(backend: SDPBackend) -> Callable:
    def attend(query, key, value):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend


def peers(case: Case, which: str) -> dict[str, Callable]:
    result = {}
    if which != "none" and case.N <= DENSE_LIMIT:
        result["cudnn"] = dense(SDPBackend.CUDNN_ATTENTION)
        result["flash"] = dense(SDPBackend.FLASH_ATTENTION)
    if which == "all" and case.name not in ("D", "E"):  # there it runs out of memory
        result["plain_pytorch"] = lambda *inputs: reference.attention(*inputs, topk=case.K, **case.pooling)
    return result


def measure(direction: str, attend: Callable, inputs, samples: int, budget_s: float | None = None, host: bool = False) -> dict:
    """Device time, extra memory and host time of the forward without autograd, or of forward and backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    dout = torch.randn_like(inputs[0])

    def forward():
        with torch.no_grad():
            return (attend(*inputs),)

    def forward_backward():
        out = attend(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, dout))

    fn = {"forward": forward, "forward_backward": forward_backward}[direction]
    fn()
    extra = peak_extra_bytes(fn)
    result = device_time(fn, samples, budget_s)
    result |= {"extra_MiB": extra / MIB, "extra_per_q": extra / (dout.numel() * dout.element_size())}
    return result | ({"host": host_time(fn)} if host else {})


def measure_peer(attend: Callable, inputs, samples: int) -> dict:
    """A peer may run out of memory or refuse a shape; that is a result too."""
    result = {}
    for direction in DIRECTIONS:
        try:
            result[direction] = measure(direction, attend, inputs, samples, PEER_BUDGET_S)
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            result[direction] = {"failed": "out of memory" if out_of_memory else str(error).splitlines()[0]}
        gc.collect()
        torch.cuda.empty_cache()
    return result


def bench_case(case: Case, kind: str, args, ceiling: dict) -> dict:
    inputs = make_inputs(case, kind)
    result = {"case": case.name, "inputs": kind, "shape": {key: getattr(case, key) for key in "BHNDMK"}, "about": case.about}
    result["correctness"] = check(case, inputs)
    if kind == "one_expert":
        result["correctness"]["ok"] &= result["correctness"]["largest_expert_share"] > 0.99
    if args.repeats_check:
        result["correctness"]["200_repeats_bitwise_equal"] = equal = repeats_equal(case, inputs)
        result["correctness"]["ok"] &= equal
    gc.collect()
    torch.cuda.empty_cache()

    result["mita"] = {}
    for name in DIRECTIONS:
        timed = result["mita"][name] = measure(name, mita(case), inputs, args.samples, host=True)
        (moved, flops), floor = case.work[name], floor_ms(case.work[name], ceiling)
        median_s = timed["median_ms"] / 1e3
        timed |= {"bytes": moved, "flops": flops, "floor_ms": floor, "times_floor": timed["median_ms"] / floor}
        timed |= {"GB_s": moved / median_s / 1e9, "TFLOP_s": flops / median_s / 1e12}
        if case.authors:
            timed["speedup_over_authors"] = getattr(case.authors, f"{name}_ms") / timed["median_ms"]
    result["mita"]["forward"]["dense_equivalent_TFLOP_s"] = (
        4 * case.B * case.H * case.N**2 * case.D / result["mita"]["forward"]["median_ms"] / 1e9
    )
    if kind == "normal":
        result["peers"] = {name: measure_peer(peer, inputs, args.samples) for name, peer in peers(case, args.peers).items()}
    if case.authors:
        result["authors"] = asdict(case.authors) | {"source": AUTHORS_SOURCE}
    return result


COLUMNS = {
    "case": 15, "ok": 4, "err/plain": 9,
    "fwd ms": 8, "fwd p10-p90": 15, "fwd x floor": 11, "vs cuDNN": 8, "vs authors": 10,
    "f+b ms": 8, "f+b p10-p90": 15, "f+b x floor": 11, "vs cuDNN ": 8, "vs authors ": 10,
    "extra MiB": 11, "x q": 9, "host us": 9, "vs normal": 9,
}  # fmt: skip


def row(values) -> str:
    first, *rest = zip(values, COLUMNS.values(), strict=True)
    return " | ".join([f"{first[0]:<{first[1]}}", *(f"{value:>{width}}" for value, width in rest)])


def line(result: dict, peer: str | None = None) -> str:
    """One aligned line: the package's own, or a peer's below it. `vs X` is the time of X over this one: above 1 is faster."""
    timed = result["peers"][peer] if peer else result["mita"]
    cells = [f"  {peer}", "", ""] if peer else [f"{result['case']} {result['inputs']}", *verdict(result["correctness"])]
    for direction in DIRECTIONS:
        t = timed[direction]
        if "failed" in t:
            cells += ["OOM" if t["failed"] == "out of memory" else "failed", "", "", "", ""]
            continue
        cudnn = result.get("peers", {}).get("cudnn", {}).get(direction, {}).get("median_ms")
        authors = result.get("authors", {}).get(f"{direction}_ms")
        cells += [f"{t['median_ms']:.4g}", f"{t['p10_ms']:.4g}-{t['p90_ms']:.4g}"]
        cells += [f"{t['times_floor']:.2f}" if "times_floor" in t else ""]
        cells += [f"{rival / t['median_ms']:.2f}x" if rival else "-" for rival in (cudnn, authors)]
    done = [t for t in timed.values() if "failed" not in t]
    cells += ["/".join(f"{t['extra_MiB']:.0f}" for t in done), "/".join(f"{t['extra_per_q']:.2f}" for t in done)]
    cells += ["/".join(f"{t['host']['median_us']:.0f}" for t in done if "host" in t)]
    cells += ["" if peer else "/".join(f"{x:.2f}" for x in result.get("times_normal", {}).values())]
    return row(cells)


def verdict(correctness: dict) -> tuple[str, str]:
    worst = max(e["error"] / max(e["plain_pytorch"], e["rounding_level"]) for e in correctness["relative_errors"].values())
    return "ok" if correctness["ok"] else "FAIL", f"{worst:.2f}"


def bench_cases(args, report: dict) -> bool:
    print(row(COLUMNS))
    everything_right = True
    for name in args.cases.split(","):
        normal = None
        for kind in args.inputs.split(","):
            result = bench_case(CASES[name], kind, args, report["ceilings"])
            normal = result if kind == "normal" else normal
            if normal and kind != "normal":
                result["times_normal"] = {
                    d: result["mita"][d]["median_ms"] / normal["mita"][d]["median_ms"] for d in DIRECTIONS
                }
            report["results"].append(result)
            save(report, args.out)
            print(line(result), flush=True)
            for peer in result.get("peers", {}):
                print(line(result, peer), flush=True)
            if not result["correctness"]["ok"]:
                everything_right = False
                print(f"FAIL {name} {kind}: {json.dumps(result['correctness'], indent=2)}", flush=True)
    return everything_right


def sweep(args, report: dict) -> bool:
    """Time against N, ours and dense: H=16, D=64, M=K=64, B=1."""
    everything_right = True
    columns = "{:>8} | {:>11} | {:>8} | {:>12} | {:>8}{}"
    print(columns.format("N", "MiTA fwd ms", "f+b ms", "cuDNN fwd ms", "f+b ms", ""))
    for case in SWEEP:
        inputs = make_inputs(case, "normal")
        right = check(case, inputs)["ok"]
        everything_right &= right
        point = {"N": case.N, "correct": right}
        point["mita"] = {direction: measure(direction, mita(case), inputs, args.samples) for direction in DIRECTIONS}
        if case.N <= DENSE_LIMIT:
            point["cudnn"] = measure_peer(dense(SDPBackend.CUDNN_ATTENTION), inputs, args.samples)
        report["sweep"].append(point)
        save(report, args.out)
        times = [point.get(who, {}).get(d, {}).get("median_ms") for who in ("mita", "cudnn") for d in DIRECTIONS]
        shown = (f"{ms:.4g}" if ms else "-" for ms in times)
        print(columns.format(case.N, *shown, "" if right else "   FAIL: wrong result"), flush=True)
    return everything_right


def grid(args, report: dict) -> bool:
    """Forward time against M and K at N=65536, H=16, B=1, and the largest step between neighbours that flops do not explain."""
    everything_right, times = True, {}
    for case in GRID:
        inputs = make_inputs(case, "normal")
        right = check(case, inputs)["ok"]
        everything_right &= right
        point = {"D": case.D, "M": case.M, "K": case.K, "correct": right}
        point["forward"] = measure("forward", mita(case), inputs, args.samples)
        report["grid"].append(point)
        save(report, args.out)
        times[case.D, case.M, case.K] = point["forward"]["median_ms"]
        if case.K == GRID_SIZES[0]:
            if case.M == GRID_SIZES[0]:
                print(f"D={case.D}, forward ms".ljust(20) + "".join(f"{f'K={k}':>9}" for k in GRID_SIZES))
            print(f"M={case.M}".ljust(20), end="")
        print(f"{point['forward']['median_ms']:>9.3f}" if right else "     FAIL", end="", flush=True)
        if case.K == GRID_SIZES[-1]:
            print()
    steps = []
    for (D, M, K), ms in times.items():
        for m, k in ((2 * M, K), (M, 2 * K)):
            if (D, m, k) in times:
                step = times[D, m, k] / ms
                steps.append((max(step * (10 * M + 4 * K) / (10 * m + 4 * k), 1 / step), f"D={D} M={M} K={K} -> M={m} K={k}"))
    report["largest_unexplained_step"], where = max(steps)
    save(report, args.out)
    print(f"largest step between neighbours beyond the flops: {report['largest_unexplained_step']:.2f}x, {where}")
    return everything_right


def save(report: dict, path: str | None) -> None:
    """Written after every case: a run that is cut off keeps what it has."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def start_report(commit: str | None) -> dict:
    report = {"environment": environment(commit), "dtype": str(DTYPE), "ceilings": ceilings(), "formulas": FORMULAS}
    ceiling, where = report["ceilings"], report["environment"]
    print(f"{where['gpu']}, torch {where['torch']}, driver {where['driver']}, mita_ext {where['mita_ext']} ({where['commit']})")
    print(f"ceilings: copy {ceiling['copy_TB_s']:.2f} TB/s, bf16 8192^3 product {ceiling['matmul_bf16_TFLOP_s']:.0f} TFLOP/s")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--inputs", default=",".join(INPUTS), help="of " + ",".join(INPUTS))
    parser.add_argument("--peers", choices=("all", "dense", "none"), default="all")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--repeats-check", action="store_true", help="200 forward+backward runs must agree bit for bit")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", action="store_true", help="time against N from 256 to 1048576 instead of the cases")
    instead.add_argument("--grid", action="store_true", help="forward time against M and K instead of the cases")
    parser.add_argument("--commit", help="what is measured; default: $MITA_COMMIT, else git")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()

    started = time.perf_counter()
    report = start_report(args.commit)
    name, bench = ("sweep", sweep) if args.sweep else ("grid", grid) if args.grid else ("results", bench_cases)
    report[name] = []
    right = bench(args, report)
    print(f"{'all correct' if right else 'FAIL: see above'}; {time.perf_counter() - started:.0f} s")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
