// Gradients of the rows of a softmax, the "queries". Two sums, one kernel (RowRole):
//   attention: rows = a tile of queries of one expert, taken in passes, units = [landmarks | its gathered keys]; the epilogue adds what the
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
  static constexpr int kBlocks = !kHalf ? 1 : C::DP == 64 ? 3 : 2;                    // of a multiprocessor, by registers
  struct Shared {
    UnitStage<typename C::T, C::DP, kUnits> stage[2];
    std::int32_t entries[kMaxTileRows];
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, rows = blockDim.x / 2;
  const bool landmark = p.role == RowRole::landmark;
  const int N = x.queries.max_length;

  // What this block works on: `work.entries` rows of one head and the unit tiles [first_tile, last_tile).
  const int block_rows = landmark ? rows : p.groups.tile_rows, blocks = landmark ? ceil_div(x.M, rows) : max_tiles(x, block_rows), parts = landmark ? p.splits : 1;
  const int block = blockIdx.x % blocks, part = blockIdx.x / blocks % parts, bh = blockIdx.x / blocks / parts, b = bh / x.H, h = bh % x.H;
  // Landmarks come as they are, like queries without experts.
  const WorkItem& work = find_work(p.groups.tiles, p.groups, x, landmark ? 0 : x.s, bh, landmark ? x.M : span(x.queries, b).length, block, block_rows);
  if (work.entries <= 0) return;
  for (int i = threadIdx.x; i < work.entries; i += blockDim.x) shared.entries[i] = work.entry(i);
  __syncthreads();
  const int length = span(x.keys, b).length;
  const int gathered = landmark ? length : x.s > 0 ? load_indices(shared.indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, length) : 0;
  const UnitTiles<kUnits>& units = UnitTiles<kUnits>::of(!landmark && p.units.shared ? x.M : 0, gathered, landmark ? nullptr : shared.indices);
  const int tiles_per_part = ceil_div(units.tiles, parts), first_tile = part * tiles_per_part, last_tile = min(units.tiles, first_tile + tiles_per_part);
  int buffer = 0;  // the stage of the tile at hand
  if (first_tile < last_tile) units.load(shared.stage[buffer], window, p.units, x, b, h, first_tile);

  const int passes = ceil_div(work.entries, rows);
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const auto own = [&](int i) { return pass * rows + 16 * warp + g + 8 * i; };  // entries of the lane's two rows
    const int batch = opaque(b), head = opaque(h);
    const std::int64_t start = landmark ? 0 : span(x.queries, batch).start;
    load_rows<T, DP>(rows, x.D, (pass + 1) * rows <= work.entries, [&](int i) { return pass * rows + i < work.entries ? work.query_of(shared.entries[pass * rows + i]) : -1; },
                     Copy<T, DP>(shared.q.in(window), p.q, batch, head, start), Copy<T, DP>(shared.dout.in(window), p.dout, batch, head, start));
    commit_loads();
    SharedRows<T, DP> q, dout;
    q.load(shared.q.in(window).from_row(16 * warp), lane);
    dout.load(shared.dout.in(window).from_row(16 * warp), lane);
    // Only the first slot of a query has the shared units, and takes the pooled gradient.
    const auto first_slot = [&](int i) { return work.slots == 1 || (own(i) < work.entries && shared.entries[own(i)] % work.slots == 0); };
    float lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool present = own(i) < work.entries;
      const std::int64_t at = std::int64_t(opaque(bh)) * (landmark ? x.M : N) + (present ? work.query_of(shared.entries[own(i)]) : 0);
      lse[i] = present ? p.lse[at] * kLogit<T> : kInfinity;
      if (lse[i] == -kInfinity) lse[i] = kInfinity;  // attended to nothing
      delta[i] = present ? p.delta[at] : 0.0f;
    }
    float dq[DP / 8][4], sum[2] = {0.0f, 0.0f};
    clear(dq);
    wait_loads<0>();
    if (first_tile >= last_tile) __syncthreads();
    for (int tile = first_tile; tile < last_tile; ++tile, buffer ^= 1) {
      if (tile + 1 < last_tile || pass + 1 < passes) units.load(shared.stage[buffer ^ 1], window, p.units, x, opaque(b), opaque(h), tile + 1 < last_tile ? tile + 1 : first_tile);
      commit_loads();
      wait_loads<1>();
      __syncthreads();
      auto& stage = shared.stage[buffer];
      if (pass * rows + 16 * warp < work.entries) {
        const bool dense = units.is_shared(tile);
        const float scale = dense ? p.landmark_scale : p.scale;
        float s[kTiles][4], gradient[kTiles][4];
        clear(s);
        add_product<T, DP, kTiles>(s, q, stage.k.in(window), lane);
        clear(gradient);
        add_product<T, DP, kTiles>(gradient, dout, stage.v.in(window), lane);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], scale * kLogit<T>, -lse[i / 2]);
        if (units.count(tile) < kUnits) mask_logits(s, units.count(tile), lane);
        if (dense && work.slots > 1)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (!first_slot(i))
#pragma unroll
              for (int n = 0; n < kTiles; ++n) s[n][2 * i] = s[n][2 * i + 1] = -kInfinity;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float probability = exponential<T>(s[n][i]);
            if constexpr (!L::kHalf) sum[i / 2] += probability;
            gradient[n][i] = probability * (gradient[n][i] - delta[i / 2]) * (scale * power_of_2(kGradientShift<T>));
          }
        add_weighted_rows<T, DP, kTiles>(dq, gradient, stage.k.in(window), lane);
      }
      __syncthreads();
    }
    // The probabilities of a row sum to 1, but for the rounding of a large lse, which is far above that of fp32 gradients.
    if constexpr (!L::kHalf)
      if (!landmark && work.slots == 1)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
          sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
          const float factor = sum[i] > 0.0f ? 1.0f / sum[i] : 1.0f;
#pragma unroll
          for (int d = 0; d < DP / 8; ++d) dq[d][2 * i] *= factor, dq[d][2 * i + 1] *= factor;
        }
    if constexpr (kGradientShift<T> != 0)
#pragma unroll
      for (int d = 0; d < DP / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[d][i] *= power_of_2(-kGradientShift<T>);

    if (!landmark && p.dlandmarks != nullptr) {
      Windows windows = windows_of(p.windows, x.queries, span(x.queries, batch).length);
      windows.gw = opaque(windows.gw), windows.gh = opaque(windows.gh);
      const float* dlandmarks = p.dlandmarks + std::int64_t(opaque(bh)) * x.M * x.D;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (own(i) < work.entries && first_slot(i))
          for_each_window(windows, work.query_of(shared.entries[own(i)]), [&](int m, float weight) {
#pragma unroll
            for (int d = 0; d < DP / 8; ++d)
              if (8 * d < x.D) {
                const float2 z = *reinterpret_cast<const float2*>(dlandmarks + std::int64_t(m) * x.D + 8 * d + 2 * t);
                dq[d][2 * i] += weight * z.x, dq[d][2 * i + 1] += weight * z.y;
              }
          });
    }
    const float one[2] = {1.0f, 1.0f};
    const std::int64_t row0 = landmark ? (std::int64_t(opaque(bh)) * parts + part) * x.M : std::int64_t(opaque(bh)) * N * work.slots;
    const auto entry = [&](int i) { return pass * rows + 16 * warp + i < work.entries ? shared.entries[pass * rows + 16 * warp + i] : -1; };
    if (landmark || x.s > 1)
      store_partial_rows<DP>(dq, one, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : p.partial_dq + (row0 + entry(i)) * x.D; });
    else
      store_rows<T, DP>(q.tile, dq, one, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : head_rows<T>(p.dq, batch, head, span(x.queries, batch).start + entry(i)); });
    __syncthreads();  // the next queries take the place of these
  }
}

}  // namespace

cudaError_t launch_row_gradient(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const bool landmark = p.role == RowRole::landmark;
    const int warps = std::min(L::kWarps, landmark ? ceil_div(x.M, 16) : p.groups.tile_rows / 16);
    if (warps < 1 || p.groups.tile_rows > kMaxTileRows) return cudaErrorInvalidValue;
    const std::size_t bytes = offsetof(typename L::Shared, indices) + (landmark ? 0 : x.K * sizeof(std::int32_t));
    if (cudaError_t status = allow_shared_memory(row_gradient_kernel<C>, sizeof(typename L::Shared))) return status;
    const unsigned heads = static_cast<unsigned>(x.B) * x.H;
    const unsigned blocks = landmark ? heads * p.splits * ceil_div(x.M, 16 * warps) : heads * max_tiles(x, p.groups.tile_rows);
    row_gradient_kernel<C><<<blocks, 32 * warps, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
