"""Time against N, MiTA and dense attention, forward and forward+backward, from the sweeps in bench/results.

python3 -m bench.plot [--results bench/results] [--out bench/results/time_against_n.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CURVES = (
    ("mita", "forward", "MiTA, forward", "tab:red", "-"),
    ("mita", "forward_backward", "MiTA, forward + backward", "tab:red", "--"),
    ("cudnn", "forward", "dense (cuDNN), forward", "tab:blue", "-"),
    ("cudnn", "forward_backward", "dense (cuDNN), forward + backward", "tab:blue", "--"),
)


def newest_sweep(results: Path) -> dict:
    reports = [json.loads(path.read_text()) for path in results.glob("*.json")]
    sweeps = [report for report in reports if report.get("sweep")]
    if not sweeps:
        raise SystemExit(f"no sweep in {results}: python3 -m bench.bench_attention --sweep --out {results}/sweep.json")
    return max(sweeps, key=lambda report: report["environment"]["date"])


def plot(report: dict, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for who, direction, label, color, style in CURVES:
        points = [(p["N"], p[who][direction]) for p in report["sweep"] if "median_ms" in p.get(who, {}).get(direction, {})]
        if not points:
            continue
        n, timed = zip(*points, strict=True)
        axes.plot(n, [t["median_ms"] for t in timed], style, color=color, marker="o", markersize=4, label=label)
        axes.fill_between(n, [t["p10_ms"] for t in timed], [t["p90_ms"] for t in timed], color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens N")
    axes.set_ylabel("milliseconds")
    where = report["environment"]
    axes.set_title(f"B=1, H=16, D=64, M=K=64, bf16, cold L2\n{where['gpu']}, torch {where['torch']}", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "time_against_n.png")
    args = parser.parse_args()
    plot(newest_sweep(args.results), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
