"""Is the very build that is about to be timed right, on the very inputs? One head of each case against float64."""

from __future__ import annotations

import torch

import mita_ext
from mita_ext import reference

from .cases import Case

ALL_QUERIES = 4096  # above this many, a random subset: the reference gathers K keys per query in float64
SUBSET = 2048
FEW_ROUNDINGS = 2  # where plain PyTorch is exact by luck


def run(case: Case, inputs, dout) -> tuple[torch.Tensor, ...]:
    """Output and gradients."""
    out = mita_ext.attention(*inputs, topk=case.K, **case.pooling)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def check(case: Case, inputs) -> dict:
    """Selection and arithmetic, each by its own question. `ok` is False if anything is wrong, NaN included.

    The selection of the last head is compared with float64 scores, allowing swaps below the rounding bound of an fp32 dot
    product. Output and gradients *given* this selection are compared with the float64 definition. The error must stay below
    twice that of the same definition in plain PyTorch in the low precision, or below a few roundings: this guards against
    wrong builds, while tests/ hold what is promised about rounding.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out, aux = mita_ext.attention(*inputs, topk=case.K, return_aux=True, **case.pooling)
    head = slice(-1, None), slice(-1, None)

    rows = torch.arange(case.N, device=out.device)
    if case.N > ALL_QUERIES:
        rows = torch.randperm(case.N, device=out.device)[:SUBSET].sort().values
    dout = torch.zeros_like(out)  # a gradient for the checked rows alone makes the reference's gradients complete
    dout[-1, -1, rows] = torch.randn(len(rows), case.D, device=out.device, dtype=out.dtype)
    grads = torch.autograd.grad(out, inputs, dout)
    finite = all(bool(tensor.isfinite().all()) for tensor in run(case, inputs, torch.randn_like(out)))
    dquery, dkey, dvalue = (grad[head] for grad in grads)
    kernel = {"landmarks": aux.landmarks[head], "out": out[head][:, :, rows], "dquery": dquery, "dkey": dkey, "dvalue": dvalue}
    kernel = {name: tensor.detach() for name, tensor in kernel.items()}

    def definition(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        query, key, value = (tensor[head].detach().to(dtype).requires_grad_() for tensor in inputs)
        pooled = reference.pool_landmarks(query, **case.pooling)
        landmarks = aux.landmarks[head].to(dtype) + (pooled - pooled.detach())  # the kernel's values, pooling's gradient
        selection = aux.topk_indices[head], aux.experts[head][:, :, rows]
        result, _ = reference.attention_given(query[:, :, rows], key, value, landmarks, *selection)
        dquery, dkey, dvalue = torch.autograd.grad(result, (query, key, value), dout[head][:, :, rows].to(dtype))
        return {"landmarks": pooled.detach(), "out": result.detach(), "dquery": dquery, "dkey": dkey, "dvalue": dvalue}

    exact, rival = definition(torch.float64), definition(out.dtype)
    errors = {
        name: {
            "error": _relative(kernel[name], exact[name]),
            "plain_pytorch": _relative(rival[name], exact[name]),
            "rounding_level": _relative(exact[name].to(out.dtype), exact[name]),
        }
        for name in kernel
    }
    selection = _selection(*(tensor[head].detach()[0, 0] for tensor in (inputs[0], inputs[1], *aux[1:4])))
    right = [e["error"] <= max(2 * e["plain_pytorch"], FEW_ROUNDINGS * e["rounding_level"]) for e in errors.values()]
    first_of_head = case.M * torch.arange(case.B * case.H, device=out.device).view(case.B, case.H, 1, 1)
    load = torch.bincount((aux.experts + first_of_head).flatten(), minlength=case.B * case.H * case.M).view(-1, case.M)
    return {
        "ok": finite and all(selection.values()) and all(right),
        "finite": finite,
        **selection,
        "largest_expert_share": float((load.amax(1) / load.sum(1)).amin()),
        "queries_checked": len(rows),
        "relative_errors": errors,
    }


def _relative(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    return float((tensor.double() - exact).norm() / exact.norm())


def _selection(query, key, landmarks, indices, experts) -> dict[str, bool]:
    """Are one head's keys and experts the best ones, by float64 scores?"""
    indices, experts, landmarks = indices.long(), experts.long(), landmarks.double()
    # twice the error of an fp32 dot product of D terms, truncated rather than rounded as in tensor cores
    slack = 2 * len(key[0]) * 2.0**-23

    def scores(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokens.double()
        return tokens @ landmarks.T, slack * (tokens.abs() @ landmarks.abs().T).amax()

    ordered = bool((indices[:, 1:] > indices[:, :-1]).all() and (indices >= 0).all() and (indices < len(key)).all())
    keys_right = False
    if ordered:
        score, bound = scores(key)
        worst = score.gather(0, indices.T).amin(0)
        rest = score.scatter(0, indices.T, float("-inf")).amax(0)
        keys_right = bool((rest - worst <= bound).all())
    score, bound = scores(query)
    in_range = bool((experts >= 0).all() and (experts < len(landmarks)).all())
    experts_right = in_range and bool((score.amax(1) - score.gather(1, experts[:, :1])[:, 0] <= bound).all())
    return {"indices_ascending_in_range": ordered, "keys_are_the_best": keys_right, "experts_are_the_best": experts_right}


def repeats_equal(case: Case, inputs, repeats: int = 200) -> bool:
    """Do output and gradients agree bit for bit over all repeats?"""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    dout = torch.randn_like(inputs[0])
    first = run(case, inputs, dout)
    return all(all(map(torch.equal, first, run(case, inputs, dout))) for _ in range(repeats - 1))
