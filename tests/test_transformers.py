"""MiTA attention as an attention implementation of transformers: what encoders ask for, and what is refused."""

import pytest
import torch

import mita_ext

pytest.importorskip("transformers", reason="transformers is not installed: pip install mita-ext[transformers]")

from transformers import (  # noqa: E402
    AttentionInterface,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import create_bidirectional_mask  # noqa: E402

from mita_ext.integrations.transformers import register  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0, "initializer_range": 0.3}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0}
BERT = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
LENGTHS = (20, 7, 1)


@pytest.fixture(autouse=True, scope="module")
def names():
    register("mita", num_landmarks=3, topk=4)
    register("mita-image", num_landmarks=(2, 2), topk=4)
    register("mita-dense", num_landmarks=3, topk=64, shared_expert=False)  # of up to 64 keys every query sees all


def image(device="cpu"):
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)}


def text(device="cpu"):
    """Sequences of LENGTHS tokens, padded on the right."""
    ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


MODELS = {
    "vit": (ViTModel, ViTConfig, IMAGE, image),
    "dinov2": (Dinov2Model, Dinov2Config, IMAGE | {"layerscale_value": 0.5}, image),
    "bert": (BertModel, BertConfig, BERT, text),
}


def build(name, device="cpu", attn=None, **options):
    """A model with weights large enough (initializer_range) for attention that is far from uniform; its inputs."""
    kind, config, own, inputs = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**SIZES | own | options, attn_implementation=attn)).to(device).eval(), inputs(device)


def rows(model, inputs):
    """What the model makes of all tokens that are no padding."""
    out = model(**inputs).last_hidden_state
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out


@pytest.mark.parametrize("name", MODELS)
def test_dense_options_give_the_dense_model(name, device):
    model, inputs = build(name, device)
    dense = rows(model, inputs)
    model.set_attn_implementation("mita-dense")
    torch.testing.assert_close(rows(model, inputs), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name,attn", [("vit", "mita"), ("dinov2", "mita-image"), ("bert", "mita")])
def test_compiled_equals_eager(name, attn, device):
    model, inputs = build(name, device)
    dense = rows(model, inputs)
    model.set_attn_implementation(attn)
    eager = model(**inputs).last_hidden_state
    assert (rows(model, inputs) - dense).abs().max() > 0.01
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, eager)
    if name == "bert" and device == "cpu":  # on CUDA an assertion ends the process's use of the device
        with pytest.raises(RuntimeError, match="attention_mask must have its padding on the right"):
            compiled(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    torch._dynamo.reset()


def test_padded_sequences_are_attended_as_if_alone(device):
    model, inputs = build("bert", device, "mita")
    out = model(**inputs).last_hidden_state
    for b, n in enumerate(LENGTHS):
        alone = model(inputs["input_ids"][b : b + 1, :n]).last_hidden_state
        torch.testing.assert_close(out[b : b + 1, :n], alone, rtol=1e-4, atol=1e-4)


def test_training_reaches_every_parameter(device):
    model, inputs = build("bert", device, "mita")
    model.train()(**inputs).last_hidden_state.square().sum().backward()
    for name, p in model.named_parameters():
        assert "pooler" in name or p.grad is not None, name


@pytest.mark.parametrize("image", [False, True])
def test_options_and_layout(image, device):
    """The function itself, on grouped heads: `attention` with the options registered; [B, N, H, D] contiguous."""
    pooling = {"num_landmarks": (2, 3), "grid": (3, 5), "num_prefix_tokens": 2} if image else {"num_landmarks": 7}
    options = {"topk": 3, "routes": 2, "shared_expert": False}
    own = {"grid_size" if key == "grid" else key: value for key, value in pooling.items()}
    register("mita-own", **own, **options)
    q, k, v = (torch.randn(2, H, 18, 16, device=device) for H in (4, 2, 2))
    module = torch.nn.Module()
    out, weights = AttentionInterface()["mita-own"](module, q, k, v, None, scaling=0.3, is_causal=False)
    assert weights is None and out.is_contiguous()
    assert torch.equal(out.transpose(1, 2), mita_ext.attention(q, k, v, **pooling, **options, scale=0.3))
    with pytest.raises(TypeError, match="is_causal is not an option"):  # a module that does not say counts as causal
        AttentionInterface()["mita-own"](module, q, k, v, None)
    lengths = torch.tensor([4, 18], device=device, dtype=torch.int32)
    with pytest.raises(TypeError, match="attention_mask is not an option"):
        AttentionInterface()["mita-own"](module, q[:, :, 1:], k, v, lengths, is_causal=False)


def masked(mask):
    return lambda: build("bert", attn="mita")[0](torch.ones(3, 20, dtype=torch.long), attention_mask=mask)


def with_attention_outputs_in_the_configuration():
    model, inputs = build("vit", attn="eager", output_attentions=True)
    model.config._attn_implementation = "mita"
    return model(**inputs)


def llama():
    config = LlamaConfig(**SIZES | TEXT, attn_implementation="mita")
    return LlamaModel(config)(torch.ones(1, 5, dtype=torch.long))


def modern_bert():
    config = ModernBertConfig(**SIZES | TEXT, attn_implementation="mita", local_attention=8)
    return ModernBertModel(config)(torch.ones(1, 20, dtype=torch.long))


def overlaid():
    config = BertConfig(**SIZES | BERT, attn_implementation="mita")
    local = lambda batch, head, q, k: (q - k).abs() < 2
    create_bidirectional_mask(config, torch.ones(1, 5, 32), None, and_mask_function=local)


IDS = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
HOLES = torch.ones(3, 20).index_fill(1, torch.tensor([4]), 0)


@pytest.mark.parametrize(
    "call,kind,message",
    [
        (llama, TypeError, "is_causal is not an option .* so this is for encoders"),
        (lambda: build("bert", attn="mita", is_decoder=True)[0](**IDS), TypeError, "is_causal is not an option"),
        (modern_bert, TypeError, "sliding_window is not an option of this mechanism: every query may attend to every key"),
        (masked(text()["attention_mask"].flip(1)), ValueError, "attention_mask must have its padding on the right"),
        (masked(HOLES), ValueError, "attention_mask must have its padding on the right"),
        (overlaid, TypeError, "attention_mask is not an option of this mechanism: experts are chosen among all keys"),
        (masked(torch.ones(3, 1, 20, 20)), TypeError, r"attention_mask is not an option .* as a mask \[B, N\]"),
        (lambda: build("vit", attn="mita")[0](**image(), output_attentions=True), TypeError, "output_attentions is not an opt"),
        (with_attention_outputs_in_the_configuration, TypeError, "output_attentions is not an option"),
        (
            lambda: build("bert", attn="mita", attention_probs_dropout_prob=0.1)[0].train()(**IDS),
            TypeError,
            "dropout is not an option .* set the model's attention dropout to 0 for training",
        ),
        (
            lambda: build("bert", attn="mita-image")[0](**text()),
            ValueError,
            "19 tokens after num_prefix_tokens=1 are no square",
        ),
    ],
)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=f"mita_ext as attn_implementation='mita.*': {message}"):
        call()


@pytest.mark.parametrize("option", ["position_bias", "softcap", "s_aux", "sliding_window"])
def test_options_of_other_attentions_are_refused(option):
    q = torch.randn(1, 4, 20, 8)
    with pytest.raises(TypeError, match=f"{option} is not an option of this mechanism: "):
        AttentionInterface()["mita"](torch.nn.Module(), q, q, q, None, is_causal=False, **{option: 4})
