"""The definition of MiTA attention (arXiv 2602.01219) in plain PyTorch: any dtype, any device, differentiable by autograd.

Run in float64 it is what kernels are compared with. Run in bfloat16 it is their honest rival: products take bfloat16
operands, but scores are float32 and never rounded before a decision. It is written to be read, not to be fast: the
units of every query are gathered, [B, H, N, s K, D].

Names: B batch, H query heads, Hkv key/value heads, N queries, L keys, D head dimension, M landmarks, K keys per expert
(topk), s experts per query (routes).
"""

import torch
import torch.nn.functional as F

from .functional import MiTAAux


def attention(
    query,
    key,
    value,
    *,
    landmarks=None,
    num_landmarks=None,
    grid=None,
    num_prefix_tokens=0,
    topk=64,
    routes=1,
    shared_expert=True,
    scale=None,
    landmark_scale=None,
    return_aux=False,
):
    if landmarks is None:
        landmarks = pool_landmarks(query, num_landmarks or 64, grid=grid, num_prefix_tokens=num_prefix_tokens)
    indices, compressed, _ = landmark_topk(landmarks, key, value, topk=topk, scale=scale)
    experts = route(query, landmarks, routes=routes)
    options = dict(shared_expert=shared_expert, scale=scale, landmark_scale=landmark_scale)
    out, lse = expert_attention(query, key, value, landmarks, compressed, indices, experts, **options)
    return (out, MiTAAux(lse, landmarks, indices, experts, compressed)) if return_aux else out


def attention_given(query, key, value, landmarks, indices, experts, *, shared_expert=True, scale=None, landmark_scale=None):
    """-> (out, lse) for a selection that was made elsewhere."""
    compressed, _ = compress(landmarks, key, value, scale)
    options = dict(shared_expert=shared_expert, scale=scale, landmark_scale=landmark_scale)
    return expert_attention(query, key, value, landmarks, compressed, indices, experts, **options)


def pool_landmarks(query, num_landmarks, *, grid=None, num_prefix_tokens=0):
    """Step 1. Accumulated in float32 or better, rounded once."""
    if grid is None:
        grid, num_landmarks = (1, query.shape[2]), (1, num_landmarks)
    (B, H, _, D), (gh, gw) = query.shape, grid
    image = widen(query[:, :, num_prefix_tokens : num_prefix_tokens + gh * gw]).mT.reshape(B, H * D, gh, gw)
    return F.adaptive_avg_pool2d(image, num_landmarks).reshape(B, H, D, -1).mT.to(query.dtype).contiguous()


def landmark_topk(landmarks, key, value, *, topk, scale=None):
    """Steps 2 to 4 -> the keys of each expert, a set in ascending order; the shared expert's values and their lse."""
    chosen = first(scores(landmarks, repeat_heads(key, landmarks)), min(topk, key.shape[2]))
    compressed, lse = compress(landmarks, key, value, scale)
    return chosen.sort(-1).values.to(torch.int32), compressed, lse


def compress(landmarks, key, value, scale=None):
    """Step 4: C = softmax(scale Z k^T) v."""
    scale = landmarks.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * scores(landmarks, repeat_heads(key, landmarks))
    return logits.softmax(-1).to(value.dtype) @ repeat_heads(value, landmarks), logits.logsumexp(-1)


def route(query, landmarks, *, routes=1):
    """Step 5, best first."""
    return first(scores(query, landmarks), routes).to(torch.int32)


def expert_attention(
    query, key, value, landmarks, compressed, indices, experts, *, shared_expert=True, scale=None, landmark_scale=None
):
    """Step 6 -> out, lse. An index outside [0, L) is an empty slot; a query without any unit gets 0 and -inf."""
    B, H, N, D = query.shape
    L, K, s = key.shape[2], indices.shape[3], experts.shape[3]
    scale = D**-0.5 if scale is None else scale
    landmark_scale = scale * D**-0.5 if landmark_scale is None else landmark_scale

    b = torch.arange(B, device=query.device)[:, None, None, None]
    h = torch.arange(H, device=query.device)[:, None, None]
    j = indices[b, h, experts.long()].reshape(B, H, N, s * K).long()  # the routed keys of every query
    empty = (j < 0) | (j >= L)
    j = j.masked_fill(empty, 0)
    routed_k = repeat_heads(key, query)[b, h, j]  # [B, H, N, s K, D]
    routed_v = repeat_heads(value, query)[b, h, j].masked_fill(empty[..., None], 0)

    logits = scale * scores(query[..., None, :], routed_k).squeeze(-2)
    logits = logits.masked_fill(empty, float("-inf"))
    if shared_expert:
        logits = torch.cat([landmark_scale * scores(query, landmarks), logits], dim=-1)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill((lse == float("-inf"))[..., None], 0).to(value.dtype)

    out = (weights[..., None, -s * K :] @ routed_v).squeeze(-2) if s else torch.zeros_like(query)
    if shared_expert:
        out = out + weights[..., : landmarks.shape[2]] @ compressed
    return out, lse


def scores(a, b):
    """a b^T, at least in float32."""
    return widen(a) @ widen(b).mT


def first(scores, count):
    """The `count` first in the total order: larger score, then lower index; NaN last; -0 equals +0."""
    return (-scores + 0.0).argsort(dim=-1, stable=True)[..., :count]


def widen(x):
    return x if x.dtype == torch.float64 else x.float()


def repeat_heads(x, query):
    """Head h reads key/value head h // (H / Hkv)."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)
