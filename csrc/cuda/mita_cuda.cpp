// The CUDA backend's face to torch, and the only CUDA file that knows it: checks, allocations, params, status -> exception.
// Stages in the order in which data flows; every op is a few of them. Nothing waits for the device.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nvtx3/nvToolsExt.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "dispatch.h"
#include "launch.h"

namespace mita {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// ---- from tensors to params ----------------------------------------------------------------------------------------

// A named range in the profiler, or none.
struct Range {
  const char* name;
  explicit Range(const char* name) : name(name) {
    if (name) nvtxRangePushA(name);
  }
  ~Range() {
    if (name) nvtxRangePop();
  }
  Range(const Range&) = delete;
};

// An op's device and stream, for as long as it runs.
struct Context {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  explicit Context(const Tensor& x) : Context(x.device(), nullptr) { stream = c10::cuda::getCurrentCUDAStream(); }
  Context(c10::Device device, cudaStream_t stream) : guard(device), stream(stream) {}

  // One stage: its range, and its launcher's status as an exception.
  template <class Params>
  void run(const char* stage, cudaError_t (*launch)(const Params&, cudaStream_t), const Params& params) const {
    const Range range(stage);
    const cudaError_t status = launch(params, stream);
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());  // so that nobody else meets it
    TORCH_CHECK(status == cudaSuccess, stage, ": ", cudaGetErrorString(status),
                status == cudaErrorNoKernelImageForDevice ? "; mita_ext was built for CUDA architectures " MITA_CUDA_ARCHS
                                                            ": rebuild it with TORCH_CUDA_ARCH_LIST set to this GPU's"
                                                          : "");
  }
};

// The streams beside an op's own one: blocks of the urgent one start before those of that stream.
enum class Beside { urgent, other };

// One of these, for stages that do not need what the op's own stream does meanwhile. It follows that one from here on, until they join. What is in use on
// any of them must not be freed before.
class Branch {
  struct Own {
    cudaStream_t stream = nullptr;
    cudaEvent_t event = nullptr;
  };
  const Context& trunk;
  const Own own;
  bool joined = false;

  static Own of_thread(int device, Beside which) {  // kept for the next call
    static thread_local std::map<std::pair<int, Beside>, Own> owns;
    Own& own = owns[{device, which}];
    if (!own.stream) {
      int least, greatest;
      C10_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
      C10_CUDA_CHECK(cudaStreamCreateWithPriority(&own.stream, cudaStreamNonBlocking, which == Beside::urgent ? greatest : least));
    }
    if (!own.event) C10_CUDA_CHECK(cudaEventCreateWithFlags(&own.event, cudaEventDisableTiming));
    return own;
  }
  cudaError_t follow(cudaStream_t later, cudaStream_t earlier) const {
    const cudaError_t status = cudaEventRecord(own.event, earlier);
    return status == cudaSuccess ? cudaStreamWaitEvent(later, own.event, 0) : status;
  }

 public:
  Context context;
  Branch(const Context& trunk, Beside which)
      : trunk(trunk), own(of_thread(trunk.guard.current_device().index(), which)), context(trunk.guard.current_device(), own.stream) {
    catch_up();
  }
  void catch_up() { C10_CUDA_CHECK(follow(own.stream, trunk.stream)); }  // with what the op's own stream does by now
  void join() {
    joined = true;
    C10_CUDA_CHECK(follow(trunk.stream, own.stream));
  }
  ~Branch() {  // after an exception
    if (!joined) static_cast<void>(follow(trunk.stream, own.stream));
  }
  Branch(const Branch&) = delete;
};

// [B, heads, rows, D], or packed [rows, heads, D].
Rows rows(const Tensor& x) {
  if (is_packed(x)) return {x.data_ptr(), 0, x.stride(1), x.stride(0)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// The input itself, or a copy where its rows do not start on 16 bytes, as those of a slice from an odd element on.
Tensor aligned(const Tensor& x) {
  bool whole = reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % 16 == 0 && rows(x).row * x.element_size() <= std::numeric_limits<std::uint32_t>::max();
  for (int i = 0; i < x.dim() - 1; ++i) whole &= x.size(i) <= 1 || x.stride(i) * x.element_size() % 16 == 0;
  const Range range(whole ? nullptr : "mita_ext::align");
  return whole ? x : x.clone(at::MemoryFormat::Contiguous);
}

Dtype dtype_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? Dtype::bf16 : x.scalar_type() == at::kHalf ? Dtype::fp16 : Dtype::fp32;
}

// Does torch round the operands of its own fp32 products? The older question throws where a newer setting was used.
bool allow_tf32() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
#else
  return at::globalContext().allowTF32CuBLAS();
#endif
}

// The sequences whose rows `x` holds.
Sequences sequences(int64_t longest, const Tensor& x, const OptionalTensor& seqlens) {
  Sequences s{static_cast<int>(longest)};
  if (seqlens && is_packed(x)) s.starts = seqlens->const_data_ptr<int>(), s.rows = static_cast<int>(x.size(0));
  else if (seqlens) s.lengths = seqlens->const_data_ptr<int>();
  return s;
}

Problem problem_of(const char* fn, const Shape& p, const Tensor& like) {
  check_cuda_limits(fn, p, like.scalar_type());
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  TORCH_CHECK_VALUE(p.N * std::max<int64_t>(p.s, 1) <= most && p.L <= most, fn, ": the sequences must be shorter than 2^30 entries on CUDA, got N = ",
                    p.N, ", L = ", p.L, ", routes = ", p.s);
  return {dtype_of(like), int(p.B), int(p.H), int(p.Hkv), int(p.M), int(p.K), int(p.s), int(p.D), sequences(p.N, like, {}), sequences(p.L, like, {}),
          like.scalar_type() == at::kFloat && allow_tf32()};
}
Problem problem_of(const Shape& p, const Tensor& query, const Tensor& key, const Lengths& lengths, bool backward) {
  Problem x = problem_of(attention_name(query, backward), p, query);
  x.queries = sequences(p.N, query, lengths.seqlens_q), x.keys = sequences(p.L, key, lengths.seqlens_k);
  return x;
}

Windows windows(IntArrayRef num_landmarks, IntArrayRef grid, int64_t prefix) {
  return {int(num_landmarks[0]), int(num_landmarks[1]), int(grid[0]), int(grid[1]), int(prefix)};
}

Tensor floats(const Tensor& like, IntArrayRef sizes) { return at::empty(sizes, like.options().dtype(at::kFloat)); }
Tensor ints(const Tensor& like, IntArrayRef sizes) { return at::empty(sizes, like.options().dtype(at::kInt)); }
const float* data(const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

// Memory for what kernels say of every token; where no sequence has one, it stays as it is filled here.
Tensor per_token(const Sequences& s, const Tensor& like) { return vary(s) ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options()); }
Tensor lse_of(const Problem& x, const Tensor& like) {
  const Tensor lse = floats(like, {x.B, x.H, x.queries.max_length});
  return vary(x.queries) ? lse.fill_(-std::numeric_limits<float>::infinity()) : lse;
}

int64_t heads(const Problem& x) { return int64_t(x.B) * x.H; }
int entries_per_expert(const Problem& x) { return x.s == 0 ? x.queries.max_length : int(int64_t(x.queries.max_length) * x.s / x.M); }

// ---- forward stages ------------------------------------------------------------------------------------------------

Tensor pool_stage(const Context& context, const Problem& x, const Windows& w, const Tensor& query) {
  Tensor landmarks = at::empty({x.B, x.H, x.M, x.D}, query.options());
  context.run("mita_ext::pool", launch_pool, {x, w, rows(query), landmarks.data_ptr()});
  return landmarks;
}

int64_t group_chunks(const Problem& x) { return (int64_t(x.queries.max_length) * x.s + kGroupChunk - 1) / kGroupChunk; }

// Landmarks, experts and how many queries of every chunk these have, where one pass over the queries makes all.
std::tuple<Tensor, Tensor, Tensor> pool_route_stage(const Context& context, const Problem& x, const Windows& w, const Tensor& query) {
  Tensor landmarks = at::empty({x.B, x.H, x.M, x.D}, query.options()), experts = ints(query, {x.B, x.H, x.queries.max_length, 1}), counts = ints(query, {heads(x), x.M, group_chunks(x)});
  const Tensor memory = at::empty({int64_t(pool_route_bytes(x))}, query.options().dtype(at::kByte));
  context.run("mita_ext::pool_route", launch_pool_route, {x, w, rows(query), memory.data_ptr(), landmarks.data_ptr(), experts.data_ptr<int>(), counts.data_ptr<int>()});
  return {landmarks, experts, counts};
}

// What landmarks give, and the memory for it.
struct LandmarkStage {
  Tensor indices, compressed, lse, scores, values, state;
  LandmarkParams p{};

  LandmarkStage(const Problem& x, const Tensor& landmarks, const Tensor& key, const Tensor& value, float scale) {
    const int L = x.keys.max_length, group = group_keys(L, x.K, x.D), splits = score_splits(x);
    const int64_t BH = heads(x), pitch = score_pitch(L, group);
    indices = ints(landmarks, {x.B, x.H, x.M, x.K}), compressed = at::empty({x.B, x.H, x.M, x.D}, landmarks.options()), lse = floats(landmarks, {x.B, x.H, x.M});
    scores = floats(landmarks, {BH, x.M, pitch}), values = floats(landmarks, {BH, splits, x.M, x.D}), state = floats(landmarks, {BH, splits, x.M, 2});
    p.problem = x;
    p.scale = scale;
    p.landmarks = rows(landmarks), p.k = rows(key), p.v = rows(value);
    p.splits = splits;
    p.group = group, p.halves = stores_halves(x), p.pitch = pitch;
    p.scores = scores.data_ptr<float>();
    p.partial_values = values.data_ptr<float>();
    p.partial_state = state.data_ptr<float>();
    p.indices = indices.data_ptr<int>();
    p.compressed = compressed.data_ptr();
    p.lse = lse.data_ptr<float>();
  }
  void score(const Context& context) const { context.run("mita_ext::landmark_scores", launch_landmark_scores, p); }
  bool combines_with_choice() const { return combines_with_topk(p); }
  void combine(const Context& context) const { context.run("mita_ext::landmark_combine", launch_landmark_combine, p); }
  void choose(const Context& context) const { context.run("mita_ext::landmark_topk", launch_landmark_topk, p); }
  void free_scratch() { scores = values = state = Tensor(); }
};

Tensor route_stage(const Context& context, const Problem& x, const Tensor& query, const Tensor& landmarks) {
  Tensor experts = ints(query, {x.B, x.H, x.queries.max_length, x.s});
  if (experts.numel() > 0) context.run("mita_ext::route", launch_route, {x, rows(query), rows(landmarks), experts.data_ptr<int>()});
  return experts;
}

// Groups and the memory that they point to: what a backward pass wants of them too, and the rest.
struct Grouped {
  Groups groups{};
  Tensor kept, rest;
};
// Of few queries nothing is kept. mita_ext/ops.py says how much it is, too.
bool keeps_groups(const Problem& x) { return x.s > 0 && x.queries.max_length > kShortKeys; }
constexpr int64_t kWork = sizeof(Work) / sizeof(int);
int64_t kept_ints(const Problem& x) {
  return heads(x) * (kWork * max_tiles(x, segment_rows(entries_per_expert(x))) + x.M + 1 + int64_t(x.queries.max_length) * x.s);
}

// The memory for what is kept of them, as what `p` is to make there; `known`: it has been made.
Tensor place_kept(const Context& context, const Problem& x, const Tensor& experts, const Tensor& known, GroupParams& p) {
  const Tensor memory = known.defined() ? known : ints(experts, {kept_ints(x)});
  if (!known.defined() && vary(x.queries)) C10_CUDA_CHECK(cudaMemsetAsync(memory.data_ptr(), 0, memory.nbytes(), context.stream));
  p.problem = x;
  p.segment_rows = segment_rows(entries_per_expert(x));
  p.segments = reinterpret_cast<Work*>(memory.data_ptr<int>());
  p.segment_starts = reinterpret_cast<int*>(p.segments + heads(x) * max_tiles(x, p.segment_rows));
  p.entries = p.segment_starts + heads(x) * (x.M + 1);
  return memory;
}

// The memory for them, and what is to be made of it by `p`; none without experts. counts: of pool_route_stage, if there are any. kept: of the same experts, if it is known; then all
// that may be wanted are tiles.
Grouped allocate_groups(const Context& context, const Problem& x, const Tensor& experts, int tile_rows, int pass_rows, const Tensor& counts, const Tensor& kept, bool want_tiles, GroupParams& p) {
  Grouped result;
  result.groups.tile_rows = tile_rows;
  result.groups.segment_rows = segment_rows(entries_per_expert(x));
  if (experts.numel() == 0) return result;
  const int64_t chunks = group_chunks(x);
  const bool known = kept.defined() && kept.numel() > 0 && reinterpret_cast<std::uintptr_t>(kept.const_data_ptr()) % alignof(Work) == 0, counted = counts.defined();
  result.kept = place_kept(context, x, experts, known ? kept : Tensor(), p);
  p.experts = known ? nullptr : experts.const_data_ptr<int>();
  p.chunks = static_cast<int>(chunks);
  p.tile_rows = result.groups.tile_rows;
  p.pass_rows = pass_rows;
  if (!known || want_tiles) {
    const int64_t tiles = heads(x) * max_tiles(x, tile_rows);
    result.rest = ints(experts, {kWork * tiles + 1 + (known || counted ? 0 : heads(x) * x.M * chunks)});
    p.tiles = reinterpret_cast<Work*>(result.rest.data_ptr<int>());
    p.taken = reinterpret_cast<unsigned*>(p.tiles + tiles);
    p.counts = counted ? counts.data_ptr<int>() : reinterpret_cast<int*>(p.taken + 1);
    p.counted = counted;
  }
  result.groups.entries = p.entries, result.groups.tiles = p.tiles, result.groups.taken = p.taken, result.groups.segments = p.segments, result.groups.segment_starts = p.segment_starts;
  return result;
}

Grouped group_stage(const Context& context, const Problem& x, const Tensor& experts, int tile_rows, int pass_rows = 0, const Tensor& counts = {}, const Tensor& kept = {}, bool want_tiles = true) {
  GroupParams p{};
  const Grouped result = allocate_groups(context, x, experts, tile_rows, pass_rows, counts, kept, want_tiles, p);
  if (p.tiles) context.run("mita_ext::group", launch_group, p);
  return result;
}

int segments(const Problem& x, const Groups& groups) { return max_tiles(x, groups.segment_rows); }

// The same for the keys of experts, which the backward wants.
class KeyLists {
  KeyListParams p{};
  const Tensor memory;  // what p points to
  bool begun = false;

 public:
  KeyLists(const Problem& x, const Tensor& indices, Groups& groups) : memory(allocate(x, indices, groups, p)) { groups.key_ranges = p.ranges, groups.key_entries = p.entries; }
  // Once, behind a kernel at whose end multiprocessors fall idle.
  void list(const Context& context) {
    if (!std::exchange(begun, true)) context.run("mita_ext::key_lists", launch_key_lists, p);
  }

 private:
  static Tensor allocate(const Problem& x, const Tensor& indices, const Groups& groups, KeyListParams& p) {
    const int64_t rows = heads(x) * segments(x, groups) * x.K, ranges = heads(x) * ceil_div(x.keys.max_length, kKeyBlock);
    const Tensor memory = ints(indices, {2 * ranges + 3 * rows});
    KeyRange* const first = reinterpret_cast<KeyRange*>(memory.data_ptr<int>());
    KeyEntry* const entries = reinterpret_cast<KeyEntry*>(first + ranges);
    p = {x, indices.const_data_ptr<int>(), groups, reinterpret_cast<int*>(entries + rows), first, entries};
    return memory;
  }
};

Units units(bool shared, const Tensor& landmarks, const Tensor& compressed, const Tensor& key, const Tensor& value, const Tensor& indices) {
  return {shared, rows(landmarks), rows(compressed), rows(key), rows(value), indices.const_data_ptr<int>()};
}

// How many queries a tile of the attention has, and a pass, where a warp takes one tile of some passes after the other, large ones first: three passes, B, H100:
// 63 -> 58 us of attention; two, B2, H200: 124 -> 121 us of the forward pass.
struct AttentionTiles {
  int rows, pass_rows;
  explicit AttentionTiles(const Problem& x) : rows(attention_tile_rows(x, entries_per_expert(x))), pass_rows(small_experts(x) && rows > kSmallPassRows ? kSmallPassRows : 0) {}
};

Grouped attention_groups(const Context& context, const Problem& x, const Tensor& experts, const Tensor& counts = {}) {
  const AttentionTiles tiles(x);
  return group_stage(context, x, experts, tiles.rows, tiles.pass_rows, counts);
}

// Landmarks, experts and groups, where one kernel makes all. H200: 5 % less of forward at B2, 3 % at B, 4 to 8 % with 192 to 384 heads of 401 to 1025 queries. With fewer
// blocks than multiprocessors, or experts that are not small, 2 to 10 % more.
bool pools_routes_and_groups(const Problem& x, const Windows& w) { return fits_pool_route_group(x, w) && 2 * heads(x) >= kMultiprocessors && small_experts(x); }
std::tuple<Tensor, Tensor, Grouped> pool_route_group_stage(const Context& context, const Problem& x, const Windows& w, const Tensor& query) {
  Tensor landmarks = at::empty({x.B, x.H, x.M, x.D}, query.options()), experts = ints(query, {x.B, x.H, x.queries.max_length, 1});
  const AttentionTiles tiles(x);
  GroupParams p{};
  Grouped grouped = allocate_groups(context, x, experts, tiles.rows, tiles.pass_rows, {}, {}, true, p);
  context.run("mita_ext::pool_route_group", launch_pool_route_group, {p, w, rows(query), landmarks.data_ptr(), experts.data_ptr<int>()});
  return {landmarks, experts, grouped};
}

std::tuple<Tensor, Tensor> attention_stage(const Context& context, const Problem& x, const Units& units, const Tensor& query, const Grouped& grouped, float scale,
                                           float landmark_scale, bool early = false) {
  const int N = x.queries.max_length;
  Tensor out = per_token(x.queries, query), lse = lse_of(x, query);
  if (lse.numel() == 0) return {out, lse};
  Tensor partial_out, partial_lse;
  AttentionParams p{};
  p.problem = x;
  p.scale = scale, p.landmark_scale = landmark_scale;
  p.q = rows(query);
  p.units = units;
  p.groups = grouped.groups;
  if (x.s > 1) {
    partial_out = floats(query, {heads(x), N, x.s, x.D}), partial_lse = floats(query, {heads(x), N, x.s});
    p.partial_out = partial_out.data_ptr<float>(), p.partial_lse = partial_lse.data_ptr<float>();
  }
  p.out = rows(out);
  p.lse = lse.data_ptr<float>();
  p.early = early;
  context.run("mita_ext::expert_attention", launch_expert_attention, p);
  return {out, lse};
}

// All of it, for short sequences with one expert per query. `landmarks` are given, or made from the queries.
struct Attended {
  Tensor out, lse, landmarks, indices, experts, compressed, landmark_lse, groups;
};

Attended short_attention_stage(const Context& context, const Problem& x, const Windows* pooling, const OptionalTensor& landmarks, const Tensor& query, const Tensor& key,
                               const Tensor& value, bool shared, float scale, float landmark_scale) {
  const int N = x.queries.max_length;
  const auto per_landmark = [&] { return at::empty({x.B, x.H, x.M, x.D}, query.options()); };
  Attended result{per_token(x.queries, query),   lse_of(x, query), landmarks ? *landmarks : per_landmark(), ints(query, {x.B, x.H, x.M, x.K}),
                  ints(query, {x.B, x.H, N, 1}), per_landmark(),   floats(query, {x.B, x.H, x.M}), ints(query, {0})};
  GroupParams groups{};
  if (keeps_groups(x)) result.groups = place_kept(context, x, result.experts, {}, groups);
  context.run("mita_ext::short_attention", launch_short_attention,
              {x, pooling ? *pooling : Windows{}, pooling != nullptr, shared, scale, landmark_scale, rows(query), rows(key), rows(value), rows(result.landmarks),
               rows(result.compressed), result.landmark_lse.data_ptr<float>(), result.indices.data_ptr<int>(), result.experts.data_ptr<int>(), rows(result.out),
               result.lse.data_ptr<float>(), groups});
  return result;
}

// ---- backward stages -----------------------------------------------------------------------------------------------

Tensor delta_stage(const Context& context, const Problem& x, const Sequences& sequences, const Tensor& dout, const Tensor& out, const OptionalTensor& dlse) {
  Tensor delta = floats(out, {x.B, x.H, sequences.max_length});
  if (delta.numel() > 0)
    context.run("mita_ext::delta", launch_delta, {x.dtype, x.B, x.H, x.D, sequences, rows(dout), rows(out), data(dlse), delta.data_ptr<float>()});
  return delta;
}

// One softmax over keys or units, what comes back to its rows (queries or landmarks), and the statistics of those rows: delta and, in fp32,
// the normalizer are exact once the gradient of the rows themselves is done.
struct Softmax {
  Tensor query, dout, lse;
  OptionalTensor dlse;
  Tensor delta, normalizer;
  Softmax() = default;
  Softmax(const Problem& x, const Tensor& query, const Tensor& dout, const Tensor& lse, const OptionalTensor& dlse, const Tensor& delta)
      : query(query), dout(dout), lse(lse), dlse(dlse), delta(delta), normalizer(x.dtype == Dtype::fp32 ? at::empty_like(delta) : Tensor()) {}
  template <class Params> void describe(Params& p) const {
    p.lse = lse.const_data_ptr<float>(), p.delta = delta.data_ptr<float>(), p.normalizer = normalizer.defined() ? normalizer.data_ptr<float>() : nullptr;
  }
};

Softmax softmax_stage(const Context& context, const Problem& x, const Sequences& sequences, const Tensor& query, const Tensor& dout, const Tensor& out, const Tensor& lse,
                      const OptionalTensor& dlse) {
  return {x, query, dout, lse, dlse, delta_stage(context, x, sequences, dout, out, dlse)};
}

// Partial sums of the gradients of shared units.
struct SharedSums {
  Tensor dk, dv;
  SharedSums(const Problem& x, const Tensor& like, int splits) : dk(floats(like, {x.B, x.H, splits, x.M, x.D})), dv(at::empty_like(dk)) {}
};
// And of experts' keys and values. Of few queries in fp32: each may be all that its expert has, and then plain PyTorch rounds nothing.
bool rounds_routed_sums(const Problem& x) { return x.dtype != Dtype::fp32 && int64_t(x.queries.max_length) * x.s > kPassRows; }
class RoutedSums {
  Tensor numbers, factors;  // of keys, then of values
  RoutedRows rows(int which) const {
    return {static_cast<char*>(numbers.data_ptr()) + which * (numbers.nbytes() / 2), factors.defined() ? factors.data_ptr<float>() + which * (factors.numel() / 2) : nullptr};
  }

 public:
  RoutedSums(const Problem& x, const Tensor& like, const Groups& groups) {
    const bool rounded = rounds_routed_sums(x);
    numbers = at::empty({2, heads(x), segments(x, groups), x.K, routed_pitch(x.D)}, like.options().dtype(rounded ? at::kShort : at::kFloat));
    if (rounded) factors = floats(like, {2, heads(x), segments(x, groups), x.K, ceil_div(x.D, kFactorColumns)});
  }
  RoutedRows dk() const { return rows(0); }
  RoutedRows dv() const { return rows(1); }
};

// The totals of shared ones: of values, and either of keys too or delta of `landmarks`, the softmax of which the values are the outputs.
void reduce_stage(const Context& context, const Problem& x, const SharedSums& sums, const Tensor& dk, const Tensor& dv, const Tensor& values, const Softmax* landmarks, bool early) {
  ReduceParams p{x.dtype, int(heads(x)), int(sums.dk.size(2)), x.M, x.D, {}, {}, x.H, rows(values), nullptr};
  p.dk.partial = sums.dk.const_data_ptr<float>(), p.dv.partial = sums.dv.const_data_ptr<float>();
  p.early = early;
  if (landmarks) p.delta = landmarks->delta.data_ptr<float>();
  else p.dk.total = dk.data_ptr();
  p.dv.total = dv.data_ptr();
  context.run("mita_ext::reduce", launch_reduce, p);
}

UnitGradientParams unit_gradient_params(const Problem& x, UnitRole role, const Softmax* rows_of, const Tensor& unit_k, const Tensor& unit_v, float scale) {
  UnitGradientParams p{};
  p.problem = x;
  p.role = role;
  p.scale = scale;
  p.unit_k = rows(unit_k), p.unit_v = rows(unit_v);
  if (rows_of) p.row_q = rows(rows_of->query), p.row_dout = rows(rows_of->dout), rows_of->describe(p);
  return p;
}

// Parts of the rows that pass by the landmarks of every head: specialists are alone on their multiprocessors, with 128 landmarks. Of other blocks, with 64, enough for one
// wave, not so many that the partial sums weigh.
int parts_by_landmarks(const Problem& x, int64_t rows, bool by_specialists) {
  if (by_specialists) return least_busy(heads(x) * ceil_div(x.M, 128), ceil_div(rows, kPassRows), 1, kMultiprocessors, 3).parts;
  return static_cast<int>(std::max<int64_t>(1, std::min(kBlocksOfAWave / std::max<int64_t>(heads(x) * ceil_div(x.M, 64), 1), (rows + 511) / 512)));
}

// Of the shared units.
SharedSums shared_gradient_stage(const Context& context, const Problem& x, const Softmax& softmax, const Tensor& landmarks, const Tensor& compressed, float landmark_scale) {
  UnitGradientParams p = unit_gradient_params(x, UnitRole::shared, &softmax, landmarks, compressed, landmark_scale);
  p.splits = parts_by_landmarks(x, x.queries.max_length, fits_unit_specialists(p));
  SharedSums sums(x, landmarks, p.splits);
  p.partial_dk = sums.dk.data_ptr<float>(), p.partial_dv = sums.dv.data_ptr<float>();
  context.run("mita_ext::shared_gradient", launch_unit_gradient, p);
  return sums;
}

// Of the keys of every expert, for each segment of its queries.
RoutedSums routed_gradient_stage(const Context& context, const Problem& x, const Softmax& softmax, const Groups& groups, const Tensor& key, const Tensor& value, const Tensor& indices,
                               float scale) {
  RoutedSums sums(x, key, groups);
  UnitGradientParams p = unit_gradient_params(x, UnitRole::routed, &softmax, key, value, scale);
  p.indices = indices.const_data_ptr<int>();
  p.routed_dk = sums.dk(), p.routed_dv = sums.dv();
  p.groups = groups;
  context.run("mita_ext::routed_gradient", launch_unit_gradient, p);
  return sums;
}

// What both gradients of rows share. Afterwards the softmax is exact.
RowGradientParams row_gradient_params(const Problem& x, RowRole role, const Softmax& softmax, const Tensor& dquery, float scale) {
  RowGradientParams p{};
  p.problem = x;
  p.role = role;
  p.scale = scale;
  p.q = rows(softmax.query), p.dout = rows(softmax.dout);
  softmax.describe(p);
  p.dlse = data(softmax.dlse);
  p.dq = rows(dquery);
  return p;
}

// The landmarks' own gradient, as queries of the keys, and the parts of that as keys of the queries, to which it is added.
struct OwnGradient {
  OptionalTensor base;
  Tensor dlandmarks;
};

RowGradientParams own_gradient_params(const Problem& x, const Softmax& landmarks, const OwnGradient& own, int64_t parts, float scale, Tensor& memory) {
  RowGradientParams p = row_gradient_params(x, RowRole::landmark, landmarks, own.dlandmarks, scale);
  const int64_t rows = parts * x.M;
  memory = floats(own.dlandmarks, {rows * (2 * x.D + 3)});
  p.partial = memory.data_ptr<float>(), p.partial_sums = p.partial + 2 * rows * x.D;
  if (own.base) p.base = data(own.base), p.base_parts = static_cast<int>(own.base->size(2));
  return p;
}

// Returns memory in use until it is done.
Tensor landmark_gradient_stage(const Context& context, const Problem& x, const Softmax& landmarks, const OwnGradient& own, const Tensor& key, const Tensor& value, float scale) {
  Tensor memory;
  const int splits = parts_by_landmarks(x, x.keys.max_length, fits_row_specialists(x, RowRole::landmark));
  RowGradientParams p = own_gradient_params(x, landmarks, own, heads(x) * splits, scale, memory);
  p.splits = splits;
  p.units.k = rows(key), p.units.v = rows(value);
  context.run("mita_ext::landmark_gradient", launch_row_gradient, p);
  return memory;
}

// Tiles of keys of each block where these share those of all heads, one block on each multiprocessor. Whole heads, or even parts of one, where that is
// hardly more: H100, 16 and 64 heads in parts of 128 tiles instead of 125 take 2 % less.
int key_share(const Problem& x) {
  const int tiles = ceil_div(x.keys.max_length, kKeyBlock), share = static_cast<int>((heads(x) * tiles + kMultiprocessors - 1) / kMultiprocessors);
  const int even = share <= tiles ? ceil_div(tiles, tiles / share) : round_up(share, tiles);
  return 16 * even <= 17 * share ? even : share;
}

// dkey and dvalue: through the compressed values where `landmarks` says how, plus what routed queries gave to the keys of their experts, if any.
// With `own`, which few landmarks may have, the landmarks' own gradient in the same pass; then the other two need not be wanted.
void key_gradient_stage(const Context& context, const Problem& x, const Softmax* landmarks, const OwnGradient* own, const RoutedSums* routed, const Groups& groups, const Tensor& key,
                        const Tensor& value, float scale, const Tensor& dkey, const Tensor& dvalue, bool early = false) {
  UnitGradientParams p = unit_gradient_params(x, UnitRole::compress, landmarks, key, value, scale);
  if (dkey.dim() > 1) p.dk = rows(dkey), p.dv = rows(dvalue);
  if (landmarks) p.landmark_rows = x.M;
  if (routed) p.groups = groups, p.routed_dk = routed->dk(), p.routed_dv = routed->dv();
  if (!own) return context.run("mita_ext::key_gradient", launch_unit_gradient, p);
  Tensor memory;
  RowGradientParams of_landmarks = own_gradient_params(x, *landmarks, *own, kMultiprocessors + heads(x), scale, memory);
  of_landmarks.share = key_share(x);
  context.run("mita_ext::key_gradient", launch_key_specialists, {p, of_landmarks, early});
  context.run("mita_ext::landmark_gradient", launch_row_finish, of_landmarks);
}

// dquery, without what queries receive as parts of pooled landmarks.
void query_gradient_stage(const Context& context, const Problem& x, const Softmax& softmax, const Tensor& out, const Units& units, const Groups& groups, float scale,
                          float landmark_scale, const Tensor& dquery) {
  const int64_t N = x.queries.max_length;
  Tensor partial, sums;
  RowGradientParams p = row_gradient_params(x, RowRole::attention, softmax, dquery, scale);
  p.out = rows(out);
  p.landmark_scale = landmark_scale;
  p.units = units;
  p.groups = groups;
  if (x.s > 1) {
    partial = floats(softmax.query, {heads(x), N, x.s, 2, x.D}), sums = floats(softmax.query, {heads(x), N, x.s, 3});
    p.partial = partial.data_ptr<float>(), p.partial_sums = sums.data_ptr<float>();
  }
  context.run("mita_ext::query_gradient", launch_row_gradient, p);
}

// dquery and the sums of shared units, and of routed ones where wanted, in one pass.
std::pair<SharedSums, std::optional<RoutedSums>> specialist_gradient_stage(const Context& context, const Problem& x, const Tensor& dout, const OptionalTensor& dlse, const Tensor& query,
                                                                       const Tensor& lse, const Units& units, const Groups& groups, bool want_routed, float scale,
                                                                       float landmark_scale, const Tensor& dquery) {
  // One block on each multiprocessor, its start like a pass. Of an expert's slots the last one is half empty, on the average.
  const int splits = least_busy(heads(x), ceil_div(x.queries.max_length, kPassRows) + x.M / (2 * gradient_slots(x)), 1, kMultiprocessors, 2).parts;
  const SharedSums shared(x, query, splits);
  std::optional<RoutedSums> routed;
  if (want_routed) routed.emplace(x, query, groups);
  context.run("mita_ext::attention_gradient", launch_specialist_gradient,
              {x, scale, landmark_scale, rows(query), rows(dout), lse.const_data_ptr<float>(), data(dlse), units, groups, splits, shared.dk.data_ptr<float>(), shared.dv.data_ptr<float>(),
               routed ? routed->dk() : RoutedRows{}, routed ? routed->dv() : RoutedRows{}, rows(dquery)});
  return {shared, routed};
}

// What the backward pass of attention reads. With `landmark_lse` the compressed values are differentiated on to landmarks and keys.
struct Saved {
  Tensor dout, query, key, value, landmarks, compressed, indices, experts, out, lse;
  OptionalTensor dlse, landmark_lse;
};
// And writes. dlandmarks: as keys of the queries, and with the landmarks' own softmax as its queries too.
struct AttentionGradient {
  Tensor dquery, dkey, dvalue, dlandmarks, dcompressed;
};
// Which gradients are wanted beside dquery: of keys and values, of landmarks.
struct Wanted {
  bool keys, landmarks;
};
Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// All of it, for short sequences: without dcompressed.
void short_gradient_stage(const Context& context, const Problem& x, const Saved& saved, const Windows* pooling, const Wanted& wanted, float scale, float landmark_scale,
                          const AttentionGradient& result) {
  ShortGradientParams p{};
  p.forward = {x, pooling ? *pooling : Windows{}, pooling && wanted.landmarks, true, scale, landmark_scale, rows(saved.query), rows(saved.key), rows(saved.value),
               rows(saved.landmarks), rows(saved.compressed), saved.landmark_lse->data_ptr<float>(), saved.indices.data_ptr<int>(), saved.experts.data_ptr<int>(), {}, saved.lse.data_ptr<float>()};
  p.dout = rows(saved.dout);
  p.dlse = data(saved.dlse);
  p.dq = rows(result.dquery);
  if (wanted.keys) p.dk = rows(result.dkey), p.dv = rows(result.dvalue);
  if (wanted.landmarks && !pooling) p.dlandmarks = rows(result.dlandmarks);
  context.run("mita_ext::short_gradient", launch_short_gradient, p);
}

// Some (batch, query head) pairs and what belongs to them: whole batch elements, or heads of one.
struct Heads {
  int64_t b, batches, h, heads, of;  // of: heads of a batch element
  Tensor tokens(const Tensor& x) const { return is_packed(x) ? its_heads(x) : (*this)(x); }
  Tensor operator()(const Tensor& x) const { return its_heads(some(x, 0, b, batches)); }  // [B, heads, ...]
  OptionalTensor operator()(const OptionalTensor& x) const { return x ? OptionalTensor((*this)(*x)) : x; }
  Sequences operator()(Sequences s) const {
    if (s.lengths) s.lengths += b;
    if (s.starts) s.starts += b;
    return s;
  }
  Problem operator()(Problem x) const {
    x.Hkv = static_cast<int>(heads / (x.H / x.Hkv)), x.H = static_cast<int>(heads), x.B = static_cast<int>(batches);
    x.queries = (*this)(x.queries), x.keys = (*this)(x.keys);
    return x;
  }
  Softmax operator()(const Softmax& s) const {
    Softmax its = s;
    its.query = tokens(s.query), its.dout = tokens(s.dout), its.lse = (*this)(s.lse), its.dlse = (*this)(s.dlse), its.delta = (*this)(s.delta);
    if (s.normalizer.defined()) its.normalizer = (*this)(s.normalizer);
    return its;
  }
  OwnGradient operator()(const OwnGradient& own) const { return {(*this)(own.base), (*this)(own.dlandmarks)}; }
  Groups operator()(Groups g, const Problem& x) const {  // x: of all heads
    const int64_t first = b * of + h;
    if (g.entries) g.entries += first * x.queries.max_length * x.s, g.segments += first * segments(x, g), g.segment_starts += first * (x.M + 1);
    if (g.key_ranges) g.key_ranges += first * ceil_div(x.keys.max_length, kKeyBlock), g.key_entries += first * segments(x, g) * x.K;
    g.tiles = nullptr;  // not needed any more
    return g;
  }
  AttentionGradient operator()(const AttentionGradient& g) const {
    const auto wanted = [&](const Tensor& x) { return x.dim() > 1 ? tokens(x) : x; };
    return {tokens(g.dquery), wanted(g.dkey), wanted(g.dvalue), wanted(g.dlandmarks), wanted(g.dcompressed)};
  }
  Saved operator()(const Saved& s) const {
    return {tokens(s.dout), tokens(s.query), tokens(s.key), tokens(s.value), (*this)(s.landmarks), (*this)(s.compressed), (*this)(s.indices), (*this)(s.experts), tokens(s.out),
            (*this)(s.lse), (*this)(s.dlse), (*this)(s.landmark_lse)};
  }

 private:
  static Tensor some(const Tensor& x, int64_t dim, int64_t first, int64_t count) { return x.size(dim) == count ? x : x.narrow(dim, first, count); }
  Tensor its_heads(const Tensor& x) const {
    const int64_t group = of / x.size(1);
    return some(x, 1, h / group, heads / group);
  }
};

// So many heads at a time that their routed sums, 2 K rows for every segment of queries, fit in some memory.
// H100: launches of fewer blocks cost more than 3 %, and sums that fit in the L2 gain nothing.
std::vector<Heads> heads_at_a_time(const Problem& x) {
  constexpr int64_t kMostBytes = 288 << 20, kLeastBlocks = 3500;
  const int64_t group = x.H / x.Hkv, most_segments = max_tiles(x, segment_rows(entries_per_expert(x))), bytes = std::max<int64_t>(1, most_segments * x.K * 2 * (rounds_routed_sums(x) ? 2 * routed_pitch(x.D) + 4 : 4 * routed_pitch(x.D)));
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(int64_t(x.M) * ceil_div(x.K, 64), ceil_div(x.keys.max_length, kKeyBlock) / group));  // of one head
  const int64_t most = std::max<int64_t>(kMostBytes / bytes, (kLeastBlocks + blocks - 1) / blocks);
  const auto even = [](int64_t all, int64_t most) {  // pieces of so many, as even as they come
    const int64_t pieces = (all + most - 1) / most;
    return (all + pieces - 1) / pieces;
  };
  const int64_t batches = even(x.B, std::max<int64_t>(1, most / x.H)), heads = even(x.Hkv, std::max<int64_t>(1, std::min<int64_t>(most, x.H) / group)) * group;
  std::vector<Heads> result;
  for (int64_t b = 0; b < x.B; b += batches)
    for (int64_t h = 0; h < x.H; h += heads) result.push_back({b, std::min<int64_t>(batches, x.B - b), h, std::min<int64_t>(heads, x.H - h), x.H});
  return result;
}

// ---- ops -----------------------------------------------------------------------------------------------------------

Tensor pool(const Tensor& query, IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens, const OptionalTensor& seqlens) {
  Problem x = problem_of("mita_ext.pool_landmarks", check_pool(query, num_landmarks, grid, num_prefix_tokens, seqlens), query);
  x.queries = sequences(x.queries.max_length, query, seqlens);
  const Context context(query);
  if (x.B == 0) return at::empty({x.B, x.H, x.M, x.D}, query.options());
  return pool_stage(context, x, windows(num_landmarks, grid, num_prefix_tokens), aligned(query));
}

Tensor pool_backward(const Tensor& dlandmarks, int64_t N, IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens, const OptionalTensor& seqlens) {
  Problem x = problem_of("mita_ext.pool_landmarks backward", check_pool_backward(dlandmarks, N, num_landmarks, grid, num_prefix_tokens, seqlens), dlandmarks);
  x.queries = sequences(N, dlandmarks, seqlens);
  const Context context(dlandmarks);
  const Tensor from = aligned(dlandmarks);
  Tensor dquery = at::empty({x.B, x.H, N, x.D}, dlandmarks.options());
  if (dquery.numel() > 0)
    context.run("mita_ext::pool_backward", launch_pool_backward, {x, windows(num_landmarks, grid, num_prefix_tokens), rows(from), false, false, rows(dquery)});
  return dquery;
}

std::tuple<Tensor, Tensor, Tensor> landmark_topk(const Tensor& landmarks, const Tensor& key, const Tensor& value, int64_t topk, double scale,
                                                 const OptionalTensor& seqlens_k) {
  Problem x = problem_of("mita_ext.landmark_topk", check_landmark_topk(landmarks, key, value, topk, seqlens_k), landmarks);
  x.keys = sequences(x.keys.max_length, key, seqlens_k);
  const Context context(landmarks);
  if (x.B == 0) return {ints(landmarks, {0, x.H, x.M, x.K}), at::empty({0, x.H, x.M, x.D}, landmarks.options()), floats(landmarks, {0, x.H, x.M})};
  const Tensor z = aligned(landmarks), k = aligned(key), v = aligned(value);
  const LandmarkStage stage(x, z, k, v, static_cast<float>(scale));
  stage.score(context);
  if (!stage.combines_with_choice()) stage.combine(context);
  stage.choose(context);
  return {stage.indices, stage.compressed, stage.lse};
}

std::tuple<Tensor, Tensor, Tensor> landmark_topk_backward(const Tensor& dcompressed, const OptionalTensor& dlse, const Tensor& landmarks, const Tensor& key,
                                                          const Tensor& value, const Tensor& compressed, const Tensor& lse, double scale,
                                                          const OptionalTensor& seqlens_k) {
  Problem x =
      problem_of("mita_ext.landmark_topk backward", check_landmark_topk_backward(dcompressed, dlse, landmarks, key, value, compressed, lse, seqlens_k), landmarks);
  x.keys = sequences(x.keys.max_length, key, seqlens_k);
  const Context context(landmarks);
  if (x.B == 0) return {at::empty({0, x.H, x.M, x.D}, landmarks.options()), at::empty(key.sizes(), key.options()), at::empty(value.sizes(), value.options())};
  const Tensor z = aligned(landmarks), k = aligned(key), v = aligned(value), dc = aligned(dcompressed), c = aligned(compressed);
  const Softmax softmax = softmax_stage(context, x, Sequences{x.M}, z, dc, c, lse, dlse);
  const Tensor dlandmarks = at::empty(landmarks.sizes(), landmarks.options()), dkey = per_token(x.keys, key), dvalue = per_token(x.keys, value);
  landmark_gradient_stage(context, x, softmax, {{}, dlandmarks}, k, v, static_cast<float>(scale));
  key_gradient_stage(context, x, &softmax, nullptr, nullptr, {}, k, v, static_cast<float>(scale), dkey, dvalue);
  return {dlandmarks, dkey, dvalue};
}

Tensor route(const Tensor& query, const Tensor& landmarks, int64_t routes) {
  const Problem x = problem_of("mita_ext.route", check_route(query, landmarks, routes), query);
  return route_stage(Context(query), x, aligned(query), aligned(landmarks));
}

std::tuple<Tensor, Tensor> expert_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& landmarks, const Tensor& compressed,
                                            const Tensor& indices, const Tensor& experts, bool shared_expert, double scale, double landmark_scale) {
  const Problem x =
      problem_of("mita_ext.expert_attention", check_expert_attention(query, key, value, landmarks, compressed, indices, experts, shared_expert), query);
  const Tensor q = aligned(query), k = aligned(key), v = aligned(value), z = aligned(landmarks), c = aligned(compressed);
  const Context context(query);
  return attention_stage(context, x, units(shared_expert, z, c, k, v, indices), q, attention_groups(context, x, experts), static_cast<float>(scale), static_cast<float>(landmark_scale));
}

// In several stages. What queries give to the keys of their experts, in one pass with the rest or in one of its own, is held for some heads at a time.
// With `pooling` the landmarks' gradient goes on to the queries.
void attention_gradient_stages(const Context& context, const Problem& x, const Saved& saved, const Windows* pooling, const Groups& groups, KeyLists* lists, const Wanted& wanted,
                               bool shared_expert, bool one_pass, float scale, float landmark_scale, const AttentionGradient& result) {
  const Units all = units(shared_expert, saved.landmarks, saved.compressed, saved.key, saved.value, saved.indices);
  Softmax softmax;
  std::optional<SharedSums> shared;
  std::optional<RoutedSums> routed;
  if (one_pass) {
    std::tie(shared, routed) = specialist_gradient_stage(context, x, saved.dout, saved.dlse, saved.query, saved.lse, all, groups, wanted.keys, scale, landmark_scale, result.dquery);
    if (lists) lists->list(context);
  } else {
    if (row_gradient_makes_delta(RowRole::attention, x.s)) softmax = Softmax(x, saved.query, saved.dout, saved.lse, saved.dlse, floats(saved.lse, saved.lse.sizes()));
    else softmax = softmax_stage(context, x, x.queries, saved.query, saved.dout, saved.out, saved.lse, saved.dlse);
    query_gradient_stage(context, x, softmax, saved.out, all, groups, scale, landmark_scale, result.dquery);
    if (shared_expert && (wanted.keys || wanted.landmarks)) shared = shared_gradient_stage(context, x, softmax, saved.landmarks, saved.compressed, landmark_scale);
  }

  // What landmarks receive, beside the sums of the first routed queries where those are a pass of their own.
  std::optional<Softmax> landmark_softmax;  // its lse is no output
  std::optional<OwnGradient> own;
  const bool with_keys = fits_key_specialists(x) && rounds_routed_sums(x);  // the landmarks' own gradients, in one pass
  Tensor memory;
  std::optional<Branch> beside;
  if (shared && !one_pass && wanted.keys && x.s > 0) beside.emplace(context, Beside::other);
  if (shared) {
    const Context& of_landmarks = beside ? beside->context : context;
    if (saved.landmark_lse) {
      landmark_softmax = Softmax(x, saved.landmarks, result.dcompressed, *saved.landmark_lse, {}, floats(saved.landmarks, {x.B, x.H, x.M}));
    }
    reduce_stage(of_landmarks, x, *shared, result.dlandmarks, result.dcompressed, saved.compressed, landmark_softmax ? &*landmark_softmax : nullptr, one_pass);
    if (landmark_softmax) {
      own = {shared->dk, result.dlandmarks};
      if (!with_keys) memory = landmark_gradient_stage(of_landmarks, x, *landmark_softmax, *own, saved.key, saved.value, scale);
    }
  }
  std::optional<Branch> pooled;  // what queries receive from that, beside the gradients of keys
  const bool pools = pooling && shared && wanted.landmarks;
  const auto pool = [&](const Context& context) { context.run("mita_ext::pool_backward", launch_pool_backward, {x, *pooling, rows(result.dlandmarks), true, with_keys, rows(result.dquery)}); };
  const auto join = [&] {
    if (beside) {
      beside->join();
      beside.reset();
      if (pools && !with_keys) pooled.emplace(context, Beside::other), pool(pooled->context);
    }
    shared.reset(), memory = Tensor();  // for what follows
    if (!with_keys) own.reset();
  };
  const auto key_gradient = [&](const Problem& x, const Saved& saved, const std::optional<Softmax>& landmarks, const std::optional<OwnGradient>& own, const Groups& groups,
                                const AttentionGradient& result) {
    key_gradient_stage(context, x, landmarks ? &*landmarks : nullptr, own ? &*own : nullptr, routed ? &*routed : nullptr, groups, saved.key, saved.value, scale,
                       result.dkey, result.dvalue, one_pass);
  };
  if (one_pass || !wanted.keys || x.s == 0) {
    join();
    if (wanted.keys ? routed || x.s == 0 : own.has_value()) key_gradient(x, saved, landmark_softmax, own, groups, result);
  } else {
    for (const Heads& its : heads_at_a_time(x)) {
      routed = routed_gradient_stage(context, its(x), its(softmax), its(groups, x), its.tokens(saved.key), its.tokens(saved.value), its(saved.indices), scale);
      lists->list(context);
      join();
      key_gradient(its(x), its(saved), landmark_softmax ? std::optional(its(*landmark_softmax)) : std::nullopt, own ? std::optional(its(*own)) : std::nullopt, its(groups, x), its(result));
      routed.reset();
    }
  }
  if (pooled) pooled->join();
  else if (pools) pool(context);
}

// By masks: what experts chose need not be listed, nor what queries leave for it be held.
void masked_gradient_stages(const Context& context, const Problem& x, const Saved& saved, const Windows* pooling, const Wanted& wanted, float scale, float landmark_scale,
                            const AttentionGradient& result) {
  const Softmax softmax(x, saved.query, saved.dout, saved.lse, saved.dlse, floats(saved.lse, saved.lse.sizes()));
  const int pitch = masked_gradient_pitch(x);
  const Tensor masks = ints(saved.query, {heads(x), x.M, pitch});
  MaskedGradientParams p{};
  p.problem = x;
  p.scale = scale, p.landmark_scale = landmark_scale;
  p.q = rows(saved.query), p.dout = rows(saved.dout);
  p.k = rows(saved.key), p.v = rows(saved.value);
  p.landmarks = rows(saved.landmarks), p.compressed = rows(saved.compressed);
  p.lse = saved.lse.const_data_ptr<float>(), p.dlse = data(saved.dlse), p.delta = softmax.delta.data_ptr<float>();
  p.indices = saved.indices.const_data_ptr<int>(), p.experts = saved.experts.const_data_ptr<int>();
  p.masks = reinterpret_cast<std::uint32_t*>(masks.data_ptr<int>()), p.pitch = pitch;
  p.dq = rows(result.dquery);
  context.run("mita_ext::query_gradient", launch_masked_row_gradient, p);
  if (!wanted.keys && !wanted.landmarks) return;

  const SharedSums shared = shared_gradient_stage(context, x, softmax, saved.landmarks, saved.compressed, landmark_scale);
  const Softmax landmarks(x, saved.landmarks, result.dcompressed, *saved.landmark_lse, {}, floats(saved.landmarks, {x.B, x.H, x.M}));
  reduce_stage(context, x, shared, result.dlandmarks, result.dcompressed, saved.compressed, &landmarks, false);
  const Tensor memory = landmark_gradient_stage(context, x, landmarks, {shared.dk, result.dlandmarks}, saved.key, saved.value, scale);
  if (wanted.keys) {
    p.dcompressed = rows(result.dcompressed);
    p.landmark_lse = saved.landmark_lse->const_data_ptr<float>(), p.landmark_delta = landmarks.delta.data_ptr<float>();
    p.dk = rows(result.dkey), p.dv = rows(result.dvalue);
    context.run("mita_ext::key_gradient", launch_masked_key_gradient, p);
  }
  if (pooling && wanted.landmarks) context.run("mita_ext::pool_backward", launch_pool_backward, {x, *pooling, rows(result.dlandmarks), true, false, rows(result.dquery)});
}

// The backward of both attention ops. With `pooling` the landmarks' gradient goes on to the queries.
AttentionGradient attention_gradient(const Problem& x, const Saved& saved, const Tensor& kept_groups, const Windows* pooling, const Wanted& wanted, bool shared_expert, float scale, float landmark_scale) {
  const Context context(saved.query);
  const auto like = [](const Tensor& t, bool wanted, bool zeros) { return !wanted ? nothing(t) : zeros ? at::zeros(t.sizes(), t.options()) : at::empty(t.sizes(), t.options()); };
  const bool empty = saved.lse.numel() == 0, in_one = !empty && saved.landmark_lse && fits_short_gradient(x, shared_expert, scale, landmark_scale);
  // Are those of the shared units made on the way? Else they are wanted only as outputs, and zeros unless the one kernel writes them.
  const bool of_units = !empty && !in_one && shared_expert && (wanted.keys || wanted.landmarks);
  const AttentionGradient result{like(saved.query, true, empty || vary(x.queries)), like(saved.key, wanted.keys, empty || vary(x.keys)), like(saved.value, wanted.keys, empty || vary(x.keys)),
                                 like(saved.landmarks, of_units || (wanted.landmarks && !pooling), !of_units && !in_one), like(saved.compressed, of_units || !saved.landmark_lse, !of_units)};
  if (empty) return result;
  if (in_one) {
    short_gradient_stage(context, x, saved, pooling, wanted, scale, landmark_scale, result);
    return result;
  }
  if (shared_expert && saved.landmark_lse && fits_masked_gradient(x, scale, landmark_scale)) {
    masked_gradient_stages(context, x, saved, pooling, wanted, scale, landmark_scale, result);
    return result;
  }
  const bool one_pass = of_units && rounds_routed_sums(x) && fits_specialist_gradient(x, shared_expert, scale, landmark_scale);
  Grouped grouped = group_stage(context, x, saved.experts, row_gradient_tile_rows(x, entries_per_expert(x)), 0, {}, kept_groups, !one_pass);
  std::optional<KeyLists> lists;
  if (wanted.keys && x.s > 0) lists.emplace(x, saved.indices, grouped.groups);
  const auto stages = [&](const Problem& x, const Saved& saved, const Groups& groups, const AttentionGradient& result) {
    attention_gradient_stages(context, x, saved, pooling, groups, lists ? &*lists : nullptr, wanted, shared_expert, one_pass, scale, landmark_scale, result);
  };
  if (one_pass && wanted.keys)
    for (const Heads& its : heads_at_a_time(x)) stages(its(x), its(saved), its(grouped.groups, x), its(result));
  else stages(x, saved, grouped.groups, result);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key,
                                                                             const Tensor& value, const Tensor& landmarks, const Tensor& compressed,
                                                                             const Tensor& indices, const Tensor& experts, const Tensor& out, const Tensor& lse,
                                                                             bool shared_expert, double scale, double landmark_scale) {
  const Problem x = problem_of("mita_ext.expert_attention backward",
                               check_expert_attention_backward(dout, dlse, query, key, value, landmarks, compressed, indices, experts, out, lse, shared_expert), query);
  const Saved saved{aligned(dout), aligned(query), aligned(key), aligned(value), aligned(landmarks), aligned(compressed), indices, experts, aligned(out), lse, dlse, {}};
  AttentionGradient g = attention_gradient(x, saved, {}, nullptr, {true, true}, shared_expert, static_cast<float>(scale), static_cast<float>(landmark_scale));
  return {g.dquery, g.dkey, g.dvalue, g.dlandmarks, g.dcompressed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& landmarks,
                                                                             IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens, int64_t topk,
                                                                             int64_t routes, bool shared_expert, double scale, double landmark_scale,
                                                                             const OptionalTensor& seqlens_q, const OptionalTensor& seqlens_k, OptionalInt max_seqlen_q,
                                                                             OptionalInt max_seqlen_k) {
  const Lengths lengths{seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k};
  const Problem x = problem_of(check_attention(query, key, value, landmarks, num_landmarks, grid, num_prefix_tokens, topk, routes, shared_expert, lengths), query, key,
                               lengths, false);
  const Context context(query);
  if (x.B == 0) {
    const Tensor like = at::empty({0, x.H, x.M, x.D}, query.options());
    return {per_token(x.queries, query), lse_of(x, query), landmarks ? at::empty({0}, query.options()) : like,
            ints(query, {0, x.H, x.M, x.K}), ints(query, {0, x.H, x.queries.max_length, x.s}), ints(query, {0}), at::empty_like(like), floats(query, {0, x.H, x.M})};
  }
  const Tensor q = aligned(query), k = aligned(key), v = aligned(value);
  const Windows w = windows(num_landmarks, grid, num_prefix_tokens);
  const auto none = [&] { return at::empty({0}, query.options()); };
  if (fits_short_attention(x, shared_expert)) {
    Attended a = short_attention_stage(context, x, landmarks ? nullptr : &w, landmarks ? aligned(*landmarks) : landmarks, q, k, v, shared_expert, static_cast<float>(scale),
                                       static_cast<float>(landmark_scale));
    return {a.out, a.lse, landmarks ? none() : a.landmarks, a.indices, a.experts, a.groups, a.compressed, a.landmark_lse};
  }
  // Experts and groups beside the scores, where one kernel does not make them with the landmarks. And compressed values beside the choice of keys.
  const bool all = !landmarks && pools_routes_and_groups(x, w), both = !all && !landmarks && fits_pool_route(x, w);
  Tensor pooled = none(), experts, counts;
  Grouped grouped;
  if (all) std::tie(pooled, experts, grouped) = pool_route_group_stage(context, x, w, q);
  else if (both) std::tie(pooled, experts, counts) = pool_route_stage(context, x, w, q);
  else if (!landmarks) pooled = pool_stage(context, x, w, q);
  const Tensor z = landmarks ? aligned(*landmarks) : pooled;
  LandmarkStage landmark(x, z, k, v, static_cast<float>(scale));
  landmark.p.early = all || both;  // H100, both: so their blocks come before those of the groups
  landmark.p.early_choice = all;   // one stream: H200, all of these early, B 113.6 -> 109, B2 139.4 -> 136 us
  std::optional<Branch> beside;
  if (!all) {
    beside.emplace(context, Beside::urgent);
    if (!both) experts = route_stage(beside->context, x, q, z);
    grouped = attention_groups(beside->context, x, experts, counts);
  }
  landmark.score(context);
  if (!landmark.combines_with_choice()) {
    if (beside) beside->catch_up();
    else beside.emplace(context, Beside::urgent);
    landmark.combine(beside->context);
  }
  landmark.choose(context);
  if (beside) beside->join();
  landmark.free_scratch();
  auto [out, lse] = attention_stage(context, x, units(shared_expert, z, landmark.compressed, k, v, landmark.indices), q, grouped, static_cast<float>(scale),
                                    static_cast<float>(landmark_scale), all && landmark.combines_with_choice());
  return {out, lse, pooled, landmark.indices, experts, keeps_groups(x) ? grouped.kept : ints(query, {0}), landmark.compressed, landmark.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
                                                              const Tensor& landmarks, const Tensor& indices, const Tensor& experts, const Tensor& groups, const Tensor& compressed,
                                                              const Tensor& landmark_lse, const Tensor& out, const Tensor& lse, bool pooled, IntArrayRef num_landmarks,
                                                              IntArrayRef grid, int64_t num_prefix_tokens, bool shared_expert, double scale, double landmark_scale,
                                                              bool want_keys, bool want_landmarks, const OptionalTensor& seqlens_q, const OptionalTensor& seqlens_k, OptionalInt max_seqlen_q,
                                                              OptionalInt max_seqlen_k) {
  const Lengths lengths{seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k};
  const Problem x = problem_of(check_attention_backward(dout, dlse, query, key, value, landmarks, indices, experts, groups, compressed, landmark_lse, out, lse, pooled,
                                                        num_landmarks, grid, num_prefix_tokens, shared_expert, lengths),
                               query, key, lengths, true);
  TORCH_CHECK_VALUE(groups.numel() == 0 || (keeps_groups(x) && groups.numel() == kept_ints(x)), attention_name(query, true), ": groups must be those of the forward pass, or empty");
  const Windows w = windows(num_landmarks, grid, num_prefix_tokens);
  const Saved saved{aligned(dout), aligned(query), aligned(key), aligned(value), aligned(landmarks), aligned(compressed), indices, experts, aligned(out), lse, dlse, landmark_lse};
  AttentionGradient g =
      attention_gradient(x, saved, groups, pooled ? &w : nullptr, {want_keys, want_landmarks}, shared_expert, static_cast<float>(scale), static_cast<float>(landmark_scale));
  return {g.dquery, g.dkey, g.dvalue, pooled || !want_landmarks ? nothing(landmarks) : g.dlandmarks};
}

TORCH_LIBRARY_IMPL(mita_ext, CUDA, m) {
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
  m.impl("landmark_topk", &landmark_topk);
  m.impl("landmark_topk_backward", &landmark_topk_backward);
  m.impl("route", &route);
  m.impl("expert_attention", &expert_attention);
  m.impl("expert_attention_backward", &expert_attention_backward);
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace
}  // namespace mita
