"""Pictures hold what attention decided, token by token."""

import numpy as np
import pytest
import torch

import mita_ext
from mita_ext.nn import MiTAAttention

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mita-ext[viz]")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from mita_ext import viz  # noqa: E402

GRID, PREFIX, WINDOWS, TOPK = (6, 9), 2, (2, 4), 5
PIXELS = np.random.default_rng(0).random((24, 36, 3))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def looked(device="cpu", **options):
    """A look at 2 samples and 3 heads, with 2 prefix tokens and 1 behind the image."""
    q, k, v = torch.randn(3, 2, 3, PREFIX + 54 + 1, 8, generator=torch.Generator().manual_seed(0)).to(device)
    pooling = {"num_landmarks": WINDOWS, "grid": GRID, "num_prefix_tokens": PREFIX}
    return viz.Look(mita_ext.attention(q, k, v, topk=TOPK, return_aux=True, **pooling, **options)[1], **pooling)


def layer(dim=16, **options):
    torch.manual_seed(0)
    return MiTAAttention(dim, 2, num_landmarks=(2, 2), topk=3, **options)


def map_of(ax):
    """What is drawn over the image, padding and keys that nobody holds as -1."""
    return ax.images[-1].get_array().filled(-1)


def test_expert_map(device):
    look = looked(device, routes=2)
    ax = viz.expert_map(look, PIXELS, sample=1, head=2)
    best = look.aux.experts[1, 2, PREFIX : PREFIX + 54, 0].cpu()
    assert np.array_equal(map_of(ax), best.view(GRID))
    colors = ax.images[-1].to_rgba(map_of(ax))[..., :3]
    bars = viz.load(look, sample=1, head=2).patches  # the colour of an expert is that of its bar
    assert all(np.allclose(colors[y, x], bars[map_of(ax)[y, x]].get_facecolor()[:3]) for y, x in np.ndindex(GRID))


def test_selection_map(device):
    look = looked(device)
    counts = np.zeros(PREFIX + 54 + 1, dtype=int)
    for keys in look.aux.topk_indices[1].flatten(0, 1).cpu():
        counts[keys] += 1
    drawn = map_of(viz.selection_map(look, PIXELS, sample=1))
    assert np.array_equal(np.maximum(drawn, 0).ravel(), counts[PREFIX : PREFIX + 54])
    assert ((drawn == -1).ravel() == (counts[PREFIX : PREFIX + 54] == 0)).all()
    assert f"({(drawn == -1).mean():.0%})" in viz.selection_map(look, sample=1).get_title()
    heads = [map_of(viz.selection_map(look, sample=1, heads=[h])).clip(0) for h in range(3)]
    assert np.array_equal(sum(heads), drawn.clip(0)) and heads[0].max() <= 8  # an expert holds a key once


def test_load(device):
    look = looked(device, routes=2)
    heights = [bar.get_height() for bar in viz.load(look, sample=1, head=2).patches]
    assert heights == torch.bincount(look.aux.experts[1, 2].flatten().cpu(), minlength=8).tolist()
    assert sum(heights) == 2 * (PREFIX + 54 + 1)


def test_landmark_windows():
    """The box with the number m is around the tokens that landmark m averages."""
    ax = viz.landmark_windows(looked(), PIXELS)
    assert [text.get_text() for text in ax.texts] == [str(m) for m in range(8)]
    averaged = mita_ext.pool_landmarks(torch.eye(54)[None, None], WINDOWS, grid=GRID)[0, 0].view(8, *GRID) > 0
    for box, tokens in zip(ax.patches, averaged, strict=True):
        (left, top), (right, bottom) = (np.round(corner).astype(int) for corner in box.get_bbox().get_points())
        inside = torch.zeros(GRID, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(inside, tokens)


def test_overview_has_all_four(device):
    look = looked(device)
    figure = viz.overview(look, torch.rand(1, 24, 36), sample=1, head=1)
    windows, experts, selection, load = figure.axes[:4]
    assert len(windows.patches) == len(load.patches) == 8
    assert np.array_equal(map_of(experts), map_of(viz.expert_map(look, sample=1, head=1)))
    assert np.array_equal(map_of(selection), map_of(viz.selection_map(look, sample=1)))
    assert all(len(ax.images) >= 1 and ax.images[0].get_array().shape == (24, 36) for ax in (windows, experts, selection))


def test_one_dimension_and_padding():
    q = torch.randn(2, 1, 20, 8)
    lengths = torch.tensor([20, 12], dtype=torch.int32)
    _, aux = mita_ext.attention(q, q, q, num_landmarks=40, topk=15, seqlens_q=lengths, seqlens_k=lengths, return_aux=True)
    look = viz.Look(aux, 40)
    drawn = map_of(viz.expert_map(look, sample=1))
    assert drawn.shape == (1, 20) and (drawn[0, 12:] == -1).all() and (drawn[0, :12] >= 0).all()
    assert look.load(sample=1).sum() == 12
    assert (look.times_chosen(sample=1)[0, 12:] == 0).all() and look.times_chosen(sample=1).sum() == 40 * 12
    assert len(viz.landmark_windows(look).patches) == 40 and not viz.landmark_windows(look).texts  # too many for numbers


def test_no_map_without_routes():
    look = looked(routes=0)
    with pytest.raises(ValueError, match="routes must be at least 1 for a map of experts, got 0"):
        viz.expert_map(look)
    assert not plt.get_fignums()
    assert look.times_chosen().sum() > 0


def test_look_at_a_layer(device):
    """The experts and keys of the stages, on the queries and keys that the layer makes of its input."""
    attn, x = layer(qk_norm=True, norm_layer=torch.nn.LayerNorm).to(device), torch.randn(2, 1 + 16, 16, device=device)
    q, k, _ = attn.qkv(x).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    landmarks = mita_ext.pool_landmarks(q, (2, 2), grid=(4, 4), num_prefix_tokens=1)
    aux = attn.look(x)
    assert torch.equal(aux.experts, mita_ext.route(q, landmarks))
    assert torch.equal(aux.topk_indices, mita_ext.landmark_topk(landmarks, k, k, topk=3)[0])


def test_look_at_a_model():
    """Each layer by its name, with the input that it has in the model, which stays as it was."""
    first, second = layer(), layer()
    model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(first, torch.nn.GELU(), second)})
    model.forward = model["blocks"].forward
    x = torch.randn(2, 1 + 16, 16)
    before = model(x)
    looks = viz.look(model, x)
    assert list(looks) == ["blocks.0", "blocks.2"]
    assert (looks["blocks.2"].image, looks["blocks.2"].windows, looks["blocks.2"].num_prefix_tokens) == ((4, 4), (2, 2), 1)
    expected = second.look(torch.nn.functional.gelu(first(x)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(looks["blocks.2"].aux, expected))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(x), before) and not looks["blocks.0"].aux.lse.requires_grad


def test_look_leaves_no_hook_behind_where_the_model_fails():
    attn = layer()
    with pytest.raises(ValueError, match="no square image"):
        viz.look(attn, torch.randn(2, 16, 16))
    assert not attn._forward_pre_hooks


def test_look_at_a_model_without_mita():
    with pytest.raises(ValueError, match="model must hold a MiTAAttention, got a Linear without one"):
        viz.look(torch.nn.Linear(2, 2), torch.randn(2, 2))
