"""The ops (schemas: csrc/ops.cpp, gradients: csrc/autograd.cpp), each with its shape-only fake right below. Private: options
are checked in functional.py."""

import torch

from . import _C as _C  # importing it registers the ops

_ops = torch.ops.mita_ext


def _like(x):
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


def _lse_like(x, shape):
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


pool = _ops.pool.default


@torch.library.register_fake("mita_ext::pool")
def _(query, num_landmarks, grid, num_prefix_tokens, seqlens=None):
    B, H, _, D = query.shape
    return query.new_empty((B, H, num_landmarks[0] * num_landmarks[1], D))


pool_backward = _ops.pool_backward.default


@torch.library.register_fake("mita_ext::pool_backward")
def _(dlandmarks, N, num_landmarks, grid, num_prefix_tokens, seqlens=None):
    B, H, _, D = dlandmarks.shape
    return dlandmarks.new_empty((B, H, N, D))


landmark_topk = _ops.landmark_topk.default


@torch.library.register_fake("mita_ext::landmark_topk")
def _(landmarks, key, value, topk, scale, seqlens_k=None):
    rows = landmarks.shape[:3]
    indices = landmarks.new_empty((*rows, torch.sym_min(topk, key.shape[2])), dtype=torch.int32)
    return indices, _like(landmarks), _lse_like(landmarks, rows)


landmark_topk_backward = _ops.landmark_topk_backward.default


@torch.library.register_fake("mita_ext::landmark_topk_backward")
def _(dcompressed, dlse, landmarks, key, value, *rest):
    return _like(landmarks), _like(key), _like(value)


route = _ops.route.default


@torch.library.register_fake("mita_ext::route")
def _(query, landmarks, routes):
    return query.new_empty((*query.shape[:3], routes), dtype=torch.int32)


expert_attention = _ops.expert_attention.default


@torch.library.register_fake("mita_ext::expert_attention")
def _(query, key, value, landmarks, compressed, indices, experts, shared_expert, scale, landmark_scale):
    return _like(query), _lse_like(query, query.shape[:3])


expert_attention_backward = _ops.expert_attention_backward.default


@torch.library.register_fake("mita_ext::expert_attention_backward")
def _(dout, dlse, query, key, value, landmarks, compressed, *rest):
    return _like(query), _like(key), _like(value), _like(landmarks), _like(compressed)


attention = _ops.attention.default


def _groups_like(query, B, H, N, M, routes):
    """Segments, where they start and entries of each head (Groups in csrc/cuda/params.h): kept of more than 256 queries."""
    entries = N * routes
    segment_rows = (2 * (entries // M) + 127) // 64 * 64
    of_a_head = 4 * (entries // segment_rows + torch.sym_min(entries, M)) + M + 1 + entries
    kept = torch.sym_min(torch.sym_max(N - 256, 0), 1) * torch.sym_min(routes, 1)  # not by a branch: N may be a symbol
    return query.new_empty((B * H * of_a_head * kept if query.is_cuda else 0,), dtype=torch.int32)


@torch.library.register_fake("mita_ext::attention")
def _(
    query, key, value, landmarks, num_landmarks, grid, num_prefix_tokens, topk, routes, shared_expert, scale, landmark_scale,
    seqlens_q=None, seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    H, D = query.shape[1], query.shape[-1]
    if query.dim() == 3:  # packed
        B, N, L = seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    else:
        B, N, L = query.shape[0], query.shape[2], key.shape[2]
    M = num_landmarks[0] * num_landmarks[1] if landmarks is None else landmarks.shape[2]
    return (
        _like(query),
        _lse_like(query, (B, H, N)),
        query.new_empty((B, H, M, D) if landmarks is None else (0,)),
        query.new_empty((B, H, M, torch.sym_min(topk, L)), dtype=torch.int32),
        query.new_empty((B, H, N, routes), dtype=torch.int32),
        _groups_like(query, B, H, N, M, routes),
        query.new_empty((B, H, M, D)),
        _lse_like(query, (B, H, M)),
    )


attention_backward = _ops.attention_backward.default


@torch.library.register_fake("mita_ext::attention_backward")
def _(
    dout, dlse, query, key, value, landmarks, indices, experts, groups, compressed, landmark_lse, out, lse, pooled,
    num_landmarks, grid, num_prefix_tokens, shared_expert, scale, landmark_scale, want_keys, want_landmarks, *lengths,
):  # fmt: skip
    def if_(wanted, x):
        return x.new_empty(x.shape if wanted else (0,))

    return _like(query), if_(want_keys, key), if_(want_keys, value), if_(want_landmarks and not pooled, landmarks)
