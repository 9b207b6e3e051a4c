// Gather, softmax and product in one kernel: every query attends to the M shared units (landmarks, compressed values) and to
// the K keys of its expert, in one online softmax.
//
// attention: one block per tile of queries of one expert (found in the tile table), taken in passes of up to 64; one warp owns
//   16 of a pass. Unit tiles come in two stages deep, without a break between the passes: first the shared units, as dense
//   rows, then the expert's keys and values, gathered by index. Queries are gathered and outputs scattered as whole rows.
// merge: with s > 1 experts per query every (query, slot) entry leaves a partial output and lse (slot 0 has the shared units);
//   one warp per query combines its s parts in slot order.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kWarps = kPassRows / 16;                          // at most; fewer where the tiles are smaller
  static constexpr int kUnits = kHalf ? 64 : 32;                         // of one tile
  static constexpr int kBlocks = !kHalf ? 1 : C::DP == 64 ? 4 : 2;       // of a multiprocessor, by registers
  struct Shared {
    UnitStage<typename C::T, C::DP, kUnits> stage[2];
    std::int32_t entries[kMaxTileRows];
    TileStorage<typename C::T, C::DP, kPassRows> queries[2];  // of this pass and the next; one where there is one pass
  };
  // Behind the queries in use: the indices of the expert's keys.
  __host__ __device__ static std::size_t indices_offset(int tile_rows) {
    return sizeof(Shared) - (tile_rows > kPassRows ? 0 : sizeof(TileStorage<typename C::T, C::DP, kPassRows>));
  }
};

template <class C>
__global__ void __launch_bounds__(32 * Layout<C>::kWarps, Layout<C>::kBlocks) attention_kernel(const AttentionParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kUnits = L::kUnits, kTiles = kUnits / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int tiles = max_tiles(x, p.groups.tile_rows), bh = blockIdx.x / tiles, b = bh / x.H, h = bh % x.H;
  const WorkItem& work = find_work(p.groups.tiles, p.groups, x, x.s, bh, span(x.queries, b).length, blockIdx.x % tiles, p.groups.tile_rows);
  if (work.entries <= 0) return;

  const int rows = blockDim.x / 2, passes = ceil_div(work.entries, rows);
  const auto load_queries = [&](int pass) {
    const int first = pass * rows, batch = opaque(b);
    load_rows<T, DP>(rows, x.D, work.entries - first, [list = window.of(shared.entries) + 4 * first, slots = work.slots](int i) { return query_of(load_shared_int(list + 4 * i), slots); },
                     Copy<T, DP>(shared.queries[pass & 1].in(window), p.q, batch, opaque(h), span(x.queries, batch).start));
  };
  for (int i = threadIdx.x; i < work.entries; i += blockDim.x) shared.entries[i] = work.entry(i);
  __syncthreads();
  load_queries(0);
  std::int32_t* indices = reinterpret_cast<std::int32_t*>(memory + L::indices_offset(p.groups.tile_rows));
  const int gathered = x.s > 0 ? load_indices(indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, span(x.keys, b).length) : 0;
  const UnitTiles<kUnits>& units = UnitTiles<kUnits>::of(p.units.shared ? x.M : 0, gathered, window.of(*indices), true);
  int buffer = 0;  // the stage of the tile at hand
  if (units.tiles > 0) units.load(shared.stage[buffer], window, p.units, x, b, h, 0);
  commit_loads();
  if (units.tiles == 0) wait_loads<0>();
  __syncthreads();

#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const auto own = [&](int i) { return pass * rows + 16 * warp + g + 8 * i; };  // entries of the lane's two rows
    const bool busy = C::kGroups || pass * rows + 16 * warp < work.entries;
    const Tile<T, DP> queries = shared.queries[pass & 1].in(window);
    OwnRows<C> q;
    OnlineSoftmax<T> softmax;
    float out[DP / 8][4];
    clear(out);
    for (int tile = 0; tile < units.tiles; ++tile, buffer ^= 1) {
      if (tile + 1 < units.tiles || pass + 1 < passes) {
        if (tile + 1 == units.tiles) load_queries(pass + 1);
        units.load(shared.stage[buffer ^ 1], window, p.units, x, opaque(b), opaque(h), tile + 1 < units.tiles ? tile + 1 : 0);
      }
      commit_loads();
      wait_loads<1>();
      __syncthreads();
      auto& stage = shared.stage[buffer];
      if (tile == 0) q.load(queries.from_row(own_rows<C>(warp)), lane);
      if (busy) {
        const float scale = (units.is_shared(tile) ? p.landmark_scale : p.scale) * kLogit<T>;
        float s[kTiles][4];
        product<C>(s, q, stage.k.in(window), lane);
        wait_products<C, 0>(s);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] *= scale;
        if (units.count(tile) < kUnits) mask_logits(s, units.count(tile), lane);
        if (units.is_shared(tile) && work.slots > 1)  // only the first slot of a query has the shared units
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (own(i) < work.entries && shared.entries[own(i)] % work.slots != 0)
#pragma unroll
              for (int n = 0; n < kTiles; ++n) s[n][2 * i] = s[n][2 * i + 1] = -kInfinity;
        softmax.update(s, out);
        Weights<T, kTiles> p(s);
        add_weighted_rows<C>(out, p, stage.v.in(window), lane);
        wait_products<C, 0>(out);
      }
      __syncthreads();
    }
    softmax.finish();

    const std::int64_t entry0 = std::int64_t(opaque(bh)) * x.queries.max_length * work.slots;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = softmax.sum[i] == 0.0f ? 0.0f : __frcp_rn(softmax.sum[i]);
      if (t == 0 && own(i) < work.entries) (x.s > 1 ? p.partial_lse : p.lse)[entry0 + shared.entries[own(i)]] = log_sum<T>(softmax.maximum[i], softmax.sum[i]);
    }
    const auto entry = [&](int i) { return pass * rows + 16 * warp + i < work.entries ? shared.entries[pass * rows + 16 * warp + i] : -1; };
    if (x.s > 1)
      store_partial_rows<DP>(out, factor, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : p.partial_out + (entry0 + entry(i)) * x.D; });
    else
      store_rows<T, DP>(queries.from_row(16 * warp), out, factor, x.D, lane,
                        [&](int i) { return entry(i) < 0 ? nullptr : head_rows<T>(p.out, opaque(b), opaque(h), span(x.queries, b).start + entry(i)); });
  }
}

constexpr int kMergeWarps = 4;

template <class T> __global__ void __launch_bounds__(32 * kMergeWarps) merge_kernel(const AttentionParams p) {
  const Problem& x = p.problem;
  const std::int64_t row = std::int64_t(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  const int N = x.queries.max_length, lane = threadIdx.x % 32;
  if (row >= std::int64_t(x.B) * x.H * N) return;
  const int n = static_cast<int>(row % N), bh = static_cast<int>(row / N);
  const Span queries = span(x.queries, bh / x.H);
  if (n >= queries.length) return;
  T* out = head_rows<T>(p.out, bh / x.H, bh % x.H, queries.start + n);
  const float* lse = p.partial_lse + row * x.s;
  float maximum = -kInfinity, sum = 0.0f, value[kMaxCudaHeadDim / 32] = {};
  for (int i = 0; i < x.s; ++i) maximum = fmaxf(maximum, lse[i]);
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  for (int i = 0; i < x.s; ++i) {
    const float weight = expf(lse[i] - base);
    sum += weight;
#pragma unroll
    for (int j = 0; j < kMaxCudaHeadDim / 32; ++j)
      if (lane + 32 * j < x.D) value[j] += weight * p.partial_out[(row * x.s + i) * x.D + lane + 32 * j];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int j = 0; j < kMaxCudaHeadDim / 32; ++j)
    if (lane + 32 * j < x.D) out[lane + 32 * j] = from_float<T>(value[j] * factor);
  if (lane == 0) p.lse[row] = log_sum<float>(maximum, sum);
}

}  // namespace

cudaError_t launch_expert_attention(const AttentionParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x.dtype, x.D, p.groups.tile_rows >= kPassRows, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    if (p.groups.tile_rows < 16 || p.groups.tile_rows % 16 != 0 || p.groups.tile_rows > kMaxTileRows) return cudaErrorInvalidValue;
    const int warps = std::min(L::kWarps, p.groups.tile_rows / 16);
    const std::size_t bytes = L::indices_offset(p.groups.tile_rows) + x.K * sizeof(std::int32_t);
    if (cudaError_t status = allow_shared_memory(attention_kernel<C>, bytes)) return status;
    const unsigned blocks = static_cast<unsigned>(x.B) * x.H * max_tiles(x, p.groups.tile_rows);
    attention_kernel<C><<<blocks, 32 * warps, bytes, stream>>>(p);
    if (cudaError_t status = cudaGetLastError()) return status;
    if (x.s <= 1) return cudaSuccess;
    const std::int64_t rows = std::int64_t(x.B) * x.H * x.queries.max_length;
    merge_kernel<typename C::T><<<static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps), 32 * kMergeWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
