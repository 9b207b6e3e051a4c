"""bench.train, small: every variant learns, answers are right, and where MiTA is dense attention it is found to be."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for library in ("timm", "matplotlib", "sklearn"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install mita-ext[bench]")

import matplotlib.pyplot as plt  # noqa: E402
import sklearn.datasets  # noqa: E402
from timm.layers import Attention  # noqa: E402

from bench import plot, train  # noqa: E402
from bench.tasks import Digits, Recall, enlarged  # noqa: E402

CPU = torch.device("cpu")
SMALL = train.Size(dim=32, depth=1, heads=2)
TASK = Recall(tokens=400, runs=3, run_length=16, pairs_per_topic=8)


class Quiet:
    def update(self): ...


@pytest.fixture(scope="module")
def digits():
    return Digits.load(None, CPU)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_digits_are_learned_and_reproducible(variant, digits):
    """A handful of images, by heart."""
    few = replace(digits, images=digits.images[:1].repeat(1797, 1, 1, 1), labels=digits.labels[:1].repeat(1797))
    recipe = replace(train.DIGITS, steps=6, batch=8)
    losses = [train.train_digits(variant, 3, few, SMALL, recipe, Quiet())[1] for _ in range(2)]
    assert torch.equal(*losses)
    assert losses[0][-1] < losses[0][0] - 0.3


def test_variants_start_alike_and_splits_differ(digits):
    states = []
    for variant in train.VARIANTS:
        torch.manual_seed(0)
        states.append(train.vit(variant, SMALL, CPU).state_dict())
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    (training, testing), (other, _) = digits.split(0), digits.split(1)
    assert (len(training.labels), len(testing.labels)) == (1200, 597)
    assert not torch.equal(training.labels, other.labels)


def test_enlarged_digits(digits):
    """Without noise a plain bilinear enlargement; with noise the same image, a little elsewhere."""
    images = digits.images[:20]
    plain = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged(images), plain)
    moved = enlarged(images, generator())
    assert not torch.allclose(moved, plain, atol=0.1)
    nearest = torch.cdist(moved.flatten(1), plain.flatten(1)).argmin(1)
    assert (nearest == torch.arange(20)).double().mean() > 0.8


def test_digits_without_scikit_learn(digits, monkeypatch):
    copy = Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn, or copy .*digits.csv.gz .*--data"):
        Digits.load(None, CPU)
    again = Digits.load(copy, CPU)
    assert torch.equal(again.images, digits.images) and torch.equal(again.labels, digits.labels)


@pytest.mark.parametrize("scattered", [False, True])
def test_recall_has_right_answers(scattered):
    """Among all tokens with a value exactly one has the key of a query, and it holds the answer."""
    tokens, answers = TASK.sequences(2, generator(), scattered)
    keys, values = tokens.split([64, 16], dim=2)
    is_query = (values == 0).all(2)
    assert torch.equal(is_query, answers >= 0) and (is_query.sum(1) == 3 * 16).all()
    for key, value, query, answer in zip(keys, values, is_query, answers):
        same = (key[query][:, None] == key[~query]).all(2)
        assert (same.sum(1) == 1).all()
        assert torch.equal(value[~query][same.int().argmax(1)].argmax(1), answer[query])


def test_recall_asks_in_runs_about_one_topic():
    tokens, answers = TASK.sequences(4, generator())
    scattered, _ = TASK.sequences(4, generator(), scattered=True)
    for sequence, asked, other in zip(tokens, answers >= 0, scattered):
        starts = (asked & ~torch.nn.functional.pad(asked, (1, 0))[:-1]).nonzero().flatten().tolist()
        topics = {tuple(topic) for topic in sequence[asked][:, :32].tolist()}
        assert len(topics) == 3 and len(starts) <= 3  # runs may touch
        places = asked.nonzero().flatten().view(3, 16)
        assert all(len(sequence[run][:, :32].unique(dim=0)) == 1 and run[-1] - run[0] == 15 for run in places)
        assert torch.equal(sequence.sum(1).sort().values, other.sum(1).sort().values)  # the same tokens, elsewhere
        assert not torch.equal(sequence, other)


def test_recall_is_another_in_every_batch_and_the_same_for_a_seed():
    one, two = generator(), generator()
    first, _ = TASK.sequences(2, one)
    assert torch.equal(first, TASK.sequences(2, two)[0])
    assert not torch.equal(first, TASK.sequences(2, one)[0])


def test_recall_with_all_keys_is_dense_attention(monkeypatch):
    """The models of both start with the same weights, so they answer alike where MiTA is dense attention."""
    monkeypatch.setattr(train, "RECALL_TOPK", TASK.tokens)
    tokens, _ = TASK.sequences(2, generator())
    outputs = []
    for variant in ("dense", "route_only"):
        torch.manual_seed(0)
        outputs.append(train.recaller(variant, TASK)(tokens))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_recall_trains_and_answers(variant, monkeypatch):
    """Reproducibly; that it is learned takes longer than a test may."""
    monkeypatch.setattr(train, "ASKED_TOKENS", 1)
    recipe = replace(train.RECALL, steps=2, batch=2)
    trained = [train.train_recall(variant, 0, TASK, recipe, CPU, Quiet()) for _ in range(2)]
    assert torch.equal(trained[0][1], trained[1][1]) and trained[0][1].isfinite().all()
    asked = train.ask(trained[0][0], variant, replace(TASK, tokens=800), TASK.tokens)
    rules = [("", None)] if variant == "dense" else [("N/64", 12), ("same", 6)]
    assert [(a["scattered"], a["rule"], a["M"]) for a in asked] == [(s, *rule) for s in (False, True) for rule in rules]
    assert all(0 <= a["accuracy"] <= 1 for a in asked)


def test_swap_agrees_fully_where_mita_is_dense_attention(digits):
    """With all keys and no shared expert; the more keys the better. Large weights: attention that is far from uniform."""
    torch.manual_seed(0)
    model = train.vit("dense", train.Size(dim=32, depth=2, heads=2), CPU)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    images, labels = enlarged(digits.images[:6]), digits.labels[:6]
    points = train.swaps(model, images, labels, landmarks=((4, 4), (16, 16)), topk=(4, 64, 257))
    assert len(points) == 2 * 2 * 3 and all(type(block.attn) is Attention for block in model.blocks)
    by = {(p["shared_expert"], p["M"], p["K"]): p for p in points}
    for M in (16, 256):
        few, more, all_keys = (by[False, M, K] for K in (4, 64, 257))
        assert all_keys["accuracy"] == train.accuracy(model, images, labels)
        for a, b, c in zip(few["agreement"], more["agreement"], all_keys["agreement"]):
            assert a < b < c and abs(c - 1) < 1e-6
        assert few["agreement"] != by[True, M, 4]["agreement"]


def test_agreement_counts_the_mean_as_nothing():
    torch.manual_seed(0)
    x, dense = torch.randn(2, 17, 16), Attention(16, 2)
    flat = Attention(16, 2)
    flat.load_state_dict(dense.state_dict())
    flat.qkv.weight.data[:32] = 0  # equal logits: each head returns the mean of its values
    exact = train.attention_output(dense, x)
    mean = train.attention_output(flat, x)
    assert train.agreement(dense, dense, x) == 1
    exact, mean = exact.detach(), mean.detach()
    expected = 1 - (exact - mean).square().sum() / (exact - exact.mean(1, keepdim=True)).square().sum()
    assert math.isclose(train.agreement(dense, flat, x), expected, abs_tol=1e-5)
    assert train.agreement(dense, flat, x) <= 0


def test_against_dense():
    """95, 96 and 97 against 94, 96 and 95.9: behind by 1, 0 and 1.1; a mean of 0.7, with a standard error of 0.35."""
    shares = {"dense": (0.95, 0.96, 0.97), "mita": (0.94, 0.96, 0.959), "route_only": (0.95, 0.96, 0.97)}
    runs = [{"variant": v, "seed": s, "accuracy": x} for v in shares for s, x in enumerate(shares[v])]
    summary = train.against_dense(runs)
    assert summary["dense"] == {"mean": pytest.approx(96), "spread": pytest.approx(1), "seeds": 3}
    assert summary["mita"]["behind_dense"] == pytest.approx(0.7)
    assert summary["mita"]["standard_error"] == pytest.approx(0.3512, abs=1e-4)
    assert not summary["mita"]["within_a_point"] and summary["route_only"]["within_a_point"]
    alone = train.against_dense([run for run in runs if run["seed"] == 0])
    assert not alone["route_only"]["within_a_point"]  # one seed shows nothing


def run(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, command)])
    return train.main()


def test_digits_report(digits, monkeypatch, tmp_path, capsys):
    few = Digits(digits.images[:1230], digits.labels[:1230])
    monkeypatch.setattr(Digits, "load", lambda *_: few)
    size = ("--dim", 16, "--depth", 1, "--heads", 2)
    out = tmp_path / "digits.json"
    run(monkeypatch, "digits", "--device", "cpu", "--steps", 2, "--seeds", 2, "--variants", "dense,mita", *size, "--out", out)
    report = json.loads(out.read_text())
    assert report["environment"]["gpu"] == "none" and report["environment"]["commit"]
    assert report["digits"]["test_images"] == 30
    assert [(r["variant"], r["seed"], len(r["losses"])) for r in report["digits"]["runs"]] == [
        (variant, seed, 2) for seed in range(2) for variant in ("dense", "mita")
    ]
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert "behind dense by" in capsys.readouterr().out
    left, right = plot.digits(report).axes
    assert [line.get_label() for line in left.lines] == ["dense", "mita"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["dense", "mita"]


def test_recall_report(monkeypatch, tmp_path, capsys):
    out = tmp_path / "recall.json"
    lengths = ("--lengths", "768,1536")
    monkeypatch.setattr(train, "RECALL", replace(train.RECALL, batch=1))
    monkeypatch.setattr(train, "ASKED_TOKENS", 1)
    options = ("--steps", 1, "--seeds", 1, "--variants", "dense,mita")
    run(monkeypatch, "recall", "--device", "cpu", *options, *lengths, "--out", out)
    assert (tmp_path / "recall.png").exists()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "in runs" in line]
    assert [row[0] for row in rows] == ["dense", "mita", "mita"]
    report = json.loads(out.read_text())
    _, in_runs, _ = plot.recall(report).axes
    drawn = {line.get_label(): line.get_ydata() for line in in_runs.lines}
    asked = [a for r in report["recall"]["runs"] if r["variant"] == "mita" for a in r["asked"]]
    assert list(drawn["mita, M=same"]) == [100 * a["accuracy"] for a in asked if a["rule"] == "same" and not a["scattered"]]


def test_pictures_of_swap_and_steps():
    environment = {"gpu": "GPU", "torch": "2", "commit": "c"}
    point = {"M": 4, "agreement": [0.5, 0.7], "accuracy": 0.9}
    points = [point | {"K": K, "shared_expert": shared} for shared in (True, False) for K in (4, 8)]
    report = {"environment": environment, "swap": {"tokens": 257, "dense_accuracy": 0.95, "points": points}}
    left, right = plot.swap(report).axes
    assert [list(line.get_ydata()) for line in left.lines] == [pytest.approx([0.6, 0.6])] * 2
    assert right.lines[-1].get_ydata()[0] == 95

    step = {"batch": 2, "median_ms": 8.0, "peak_MiB": 100.0}
    points = [step | {"pixels": p, "attention": a, "compiled": False} for a in ("dense", "mita") for p in (224, 512)]
    left, right = plot.steps({"environment": environment, "steps": {"model": "m", "about": "", "points": points}}).axes
    assert [line.get_label() for line in left.lines] == ["dense, eager", "mita, eager"]
    assert list(left.lines[0].get_ydata()) == [4, 4] and list(right.lines[1].get_ydata()) == [50, 50]
    plt.close("all")


def test_steps_needs_a_gpu(monkeypatch):
    with pytest.raises(SystemExit, match="steps needs a GPU"):
        run(monkeypatch, "steps", "--device", "cpu")


def test_an_unknown_variant_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "digits", "--variants", "dense,sparse")
    assert "must be some of dense,mita,mita_2_routes,compress_only,route_only, got sparse" in capsys.readouterr().err
