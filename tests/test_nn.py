"""The module: a dense block's weights as they are, the paper's variants, the authors' checkpoints, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from cases import F64, assert_same
from torch import nn

from mita_ext import reference
from mita_ext.nn import MiTAAttention, from_authors

DIM, HEADS = 32, 4
DENSE = {"shared_expert": False, "topk": 64, "num_landmarks": 3}  # of up to 64 keys every query sees all


def module(device="cpu", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return MiTAAttention(DIM, HEADS, device="cpu", dtype=torch.float32, **options).to(device, dtype)


def tokens(N, device="cpu", dtype=torch.float32, B=2):
    return torch.randn(B, N, DIM, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def by_hand(x, weights, attend, *, activation=None, norm=lambda x: x, dwc=False, before=1, grid=None):
    """The module in plain PyTorch: weights are a state dict; attend(q, k, v) -> [B, H, N, D]."""
    B, N, _ = x.shape
    linear = lambda x, name: F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in linear(x, "qkv").chunk(3, -1))
    out = attend(norm(q), norm(k), v).transpose(1, 2).flatten(2)
    if dwc:
        gh, gw = grid
        values = v.transpose(1, 2).flatten(2)[:, before : before + gh * gw]
        image = F.pad(values.reshape(B, gh, gw, -1), (0, 0, 1, 1, 1, 1))
        kernel = weights["dwc.weight"].squeeze(1)  # [attn_dim, 3, 3]
        convolved = sum(image[:, i : i + gh, j : j + gw] * kernel[:, i, j] for i in range(3) for j in range(3))
        out[:, before : before + gh * gw] += (convolved + weights["dwc.bias"]).reshape(B, gh * gw, -1)
    out = norm(out)
    return linear(out * activation(linear(x, "gate")) if activation else out, "proj")


def unit(x):
    return F.layer_norm(x, x.shape[-1:])


def test_dense_weights_give_dense_attention():
    """Without a shared expert and with room for all keys it is scaled_dot_product_attention, norms, gate and all."""
    norms = {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}
    ours = module(dtype=F64, qkv_bias=True, gated=True, **norms, **DENSE)
    x = tokens(50, dtype=F64)
    dense = by_hand(x, ours.state_dict(), F.scaled_dot_product_attention, activation=torch.sigmoid, norm=unit)
    torch.testing.assert_close(ours(x), dense, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "default": (26, {}),
    "sizes": (26, {"attn_head_dim": 16, "dim_out": 24, "proj_bias": False}),
    "registers": (21, {"num_prefix_tokens": 5, "num_landmarks": (2, 2), "topk": 3, "routes": 2}),
    "rectangle": (25, {"grid_size": (3, 8), "num_landmarks": (2, 3), "dwc": True, "qkv_bias": True}),
    "tokens_behind": (28, {"grid_size": (5, 4), "num_prefix_tokens": 3, "dwc": True, "topk": 4}),
    "sequence": (23, {"num_landmarks": 4, "topk": 6}),
    "sequence_dwc": (26, {"num_landmarks": 4, "routes": 0, "dwc": True}),
    "gate": (17, {"gate": True, "dwc": True, "topk": 5, "shared_expert": False}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_follows_the_definition(name, device):
    N, options = OPTIONS[name]
    dtype = F64 if device == "cpu" else torch.float32
    ours, x = module(device, dtype, **options), tokens(N, device, dtype)
    before, landmarks = options.get("num_prefix_tokens", 1), options.get("num_landmarks", (5, 5))
    grid = options.get("grid_size") or (round((N - before) ** 0.5),) * 2
    pooling = {"grid": grid, "num_prefix_tokens": before} if isinstance(landmarks, tuple) else {}
    given = {key: options[key] for key in ("routes", "shared_expert") if key in options}
    given |= {"num_landmarks": landmarks, "topk": options.get("topk", 25), **pooling}
    attend = lambda q, k, v: reference.attention(q, k, v, **given)
    rest = {"activation": F.silu if options.get("gate") else None, "dwc": options.get("dwc"), "before": before, "grid": grid}
    expected = by_hand(x, ours.state_dict(), attend, **rest)
    assert ours(x).shape == (2, N, options.get("dim_out", DIM))
    tolerance = 1e-10 if dtype == F64 else 1e-4
    torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gated", [False, True])
def test_keys_of_the_state_dict(gated):
    keys = lambda **options: set(module(**options).state_dict())
    dense = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert keys(qkv_bias=True) == dense
    assert keys(qkv_bias=True, **{"gated" if gated else "gate": True}) == dense | {"gate.weight", "gate.bias"}
    assert keys(qkv_bias=True, dwc=True) == dense | {"dwc.weight", "dwc.bias"}
    norms = {f"{name}.{x}" for name in ("q_norm", "k_norm", "norm") for x in ("weight", "bias")}
    assert keys(qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm) == dense | norms


@pytest.mark.parametrize("gate", [False, True])
def test_checkpoint_of_the_authors(gate):
    """Their form, in plain PyTorch: 3 or 4 projections in one, the image pooled from all tokens but the last."""
    side, C = 4, DIM
    torch.manual_seed(2)
    fused, width = ("qkvg", 4 * C) if gate else ("qkv", 3 * C)
    shapes = {f"{fused}.weight": (width, C), f"{fused}.bias": (width,), "proj.weight": (C, C), "proj.bias": (C,)}
    shapes |= {"dwc.weight": (C, 1, 3, 3), "dwc.bias": (C,)}
    theirs = {f"blocks.0.attn.{key}": torch.randn(shape, dtype=F64) / 4 for key, shape in shapes.items()}
    around = {"cls_token": torch.zeros(1, 1, C), "head.weight": torch.zeros(3, C)}

    converted = from_authors(theirs | around)
    assert {key: converted.pop(key) for key in around} == around
    ours = MiTAAttention(
        C, HEADS, qkv_bias=True, gate=gate, dwc=True, num_landmarks=(2, 2), topk=9, num_prefix_tokens=0, grid_size=(side, side)
    ).double()
    ours.load_state_dict({key.removeprefix("blocks.0.attn."): value for key, value in converted.items()})

    def attend(q, k, v):
        image = q[:, :, :-1].mT.reshape(2, C, side, side)
        Z = F.adaptive_avg_pool2d(image, (2, 2)).reshape(2, HEADS, C // HEADS, 4).mT
        return reference.attention(q, k, v, landmarks=Z, topk=9)

    x, weights = tokens(side * side + 1, dtype=F64), {}
    for key, value in theirs.items():
        *_, name, parameter = key.split(".")
        parts = {"qkv": value[: 3 * C], "gate": value[3 * C :]} if name == "qkvg" else {name: value}
        weights |= {f"{name}.{parameter}": part for name, part in parts.items()}
    expected = by_hand(x, weights, attend, activation=F.silu if gate else None, dwc=True, before=0, grid=(side, side))
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "key,shape,message",
    [
        ("blocks.0.attn.q_norm.weight", (8,), "blocks.0.attn.q_norm.weight: the authors' code pools queries before their norm"),
        ("qkvg.weight", (30, 8), "qkvg.weight must be a multiple of 4 long, got 30"),
    ],
)
def test_checkpoints_that_are_refused(key, shape, message):
    with pytest.raises(ValueError, match=f"mita_ext.nn.from_authors: {message}"):
        from_authors({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    "call,kind,message",
    [
        (lambda: module()(tokens(26), torch.ones(26, 26)), TypeError, "attn_mask is not an option of this mechanism: experts"),
        (lambda: module()(tokens(26), is_causal=True), TypeError, "is_causal is not an option of this mechanism: every query"),
        (lambda: module(attn_drop=0.1)(tokens(26)), TypeError, "attn_drop is not an option.*; set it to 0 for training"),
        (lambda: module()(tokens(26)[0]), ValueError, r"x must have 3 dimensions, got 2 \(shape \[26, 32\]\)"),
        (lambda: module()(tokens(27)), ValueError, "26 tokens after num_prefix_tokens=1 are no square image; give grid_size"),
        (lambda: module()(tokens(1)), ValueError, "0 tokens after num_prefix_tokens=1 are no square image"),
        (lambda: module(dwc=True, num_landmarks=4)(tokens(27)), ValueError, "26 tokens after num_prefix_tokens=1 are no"),
        (lambda: module(grid_size=(5, 6))(tokens(30)), ValueError, r"grid_size must fit into the 29 tokens .* got \(5, 6\)"),
        (lambda: MiTAAttention(30, 4), ValueError, "dim must be a multiple of num_heads, got 30 and 4"),
        (lambda: module(qk_norm=True), ValueError, "norm_layer must be given where qk_norm or scale_norm is, got None"),
        (lambda: module(gate=True, gated=True), ValueError, r"gated \(sigmoid\) and gate \(silu\) must not be given together"),
    ],
)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=f"mita_ext.nn.MiTAAttention: {message}"):
        call()


def test_attention_refuses_what_is_its_own():
    with pytest.raises(ValueError, match="mita_ext.attention: topk must be at least 1, got 0"):
        module(topk=0)(tokens(26))


def test_dropout_where_it_is_harmless():
    """attn_drop counts in training alone; proj_drop is dropout of the result, in training too."""
    x = tokens(26)
    assert torch.equal(module(attn_drop=0.1).eval()(x), module()(x))
    assert (module(proj_drop=0.5)(x) == 0).float().mean() > 0.3


def test_training_reaches_every_parameter(device):
    ours = module(device, gate=True, dwc=True, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
    x = tokens(26, device).requires_grad_()
    ours(x).square().sum().backward()
    for name, p in [*ours.named_parameters(), ("x", x)]:
        assert p.grad.abs().max() > 0, name


def test_compiled(device):
    """One graph, forward and backward, the square found anew in every length."""
    ours = module(device, dwc=True, gate=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (26, 37):
        x = tokens(N, device)
        outs = [f(x) for f in (compiled, ours)]
        assert_same(*outs)
        for got, expected in zip(*(torch.autograd.grad(out.square().sum(), list(ours.parameters())) for out in outs)):
            torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def test_autocast(device):
    ours, x = module(device, dwc=True, gate=True), tokens(26, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(x), rtol=0.05, atol=0.05)


def test_repr_tells_the_options():
    assert "num_landmarks=(5, 5), topk=25, routes=1, shared_expert=True, num_prefix_tokens=1, grid_size=None" in repr(module())
