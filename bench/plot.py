"""The picture of a report in bench/results: time against N of the newest sweep, or what a report of bench.train holds.

python3 -m bench.plot [--results bench/results] [--out bench/results/time_against_n.png]
python3 -m bench.plot --report bench/results/digits.json --out bench/results/digits.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
COLORS = {
    "dense": "tab:blue",
    "mita": "tab:red",
    "mita_2_routes": "tab:purple",
    "compress_only": "tab:green",
    "route_only": "tab:orange",
}
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


def draw(report: dict, out: Path) -> Path:
    kinds = {"sweep": sweep, "digits": digits, "swap": swap, "recall": recall, "steps": steps}
    kind = next(kind for kind in kinds if kind in report)
    figure = kinds[kind](report)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def panels(count: int, report: dict, about: str):
    """Axes in a row, under what was measured on what."""
    figure, axes = plt.subplots(1, count, figsize=(3 + 4 * count, 4.5), layout="constrained", squeeze=False)
    where = report["environment"]
    on = f"a CPU, {where['cpu_threads']} threads" if where["gpu"] == "none" else where["gpu"]
    figure.suptitle(f"{about}\n{on}, torch {where['torch']}, commit {where['commit']}", fontsize=9)
    for ax in axes[0]:
        ax.grid(True, which="major", alpha=0.3)
    return figure, axes[0]


def sweep(report: dict):
    figure, (ax,) = panels(1, report, "B=1, H=16, D=64, M=K=64, bf16, cold L2")
    for who, direction, label, color, style in CURVES:
        points = [(p["N"], p[who][direction]) for p in report["sweep"] if "median_ms" in p.get(who, {}).get(direction, {})]
        if not points:
            continue
        n, timed = zip(*points, strict=True)
        ax.plot(n, [t["median_ms"] for t in timed], style, color=color, marker="o", markersize=4, label=label)
        ax.fill_between(n, [t["p10_ms"] for t in timed], [t["p90_ms"] for t in timed], color=color, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens N")
    ax.set_ylabel("milliseconds")
    ax.legend(fontsize=8)
    return figure


def digits(report: dict):
    """Losses against steps; the test accuracy of every run, with mean and standard deviation."""
    result = report["digits"]
    about = f"A ViT on handwritten digits, N={result['tokens']}, {result['test_images']} test images"
    figure, (left, right) = panels(2, report, about)
    for at, (variant, row) in enumerate(result["summary"].items()):
        runs = [run for run in result["runs"] if run["variant"] == variant]
        losses(left, [run["losses"] for run in runs], variant)
        right.plot([at] * len(runs), [100 * run["accuracy"] for run in runs], "o", color=COLORS[variant], alpha=0.5)
        right.errorbar(at, row["mean"], row["spread"], fmt="_", color="black", markersize=24, capsize=4)
    right.set_xticks(range(len(result["summary"])), result["summary"])
    right.set_ylabel("test accuracy, %")
    return figure


def losses(ax, runs: list[list[float]], variant: str, window: int = 20) -> None:
    """Moving averages: their mean over the seeds, and from the lowest to the highest."""
    window = min(window, len(runs[0]))
    smooth = np.stack([np.convolve(run, np.ones(window) / window, "valid") for run in runs])
    step = np.arange(window, window + smooth.shape[1])
    ax.plot(step, smooth.mean(0), color=COLORS[variant], label=variant)
    ax.fill_between(step, smooth.min(0), smooth.max(0), color=COLORS[variant], alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel(f"loss (mean of {window} steps)")
    ax.legend(fontsize=8)


def swap(report: dict):
    """Agreement and accuracy against the keys of an expert, a line for each M."""
    result = report["swap"]
    about = f"Dense attention of a digits ViT exchanged without training, N={result['tokens']}"
    figure, axes = panels(2, report, about)
    sizes = sorted({p["M"] for p in result["points"]})
    for shared, style in ((True, "-"), (False, "--")):
        for M, color in zip(sizes, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sizes))), strict=True):
            points = [p for p in result["points"] if p["M"] == M and p["shared_expert"] == shared]
            K = [p["K"] for p in points]
            label = f"M={M}" + ("" if shared else ", no shared expert")
            options = {"color": color, "marker": "o", "markersize": 4, "label": label}
            axes[0].plot(K, [np.mean(p["agreement"]) for p in points], style, **options)
            axes[1].plot(K, [100 * p["accuracy"] for p in points], style, **options)
    axes[0].set_ylabel("explained variance of the output, mean of layers")
    axes[0].set_ylim(max(axes[0].get_ylim()[0], -1), 1.05)
    axes[1].axhline(100 * result["dense_accuracy"], color="black", lw=1, ls=":", label="dense")
    axes[1].set_ylabel("test accuracy of the model, %")
    axes[1].legend(fontsize=7, handlelength=3.5)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xlabel("keys of an expert K")
    return figure


def recall(report: dict):
    """Loss against steps; accuracy against length, with landmarks in proportion to N and with always the same number."""
    result = report["recall"]
    task = result["task"]
    about = f"Associative recall, trained at {task['tokens']} tokens, {task['runs'] * task['run_length']} queries among pairs"
    figure, (left, *others) = panels(3, report, about)
    for variant in dict.fromkeys(run["variant"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["variant"] == variant]
        losses(left, [run["losses"] for run in runs], variant)
        for ax, scattered in zip(others, (False, True), strict=True):
            for rule, style in (("", "-"), ("N/64", "-"), ("same", "--")):
                by_length = {}
                for a in (a for run in runs for a in run["asked"] if (a["scattered"], a["rule"]) == (scattered, rule)):
                    by_length.setdefault(a["N"], []).append(100 * a["accuracy"])
                if by_length:
                    label = f"{variant}, M={rule}" if rule else variant
                    mean = [np.mean(shares) for shares in by_length.values()]
                    ax.plot(list(by_length), mean, style, color=COLORS[variant], marker="o", markersize=4, label=label)
    for ax, title in zip(others, ("queries in runs about one topic", "the same queries, scattered"), strict=True):
        ax.axhline(100 / task["values"], color="black", lw=1, ls=":", label="chance")
        ax.set_title(title, fontsize=9)
        ax.set_xscale("log", base=2)
        ax.set_ylim(0, 103)
        ax.set_xlabel("tokens N")
        ax.set_ylabel("right answers, %")
    others[0].legend(fontsize=7, handlelength=3.5)
    return figure


def steps(report: dict):
    """Milliseconds and memory of a training step against the pixels of an image."""
    result = report["steps"]
    figure, axes = panels(2, report, f"A training step of {result['model']}: {result['about']}")
    for attention in ("dense", "mita"):
        for compiled, style in ((False, "-"), (True, "--")):
            points = [p for p in result["points"] if (p["attention"], p["compiled"]) == (attention, compiled)]
            if not points:
                continue
            label = f"{attention}, {'compiled' if compiled else 'eager'}"
            options = {"color": COLORS[attention], "marker": "o", "label": label}
            for ax, key in zip(axes, ("median_ms", "peak_MiB"), strict=True):
                ax.plot([p["pixels"] for p in points], [p[key] / p["batch"] for p in points], style, **options)
    for ax, label in zip(axes, ("milliseconds an image", "peak MiB an image"), strict=True):
        ax.set_xlabel("pixels of an edge (patches of 16)")
        ax.set_ylabel(label)
        ax.set_yscale("log")
        ax.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--report", type=Path, help="this one instead")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "time_against_n.png")
    args = parser.parse_args()
    print(draw(json.loads(args.report.read_text()) if args.report else newest_sweep(args.results), args.out))


if __name__ == "__main__":
    main()
