"""Are the gradients right? Against finite differences in float64, and against the honest rival in every dtype."""

import math
from contextlib import contextmanager

import pytest
import torch
from cases import BY_NAME, assert_rivals, assert_same, case_of, given_selection, make_inputs

import mita_ext

NAMES = ("dq", "dk", "dv", "dlandmarks")


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def grad_outputs(case, device, dtype):
    """dout transposed in memory; dlse in the dtype of lse."""
    dout = torch.randn(case.B, case.N, case.H, case.D, generator=generator(), dtype=torch.float64).transpose(1, 2)
    dlse = torch.randn(case.B, case.H, case.N, generator=generator(8), dtype=torch.float64)
    return dout.to(device, dtype), dlse.to(device, torch.promote_types(dtype, torch.float32))


def inputs_of(case, tensors):
    """The tensors that the case differentiates: pooled landmarks are no input."""
    return tensors[:3] if case.pooled else tensors


def grads_given_selection(case, aux, tensors, dtype, dout, dlse):
    """By autograd through the definition."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    out, lse = given_selection(case, aux, *leaves)
    grads = torch.autograd.grad(
        (out, lse), inputs_of(case, leaves), (dout.to(out.dtype), dlse.to(lse.dtype)), allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs_of(case, leaves), grads, strict=True)]


def test_gradients_given_the_selection(case, backend):
    """The largest error of a few numbers is mostly luck: small cases are drawn many times, and judged together."""
    device, dtype = backend
    dout, dlse = grad_outputs(case, device, dtype)
    draws = []
    size = case.B * case.H * case.N * case.D
    for seed in range(1 if size >= 5000 else max(8, 5000 // size)):
        tensors = make_inputs(case, device, dtype, requires_grad=True, seed=seed)
        q, k, v, z = tensors
        out, aux = mita_ext.attention(q, k, v, **case.options(z), return_aux=True)
        grads = torch.autograd.grad((out, aux.lse), inputs_of(case, tensors), (dout, dlse))
        for x, got in zip(tensors, grads, strict=False):
            assert got.dtype == dtype
            assert got.shape == x.shape
        exact = grads_given_selection(case, aux, tensors, torch.float64, dout, dlse)
        rival = grads_given_selection(case, aux, tensors, dtype, dout, dlse)
        draws.append((grads, exact, rival))
    for i, name in enumerate(NAMES[: len(draws[0][0])]):
        got, exact, rival = (torch.stack([gradients[i] for gradients in kind]) for kind in zip(*draws, strict=True))
        assert_rivals(name, got, exact, rival, terms=case.magnitude**2)


EXPANDED = ["basic", "grouped_query", "pooled_2d_with_prefix", "routes_2", "ragged_tile", "no_shared_expert"]


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_grad_out(name, backend):
    """Stride 0 everywhere (`out.sum()`), in rows, and in the last dimension only."""
    device, dtype = backend
    case = BY_NAME[name]
    tensors = make_inputs(case, device, dtype, requires_grad=True)
    inputs = inputs_of(case, tensors)
    out = mita_ext.attention(*tensors[:3], **case.options(tensors[3]))
    for shape in ((1, 1, 1, 1), (case.B, 1, 1, case.D), (case.B, case.H, case.N, 1)):
        dout = torch.randn(shape, generator=generator()).to(device, dtype).expand(out.shape)
        got = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, dout.contiguous(), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["basic", "pooled_1d", "routes_0", "no_shared_expert", "deit", "ragged_tile"])
def test_only_what_is_needed(name, backend):
    """Any subset of the inputs may need gradients; the others get none, and nothing else changes."""
    device, dtype = backend
    case = BY_NAME[name]
    dout, dlse = grad_outputs(case, device, dtype)
    full = None
    for needed in (0b1111, 0b0001, 0b0010, 0b0100, 0b1000, 0b0110, 0b1001):
        tensors = make_inputs(case, device, dtype)
        wanted = [x for i, x in enumerate(inputs_of(case, tensors)) if needed >> i & 1]
        if not wanted:
            continue
        for x in wanted:
            x.requires_grad_()
        out, aux = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
        torch.autograd.backward((out, aux.lse), (dout, dlse))
        grads = [x.grad for x in inputs_of(case, tensors)]
        full = full or grads
        for i, (got, expected) in enumerate(zip(grads, full, strict=True)):
            assert torch.equal(got, expected) if needed >> i & 1 else got is None


@pytest.mark.gpu
def test_frozen_keys_and_values_take_no_memory():
    """The sums for their gradients are most of what a backward pass needs."""
    tensors = make_inputs(case_of("basic", N=4096, D=64, M=32, K=64), "cuda", torch.bfloat16)
    peaks = []
    for frozen in (False, True):
        inputs = [x.detach().requires_grad_(not frozen or i in (0, 3)) for i, x in enumerate(tensors)]
        out = mita_ext.attention(*inputs[:3], landmarks=inputs[3], topk=64)
        dout = torch.ones_like(out)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 2 * peaks[1] < peaks[0]


def test_nothing_needed(device):
    case = BY_NAME["basic"]
    q, k, v, z = make_inputs(case, device, torch.float32)
    out, aux = mita_ext.attention(q, k, v, landmarks=z, return_aux=True)
    assert not any(x.requires_grad for x in (out, *aux))
    q.requires_grad_()
    out, aux = mita_ext.attention(q, k, v, landmarks=z, return_aux=True)
    assert out.requires_grad
    assert aux.lse.requires_grad
    assert not any(x.requires_grad for x in (aux.topk_indices, aux.experts, aux.compressed))


@pytest.mark.parametrize("name", ["basic", "pooled_1d", "grouped_query", "no_shared_expert"])
def test_lse_alone_and_out_alone(name, backend):
    """Gradients are linear in (dout, dlse), each of which may be missing."""
    device, dtype = backend
    case = BY_NAME[name]
    tensors = make_inputs(case, device, dtype, requires_grad=True)
    inputs = inputs_of(case, tensors)
    out, aux = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
    dout, dlse = grad_outputs(case, device, dtype)

    def grads(**outputs):
        pairs = {"out": (out, dout), "lse": (aux.lse, dlse)}
        of, with_respect = zip(*(pairs[name] for name in outputs), strict=True)
        return torch.autograd.grad(of, inputs, with_respect, retain_graph=True, allow_unused=True)

    for a, b in zip(
        grads(out=1), torch.autograd.grad((out, aux.lse), inputs, (dout, 0 * dlse), retain_graph=True), strict=True
    ):
        assert torch.equal(a, b)
    lse_only = grads(lse=1)
    exact = [grads_given_selection(case, aux, tensors, at, 0 * dout, dlse) for at in (torch.float64, dtype)]
    for name, got, *others in zip(NAMES, lse_only, *exact, strict=False):
        assert_rivals(name, got, *others)


# ---- TF32: only as torch's own products, and never in a decision


@pytest.fixture(params=[("allow_tf32", True), ("fp32_precision", "tf32")], ids=["allow_tf32", "fp32_precision"])
def tf32(request, monkeypatch):
    """A context in which torch's float32 products are rounded, in the older and the newer way of saying so."""
    if not hasattr(torch.backends.cuda.matmul, request.param[0]):
        pytest.skip("torch is older than this setting")

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cuda.matmul, *request.param)
            yield

    return context


def attend_and_differentiate(case, tensors):
    out, aux = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
    dout, dlse = grad_outputs(case, "cuda", torch.float32)
    grads = torch.autograd.grad((out, aux.lse), inputs_of(case, tensors), (dout, dlse), allow_unused=True)
    return aux, (out, aux.lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads)))


SELECTED = [
    "deit",
    "clustered_pooled",
    "grouped_query",
    "routes_3",
    "keys_5000",
    "long",
    "wide_keys_9000",
    "wide_landmarks_300",
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SELECTED)
def test_tf32_selects_the_same(name, tf32):
    case = BY_NAME[name]
    tensors = make_inputs(case, "cuda", torch.float32, requires_grad=True)
    exact_aux, exact = attend_and_differentiate(case, tensors)
    with tf32():
        aux, results = attend_and_differentiate(case, tensors)
    for field in ("landmarks", "topk_indices", "experts"):
        assert torch.equal(getattr(aux, field), getattr(exact_aux, field))
    for got, expected in zip((*results, aux.compressed), (*exact, exact_aux.compressed), strict=True):
        assert not torch.equal(got, expected)
        assert (got - expected).norm() <= 1e-2 * expected.norm()
    _, again = attend_and_differentiate(case, tensors)
    for got, expected in zip(again, exact, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("routes", [0, 1])
def test_tf32_given_the_selection(routes, D, tf32):
    """Where the definition is dense attention, and its products are of a kind that torch rounds as well."""
    case = case_of("basic", N=256, L=128, D=D, M=64, K=128, routes=routes, shared_expert=routes == 0)
    tensors = make_inputs(case, "cuda", torch.float32, requires_grad=True)
    dout, dlse = grad_outputs(case, "cuda", torch.float32)

    def attend(q, k, v, scale):
        logits = scale * (q @ k.mT)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    def dense(dtype):
        q, k, v, z = leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
        out, lse = attend(q, k, v, D**-0.5) if routes else attend(q, z, attend(z, k, v, D**-0.5)[0], 1 / D)
        grads = torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dlse.to(dtype)), allow_unused=True)
        return out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))

    exact, (_, full) = dense(torch.float64), attend_and_differentiate(case, tensors)
    with tf32():
        (_, results), rivals = attend_and_differentiate(case, tensors), dense(torch.float32)
    for name, got, precise, *others in zip(("out", "lse", *NAMES), results, full, exact, rivals, strict=True):
        assert_rivals(name, got, *others)
        if name != "lse" and others[0].any():  # its rounding may vanish beside that of a sum
            assert (got - others[0]).norm() > 20 * (precise - others[0]).norm(), f"{name}: nothing was rounded to TF32"


# ---- gradcheck: float64 on the CPU


def smallest_gap(case, tensors):
    """How far the nearest selection is from changing."""
    q, k, _, z = tensors
    Z = mita_ext.pool_landmarks(q, **case.pooling) if case.pooled else z
    keys = k.repeat_interleave(case.H // k.shape[1], 1)
    gaps = []
    for scores, count in ((Z @ keys.mT, case.K), (q @ Z.mT, case.routes)):
        ranked = scores.sort(-1, descending=True).values
        gaps += [(ranked[..., :-1] - ranked[..., 1:])[..., :count].min().item()] if count and ranked.shape[-1] > 1 else []
    return min(gaps, default=1.0)


SMALL = {"B": 1, "H": 2, "N": 7, "L": 9, "D": 4, "M": 3, "K": 3}
CHECKED = {
    "given": case_of("basic", **SMALL),
    "given_routes_0": case_of("routes_0", **SMALL),
    "given_routes_2": case_of("routes_2", **SMALL),
    "given_no_shared_expert": case_of("no_shared_expert", **SMALL),
    "given_no_shared_routes_2": case_of("no_shared_expert_routes_2", **SMALL),
    "given_grouped_query": case_of("grouped_query", **SMALL | {"H": 4, "Hkv": 2}),
    "given_own_scales": case_of("own_scales", **SMALL),
    "given_topk_exceeds_keys": case_of("basic", **SMALL | {"K": 20}),
    "given_fused_qkv": case_of("fused_qkv_view", **SMALL | {"L": 7}),
    "pooled_1d": case_of("pooled_1d", **SMALL),
    "pooled_1d_routes_0": case_of("pooled_routes_0", **SMALL),
    "pooled_1d_routes_2": case_of("pooled_1d", **SMALL, routes=2),
    "pooled_1d_no_shared_expert": case_of("pooled_no_shared_expert", **SMALL),
    "pooled_more_landmarks_than_queries": case_of("pooled_1d", **SMALL | {"N": 3, "M": 5}),
    "pooled_2d_with_prefix": case_of("pooled_2d_with_prefix", **SMALL | {"N": 9, "M": (2, 2)}, grid=(2, 3), prefix=2),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name):
    """out and lse together, by central differences; the selection must be too firm to change under them."""
    case = CHECKED[name]
    seed = next(s for s in range(100) if smallest_gap(case, make_inputs(case, seed=s)) > 1e-3)
    tensors = make_inputs(case, seed=seed, requires_grad=True)

    def attend(q, k, v, z=None):
        out, aux = mita_ext.attention(q, k, v, **case.options(z), return_aux=True)
        return out, aux.lse

    assert torch.autograd.gradcheck(attend, inputs_of(case, tensors))


def test_gradcheck_pool_landmarks():
    q = make_inputs(case_of("basic", B=1, N=11, D=3), requires_grad=True)[0]
    for M, options in ((4, {}), (13, {}), ((2, 2), {"grid": (3, 3), "num_prefix_tokens": 1})):
        assert torch.autograd.gradcheck(lambda x, M=M, options=options: mita_ext.pool_landmarks(x, M, **options), q)


@pytest.mark.parametrize("name", ["given", "given_grouped_query"])
def test_gradcheck_landmark_topk(name):
    _, k, v, z = make_inputs(CHECKED[name], requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: mita_ext.landmark_topk(*x, topk=3, scale=0.4)[1:], (z, k, v))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["given", "given_routes_2", "given_grouped_query"])
def test_gradcheck_expert_attention(name, shared):
    """The compressed values are an input of their own here; one slot is empty, and the order is the caller's."""
    case = CHECKED[name]
    q, k, v, z = make_inputs(case, requires_grad=True)
    T, C, _ = (x.detach() for x in mita_ext.landmark_topk(z, k, v, topk=case.K))
    T[:, :, 0, 0] = -1
    T = T.flip(-1)
    r = mita_ext.route(q, z, routes=case.routes)

    def attend(q, k, v, z, C):
        return mita_ext.expert_attention(q, k, v, z, C, T, r, shared_expert=shared, scale=0.6, landmark_scale=0.4)

    inputs = (q, k, v, z, C.requires_grad_())
    if not shared:  # the landmarks and their values take no part
        grads = torch.autograd.grad(attend(*inputs)[0].sum(), inputs, allow_unused=True)
        assert all(g is None or (g == 0).all() for g in grads[3:])
    assert torch.autograd.gradcheck(attend, inputs)


def test_stages_give_the_gradients_of_attention(backend):
    device, dtype = backend
    case = case_of("ragged_tile", N=68, M=(2, 3), grid=(6, 11), prefix=1, pooled=True, Hkv=1, routes=2)
    dout, dlse = grad_outputs(case, device, dtype)

    def fused(q, k, v):
        out, aux = mita_ext.attention(q, k, v, **case.options(None), return_aux=True)
        return out, aux.lse

    def staged(q, k, v):
        Z = mita_ext.pool_landmarks(q, **case.pooling)
        T, C, _ = mita_ext.landmark_topk(Z, k, v, topk=case.K)
        return mita_ext.expert_attention(q, k, v, Z, C, T, mita_ext.route(q, Z, routes=2))

    grads = []
    for attend in (fused, staged):
        tensors = make_inputs(case, device, dtype, requires_grad=True)[:3]
        grads.append(torch.autograd.grad(attend(*tensors), tensors, (dout, dlse)))
    aux = mita_ext.attention(*tensors, **case.options(None), return_aux=True)[1]
    exact, rival = (grads_given_selection(case, aux, [*tensors, tensors[0]], at, dout, dlse) for at in (torch.float64, dtype))
    for name, got, *others in zip(NAMES, grads[1], exact, rival, strict=False):
        assert_rivals(name, got, *others)
    if dtype in (torch.float32, torch.float64):
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_shared_dense_gradient_reaches_keys_of_no_expert():
    """A key that no landmark chose still has its share of the compressed values."""
    case = case_of("basic", M=1, K=2, routes=1)
    q, k, v, z = make_inputs(case, requires_grad=True)
    out, aux = mita_ext.attention(q, k, v, landmarks=z, topk=2, return_aux=True)
    out.square().sum().backward()
    rest = torch.ones(2, 2, 50, dtype=torch.bool).scatter_(-1, aux.topk_indices[:, :, 0].long(), False)
    assert (k.grad[rest].abs().amax(-1) > 0).all()
    k.grad = None
    mita_ext.attention(q, k, v, landmarks=z, topk=2, shared_expert=False).square().sum().backward()
    assert (k.grad[rest] == 0).all()


def test_batch_entries_do_not_mix(backend):
    device, dtype = backend
    case = case_of("clustered_pooled", H=4, Hkv=2)
    tensors = make_inputs(case, device, dtype, requires_grad=True)[:3]
    dout, _ = grad_outputs(case, device, dtype)
    together = torch.autograd.grad(mita_ext.attention(*tensors, **case.options(None)), tensors, dout)
    for b in range(case.B):
        part = [x[b : b + 1].detach().requires_grad_() for x in tensors]
        alone = torch.autograd.grad(mita_ext.attention(*part, **case.options(None)), part, dout[b : b + 1])
        for a, t in zip(alone, together, strict=True):
            assert_same(a[0], t[b])


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])  # queries and units in one pass, and not
def test_gradients_scale_with_those_of_the_output(K):
    """Whatever the size of what comes back, sums that are held in 16 bits on the way lose nothing by it."""
    case = case_of("one_pass_clustered", K=K)
    tensors = make_inputs(case, "cuda", torch.bfloat16, requires_grad=True)[:3]
    dout, _ = grad_outputs(case, "cuda", torch.bfloat16)
    out = mita_ext.attention(*tensors, **case.options(None))
    grads = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    for factor in (2.0**-40, 2.0**40):
        scaled = torch.autograd.grad(out, tensors, factor * dout, retain_graph=True)
        for name, expected, got in zip(NAMES, grads, scaled, strict=False):
            assert torch.equal(got.double() / factor, expected.double()), f"{name} times {factor}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_value_gradient_of_one_query_with_one_key_is_exact(dtype):
    """Its probability is 1: plain PyTorch rounds nothing then, whatever the numbers of a row differ by."""
    query, key, value = (torch.randn(4, 3, n, 40, device="cuda", dtype=dtype, requires_grad=True) for n in (1, 5, 5))
    out, aux = mita_ext.attention(query, key, value, num_landmarks=1, topk=1, shared_expert=False, return_aux=True)
    dout = torch.randn_like(out) * torch.logspace(-3, 1, 40, device="cuda").to(dtype)
    (grad,) = torch.autograd.grad(out, value, dout)
    expected = torch.zeros_like(value).scatter(2, aux.topk_indices.long()[:, :, 0, :, None].expand(-1, -1, -1, 40), dout)
    assert torch.equal(grad, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_reaches_the_keys_of_its_expert_alone(value):
    case = case_of("no_shared_expert", N=100, D=64, M=4, K=20)
    tensors = make_inputs(case, "cuda", torch.bfloat16, requires_grad=True)
    dout, _ = grad_outputs(case, "cuda", torch.bfloat16)
    dout[0, 1, 7, 3] = value
    out, aux = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
    chosen = torch.zeros(tensors[1].shape[:3], dtype=torch.bool, device="cuda")
    chosen[0, 1, aux.topk_indices[0, 1, aux.experts[0, 1, 7, 0]]] = True
    for grad in torch.autograd.grad(out, tensors[1:3], dout):
        assert torch.equal(~grad.isfinite().all(-1), chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("D, routes, Nq", [(64, 1, 300), (64, 1, 9000), (64, 2, 300), (128, 1, 3000), (64, 1, None)])
def test_groups_kept_and_made_again_give_the_same(D, routes, Nq):
    case = case_of("basic", B=2, H=4, Hkv=2, N=Nq or 700, L=400, D=D, M=20, K=17, routes=routes)
    q, k, v, z = make_inputs(case, "cuda", torch.bfloat16)
    lengths = () if Nq else [torch.tensor(n, dtype=torch.int32, device="cuda") for n in ((700, 31), (400, 90))]
    options = True, D**-0.5, 1 / D
    out, lse, _, indices, experts, groups, *rest = torch.ops.mita_ext.attention(
        q, k, v, z, [1, 1], [1, 1], 0, case.K, routes, *options, *lengths
    )
    assert groups.numel() > experts.numel()
    dout = torch.randn_like(out)

    def gradients(groups):
        saved = q, k, v, z, indices, experts, groups, *rest, out, lse
        pooling = False, [1, 1], [1, 1], 0
        return torch.ops.mita_ext.attention_backward(dout, None, *saved, *pooling, *options, True, True, *lengths)

    shifted = groups.new_zeros(groups.numel() + 1)[1:].copy_(groups)  # where no list may begin
    for other in (groups.new_empty(0), shifted):
        assert all(torch.equal(a, b) for a, b in zip(gradients(groups), gradients(other), strict=True))
    with pytest.raises(ValueError, match="groups must be those of the forward pass, or empty"):
        gradients(groups[1:].contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("N, M, K", [(4096, 64, 64), (9000, 60, 64), (4096, 64, 128)])  # in one pass, twice, and not
def test_many_heads_take_several_launches(N, M, K):
    """The routed sums of 160 heads of this size are more than are held at once."""
    case = case_of("clustered_pooled", B=5, H=32, Hkv=16, N=N, L=4096, D=64, M=M, K=K)
    tensors = make_inputs(case, "cuda", torch.bfloat16, requires_grad=True)[:3]
    dout, _ = grad_outputs(case, "cuda", torch.bfloat16)
    together = torch.autograd.grad(mita_ext.attention(*tensors, **case.options(None)), tensors, dout)
    for b in range(case.B):
        part = [x[b : b + 1].detach().requires_grad_() for x in tensors]
        alone = torch.autograd.grad(mita_ext.attention(*part, **case.options(None)), part, dout[b : b + 1])
        for name, a, t in zip(NAMES, alone, together, strict=False):
            error = (a[0].float() - t[b].float()).norm() / a[0].float().norm()
            assert error <= 5e-3, f"{name} of batch element {b}: {error:.1e}"  # sums in another order, rounded to bfloat16
