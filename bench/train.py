"""Does it train, and what does a training step take? MiTA against dense attention, with the same recipe.

python3 -m bench.train digits --out bench/results/digits.json    a small ViT on handwritten digits, five seeds of each variant
python3 -m bench.train swap --out bench/results/swap.json        a dense model's attention exchanged, without training
python3 -m bench.train recall --out bench/results/recall.json    one pair among thousands: what compression alone cannot do
python3 -m bench.train steps --out bench/results/steps.json      time and memory of a ViT-S training step (needs a GPU)

Each also draws its picture beside the JSON. On one H100 they are meant to take about 100, 15, 120 and 60 seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from tqdm import tqdm

from mita_ext.integrations.timm import convert
from mita_ext.nn import MiTAAttention

from . import plot
from .bench_attention import MIB, save
from .tasks import PIXELS, Digits, Recall, enlarged
from .timing import environment, summary

VARIANTS = {  # options of MiTAAttention; None is dense attention
    "dense": None,
    "mita": {},
    "mita_2_routes": {"routes": 2},
    "compress_only": {"routes": 0},
    "route_only": {"shared_expert": False},
}


@dataclass(frozen=True)
class Recipe:
    """AdamW, a learning rate that rises and falls once, bf16 autocast on CUDA; the same for every variant."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # norm of the gradient


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def fit(model: nn.Module, batch_of: Callable[[int], tuple[Tensor, Tensor]], recipe: Recipe, device: torch.device, bar: tqdm):
    """Trains on batch_of(step) -> inputs, labels (below 0: not asked). Returns the losses [steps], still on the device."""
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps + 1, pct_start=recipe.warmup, cycle_momentum=False
    )
    model.train()
    losses = []
    for step in range(recipe.steps):
        inputs, labels = batch_of(step)
        with autocast(device):
            loss = F.cross_entropy(model(inputs).flatten(0, -2).float(), labels.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        bar.update()
    return torch.stack(losses)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers among the labels that are asked (not below 0)."""
    model.eval()
    with autocast(inputs.device):
        right = model(inputs).argmax(-1) == labels
    return float(right[labels >= 0].double().mean())


# ---- digits: 1797 images, 8 x 8, of the scikit-learn package; enlarged to 64 x 64, which makes 256 patches and a class token

PATCH = 4
TOKENS = (PIXELS // PATCH) ** 2 + 1  # patches and a class token
DIGITS = Recipe(steps=600, batch=128, lr=2e-3, weight_decay=0.05)
DIGITS_MITA = {"num_landmarks": (5, 5), "topk": 25}  # of the paper's DeiT


@dataclass(frozen=True)
class Size:
    dim: int = 128
    depth: int = 4
    heads: int = 4


def vit(variant: str, size: Size, device: torch.device) -> VisionTransformer:
    """The same weights for every variant under the same torch.manual_seed: torch's own, and places loud enough to be seen
    from the first step on. timm's are made for wider models and longer training.
    """
    options = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads, "weight_init": "reset"}
    model = VisionTransformer(PIXELS, PATCH, 1, 10, **options)
    nn.init.normal_(model.pos_embed, std=0.5)
    if VARIANTS[variant] is not None:
        convert(model, **DIGITS_MITA, **VARIANTS[variant])
    return model.to(device)


def train_digits(variant: str, seed: int, digits: Digits, size: Size, recipe: Recipe, bar: tqdm):
    """-> the model, its losses [steps]."""
    training, _ = digits.split(seed)
    device = training.images.device
    torch.manual_seed(seed)
    model = vit(variant, size, device)
    generator = torch.Generator(device).manual_seed(seed)

    def batch_of(step: int):
        chosen = torch.randint(len(training.labels), (recipe.batch,), generator=generator, device=device)
        return enlarged(training.images[chosen], generator), training.labels[chosen]

    return model, fit(model, batch_of, recipe, device, bar)


def bench_digits(args) -> dict:
    size, recipe = Size(args.dim, args.depth, args.heads), replace(DIGITS, steps=args.steps)
    digits = Digits.load(args.data, args.device)
    result = {"size": asdict(size), "recipe": asdict(recipe), "mita": DIGITS_MITA, "tokens": TOKENS, "runs": []}
    with tqdm(total=len(args.variants) * args.seeds * recipe.steps, unit="step") as bar:
        for seed in range(args.seeds):
            _, testing = digits.split(seed)
            for variant in args.variants:
                bar.set_description(f"{variant}, seed {seed}")
                started = time.perf_counter()
                model, losses = train_digits(variant, seed, digits, size, recipe, bar)
                run = {"variant": variant, "seed": seed, "losses": losses.tolist(), "seconds": time.perf_counter() - started}
                run["accuracy"] = accuracy(model, enlarged(testing.images), testing.labels)
                result["runs"].append(run)
    result["test_images"] = len(testing.labels)
    result["summary"] = against_dense(result["runs"])
    print(f"test accuracy in per cent, {result['test_images']} images, {args.seeds} seeds: mean ± standard deviation")
    print_against_dense(result["summary"])
    return result


def against_dense(runs: list[dict]) -> dict[str, dict]:
    """Accuracies in per cent: mean and spread over the seeds, and the difference to the dense run of the same seed."""
    by = {}
    for run in runs:
        by.setdefault(run["variant"], {})[run["seed"]] = 100 * run["accuracy"]
    result = {}
    for variant, by_seed in by.items():
        result[variant] = {"mean": statistics.mean(by_seed.values()), "spread": spread(by_seed.values()), "seeds": len(by_seed)}
        if variant != "dense" and "dense" in by:
            behind = [by["dense"][seed] - percent for seed, percent in by_seed.items()]
            error = spread(behind) / len(behind) ** 0.5
            result[variant] |= {"behind_dense": statistics.mean(behind), "standard_error": error}
            result[variant]["within_a_point"] = result[variant]["behind_dense"] + 2 * error <= 1
    return result


def spread(values) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def print_against_dense(summary: dict[str, dict]) -> None:
    for variant, row in summary.items():
        line = f"{variant:14} {row['mean']:6.2f} ± {row['spread']:.2f}"
        if "behind_dense" in row:
            line += f"   behind dense by {row['behind_dense']:5.2f} ± {row['standard_error']:.2f} (standard error), "
            line += "within 1 point" if row["within_a_point"] else "NOT shown to be within 1 point"
        print(line)


# ---- swap: the attention of a dense model exchanged without training, on what the model itself makes of test images

SWAP_LANDMARKS = ((2, 2), (4, 4), (8, 8), (16, 16))
SWAP_TOPK = (4, 8, 16, 32, 64, 128, 257)  # 257: all keys


@torch.no_grad()
def agreement(dense: nn.Module, mita: MiTAAttention, x: Tensor) -> float:
    """How much of dense attention's output on x [B, N, dim] MiTA's explains: 1 - |difference|² / |output - its mean over the
    tokens|². 1 is equality, 0 as far away as the same mean for all tokens of an image, below 0 farther.
    """
    exact, ours = (attention_output(layer, x).double() for layer in (dense, mita))
    return float(1 - (ours - exact).square().sum() / (exact - exact.mean(1, keepdim=True)).square().sum())


def attention_output(layer: nn.Module, x: Tensor) -> Tensor:
    """[B, N, H D]: what the heads of a layer return, which is what its projection gets."""
    return inputs_of([layer.proj], lambda: layer(x))[0]


def inputs_of(layers: list[nn.Module], forward: Callable) -> list[Tensor]:
    """The first argument of each layer during forward()."""
    seen = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    forward()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def swaps(model: VisionTransformer, images: Tensor, labels: Tensor, landmarks=SWAP_LANDMARKS, topk=SWAP_TOPK) -> list[dict]:
    """For each M, K, with and without the shared expert: the agreement of each layer, given the inputs that it has in the
    dense model, in float32; and the accuracy of the model with all layers exchanged.
    """
    model.eval()
    dense = [block.attn for block in model.blocks]
    features = inputs_of(dense, lambda: model(images))
    points = []
    for shared in (True, False):
        for pair in landmarks:
            for K in topk:
                undo = convert(model, num_landmarks=pair, topk=K, shared_expert=shared)
                point = {"M": pair[0] * pair[1], "K": K, "shared_expert": shared}
                layers = zip(dense, (block.attn for block in model.blocks), features, strict=True)
                point["agreement"] = [agreement(*layer) for layer in layers]
                point["accuracy"] = accuracy(model, images, labels)
                undo()
                points.append(point)
    return points


def bench_swap(args) -> dict:
    size, recipe = Size(args.dim, args.depth, args.heads), replace(DIGITS, steps=args.steps)
    digits = Digits.load(args.data, args.device)
    with tqdm(total=recipe.steps, unit="step", desc="dense") as bar:
        model, _ = train_digits("dense", 0, digits, size, recipe, bar)
    _, testing = digits.split(0)
    images, labels = enlarged(testing.images[: args.images]), testing.labels[: args.images]
    result = {"size": asdict(size), "recipe": asdict(recipe), "test_images": len(images), "tokens": TOKENS}
    result["dense_accuracy"] = accuracy(model, images, labels)
    result["points"] = swaps(model, images, labels)
    print(f"dense accuracy {result['dense_accuracy']:.2%}; mean agreement of the layers / accuracy after the exchange")
    for shared in (True, False):
        title = f"{'with' if shared else 'without'} the shared expert"
        print(f"\n{title:26}" + "".join(f"{f'K={K}':>16}" for K in SWAP_TOPK))
        for mh, mw in SWAP_LANDMARKS:
            row = [p for p in result["points"] if p["M"] == mh * mw and p["shared_expert"] == shared]
            cells = (f"{statistics.mean(p['agreement']):.3f} / {p['accuracy']:.1%}" for p in row)
            print(f"M={mh * mw}".ljust(26) + "".join(f"{cell:>16}" for cell in cells))
    return result


# ---- recall: which value belongs to this key? Every pair is one token; only the sequence itself can answer


RECALL = Recipe(steps=800, batch=16, lr=2e-3, weight_decay=0.01)
WINDOW = 64  # tokens that a landmark pools: M = N / WINDOW
RECALL_TOPK = 128  # a run and its topic are 96 tokens
ASKED_TOKENS = 2**18  # for each accuracy, in 16 sequences at most


def recaller(variant: str, task: Recall, dim: int = 256, heads: int = 8) -> nn.Sequential:
    """One block without positions. Queries and keys start with one projection, so that like attends to like: without it no
    variant, dense attention included, finds within a few hundred steps that keys are to be compared.
    """
    block = Block(dim, heads)
    with torch.no_grad():
        query, key, _ = block.attn.qkv.weight.chunk(3)
        key.copy_(query.mul_(2))
    model = nn.Sequential(nn.Linear(task.width, dim, bias=False), block, nn.LayerNorm(dim), nn.Linear(dim, task.values))
    if VARIANTS[variant] is not None:
        dense, block.attn = block.attn, MiTAAttention(dim, heads, topk=RECALL_TOPK, **VARIANTS[variant])
        block.attn.load_state_dict(dense.state_dict())
        set_landmarks(model, task.tokens // WINDOW)
    return model


def set_landmarks(model: nn.Sequential, M: int) -> None:
    model[1].attn.num_landmarks = M


def train_recall(variant: str, seed: int, task: Recall, recipe: Recipe, device: torch.device, bar: tqdm):
    """-> the model, its losses [steps]. The same weights and sequences for every variant of a seed."""
    torch.manual_seed(seed)
    model = recaller(variant, task).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    return model, fit(model, lambda step: task.sequences(recipe.batch, generator), recipe, device, bar)


def bench_recall(args) -> dict:
    """Trained at the first length, asked at all of them: with windows of the same length, and with the same M."""
    task, recipe, device = Recall(args.lengths[0]), replace(RECALL, steps=args.steps), args.device
    result = {"task": asdict(task), "recipe": asdict(recipe), "window": WINDOW, "topk": RECALL_TOPK, "runs": []}
    with tqdm(total=len(args.variants) * args.seeds * recipe.steps, unit="step") as bar:
        for seed in range(args.seeds):
            for variant in args.variants:
                bar.set_description(f"{variant}, seed {seed}")
                started = time.perf_counter()
                model, losses = train_recall(variant, seed, task, recipe, device, bar)
                run = {"variant": variant, "seed": seed, "losses": losses.tolist(), "seconds": time.perf_counter() - started}
                at_length = (ask(model, variant, replace(task, tokens=N), task.tokens) for N in args.lengths)
                run["asked"] = [asked for part in at_length for asked in part]
                result["runs"].append(run)
    print_recall(result["runs"])
    return result


def ask(model: nn.Sequential, variant: str, task: Recall, trained_at: int) -> list[dict]:
    """Accuracy at one length, with queries in runs and scattered; with windows as long as in training, and with as many."""
    device = next(model.parameters()).device
    landmarks = {"": None} if variant == "dense" else {"N/64": task.tokens // WINDOW, "same": trained_at // WINDOW}
    sequences = max(1, min(16, ASKED_TOKENS // task.tokens))
    asked = []
    for scattered in (False, True):
        for rule, M in landmarks.items():
            if M is not None:
                set_landmarks(model, M)
            generator = torch.Generator(device).manual_seed(task.tokens)
            shares = [accuracy(model, *task.sequences(1, generator, scattered)) for _ in range(sequences)]
            asked.append({"N": task.tokens, "rule": rule, "M": M, "scattered": scattered, "accuracy": statistics.mean(shares)})
    return asked


def print_recall(runs: list[dict]) -> None:
    rows = {}
    for run in runs:
        for a in run["asked"]:
            row = rows.setdefault((run["variant"], "scattered" if a["scattered"] else "in runs", a["rule"]), {})
            row.setdefault(a["N"], []).append(100 * a["accuracy"])
    lengths = list(next(iter(rows.values())))
    print("right answers in per cent, mean (lowest) of the seeds; chance is 6.25")
    print(f"{'':14} {'queries':>10} {'M':>6}" + "".join(f"{f'N={N}':>16}" for N in lengths))
    for (variant, queries, rule), by_length in rows.items():
        cells = (f"{statistics.mean(shares):.1f} ({min(shares):.1f})" for shares in by_length.values())
        print(f"{variant:14} {queries:>10} {rule:>6}" + "".join(f"{cell:>16}" for cell in cells))


# ---- steps: what a training step of a ViT-S takes, from the optimizer's old gradients to its new weights

STEP_SIZES = {  # pixels -> options of convert, images in a batch; 16 x 16 pixels a patch
    224: ({"num_landmarks": (5, 5), "topk": 25}, 128),
    512: ({"num_landmarks": (7, 7), "topk": 49}, 32),
    1024: ({"num_landmarks": (8, 8), "topk": 64}, 8),
}


def time_steps(model: nn.Module, images: Tensor, labels: Tensor, samples: int) -> dict:
    """Milliseconds of a step among others, and the peak of memory: weights, optimizer, activations and all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    started = time.perf_counter()
    for _ in range(5):  # the first ones compile and allocate
        step()
    torch.cuda.synchronize()
    warmup = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in zip(events[:-1], events[1:], strict=True)]
    return summary(times, "ms") | {"warmup_seconds": warmup, "peak_MiB": torch.cuda.max_memory_allocated() / MIB}


def bench_steps(args) -> dict:
    if args.device.type != "cuda":
        raise SystemExit("steps needs a GPU")
    result = {"model": "vit_small_patch16_224", "about": "bf16 autocast, AdamW, blocks compiled one by one", "points": []}
    columns = "{:>7} {:>7} {:>7} {:>10} {:>9} {:>10} {:>9} {:>9}"
    print(columns.format("pixels", "tokens", "images", "attention", "", "ms a step", "images/s", "peak MiB"))
    for pixels in args.pixels:
        options, batch = STEP_SIZES[pixels]
        batch = args.batch or batch
        for compiled in {"eager": (False,), "compiled": (True,), "both": (False, True)}[args.modes]:
            for variant in ("dense", "mita"):
                torch.manual_seed(0)
                torch.cuda.empty_cache()
                torch._dynamo.reset()
                model = timm.create_model(result["model"], img_size=pixels).cuda()
                if variant == "mita":
                    convert(model, **options)
                for block in model.blocks if compiled else ():
                    block.compile()  # all of them share what is compiled
                images = torch.randn(batch, 3, pixels, pixels, device="cuda")
                labels = torch.randint(1000, (batch,), device="cuda")
                point = {"pixels": pixels, "tokens": model.patch_embed.num_patches + 1, "batch": batch, "attention": variant}
                point |= {"compiled": compiled, "options": options if variant == "mita" else {}}
                point |= time_steps(model, images, labels, args.samples)
                result["points"].append(point)
                ms, mode = point["median_ms"], "compiled" if compiled else "eager"
                rest = f"{ms:.2f}", f"{1e3 * batch / ms:.0f}", f"{point['peak_MiB']:.0f}"
                print(columns.format(pixels, point["tokens"], batch, variant, mode, *rest), flush=True)
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, bench in (("digits", bench_digits), ("swap", bench_swap), ("recall", bench_recall), ("steps", bench_steps)):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(bench=bench)
        command.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--commit", help="what is measured; default: $MITA_COMMIT, else git")
        command.add_argument("--out", type=Path, help="JSON file; the picture goes beside it")
        if name in ("digits", "recall"):
            command.add_argument("--seeds", type=int, default=5 if name == "digits" else 3)
            command.add_argument("--variants", type=names, default=list(VARIANTS), help="some of " + ",".join(VARIANTS))
        if name in ("digits", "swap"):
            command.add_argument("--data", type=Path, help="a copy of scikit-learn's digits.csv.gz, where that package is not")
            for field, size in asdict(Size()).items():
                command.add_argument(f"--{field}", type=int, default=size)
        if name == "swap":
            command.add_argument("--images", type=int, default=597, help="of the test set")
        if name != "steps":
            steps = RECALL.steps if name == "recall" else DIGITS.steps
            command.add_argument("--steps", type=int, default=steps, help="of each run")
        if name == "recall":
            command.add_argument("--lengths", type=numbers, default=[4096, 16384, 65536], help="the first one is trained at")
        if name == "steps":
            command.add_argument("--pixels", type=numbers, default=list(STEP_SIZES), help="some of 224,512,1024")
            command.add_argument("--modes", choices=("both", "eager", "compiled"), default="both")
            command.add_argument("--samples", type=int, default=20)
            command.add_argument("--batch", type=int, help="images; default: 128, 32 and 8")
    return parser.parse_args()


def names(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(VARIANTS)}, got {','.join(sorted(unknown))}")
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    args = arguments()
    started = time.perf_counter()
    report = {"environment": environment(args.commit, args.device), args.command: args.bench(args)}
    if args.out:
        save(report, args.out)
        print(plot.draw(report, args.out.with_suffix(".png")))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
