"""timm's vision transformers with MiTA attention: weights, modes and keys stay, undo brings the dense model back."""

import inspect

import pytest
import torch

from mita_ext.nn import MiTAAttention

pytest.importorskip("timm", reason="timm is not installed: pip install mita-ext[timm]")

from timm.layers import Attention  # noqa: E402
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import ParallelThingsBlock  # noqa: E402

from mita_ext.integrations.timm import convert  # noqa: E402

DENSE = {"shared_expert": False, "topk": 64}  # of up to 64 keys every query sees all
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "num_classes": 3}

MODELS = {  # kind, options -> num_prefix_tokens, grid_size
    "vit": (VisionTransformer, {}, (1, None)),
    "deit": (VisionTransformerDistilled, {}, (2, None)),
    "dinov2_registers": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5}, (5, None)),
    "no_class_token": (VisionTransformer, {"class_token": False, "global_pool": "avg"}, (0, None)),
    "rectangle": (VisionTransformer, {"img_size": (32, 64)}, (1, (4, 8))),
    "any_size": (VisionTransformer, {"dynamic_img_size": True}, (1, None)),
    "norms": (VisionTransformer, {"qk_norm": True, "scale_attn_norm": True, "qkv_bias": False, "proj_bias": False}, (1, None)),
}


def build(kind=VisionTransformer, device="cpu", depth=2, **options):
    """Weights large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    model = kind(**(SMALL | options), depth=depth)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
    return model.to(device).eval()


def images(model, device="cpu"):
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1)).to(device)


def test_the_same_signatures_as_timm():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters.values() for kind in (MiTAAttention, Attention))
        positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_undo(name, device):
    kind, options, (prefix, grid) = MODELS[name]
    model = build(kind, device, **options)
    x, names, parameters = images(model, device), list(model.state_dict()), list(model.parameters())
    dense = model(x)

    undo = convert(model, **DENSE)
    for block in model.blocks:
        assert type(block.attn) is MiTAAttention and not block.attn.training
        assert (block.attn.num_prefix_tokens, block.attn.grid_size) == (prefix, grid)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)

    undo()
    assert torch.equal(model(x), dense)
    undo = convert(model)
    assert (model(x) - dense).abs().max() > 0.01
    undo()
    assert torch.equal(model(x), dense)


def test_other_squares_where_timm_takes_them():
    model = build(dynamic_img_size=True, img_size=(32, 64))
    x = torch.randn(2, 3, 48, 48)
    dense = model(x)
    convert(model, **DENSE)
    torch.testing.assert_close(model(x), dense)
    with pytest.raises(ValueError, match="24 tokens after num_prefix_tokens=1 are no square image; give grid_size"):
        model(torch.randn(2, 3, 32, 48))


def test_gated_attention():
    model = build(depth=1)
    torch.manual_seed(2)
    model.blocks[0].attn = Attention(32, 4, attn_head_dim=16, gated=True)
    x = images(model)
    dense = model(x)
    with pytest.raises(ValueError, match=r"gated \(sigmoid\) and gate \(silu\) must not be given together"):
        convert(model, gate=True)
    convert(model, **DENSE)
    torch.testing.assert_close(model(x), dense)
    with pytest.raises(TypeError, match="got MiTAAttention"):
        convert(model)


def test_weights_load_into_a_model_of_mita_blocks():
    dense, ours = build(), build(attn_layer=MiTAAttention)
    ours.load_state_dict(dense.state_dict())
    convert(dense)
    x = images(dense)
    assert torch.equal(ours(x), dense(x))


def test_dtype_and_new_layers():
    model = build(dtype=torch.bfloat16)
    convert(model, gate=True, dwc=True)
    new = {name for name, _ in model.blocks[0].attn.named_parameters()} - {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert new == {"gate.weight", "gate.bias", "dwc.weight", "dwc.bias"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images(model).bfloat16()).isfinite().all()


def test_training_goes_on_through_convert_and_undo():
    """One optimizer, made before: what is learned in between stays, and so does the mode."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    undo = convert(model)
    model.train()
    before = model.blocks[0].attn.qkv.weight.clone()
    model(images(model)).square().sum().backward()
    optimizer.step()
    learned = model.blocks[0].attn.qkv.weight.clone()
    assert not torch.equal(learned, before)
    undo()
    assert type(model.blocks[0].attn) is Attention and all(m.training for m in model.modules())
    assert torch.equal(model.blocks[0].attn.qkv.weight, learned)


def test_compiled(device):
    model = build(device=device, depth=1)
    convert(model, num_landmarks=(2, 2), topk=4)
    x = images(model, device)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "make,options,kind,message",
    [
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "model must be a timm VisionTransformer, got Linear"),
        (lambda: build(Eva, depth=1), {}, TypeError, "model must be a timm VisionTransformer, got Eva"),
        (lambda: build(attn_layer="diff"), {}, TypeError, "blocks.0.attn must be a timm.layers.Attention, got DiffAttention"),
        (lambda: build(block_fn=ParallelThingsBlock), {}, TypeError, "blocks.0.attn must be a timm.layers.Attention, got Non"),
        (lambda: build(patch_drop_rate=0.5), {}, ValueError, "patch_drop leaves no image to pool or convolve; give a number"),
        (lambda: build(patch_drop_rate=0.5), {"num_landmarks": 4, "dwc": True}, ValueError, "patch_drop leaves no image"),
        (build, {"block_m": 64}, TypeError, "block_m"),
    ],
)
def test_refused(make, options, kind, message):
    model = make()
    before = list(model.modules())
    with pytest.raises(kind, match=message):
        convert(model, **options)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_patch_dropout_without_an_image():
    model = build(patch_drop_rate=0.5).train()
    convert(model, num_landmarks=4)
    assert model(images(model)).isfinite().all()
