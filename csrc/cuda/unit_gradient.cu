// Gradients of the units of a softmax, the "keys" and "values" that rows attended to. Three sums, one kernel (UnitRole):
//   shared:   units = landmarks and compressed values, rows = all queries, cut into parts
//   routed:   units = the gathered keys and values of an expert, rows = one segment of its queries
//   compress: units = keys and values, rows = the landmarks; the epilogue adds what the routed sums left for each key
//
// One warp owns 16 units and keeps their dk and dv in registers (two warps above 128 columns, half of them each); row tiles (q, dout,
// lse, delta) pass by, two stages deep:
//   P^T = exp(scale * k q^T - lse)      dv += P^T dout
//   dS^T = P^T * (v dout^T - delta)     dk += dS^T q
// (small_gradient.cu has keys of small experts, and above 64 columns keys of few landmarks; for sm_90a, unit_gradient_sm90.cu has specialists, for more than 64
// units above 64 columns.)
// Every sum has one owner and a fixed order: no atomics. Partial sums are fp32, routed ones fp32 or in 16 bits (routed.cuh).
#include "launch.h"
#include "routed.cuh"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kUnits = kRowGradientRows<sizeof(typename C::T), C::DP>, kWarps = kUnits / 16 * C::kSharers;  // at most
  // Of one tile. Evidence: by warps, 64 rows of 128 columns spill, in TF32 32.
  static constexpr int kRows = C::DP > 128 || (C::DP == 128 && std::is_same_v<typename C::T, Tf32>) ? kUnits / 2 : C::kGroups ? 64 : 32;
  static constexpr int kBlocks = !kHalf ? 1 : C::DP == 64 ? 3 : 2;  // of a multiprocessor, by registers
  static constexpr int kListedRows = 512;  // a multiple of kRows
  static constexpr bool kBothProducts = C::kGroups && C::DP > 64;  // under way at once: there are registers for it
  struct Shared {
    struct {
      TileStorage<typename C::T, C::DP, kRows> q, dout;
      float lse[kRows], delta[kRows], normalizer[kHalf ? 1 : kRows];
    } stage[2];
    std::int32_t rows[kListedRows];                  // routed: the queries that come next
    TileStorage<typename C::T, C::DP, kUnits> k, v;  // last: only the units of the block are allocated
  };
  static_assert(sizeof(Shared) <= 102 * 1024);
};

template <class C> __global__ void __launch_bounds__(32 * Layout<C>::kWarps, Layout<C>::kBlocks) unit_gradient_kernel(const UnitGradientParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kRows = L::kRows, kTiles = kRows / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2;
  const int block_units = rows_of_block<C>(blockDim.x), group = x.H / x.Hkv;
  const bool compress = p.role == UnitRole::compress, routed = p.role == UnitRole::routed;

  // What this block works on: units [u0, u0 + block_units) of one head, and the rows that come by in `steps` tiles.
  const int units = compress ? x.keys.max_length : routed ? x.K : x.M, blocks = ceil_div(units, block_units);
  const int parts = compress ? 1 : routed ? max_tiles(x, p.groups.segment_rows) : p.splits;
  const int u0 = blockIdx.x % blocks * block_units, part = blockIdx.x / blocks % parts;
  const int heads = compress ? x.Hkv : x.H, bh = blockIdx.x / blocks / parts;  // compress: of the keys' heads
  const int b = bh / heads, h = bh % heads;
  const Span keys = span(x.keys, b);
  // The rows that come by: a segment of an expert's queries, a part of all queries, or all landmarks (once per query head).
  const int length = compress ? p.landmark_rows : span(x.queries, b).length;
  const int rows = compress ? length : routed ? p.groups.segment_rows : ceil_div(ceil_div(length, kRows), parts) * kRows;
  const int experts = routed ? x.s : 0;
  __shared__ Work work;  // there are no registers left for it
  if (threadIdx.x == 0) work = find_work(p.groups.segments, x, experts, bh, length, part, rows);
  __syncthreads();
  if (routed && work.entries <= 0) return;
  const int tiles = max(0, ceil_div(work.entries, kRows)), steps = compress ? tiles * group : tiles;

  const auto unit_row = [&](int i) { return routed ? p.indices[(std::int64_t(bh) * x.M + work.expert) * x.K + u0 + i] : u0 + i; };
  const auto is_key = [&](int i) { return i < block_units && u0 + i < x.K && static_cast<unsigned>(unit_row(i)) < static_cast<unsigned>(keys.length); };
  // The units that are there come first.
  const int present = routed ? __syncthreads_count(is_key(threadIdx.x)) : (compress ? keys.length : x.M) - u0;
  const auto load_stage = [&](int step) {
    auto& stage = shared.stage[step & 1];
    const int row_head = compress ? h * group + step / tiles : h, base = (compress ? step % tiles : step) * kRows;
    const std::int64_t row_start = compress ? 0 : span(x.queries, b).start, stats = (std::int64_t(b) * x.H + row_head) * (compress ? x.M : x.queries.max_length);
    // kListedRows is a multiple of kRows: a tile's rows are listed one after the other.
    const auto row = [routed, list = window.of(shared.rows) + base % L::kListedRows * 4, first = work.first + base](int i) {
      return routed ? load_shared_int(list + 4 * i) : first + i;
    };
    load_rows<T, DP>(kRows, x.D, work.entries - base, row, Copy<T, DP>(stage.q.in(window), p.row_q, b, row_head, row_start),
                     Copy<T, DP>(stage.dout.in(window), p.row_dout, b, row_head, row_start));
    const auto number = [=, present = work.entries - base](int i) { return i < present ? row(i) : -1; };
    load_numbers(window.of(stage.lse), kRows, p.lse + stats, number);
    load_numbers(window.of(stage.delta), kRows, p.delta + stats, number);
    if constexpr (!L::kHalf) load_numbers(window.of(stage.normalizer), kRows, p.normalizer + stats, number);
  };
  const auto list_rows = [&](int first) {  // gathering through global memory would stall every tile: list many rows at once
    for (int i = first + threadIdx.x; i < min(first + L::kListedRows, work.entries); i += blockDim.x) shared.rows[i % L::kListedRows] = query_of(entry_of(p.groups, x, experts, bh, work, i), max(experts, 1));
    __syncthreads();
  };
  const int unit_head = routed ? h / group : h;
  const std::int64_t unit_start = routed || compress ? keys.start : 0;
  load_rows<T, DP>(block_units, x.D, present, unit_row, Copy<T, DP>(shared.k.in(window), p.unit_k, b, unit_head, unit_start),
                   Copy<T, DP>(shared.v.in(window), p.unit_v, b, unit_head, unit_start));
  if (routed) list_rows(0);
  if (steps > 0) load_stage(0);
  commit_loads();
  const bool collects = compress && p.groups.key_ranges != nullptr;
  RoutedList list;  // of the first head
  if (collects) list = RoutedList(p, b * x.H + h * group, u0), list.ask(p, lane);

  StoredRows<C> k, v;
  k.load(shared.k.in(window).from_row(own_rows<C>(warp)), lane);
  v.load(shared.v.in(window).from_row(own_rows<C>(warp)), lane);
  float dk[C::kColumns / 8][4], dv[C::kColumns / 8][4];
  clear(dk);
  clear(dv);
  const float scale = p.scale * kLogit<T>;
  constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
  for (int step = 0; step < steps; ++step) {
    if (routed && (step + 1) * kRows % L::kListedRows == 0) list_rows((step + 1) * kRows);
    if (step + 1 < steps) load_stage(step + 1);
    commit_loads();
    wait_loads<1>();
    __syncthreads();
    auto& stage = shared.stage[step & 1];
    float probability[kTiles][4], gradient[kTiles][4];
    product<C>(probability, k, stage.q.in(window), lane);
    if constexpr (L::kBothProducts) product<C>(gradient, v, stage.dout.in(window), lane);
    wait_products<C, L::kBothProducts>(probability);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = 8 * n + 2 * (lane & 3);
      const float2 lse = *reinterpret_cast<const float2*>(&stage.lse[column]);
      // A row that attended to nothing gives nothing; absent rows are zeros, and so is all that they give.
      const auto offset = [](float l) { return l == -kInfinity ? -kInfinity : kProbabilityShift<T> - l * kLogit<T>; };
      const float offsets[2] = {offset(lse.x), offset(lse.y)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        probability[n][i] = exponential<T>(fmaf(probability[n][i], scale, offsets[i & 1]));
        if constexpr (!L::kHalf) probability[n][i] *= stage.normalizer[column + (i & 1)];
      }
    }
    Weights<T, kTiles> weights(probability);
    add_weighted_rows<C>(dv, weights, stage.dout.in(window), lane);
    if constexpr (!L::kBothProducts) product<C>(gradient, v, stage.dout.in(window), lane);
    wait_products<C, 1>(gradient);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(&stage.delta[8 * n + 2 * (lane & 3)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[n][i] = probability[n][i] * kRescale * (gradient[n][i] - (i & 1 ? delta.y : delta.x));
    }
    Weights<T, kTiles> dlogits(gradient);
    add_weighted_rows<C>(dk, dlogits, stage.q.in(window), lane);
    wait_products<C, 0>(dv, dk);
    __syncthreads();
  }
  wait_loads<0>();

#pragma unroll
  for (int d = 0; d < C::kColumns / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[d][i] *= p.scale * power_of_2(-kGradientShift<T>), dv[d][i] *= power_of_2(-kProbabilityShift<T>);
  const float one[2] = {1.0f, 1.0f};
  const int own = u0 + row_of_warp<C>(warp);
  const std::int64_t row0 = std::int64_t(opaque(blockIdx.x) / blocks) * units;  // of partial sums
  if (p.role == UnitRole::shared) {
    const auto row_in = [&](float* partial) { return [=](int i) { return own + i < units ? partial + (row0 + own + i) * x.D : nullptr; }; };
    store_partial_rows<C>(dk, one, x.D, lane, row_in(p.partial_dk));
    store_partial_rows<C>(dv, one, x.D, lane, row_in(p.partial_dv));
    return;
  }
  if (routed) {
    const auto index = [=](int i) { return own + i < units ? own + i : -1; };
    const auto store = [&](const RoutedRows& to, const auto& sums) { store_routed_rows<C>(sums, one, x.D, lane, static_cast<float*>(to.numbers) + row0 * routed_pitch(x.D), index); };
    if (L::kHalf && p.routed_dk.factors)
      store_rounded_rows<C>(dk, dv, 1.0f, 1.0f, x.D, lane, rounded_rows_from(p.routed_dk, row0, x.D), rounded_rows_from(p.routed_dv, row0, x.D), index);
    else store(p.routed_dk, dk), store(p.routed_dv, dv);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row_of_warp<C>(warp) + g + 8 * i >= present)  // keys beyond a short sequence
#pragma unroll
      for (int d = 0; d < C::kColumns / 8; ++d) dk[d][2 * i] = dk[d][2 * i + 1] = dv[d][2 * i] = dv[d][2 * i + 1] = 0.0f;
  if (collects)
    for (int i = 0; i < group; ++i) {
      if (i > 0) list = RoutedList(p, b * x.H + h * group + i, u0), list.ask(p, lane);
      const int key = u0 % kKeyBlock + row_of_warp<C>(warp);
      if (L::kHalf && p.routed_dk.factors) list.template add<C, Fixed>(p, dk, dv, key, lane);
      else list.template add<C, float>(p, dk, dv, key, lane);
    }
  if (steps == 0) __syncthreads();  // what other threads loaded is there
  const Span stored_keys = span(x.keys, opaque(b));
  const int stored = x.keys.starts ? stored_keys.length : units;
  // Through the block's own units.
  const auto out = [&](const Rows& rows, const auto& tile, const auto& sums) {
    store_rows<C>(tile.in(window).from_row(row_of_warp<C>(warp)), sums, one, x.D, lane, head_rows<T>(rows, b, h, stored_keys.start), rows.row,
                  [=](int i) { return own + i < stored ? own + i : -1; });
  };
  out(p.dk, shared.k, dk), out(p.dv, shared.v, dv);
}

}  // namespace

cudaError_t launch_unit_gradient(const UnitGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (fits_small_unit_gradient(p)) return launch_small_unit_gradient(p, stream);
  if (fits_unit_specialists(p)) return launch_unit_specialists(p, stream);
  const bool compress = p.role == UnitRole::compress;
  const int units = units_of(p);
  return dispatch(x, units > 48, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const int warps = C::kGroups ? 4 : std::min(L::kWarps, ceil_div(units, 16) * C::kSharers);
    const std::size_t bytes = offsetof(typename L::Shared, v) + rows_of_block<C>(32 * warps) * C::DP * sizeof(typename C::T);
    const unsigned blocks = static_cast<unsigned>(x.B) * (compress ? x.Hkv : x.H) * parts_of(p) * ceil_div(units, rows_of_block<C>(32 * warps));
    return launch(unit_gradient_kernel<C>, blocks, 32 * warps, bytes, stream, p);
  });
}

}  // namespace mita
