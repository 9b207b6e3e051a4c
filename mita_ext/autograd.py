"""The autograd Functions around the ops; no mathematics. The gradients are once differentiable, and selections (indices,
experts) are constants. What is saved: inputs, selections, outputs and logsumexps, never probabilities."""

import functools

import torch
from torch.autograd import function

from . import ops


def once_differentiable(backward):
    """Torch's decorator, which goes quiet when the incoming gradient needs no gradient itself, made to refuse always."""
    once = function.once_differentiable(backward)

    @functools.wraps(backward)
    def refusing(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled graphs refuse by themselves
            raise RuntimeError(
                "mita_ext: a second derivative is not defined; differentiate without create_graph=True"
                " (transforms of torch.func are not supported: they ask for one)"
            )
        return once(ctx, *grads)

    return refusing


def _incoming(dout, dlse, out):
    """The gradients as the ops take them: dout always there, last dimension contiguous; dlse contiguous or absent."""
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()


def _wanted(ctx, *grads):
    """One gradient per input of the forward: None where none is needed, and for every option."""
    grads += (None,) * (len(ctx.needs_input_grad) - len(grads))
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, seqlens, *options):
        ctx.N, ctx.options = query.shape[2], options
        ctx.save_for_backward(seqlens)
        return ops.pool(query, *options, seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlandmarks):
        dlandmarks, _ = _incoming(dlandmarks, None, None)
        return _wanted(ctx, ops.pool_backward(dlandmarks, ctx.N, *ctx.options, *ctx.saved_tensors))


class LandmarkTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, landmarks, key, value, seqlens_k, topk, scale):
        indices, compressed, lse = ops.landmark_topk(landmarks, key, value, topk, scale, seqlens_k)
        ctx.scale = scale
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(landmarks, key, value, compressed, lse, seqlens_k)
        return indices, compressed, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dcompressed, dlse):
        if dcompressed is None and dlse is None:
            return _wanted(ctx)
        *saved, seqlens_k = ctx.saved_tensors
        dcompressed, dlse = _incoming(dcompressed, dlse, saved[3])
        return _wanted(ctx, *ops.landmark_topk_backward(dcompressed, dlse, *saved, ctx.scale, seqlens_k))


class ExpertAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, landmarks, compressed, indices, experts, *options):
        inputs = (query, key, value, landmarks, compressed, indices, experts)
        output = ops.expert_attention(*inputs, *options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return _wanted(ctx)
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
        dout, dlse = _incoming(dout, dlse, saved[7])
        return _wanted(ctx, *ops.expert_attention_backward(dout, dlse, *saved, *ctx.options))


class Attention(torch.autograd.Function):
    """-> out, lse, and for inspection only: landmarks (empty if they were given), indices, experts, compressed,
    landmark_lse."""

    @staticmethod
    def forward(
        ctx, query, key, value, given, seqlens_q, seqlens_k, max_q, max_k,
        num_landmarks, grid, num_prefix_tokens, topk, routes, *options,
    ):  # fmt: skip
        pooling = (num_landmarks, grid, num_prefix_tokens)
        seqlens, ctx.max_seqlens = (seqlens_q, seqlens_k), (max_q, max_k)
        output = ops.attention(query, key, value, given, *pooling, topk, routes, *options, *seqlens, *ctx.max_seqlens)
        out, lse, pooled, indices, experts, compressed, landmark_lse = output
        ctx.options = (given is None, *pooling, *options)
        ctx.mark_non_differentiable(pooled, indices, experts, compressed, landmark_lse)
        ctx.set_materialize_grads(False)
        landmarks = pooled if given is None else given
        ctx.save_for_backward(query, key, value, landmarks, indices, experts, compressed, landmark_lse, out, lse, *seqlens)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse, *_):
        if dout is None and dlse is None:
            return _wanted(ctx)
        *saved, seqlens_q, seqlens_k = ctx.saved_tensors
        dout, dlse = _incoming(dout, dlse, saved[8])
        lengths = (seqlens_q, seqlens_k, *ctx.max_seqlens)
        of_query, of_key, of_value, of_given = ctx.needs_input_grad[:4]
        want = of_key or of_value, of_query if ctx.options[0] else of_given  # keys and values, landmarks
        return _wanted(ctx, *ops.attention_backward(dout, dlse, *saved, *ctx.options, *want, *lengths))
