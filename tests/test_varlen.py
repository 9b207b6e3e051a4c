"""Sequences of different lengths, padded or packed: as if each were alone, and nothing comes of what is between them."""

import pytest
import torch
from cases import F64, VARLEN, assert_rivals, capture, case_of, given_selection, make_inputs
from test_gradients import smallest_gap
from torch.nn.functional import pad

import mita_ext

INT = torch.int32
BEFORE, BEHIND = 2, 3  # packed tokens of no sequence
CASE = pytest.mark.parametrize("case", VARLEN, ids=lambda case: case.name)
FORM = pytest.mark.parametrize("form", ["padded", "packed"])
BY_NAME = {case.name: case for case in VARLEN}


def lengths_of(case):
    return case.lengths_q or (case.N,) * case.B, case.lengths_k or (case.keys,) * case.B


def poisoned(x, lengths):
    """NaN at the padding of [B, H, N] or [B, H, N, D]."""
    behind = torch.arange(x.shape[2]) >= torch.tensor(lengths)[:, None]
    behind = behind[:, None].expand(x.shape[:3]).to(x.device)
    return x.masked_fill(behind[..., None] if x.dim() == 4 else behind, torch.nan)


def pack(x, lengths):
    """[B, H, N, D] -> [total, H, D], as a slice of a larger tensor of NaN, with tokens of no sequence at both ends."""
    B, H, _, D = x.shape
    packed = x.new_full((BEFORE + sum(lengths) + BEHIND, H + 1, D + 8), torch.nan)[:, 1:, :D]
    for b, start in enumerate(starts_of(lengths)[:-1]):
        packed[start : start + lengths[b]] = x[b, :, : lengths[b]].transpose(0, 1)
    return packed


def unpack(x, lengths, N):
    """Back again, with zeros at the padding; tokens of no sequence must be zero."""
    assert (x[:BEFORE] == 0).all()
    assert (x[len(x) - BEHIND :] == 0).all()
    starts = starts_of(lengths)
    return torch.stack([pad(x[i:j].transpose(0, 1), (0, 0, 0, N - (j - i))) for i, j in zip(starts[:-1], starts[1:])])


def starts_of(lengths):
    return [BEFORE + sum(lengths[:b]) for b in range(len(lengths) + 1)]


def int_tensor(numbers, device):
    return torch.tensor(numbers, dtype=INT, device=device)


def run(form, case, tensors, dout, dlse):
    """out, aux, gradients of query, key, value, and landmarks if they are given: all padded, with zeros at the padding."""
    nq, nk = lengths_of(case)
    device = dout.device
    q, k, v, z = (poisoned(x, n) for x, n in zip(tensors, (nq, nk, nk, (case.landmarks,) * case.B)))
    dout, dlse = poisoned(dout, nq), poisoned(dlse, nq)
    if form == "packed":
        q, k, v, dout = pack(q, nq), pack(k, nk), pack(v, nk), pack(dout, nq)
    leaves = [x.detach().requires_grad_() for x in ((q, k, v) if case.pooled else (q, k, v, z))]
    options = case.options(leaves[-1])
    if form == "padded":
        lengths = {"seqlens_q": case.lengths_q, "seqlens_k": case.lengths_k}
        lengths = {name: int_tensor(n, device) for name, n in lengths.items() if n is not None}
        out, aux = mita_ext.attention(*leaves[:3], **options, **lengths, return_aux=True)
    else:
        options = {name: x for name, x in options.items() if name not in ("grid", "num_prefix_tokens")}
        sums = (int_tensor(starts_of(n), device) for n in (nq, nk))
        out, aux = mita_ext.attention_varlen(*leaves[:3], *sums, case.N, case.keys, **options, return_aux=True)
    assert out.is_contiguous()
    grads = torch.autograd.grad((out, aux.lse), leaves, (dout, dlse))
    for x, grad in zip(leaves, grads):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    if form == "packed":
        out = unpack(out, nq, case.N)
        grads = [unpack(x, n, N) for x, n, N in zip(grads, (nq, nk, nk), (case.N, case.keys, case.keys))] + list(grads[3:])
    for x, lengths in ((out, nq), *zip(grads, (nq, nk, nk))):
        assert (poisoned(x, lengths).nan_to_num(0, 0, 0) == x).all(), "not zero at padding"
    return out.detach(), aux._replace(lse=aux.lse.detach()), grads


def grad_outputs(case, device, dtype):
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(case.B, case.N, case.H, case.D, generator=generator, dtype=F64).transpose(1, 2)
    dlse = torch.randn(case.B, case.H, case.N, generator=generator, dtype=F64)
    return dout.to(device, dtype), dlse.to(device, torch.promote_types(dtype, torch.float32))


def one_by_one(case, aux, tensors, dtype, dout, dlse):
    """The definition on the selection of `aux`, sequence after sequence -> out, lse (0 where it is -inf), gradients."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    outs, lses = [], []
    for b, (nq, nk) in enumerate(zip(*lengths_of(case))):
        if nq == 0 or (nk == 0 and not case.shared_expert):  # no units
            outs.append(0 * leaves[0][b : b + 1])
            lses.append(0 * outs[-1][..., 0].to(torch.promote_types(dtype, torch.float32)))
            continue
        q, k, v, z = (x[b : b + 1] for x in leaves)
        k, v = (x[:, :, :nk] if nk else 0 * x[:, :, :1] for x in (k, v))  # without keys: one that is zero, and not chosen
        own = aux._replace(
            landmarks=aux.landmarks[b : b + 1], topk_indices=aux.topk_indices[b : b + 1], experts=aux.experts[b : b + 1, :, :nq]
        )
        out, lse = given_selection(case, own, q[:, :, :nq], k, v, z)
        outs.append(pad(out, (0, 0, 0, case.N - nq)))
        lses.append(pad(lse, (0, case.N - nq)))
    out, lse = torch.cat(outs), torch.cat(lses)
    inputs = leaves[:3] if case.pooled else leaves
    grads = torch.autograd.grad((out, lse), inputs, (dout.to(out.dtype), dlse.to(lse.dtype)), allow_unused=True)
    return out, lse, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]


@CASE
def test_selection_is_that_of_each_sequence_alone(case, backend):
    device, dtype = backend
    tensors = make_inputs(case, device, dtype)
    _, aux, _ = run("padded", case, tensors, *grad_outputs(case, device, dtype))
    K = min(case.K, case.keys)
    assert aux.topk_indices.shape == (case.B, case.H, case.landmarks, K)
    assert aux.experts.shape == (case.B, case.H, case.N, case.routes)
    for b, (nq, nk) in enumerate(zip(*lengths_of(case))):
        q, k, v, z = (x[b : b + 1] for x in tensors)
        q, k, v = q[:, :, :nq], k[:, :, :nk], v[:, :, :nk]
        if case.pooled:
            z = mita_ext.pool_landmarks(q, case.M) if nq else torch.zeros_like(z)
        assert torch.equal(aux.landmarks[b], z[0])
        k_of_sequence = min(K, nk)
        if nk:
            chosen, compressed, _ = mita_ext.landmark_topk(z, k, v, topk=K)
            assert torch.equal(aux.topk_indices[b, ..., :k_of_sequence], chosen[0])
            fine = 4 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps  # other parts of the keys, other order
            torch.testing.assert_close(aux.compressed[b], compressed[0], rtol=fine, atol=fine)
        else:
            assert (aux.compressed[b] == 0).all()
        assert (aux.topk_indices[b, ..., k_of_sequence:] == -1).all()
        assert torch.equal(aux.experts[b, :, :nq], mita_ext.route(q, z, routes=case.routes)[0])
        assert (aux.experts[b, :, nq:] == -1).all()
        assert (aux.lse[b, :, nq:] == -torch.inf).all()
        if nq and nk:  # the whole call, one sequence at a time
            alone = mita_ext.attention(q, k, v, **case.options(z), return_aux=True)[1]
            assert torch.equal(aux.experts[b, :, :nq], alone.experts[0])
            assert torch.equal(aux.topk_indices[b, ..., :k_of_sequence], alone.topk_indices[0])


@CASE
def test_values_and_gradients_given_the_selection(case, backend):
    """NaN is in all padding, and in the gradients that come in there."""
    device, dtype = backend
    dout, dlse = grad_outputs(case, device, dtype)
    nq, nk = lengths_of(case)
    draws = []
    large = case.B * case.H * max(case.N, case.keys) * case.D > 50_000  # the largest error of few numbers is mostly luck
    for seed in range(1 if large else 2 if device == "cpu" else 8):
        tensors = make_inputs(case, device, dtype, seed=seed)
        out, aux, grads = run("padded", case, tensors, dout, dlse)
        mask = torch.arange(case.N, device=device) < int_tensor(nq, device)[:, None, None]
        units = mask & (case.shared_expert | (int_tensor(nk, device) > 0))[:, None, None]
        assert torch.equal(aux.lse == -torch.inf, ~units.expand_as(aux.lse))
        lse = aux.lse.masked_fill(~units, 0)
        masked = [dout.masked_fill(~mask[..., None], 0), dlse.masked_fill(~units, 0)]
        exact = one_by_one(case, aux, tensors, F64, *masked)
        rival = one_by_one(case, aux, tensors, dtype, *masked)
        # The inputs of lse are exact, so it owes float32 accuracy whatever the dtype.
        wide = one_by_one(case, aux, tensors, lse.dtype, *masked)
        draws.append(((out, lse, *grads), (exact[0], exact[1], *exact[2]), (rival[0], wide[1], *rival[2])))
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv", "dlandmarks")[: len(draws[0][0])]):
        assert_rivals(name, *(torch.stack([results[i] for results in kind]) for kind in zip(*draws)))


@CASE
def test_packed_is_padded_bit_for_bit(case, backend):
    """So what the tests above find of padded batches holds for packed ones."""
    device, dtype = backend
    tensors = make_inputs(case, device, dtype)
    padded, packed = (run(form, case, tensors, *grad_outputs(case, device, dtype)) for form in ("padded", "packed"))
    for a, b in zip((padded[0], *padded[1], *padded[2]), (packed[0], *packed[1], *packed[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["pooled", "no_shared_expert", "grouped_query"])
def test_full_lengths_are_no_lengths(name, backend):
    device, dtype = backend
    case = case_of("basic", B=2, pooled=BY_NAME[name].pooled, shared_expert=BY_NAME[name].shared_expert)
    tensors = make_inputs(case, device, dtype)
    full = int_tensor([50, 50], device)
    expected = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
    got = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), seqlens_q=full, seqlens_k=full, return_aux=True)
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [(0, 0), (50, 0), (7, 50), (1, 3)])
def test_stages_know_lengths(lengths, backend):
    """Pooling and selection by themselves, forward and backward: what `attention` does, bit for bit."""
    device, dtype = backend
    case = case_of("basic", M=9, K=20)
    q, k, v, z = make_inputs(case, device, dtype)
    seqlens = int_tensor(lengths, device)
    q, k, v = (poisoned(x, lengths).requires_grad_() for x in (q, k, v))
    Z = mita_ext.pool_landmarks(q, 9, seqlens=seqlens)
    T, C, lse = mita_ext.landmark_topk(Z, k, v, topk=20, seqlens_k=seqlens)
    aux = mita_ext.attention(q, k, v, num_landmarks=9, topk=20, seqlens_q=seqlens, seqlens_k=seqlens, return_aux=True)[1]
    assert torch.equal(Z, aux.landmarks)
    assert torch.equal(T, aux.topk_indices)
    if dtype in (torch.float32, F64):
        assert torch.equal(C, aux.compressed)
    assert torch.equal(lse == -torch.inf, (seqlens == 0)[:, None, None].expand_as(lse))
    dC, dlse = torch.randn_like(C), torch.randn_like(lse)
    grads = torch.autograd.grad((C, lse), (q, k, v), (dC, dlse))
    for b, n in enumerate(lengths):
        part = [x[b : b + 1, :, :n].detach().requires_grad_() for x in (q, k, v)]
        for grad in grads:
            assert (grad[b, :, n:] == 0).all()
        if n == 0:
            continue
        Z_b = mita_ext.pool_landmarks(part[0], 9)
        _, C_b, lse_b = mita_ext.landmark_topk(Z_b, *part[1:], topk=20)
        alone = torch.autograd.grad((C_b, lse_b), part, (dC[b : b + 1], dlse[b : b + 1]))
        eps = torch.finfo(dtype).eps
        for a, together in zip(alone, grads, strict=True):
            torch.testing.assert_close(together[b, :, :n], a[0], rtol=8 * eps, atol=8 * eps * max(1.0, a.abs().max().item()))


def test_no_sequences(device):
    q = torch.randn(7, 4, 16, device=device, requires_grad=True)
    k = torch.randn(9, 2, 16, device=device, requires_grad=True)
    none = int_tensor([0], device)
    out, aux = mita_ext.attention_varlen(q, k, k, none, none, 0, 0, num_landmarks=3, return_aux=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert aux.landmarks.shape == (0, 4, 3, 16)
    for x in torch.autograd.grad(out.sum(), (q, k)):
        assert (x == 0).all()


@pytest.mark.parametrize("total", [0, 6])
def test_only_empty_sequences(total, device):
    """max_seqlen may be 0, and so may the number of tokens."""
    q, k = (torch.full((total, heads, 16), torch.nan, device=device, requires_grad=True) for heads in (4, 2))
    empty = int_tensor([total] * 4, device)
    for pooling in ({"num_landmarks": 3}, {"landmarks": torch.randn(3, 4, 3, 16, device=device)}):
        for routes in (0, 1, 2):
            out, aux = mita_ext.attention_varlen(q, k, k, empty, empty, 0, 0, routes=routes, **pooling, return_aux=True)
            assert torch.equal(out, torch.zeros(q.shape, device=device))
            assert (aux.topk_indices == -1).all()
            for x in torch.autograd.grad(out.sum(), (q, k)):
                assert (x == 0).all()


GRADCHECKED = {"B": 4, "N": 5, "L": 6, "D": 3, "M": 3, "K": 2, "lengths_q": (5, 0, 2, 1), "lengths_k": (6, 3, 0, 2)}


@FORM
@pytest.mark.parametrize("options", [{}, {"routes": 2}, {"routes": 0}, {"shared_expert": False}], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_gradcheck(form, options, pooled):
    case = case_of("basic", **GRADCHECKED, pooled=pooled, H=2, Hkv=1, **options)
    nq, nk = lengths_of(case)

    def alone(tensors):  # of one token all landmarks are pooled, and tie; the keys beside it are all chosen
        q, k, v, z = tensors
        for b in range(case.B):
            if nq[b] > 1 and nk[b]:
                yield q[b : b + 1, :, : nq[b]], k[b : b + 1, :, : nk[b]], v[b : b + 1, :, : nk[b]], z[b : b + 1]

    firm = (s for s in range(100) if min(smallest_gap(case, part) for part in alone(make_inputs(case, seed=s))) > 1e-3)
    q, k, v, z = make_inputs(case, seed=next(firm))
    if form == "packed":
        q, k, v = (pack(x, n).nan_to_num(0) for x, n in ((q, nq), (k, nk), (v, nk)))
    lengths = [int_tensor(starts_of(n) if form == "packed" else n, "cpu") for n in (nq, nk)]

    def attend(q, k, v, z=None):
        options = {"topk": case.K, "routes": case.routes, "shared_expert": case.shared_expert}
        options |= {"num_landmarks": 3} if z is None else {"landmarks": z}
        if form == "packed":
            out, aux = mita_ext.attention_varlen(q, k, v, *lengths, case.N, case.keys, **options, return_aux=True)
        else:
            out, aux = mita_ext.attention(q, k, v, seqlens_q=lengths[0], seqlens_k=lengths[1], **options, return_aux=True)
        return out, aux.lse.masked_fill(aux.lse == -torch.inf, 0)

    inputs = [x.requires_grad_() for x in ((q, k, v) if pooled else (q, k, v, z))]
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_compiled_code_takes_any_lengths(form, device):
    """Lengths are tensors: other lengths are no reason to compile again. Packed tensors change their size, too."""

    def padded(q, k, v, nq, nk):
        return mita_ext.attention(q, k, v, num_landmarks=6, topk=5, seqlens_q=nq, seqlens_k=nk)

    def packed(q, k, v, nq, nk, max_q, max_k):
        return mita_ext.attention_varlen(q, k, v, nq, nk, max_q, max_k, num_landmarks=6, topk=5)

    torch._dynamo.reset()
    function = padded if form == "padded" else packed
    compiled = torch.compile(function, fullgraph=True, dynamic=form == "packed", backend="aot_eager")
    case = case_of("basic", B=3, N=20, L=30, Hkv=1)
    q, k, v, _ = make_inputs(case, device, torch.float32)
    calls = 0
    for nq, nk in (((20, 7, 3), (30, 2, 9)), ((9, 0, 20), (30, 30, 8)), ((1, 2, 15), (0, 12, 29))):
        if form == "padded":
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            lengths = [int_tensor(n, device) for n in (nq, nk)]
        else:
            leaves = [pack(x, n).detach().contiguous().requires_grad_() for x, n in ((q, nq), (k, nk), (v, nk))]
            lengths = [*(int_tensor(starts_of(n), device) for n in (nq, nk)), max(nq), max(nk)]
        with torch._dynamo.config.patch(error_on_recompile=calls > 0):
            got = compiled(*leaves, *lengths)
        expected = function(*leaves, *lengths)
        assert torch.equal(got, expected)
        dout = torch.randn_like(expected)
        for a, b in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
            assert torch.equal(a, b)
        calls += 1


@pytest.mark.parametrize(
    "name", ["pooled", "routes_2", "grouped_query", "small_experts", "small_experts_wide", "many_queries", "long_keys"]
)
@FORM
def test_repeats_are_bitwise_equal(name, form, device):
    case, dtype = BY_NAME[name], torch.float32 if device == "cpu" else torch.bfloat16
    tensors = make_inputs(case, device, dtype)
    dout, dlse = grad_outputs(case, device, dtype)
    first = None
    for _ in range(2 if device == "cpu" else 50):
        noise = torch.full((3 * dout.numel(),), torch.nan, device=device)  # memory that comes back is never zero by luck
        del noise
        out, aux, grads = run(form, case, tensors, dout, dlse)
        results = (out, *aux, *grads)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


# ---- CUDA: nothing waits for the device


def step(form, leaves, lengths, dout, longest):
    if form == "padded":
        out = mita_ext.attention(*leaves, num_landmarks=6, topk=20, seqlens_q=lengths[0], seqlens_k=lengths[1])
    else:
        out = mita_ext.attention_varlen(*leaves, *lengths, *longest, num_landmarks=6, topk=20)
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.gpu
@FORM
@pytest.mark.parametrize("N,L,dtype", [(50, 60, torch.bfloat16), (400, 5000, torch.bfloat16), (70, 300, torch.float32)])
def test_graph_replays_with_changed_lengths(form, N, L, dtype):
    """Captured once, forward and backward; lengths are read anew by every replay."""
    tensors = make_inputs(case_of("basic", B=4, H=4, Hkv=2, N=N, L=L, D=64), "cuda", dtype)[:3]
    if form == "packed":
        tensors = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    dout = torch.randn_like(leaves[0])

    def numbers(share):
        lengths = [[int(n * share[b]) for b in range(4)] for n in (N, L)]
        if form == "packed":
            lengths = [[sum(n[:b]) for b in range(5)] for n in lengths]
        return [int_tensor(n, "cuda") for n in lengths]

    lengths = numbers((1, 1, 1, 1))
    graph, captured = capture(lambda: step(form, leaves, lengths, dout, (N, L)))
    for share in ((1, 0.5, 0, 0.9), (0, 0, 0, 0), (0.1, 0.2, 0.3, 1), (1, 1, 1, 1)):
        fresh = numbers(share)
        for x, y in zip(lengths, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        for a, b in zip(captured, step(form, leaves, fresh, dout, (N, L)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@FORM
def test_no_host_synchronisation(form):
    tensors = make_inputs(case_of("basic", B=4, N=50, L=60, D=64), "cuda", torch.bfloat16)[:3]
    lengths = [[n, 0, 1, n // 2] for n in (50, 60)]
    if form == "packed":
        tensors = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
        lengths = [[sum(n[:b]) for b in range(5)] for n in lengths]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    lengths, dout = [int_tensor(n, "cuda") for n in lengths], torch.randn_like(leaves[0])
    step(form, leaves, lengths, dout, (50, 60))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(form, leaves, lengths, dout, (50, 60))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()  # the debug mode sees torch's own synchronisations only
    torch.cuda._sleep(2_000_000_000)
    done.record()
    step(form, leaves, lengths, dout, (50, 60))
    assert not done.query(), "the call waited for the GPU"
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("N,L", [(50, 60), (400, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_clamps_lengths(N, L, dtype):
    """Out of range they mean the nearest length: checking would need a host synchronisation."""
    least, most = -(2**31), 2**31 - 1
    padded = [x.detach().requires_grad_() for x in make_inputs(case_of("basic", B=4, N=N, L=L, D=64), "cuda", dtype)[:3]]
    packed = [x.detach().transpose(1, 2).flatten(0, 1).clone().requires_grad_() for x in padded]
    wild = [int_tensor([-1, 9, n + 1, most], "cuda") for n in (N, L)]
    tame = [int_tensor([0, 9, n, n], "cuda") for n in (N, L)]
    for a, b in zip(*(step("padded", padded, n, torch.ones_like(padded[0]), None) for n in (wild, tame)), strict=True):
        assert torch.equal(a, b)
    # Descending sums hold no tokens; a sequence ends with max_seqlen and with the tensor.
    for wild, tame in (
        (lambda n: [20, 9, n, most, least], lambda n: [9, 9, n, 2 * n - 5, 2 * n - 5]),
        (lambda n: [least, 9, 9, n, most], lambda n: [0, 9, 9, n, 2 * n - 5]),
    ):
        lengths = ([int_tensor(sums(n), "cuda") for n in (N, L)] for sums in (wild, tame))
        results = [step("packed", packed, x, torch.ones_like(packed[0]), (N - 5, L - 5)) for x in lengths]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
