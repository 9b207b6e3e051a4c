// Gradients of the rows of a softmax, the "queries". Two sums, one kernel (RowRole):
//   attention: rows = a tile of queries of one expert, units = [landmarks | its gathered keys]; the epilogue adds what the
//              queries receive as parts of pooled landmarks and scatters whole rows
//   landmark:  rows = landmarks, units = all keys, cut into parts
//
// One warp owns 16 rows and keeps their dq in registers; unit tiles pass by, two stages deep:
//   P = exp(scale * q k^T - lse)    dS = scale * P * (dout v^T - delta)    dq += dS k
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kWarps = kRowGradientRows<sizeof(typename C::T), C::DP> / 16;  // at most
  static constexpr int kUnits = kHalf ? 64 : C::DP == 64 ? 32 : 16;                   // of one tile
  static constexpr int kBlocks = !kHalf ? 1 : C::DP == 64 ? 3 : 2;  // of a multiprocessor, by registers
  struct Shared {
    UnitStage<typename C::T, C::DP, kUnits> stage[2];
    TileStorage<typename C::T, C::DP, 16 * kWarps> q, dout;
    std::int32_t indices[kMaxTopk];  // of the expert's keys; last: only K are allocated
  };
  static_assert(offsetof(Shared, indices) <= 97 * 1024);
};

template <class C> __global__ void __launch_bounds__(32 * Layout<C>::kWarps, Layout<C>::kBlocks) row_gradient_kernel(const RowGradientParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kUnits = L::kUnits, kTiles = kUnits / 8;
  extern __shared__ __align__(256) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, block_rows = blockDim.x / 2;
  const bool landmark = p.role == RowRole::landmark;
  const int N = x.queries.max_length;

  // What this block works on: `work.entries` rows of one head and the unit tiles [first_tile, last_tile).
  const int blocks = landmark ? ceil_div(x.M, block_rows) : max_tiles(x, block_rows), parts = landmark ? p.splits : 1;
  const int block = blockIdx.x % blocks, part = blockIdx.x / blocks % parts, bh = blockIdx.x / blocks / parts, b = bh / x.H, h = bh % x.H;
  const Span queries = span(x.queries, b);
  // Landmarks come as they are, like queries without experts.
  const WorkItem& work = find_work(p.groups.tiles, p.groups, x, landmark ? 0 : x.s, bh, landmark ? x.M : queries.length, block, block_rows);
  if (work.entries <= 0) return;
  const std::int64_t start = landmark ? 0 : queries.start;
  load_rows<T, DP>(block_rows, x.D, work.entries >= block_rows, [&](int i) { return i < work.entries ? work.query(i) : -1; },
                   Copy<T, DP>(shared.q.in(window), p.q, b, h, start), Copy<T, DP>(shared.dout.in(window), p.dout, b, h, start));
  const int length = span(x.keys, b).length;
  const int gathered = landmark ? length : x.s > 0 ? load_indices(shared.indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, length) : 0;
  const UnitTiles<kUnits> units(!landmark && p.units.shared ? x.M : 0, gathered, landmark ? nullptr : shared.indices);
  const int tiles_per_part = ceil_div(units.tiles, parts), first_tile = part * tiles_per_part, last_tile = min(units.tiles, first_tile + tiles_per_part);
  const auto load_stage = [&](int tile) { units.load(shared.stage[tile & 1], window, p.units, x, b, h, tile); };
  if (first_tile < last_tile) load_stage(first_tile);
  commit_loads();

  SharedRows<T, DP> q, dout;
  q.load(shared.q.in(window).from_row(16 * warp), lane);
  dout.load(shared.dout.in(window).from_row(16 * warp), lane);
  float lse[2], delta[2];
  bool first_slot[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int own = 16 * warp + g + 8 * i;
    const bool present = own < work.entries;
    const std::int64_t at = std::int64_t(bh) * (landmark ? x.M : N) + (present ? work.query(own) : 0);
    lse[i] = present ? p.lse[at] * kLogit<T> : kInfinity;
    if (lse[i] == -kInfinity) lse[i] = kInfinity;  // attended to nothing
    delta[i] = present ? p.delta[at] : 0.0f;
    first_slot[i] = work.slots == 1 || (present && work.entry(own) % work.slots == 0);
  }
  float dq[DP / 8][4];
  clear(dq);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    if (tile + 1 < last_tile) load_stage(tile + 1);
    commit_loads();
    wait_loads<1>();
    __syncthreads();
    auto& stage = shared.stage[tile & 1];
    if (16 * warp < work.entries) {
      const bool dense = units.is_shared(tile);
      const float scale = dense ? p.landmark_scale : p.scale;
      float s[kTiles][4], gradient[kTiles][4];
      clear(s);
      add_product<T, DP, kTiles>(s, q, stage.k.in(window), lane);
      clear(gradient);
      add_product<T, DP, kTiles>(gradient, dout, stage.v.in(window), lane);
      const float own_lse[2] = {!dense || first_slot[0] ? lse[0] : kInfinity, !dense || first_slot[1] ? lse[1] : kInfinity};
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], scale * kLogit<T>, -own_lse[i / 2]);
      if (units.count(tile) < kUnits) mask_logits(s, units.count(tile), lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          gradient[n][i] = exponential<T>(s[n][i]) * (gradient[n][i] - delta[i / 2]) * (scale * power_of_2(kGradientShift<T>));
      add_weighted_rows<T, DP, kTiles>(dq, gradient, stage.k.in(window), lane);
    }
    __syncthreads();
  }
  wait_loads<0>();
  if constexpr (kGradientShift<T> != 0)
#pragma unroll
    for (int d = 0; d < DP / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[d][i] *= power_of_2(-kGradientShift<T>);

  if (!landmark && p.dlandmarks != nullptr) {
    const Windows windows = windows_of(p.windows, x.queries, queries.length);
    const float* dlandmarks = p.dlandmarks + std::int64_t(bh) * x.M * x.D;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (16 * warp + g + 8 * i < work.entries && first_slot[i])
        for_each_window(windows, work.query(16 * warp + g + 8 * i), [&](int m, float weight) {
#pragma unroll
          for (int d = 0; d < DP / 8; ++d)
            if (8 * d < x.D) {
              const float2 z = *reinterpret_cast<const float2*>(dlandmarks + std::int64_t(m) * x.D + 8 * d + 2 * t);
              dq[d][2 * i] += weight * z.x, dq[d][2 * i + 1] += weight * z.y;
            }
        });
  }
  const float one[2] = {1.0f, 1.0f};
  const std::int64_t row0 = landmark ? (std::int64_t(bh) * parts + part) * x.M : std::int64_t(bh) * N * work.slots;
  if (landmark || x.s > 1)
    store_partial_rows<DP>(dq, one, x.D, lane, [&](int i) {
      return 16 * warp + i < work.entries ? p.partial_dq + (row0 + work.entry(16 * warp + i)) * x.D : nullptr;
    });
  else
    store_rows<T, DP>(q.tile, dq, one, x.D, lane, [&](int i) {
      return 16 * warp + i < work.entries ? head_rows<T>(p.dq, b, h, queries.start + work.entry(16 * warp + i)) : nullptr;
    });
}

}  // namespace

cudaError_t launch_row_gradient(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const bool landmark = p.role == RowRole::landmark;
    const int warps = landmark ? std::min(L::kWarps, ceil_div(x.M, 16)) : p.groups.tile_rows / 16;
    if (warps < 1 || warps > L::kWarps) return cudaErrorInvalidValue;
    const std::size_t bytes = offsetof(typename L::Shared, indices) + (landmark ? 0 : x.K * sizeof(std::int32_t));
    if (cudaError_t status = allow_shared_memory(row_gradient_kernel<C>, sizeof(typename L::Shared))) return status;
    const unsigned heads = static_cast<unsigned>(x.B) * x.H;
    const unsigned blocks = landmark ? heads * p.splits * ceil_div(x.M, 16 * warps) : heads * max_tiles(x, p.groups.tile_rows);
    row_gradient_kernel<C><<<blocks, 32 * warps, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
