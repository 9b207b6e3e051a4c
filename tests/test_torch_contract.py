"""What torch expects of an operator: opcheck, compile, autocast, checkpointing, graphs, streams, repeatability."""

import contextlib
import gc
import os
import time
from functools import partial

import pytest
import torch
from cases import BY_NAME, capture, case_of, make_inputs
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mita_ext

OPS = torch.ops.mita_ext
SHAPES = {"B": 2, "H": 4, "Hkv": 2, "N": 20, "L": 30, "D": 16, "M": 6, "K": 5}


# ---- the raw ops


def op_arguments(device, dtype):
    """(op, arguments) for every registered op, forward and backward."""
    q, k, v, z = make_inputs(case_of("basic", **SHAPES), device, dtype)
    pooling = ((2, 3), (3, 6), 1)
    scales = (0.3, 0.2)
    long = make_inputs(case_of("basic", **SHAPES | {"N": 300}), device, dtype)[0]  # its groups are kept on a GPU
    T, C, landmark_lse = OPS.landmark_topk(z, k, v, 5, 0.3)
    r = OPS.route(q, z, 2)
    out, lse = OPS.expert_attention(q, k, v, z, C, T, r, True, *scales)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dC, dlandmark_lse = torch.randn_like(C), torch.randn_like(landmark_lse)
    nq, nk = (torch.tensor(n, dtype=torch.int32, device=device) for n in ((20, 7), (0, 30)))
    in_a_row = ((1, 6), (1, 20), 0)
    sums = [torch.tensor(n, dtype=torch.int32, device=device) for n in ((0, 20, 27), (0, 3, 33))]
    g = r.new_empty(0)
    of_long = (long, k, v, None, (1, 6), (1, 300), 0, 5, 1, True, *scales)
    long_out, long_lse, long_z, *long_selected = OPS.attention(*of_long)
    packed, of_packed = ([x.transpose(1, 2).flatten(0, 1)[:33] for x in tensors] for tensors in ((q, k, v), (dout, out)))
    return {
        "pool": [(q, *pooling), (q, *in_a_row, nq)],
        "pool_backward": [(z, 20, *pooling), (z, 20, *in_a_row, nq)],
        "landmark_topk": [(z, k, v, 5, 0.3), (z, k, v, 64, 0.3), (z, k, v, 5, 0.3, nk)],
        "landmark_topk_backward": [
            *((dC, d, z, k, v, C, landmark_lse, 0.3) for d in (dlandmark_lse, None)),
            (dC, dlandmark_lse, z, k, v, C, landmark_lse, 0.3, nk),
        ],
        "route": [(q, z, s) for s in (0, 1, 2)],
        "expert_attention": [(q, k, v, z, C, T, r, shared, *scales) for shared in (True, False)],
        "expert_attention_backward": [
            (dout, d, q, k, v, z, C, T, r, out, lse, shared, *scales) for d, shared in ((dlse, True), (None, False))
        ],
        "attention": [
            (q, k, v, z, (1, 6), (1, 20), 0, 5, 1, True, *scales),
            of_long,
            (q, k, v, None, *pooling, 64, 2, True, *scales),
            (q, k, v, None, *pooling, 5, 0, True, *scales),
            (q, k, v, None, *pooling, 5, 1, False, *scales),
            (q, k, v, z, *in_a_row, 5, 1, True, *scales, nq, nk),
            (q, k, v, None, *in_a_row, 5, 2, True, *scales, nq),
            (*packed, None, *in_a_row, 64, 1, True, *scales, *sums, 20, 30),
        ],
        "attention_backward": [
            *(
                (dout, d, q, k, v, z, T, r, g, C, landmark_lse, out, lse, pooled, *pooling, True, *scales, *wanted)
                for d, pooled, *wanted in (
                    (dlse, True, True, True),
                    (None, False, True, True),
                    (None, False, False, True),
                    (None, True, True, False),
                    (dlse, False, False, False),
                )
            ),
            (long_out, None, long, k, v, long_z, *long_selected, long_out, long_lse, True, *of_long[4:7], True, *scales)
            + (True, True),
            (dout, dlse, q, k, v, z, T, r, g, C, landmark_lse, out, lse, True, *in_a_row, True, *scales, True, True, nq, nk),
            (of_packed[0], dlse, *packed, z, T, r, g, C, landmark_lse, of_packed[1], lse, True, *in_a_row, True, *scales)
            + (True, True, *sums, 20, 30),
        ],
    }


def with_gradient(x):
    is_float = isinstance(x, torch.Tensor) and x.dtype.is_floating_point
    return x.detach().requires_grad_() if is_float else x


OP_NAMES = [
    "pool",
    "pool_backward",
    "landmark_topk",
    "landmark_topk_backward",
    "route",
    "expert_attention",
    "expert_attention_backward",
    "attention",
    "attention_backward",
]


@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name, backend):
    for arguments in op_arguments(*backend)[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)
        if f"{name}_backward" in OP_NAMES:  # aot_dispatch adds to the sum of the first output in place: not to indices
            tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            tests = tests[: 3 if name == "landmark_topk" else 4]
            torch.library.opcheck(getattr(OPS, name).default, [with_gradient(x) for x in arguments], test_utils=tests)


def test_every_op_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mita_ext::")}
    assert registered == set(OP_NAMES)


def test_ops_return_fresh_contiguous_tensors(device):
    arguments = op_arguments(device, torch.float32)
    for name in OP_NAMES:
        for args in arguments[name]:
            results = getattr(OPS, name)(*args)
            results = results if isinstance(results, tuple) else (results,)
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            for x in results:
                assert x.is_contiguous(), name
                assert x.numel() == 0 or x.untyped_storage().data_ptr() not in inputs, name


# ---- attention as a function: compiled, under autocast, checkpointed


def fused(q, k, v, z):
    return mita_ext.attention(q, k, v, landmarks=z, topk=5, routes=2)


def with_lse(q, k, v, z):
    out, aux = mita_ext.attention(q, k, v, landmarks=z, topk=64, return_aux=True)
    return out * aux.lse[..., None].sigmoid().to(out.dtype)


def pooled(q, k, v, z):
    return mita_ext.attention(q, k, v, num_landmarks=(2, 3), grid=(3, 6), num_prefix_tokens=1, topk=5) + 0 * z.sum()


def stages(q, k, v, z):
    Z = mita_ext.pool_landmarks(q, 6)
    T, C, _ = mita_ext.landmark_topk(z, k, v, topk=5)
    return mita_ext.expert_attention(q, k, v, Z, C, T, mita_ext.route(q, Z))[0]


def padded(q, k, v, z):
    numbers = 7 * torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    lengths = {"seqlens_q": numbers % (q.shape[2] + 1), "seqlens_k": (numbers + 3) % (k.shape[2] + 1)}
    return mita_ext.attention(q, k, v, landmarks=z, topk=5, **lengths)


def packed(q, k, v, z):
    B, _, N, _ = q.shape
    sums = torch.arange(B + 1, device=q.device, dtype=torch.int32)
    tensors = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1) for x in (q, k, v))
    out = mita_ext.attention_varlen(*tensors, sums * N, sums * k.shape[2], N, k.shape[2], num_landmarks=6, topk=5)
    return out.unflatten(0, (B, N)).transpose(1, 2) + 0 * z.sum()


FUNCTIONS = pytest.mark.parametrize("function", [fused, with_lse, pooled, stages, padded, packed], ids=lambda f: f.__name__)


def run(function, tensors, dout=None):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out) if dout is None else dout)


def assert_all_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@FUNCTIONS
def test_static_shapes_compile_without_a_graph_break(function, device):
    """fullgraph raises on a break; a second batch size and length follow the first."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    for B in (2, 3):
        tensors = make_inputs(case_of("basic", **SHAPES | {"B": B, "L": 30 + B}), device, torch.float32)
        assert_all_equal(run(compiled, tensors), run(function, tensors))


@FUNCTIONS
def test_dynamic_shapes_compile_once(function, device):
    """No length and no batch size compiles again: with more or fewer keys than topk, with N = L, with N < M."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for B, N, L in ((3, 20, 30), (5, 19, 70), (4, 64, 64), (7, 100, 2)):  # torch itself ties sizes that are equal at first
        tensors = make_inputs(case_of("basic", **SHAPES | {"B": B, "N": N, "L": L}), device, torch.float32)
        assert_all_equal(run(compiled, tensors), run(function, tensors))
        assert counter.frame_count == 1


def test_one_tensor_in_many_places_compiles(device):
    """As query, key, value and landmarks; as the lengths of both sides."""

    def function(x, n):
        given = mita_ext.attention(x, x, x, landmarks=x, topk=5)
        return given + mita_ext.attention(x, x, x, num_landmarks=4, topk=5, seqlens_q=n, seqlens_k=n)

    torch._dynamo.reset()
    n = torch.tensor([20, 7], dtype=torch.int32, device=device)
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)[:1]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (run(partial(f, n=n), tensors) for f in (compiled, function))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_with_inductor(device, dtype):
    torch._dynamo.reset()
    tensors = make_inputs(case_of("basic", **SHAPES), device, dtype)
    got, expected = run(torch.compile(fused, fullgraph=True), tensors), run(fused, tensors)
    assert_all_equal(got, expected)


@FUNCTIONS
def test_fake_tensors_have_the_shapes_of_real_ones(function, device):
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    real = run(function, tensors)
    with FakeTensorMode() as mode:
        fake = run(function, [mode.from_tensor(x) for x in tensors])
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@FUNCTIONS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_computes_in_the_autocast_dtype(function, half, compiled, device):
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=half):
        out, *grads = run(function, tensors, torch.ones(2, 4, 20, 16, device=device, dtype=half))
    expected = run(lambda *x: function(*(y.to(half) for y in x)), tensors)
    assert out.dtype == half
    assert torch.equal(out, expected[0])
    for got, want in zip(grads, expected[1:], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(half).eps, atol=1e-3)


def test_autocast_joins_mixed_dtypes(device):
    q, k, v, z = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = fused(q, k.bfloat16(), v, z.bfloat16())
        assert torch.equal(mixed, fused(*(x.bfloat16() for x in (q, k, v, z))))
        with torch.autocast(device, enabled=False):
            assert fused(q, k, v, z).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    tensors = make_inputs(case_of("basic", **SHAPES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(*tensors), fused(*tensors))
        assert fused(*tensors).dtype == torch.float64


@FUNCTIONS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(function, reentrant, device):
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.backward(torch.ones_like(out))
    assert_all_equal((out.detach(), *(x.grad for x in leaves)), run(function, tensors))


def test_saved_tensors_are_inputs_and_small_results(device):
    """Memory between forward and backward: no probabilities, no scores, no gathered keys."""
    case = case_of("basic", N=300, L=400, M=20, K=16)
    tensors = make_inputs(case, device, torch.float32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused(*tensors)
    given = {x.untyped_storage().data_ptr() for x in tensors}
    extra = sum(x.numel() * x.element_size() for x in saved if x.untyped_storage().data_ptr() not in given)
    rows = case.B * case.H
    out, lse, experts = case.N * case.D, case.N, case.N * 2
    groups = experts + 5 * (experts // 128 + case.M) + 1 if device == "cuda" else 0  # one for an entry, five for a segment
    landmarks = case.landmarks * (case.D + 1 + 5)  # compressed values, lse, five keys
    assert extra <= 4 * rows * (out + lse + experts + groups + landmarks)


@FUNCTIONS
def test_second_derivative_is_refused(function, device):
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32, requires_grad=True)
    out = function(*tensors).square().sum()
    with pytest.raises(RuntimeError, match="second derivative|differentiate twice"):
        torch.autograd.grad(torch.autograd.grad(out, tensors[:1], create_graph=True)[0].sum(), tensors)


# ---- other ways to run and to differentiate


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_functional_transforms_are_refused(transform, compiled, device):
    """In compiled code too, where torch would trace the forward pass alone and give gradients of zero."""
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)

    def transformed(q):
        return TRANSFORMS[transform](lambda x: fused(x, *tensors[1:]), q)

    torch._dynamo.reset()
    if compiled:
        transformed = torch.compile(transformed, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"^mita_ext\.attention: transforms of torch\.func .* are not supported"):
        transformed(tensors[0])


def test_route_is_refused_under_a_transform_as_attention_is(device):
    q, _, _, z = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    with pytest.raises(RuntimeError, match=r"^mita_ext\.route: transforms"):
        torch.func.vmap(lambda x: mita_ext.route(x, z))(q[None])


def test_forward_mode_is_refused(device):
    q, k, v, z = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        fused(forward_ad.make_dual(q, q), k, v, z)


class Layer(torch.nn.Module):
    """Self-attention as a model has it, in float64, so that two ways to the same gradients differ by rounding alone."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv, self.proj = torch.nn.Linear(32, 96).double(), torch.nn.Linear(32, 32).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = mita_ext.attention(q, k, v, num_landmarks=4, topk=6)
        return self.proj(out.transpose(1, 2).flatten(2))

    def gradients(self, x):
        self(x).square().mean().backward()
        return [parameter.grad for parameter in self.parameters()]


BATCH = torch.linspace(-3, 3, 4 * 40 * 32, dtype=torch.float64).mul(100).sin().view(4, 40, 32)


def test_functional_call():
    layer = Layer()
    parameters = {name: x.detach().clone().requires_grad_() for name, x in layer.named_parameters()}
    out = torch.func.functional_call(layer, parameters, BATCH)
    got = torch.autograd.grad(out.square().mean(), list(parameters.values()))
    assert_all_equal(got, layer.gradients(BATCH))


def train_on_two_ranks(rank, rendezvous):
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    expected = Layer().gradients(BATCH)
    for wrap in (DistributedDataParallel, lambda layer: fully_shard(layer, mesh=mesh)):
        layer = wrap(Layer())
        got = Layer.gradients(layer, BATCH.chunk(2)[rank])
        got = [x.full_tensor() if isinstance(x, DTensor) else x for x in got]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    distributed.barrier()
    os._exit(0)  # both are through. At the end of torch's threads a process aborts now and then ("terminate called ...")


def test_data_parallel_and_fully_sharded(tmp_path, monkeypatch):
    """Each rank has half of the batch; the gradients are those of one process with all of it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # no network is needed, nor a name for this host
    torch.multiprocessing.spawn(train_on_two_ranks, (tmp_path / "rendezvous",), nprocs=2)


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v, z):
        return self.function(q, k, v, z)


@FUNCTIONS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_keeps_the_ops(function, dynamic, device):
    tensors = make_inputs(case_of("basic", **SHAPES), device, torch.float32)
    dims = None
    if dynamic:
        B, L = torch.export.Dim("B", min=2), torch.export.Dim("L", min=2)
        N = torch.export.Dim("N", min=19)  # the grid of `pooled`
        dims = {"q": {0: B, 2: N}, "k": {0: B, 2: L}, "v": {0: B, 2: L}, "z": {0: B}}
    program = torch.export.export(Exported(function), tuple(tensors), dynamic_shapes=dims, strict=False)
    program = program.run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes]
    assert any(target.startswith("mita_ext.") for target in targets), targets
    for B, N, L in ((2, 20, 30), (5, 41, 77)) if dynamic else ((2, 20, 30),):
        tensors = make_inputs(case_of("basic", **SHAPES | {"B": B, "N": N, "L": L}), device, torch.float32)
        assert torch.equal(program.module()(*tensors), function(*tensors))


def test_in_place_change_before_backward_is_noticed(device):
    tensors = [x.clone() for x in make_inputs(case_of("basic", **SHAPES), device, torch.float32, requires_grad=True)]
    out = fused(*tensors)
    tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- the same bits, every time

REPEATED = [
    (case_of("deit", B=64, H=6), "cuda", torch.bfloat16, 200),
    (case_of("all_queries_one_expert", B=64, H=6, N=197, D=64, M=25, K=25), "cuda", torch.float16, 200),
    (case_of("deit", B=64, H=6, M=(7, 7), K=49), "cuda", torch.bfloat16, 200),
    (case_of("pooled_2d_with_prefix", B=8, H=12, N=1601, D=64, M=(7, 7), K=49, grid=(40, 40)), "cuda", torch.bfloat16, 200),
    (case_of("all_queries_one_expert", B=4, H=8, N=4096, D=64, M=64, K=64), "cuda", torch.bfloat16, 200),
    (case_of("clustered", B=4, H=8, N=3000, D=128, M=65, K=100, Hkv=2, routes=2), "cuda", torch.float16, 200),
    (case_of("clustered", B=2, H=4, N=1000, D=40, M=33, K=50), "cuda", torch.float32, 200),
    *(
        (case_of(name), "cpu", dtype, 5)
        for name in ("deit", "clustered", "routes_3")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (case_of("all_queries_one_expert", N=1000), "cpu", torch.float32, 5),
    (case_of("grouped_query", B=3, N=400, L=3000, M=33, K=50), "cpu", torch.float32, 5),
]
REPEATED = [
    pytest.param(*row, marks=[pytest.mark.gpu] if row[1] == "cuda" else [], id=f"{row[0].name}-{row[1]}-{row[2]}")
    for row in REPEATED
]


@pytest.mark.parametrize("case,device,dtype,repeats", REPEATED)
def test_repeats_are_bitwise_equal(case, device, dtype, repeats):
    """Forward and backward, while other work churns the memory that the allocator hands out."""
    tensors = make_inputs(case, device, dtype, requires_grad=True)
    inputs = tensors[:3] if case.pooled else tensors

    def results():
        out, aux = mita_ext.attention(*tensors[:3], **case.options(tensors[3]), return_aux=True)
        dout = out.detach() * 0.5 + 1
        return out, *aux, *torch.autograd.grad((out, aux.lse), inputs, (dout, torch.ones_like(aux.lse)))

    first = [x.detach().clone() for x in results()]
    for _ in range(repeats):
        noise = torch.full((first[0].numel() // 3,), torch.nan, device=device)
        del noise
        again = results()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


# ---- memory: none grows, none is lost


@pytest.mark.gpu
@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow(function, dtype):
    """Scratch is torch's own: after a call or two, calls take nothing new from the device and leave nothing behind."""
    tensors = make_inputs(case_of("basic", **SHAPES | {"N": 3000, "L": 5000, "D": 64}), "cuda", dtype)
    for _ in range(3):
        run(function, tensors)
    gc.collect()  # what other tests left

    def in_use(expected=None):
        """The least of some readings: on a busy machine autograd's own thread may still hold what it worked on last."""
        readings = []
        while len(readings) < 20 or (expected and expected not in readings and len(readings) < 100):
            torch.cuda.synchronize()
            readings.append((torch.cuda.memory_reserved(), torch.cuda.memory_allocated()))
            time.sleep(0.02)
        return min(readings)

    before = in_use()
    for _ in range(50):
        run(function, tensors)
    assert in_use(before) == before


@pytest.mark.gpu
@pytest.mark.parametrize("function", [fused, with_lse, stages], ids=lambda f: f.__name__)
def test_out_of_memory_leaves_nothing_broken(function):
    """The limit is raised step by step, so that each large allocation of forward and backward fails once."""
    case = case_of("basic", B=1, H=8, N=2**16, D=64)  # query: 64 MiB
    tensors = make_inputs(case, "cuda", torch.bfloat16, requires_grad=True)
    dout = torch.ones_like(tensors[0])

    def step():
        out = function(*tensors)
        return out.detach(), *torch.autograd.grad(out, tensors, dout)

    expected = step()
    total, failures = torch.cuda.get_device_properties(0).total_memory, 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    ballast = []  # what other tests left free between their tensors
    for size in (2**25, 2**20):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    allocated = torch.cuda.memory_allocated()
    try:
        for spare in range(0, 2**29, 2**25):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
            try:
                results = step()
            except torch.OutOfMemoryError:
                failures += 1
            else:
                assert_all_equal(results, expected)
                del results
            gc.collect()
            deadline = time.monotonic() + 10  # autograd's thread may end after the call, with the gradients still in its hands
            while torch.cuda.memory_allocated() > allocated and time.monotonic() < deadline:
                time.sleep(0.01)
            assert torch.cuda.memory_allocated() <= allocated, "a failed call kept memory"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures >= 2, "the limits never bit"
    assert_all_equal(step(), expected)


# ---- CUDA graphs, host synchronisation


@pytest.mark.gpu
@FUNCTIONS
@pytest.mark.parametrize("sizes", [{"L": 300}, {"Hkv": 4}], ids=["stages", "short"])
def test_graph_replays_with_changed_inputs(function, sizes):
    """Captured forward and backward, replayed on inputs with another selection."""
    case = case_of("basic", **SHAPES | {"D": 64} | sizes)
    static = make_inputs(case, "cuda", torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in static]
    dout = torch.ones(2, 4, 20, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    graph, captured = capture(step)
    for seed in (0, 1, 2):
        fresh = make_inputs(case, "cuda", torch.bfloat16, seed=seed)
        with torch.no_grad():
            for x, y in zip(leaves, fresh, strict=True):
                x.copy_(y)
        graph.replay()
        assert_all_equal([x.detach() for x in captured], run(function, fresh, dout))


@pytest.mark.gpu
@pytest.mark.parametrize("N", [600, 4608])
def test_graph_of_kernels_that_start_early(N):
    """On Hopper: what follows the pass over the queries, and the scores behind pooling and routing."""
    torch.manual_seed(0)
    *leaves, dout = (torch.randn(4, 16, N, 64, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3) for i in range(4))

    def step():
        out = mita_ext.attention(*leaves, num_landmarks=64, topk=32)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, captured = capture(step)
    for _ in range(3):
        with torch.no_grad():
            for x in leaves:
                x.normal_()
        expected = step()
        graph.replay()
        assert_all_equal(captured, expected)


@pytest.mark.gpu
@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation(function, dtype):
    tensors = make_inputs(case_of("basic", **SHAPES), "cuda", dtype)
    run(function, tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_host_synchronisation_in_the_kernels():
    """The debug mode sees torch's own synchronisations only: a call must return while the GPU is still busy before it."""
    tensors = make_inputs(BY_NAME["deit"], "cuda", torch.bfloat16)
    call = lambda *x: mita_ext.attention(*x[:3], num_landmarks=25, topk=25) + 0 * x[3].sum()  # noqa: E731
    for _ in range(3):
        run(call, tensors)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done.record()
    run(call, tensors)
    assert not done.query(), "the call waited for the GPU"
    torch.cuda.synchronize()
