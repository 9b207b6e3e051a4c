// Gather, softmax and product in one kernel: every query attends to the M shared units (landmarks, compressed values) and to
// the K keys of its expert, in one online softmax.
//
// attention: one block per tile of queries of one expert (from the list of work). A team, the block or each of its warpgroups,
//   takes 64 queries or fewer at a time, one warp 16 of them, while the next ones are on their way. Units come in tiles: first the
//   shared units, as dense rows, then the expert's keys and values, gathered by index. Where all of them fit in shared
//   memory they stay there, and the teams need not wait for each other; else they pass by, in step, for every pass of all teams.
//   Queries are gathered and outputs scattered as whole rows.
// merge: with s > 1 experts per query every (query, slot) entry leaves a partial output and lse (slot 0 has the shared units);
//   one warp per query combines its s parts in slot order.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kTeams = C::kGroups && C::DP == 128 ? 3 : 1;      // at most
  static constexpr int kUnits = C::kGroups ? 64 : 32;                    // of one tile
  static constexpr int kBlocks = !kHalf || kTeams == 3 ? 1 : C::DP == 64 ? 4 : 2;  // of a multiprocessor, by registers
  static constexpr int kMemory = (kTeams == 3 ? 227 : C::kGroups ? 56 : 99) * 1024;  // of a block
  using Stage = UnitStage<typename C::T, C::DP, kUnits>;
  using Queries = TileStorage<typename C::T, C::DP, kPassRows>;
};

// Shared memory of a block: stages of units, queries of every team (two sets where there is more than one pass), its entries, and
// the indices of its expert's keys.
template <class C> struct Memory {
  using L = Layout<C>;
  int teams, stages;
  std::size_t queries, entries, indices, bytes;
  __host__ __device__ Memory(const AttentionParams& p) {
    const Problem& x = p.problem;
    teams = min(L::kTeams, ceil_div(p.groups.tile_rows, kPassRows));
    const std::size_t sets = teams * (p.groups.tile_rows > teams * kPassRows ? 2 : 1), rest = sets * sizeof(typename L::Queries) + (p.groups.tile_rows + x.K) * sizeof(std::int32_t);
    const int tiles = (p.units.shared ? ceil_div(x.M, L::kUnits) : 0) + (x.s > 0 ? ceil_div(x.K, L::kUnits) : 0);
    stages = max(2, min(tiles, static_cast<int>((L::kMemory - rest) / sizeof(typename L::Stage))));
    queries = stages * sizeof(typename L::Stage);
    entries = queries + sets * sizeof(typename L::Queries);
    indices = entries + p.groups.tile_rows * sizeof(std::int32_t);
    bytes = indices + x.K * sizeof(std::int32_t);
  }
};

template <class C>
__global__ void __launch_bounds__(128 * Layout<C>::kTeams, Layout<C>::kBlocks) attention_kernel(const AttentionParams p, const Memory<C> layout) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kUnits = L::kUnits, kTiles = kUnits / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  auto* const stage = reinterpret_cast<typename L::Stage*>(memory);
  auto* const queries = reinterpret_cast<typename L::Queries*>(memory + layout.queries);
  auto* const entries = reinterpret_cast<std::int32_t*>(memory + layout.entries);
  auto* const indices = reinterpret_cast<std::int32_t*>(memory + layout.indices);

  const Problem& x = p.problem;
  const Team team = C::kGroups ? Team::warpgroup() : Team::block();
  const int warp = team.thread / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int tiles = max_tiles(x, p.groups.tile_rows), bh = blockIdx.x / tiles, b = bh / x.H, h = bh % x.H;
  const Work work = find_work(p.groups.tiles, x, x.s, bh, span(x.queries, b).length, blockIdx.x % tiles, p.groups.tile_rows);
  if (work.entries <= 0) return;
  const int slots = max(x.s, 1);

  // A team's passes are every `teams`-th.
  const int rows = team.threads / 2, own_team = threadIdx.x / team.threads, passes = ceil_div(work.entries, rows);
  const auto queries_of = [&](int pass) { return queries[own_team + (pass / layout.teams & 1) * layout.teams].in(window); };
  const auto load_queries = [&](int pass) {
    const int first = pass * rows, batch = opaque(b);
    load_rows<T, DP>(team, rows, x.D, work.entries - first, [list = window.of(*entries) + 4 * first, slots](int i) { return query_of(load_shared_int(list + 4 * i), slots); },
                     Copy<T, DP>(queries_of(pass), p.q, batch, opaque(h), span(x.queries, batch).start));
  };
  for (int i = threadIdx.x; i < work.entries; i += blockDim.x) entries[i] = entry_of(p.groups, x, x.s, bh, work, i);
  int gathered = 0;
  if (x.s > 0) gathered = load_indices(indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, span(x.keys, b).length);
  else __syncthreads();
  const auto units = UnitTiles<kUnits>::of(p.units.shared ? x.M : 0, gathered, window.of(*indices), true);
  const bool resident = units.tiles <= layout.stages;
  const auto load_units = [&](int tile, int to) { units.load(stage[to], window, p.units, x, opaque(b), opaque(h), tile); };
  if (own_team < passes) load_queries(own_team);
  const int under_way = layout.stages - 1;  // tiles, where they pass by
  for (int tile = 0; tile < (resident ? units.tiles : under_way); ++tile) {
    load_units(tile, tile);
    if (resident && tile + 1 == units.tiles && own_team + layout.teams < passes) load_queries(own_team + layout.teams);
    commit_loads();
  }
  if (units.tiles == 0) {
    commit_loads();
    wait_loads<0>();
    __syncthreads();
  }

  int pass = own_team;
  // Waits for a tile; returns its stage.
  const auto arrive = [&](int tile) {
    if (resident) {
      if (pass == own_team) {
        wait_all_but(units.tiles - 1 - tile);
        __syncthreads();
      }
      return tile;
    }
    wait_all_but(under_way - 1);
    __syncthreads();
    // The stage of the tile before is free now. The next pass begins with the first tile again.
    const int at = pass / layout.teams * units.tiles + tile, coming = tile + under_way;
    const bool wraps = coming >= units.tiles, last = pass - own_team + layout.teams >= passes;
    if (tile == 0 && pass + layout.teams < passes) load_queries(pass + layout.teams);
    if (!wraps || !last) load_units(wraps ? coming - units.tiles : coming, (at + under_way) % layout.stages);
    commit_loads();
    return at % layout.stages;
  };
#pragma unroll 1
  for (; (resident ? pass : pass - own_team) < passes || pass == own_team; pass += layout.teams) {  // the first one in step
    const auto own = [&](int i) { return pass * rows + 16 * warp + g + 8 * i; };  // entries of the lane's two rows
    const bool busy = C::kGroups ? pass < passes : pass * rows + 16 * warp < work.entries;
    if (resident && pass > own_team) {
      wait_loads<0>();
      team.sync();
      if (pass + layout.teams < passes) load_queries(pass + layout.teams);
      commit_loads();
    }
    OwnRows<C> q;
    OnlineSoftmax<T> softmax;
    float out[DP / 8][4];
    clear(out);
    for (int tile = 0; tile < units.tiles; ++tile) {
      if (!resident) wait_products<C, 0>(out);  // the stage of the tile before is free after the barrier
      auto& at = stage[arrive(tile)];
      if (tile == 0) q.load(queries_of(pass).from_row(own_rows<C>(warp)), lane);
      if (!busy) continue;
      float s[kTiles][4];
      product<C>(s, q, at.k.in(window), lane);
      wait_products<C, 0>(s, out);
      const bool dense = units.is_shared(tile);
      const float scale = positive_scale(s, (dense ? p.landmark_scale : p.scale) * kLogit<T>);
      if (units.count(tile) < kUnits) mask_logits(s, units.count(tile), lane);
      if (dense && slots > 1)  // only the first slot of a query has the shared units
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (own(i) < work.entries && entries[own(i)] % slots != 0)
#pragma unroll
            for (int n = 0; n < kTiles; ++n) s[n][2 * i] = s[n][2 * i + 1] = -kInfinity;
      softmax.update(s, scale, out);
      Weights<T, kTiles> weights(s);
      add_weighted_rows<C>(out, weights, at.v.in(window), lane);
    }
    wait_products<C, 0>(out);
    if (!busy) continue;
    softmax.finish();

    const std::int64_t entry0 = std::int64_t(opaque(bh)) * x.queries.max_length * slots;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = softmax.sum[i] == 0.0f ? 0.0f : __frcp_rn(softmax.sum[i]);
      if (t == 0 && own(i) < work.entries) (x.s > 1 ? p.partial_lse : p.lse)[entry0 + entries[own(i)]] = log_sum<T>(softmax.maximum[i], softmax.sum[i]);
    }
    const auto entry = [list = window.of(*entries) + 4 * (pass * rows + 16 * warp), present = work.entries - pass * rows - 16 * warp](int i) {
      return i < present ? load_shared_int(list + 4 * i) : -1;
    };
    if (x.s > 1)
      store_partial_rows<DP>(out, factor, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : p.partial_out + (entry0 + entry(i)) * x.D; });
    else
      store_rows<T, DP>(queries_of(pass).from_row(16 * warp), out, factor, x.D, lane, head_rows<T>(p.out, opaque(b), opaque(h), span(x.queries, b).start), p.out.row, entry);
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
    if (p.groups.tile_rows < 16 || p.groups.tile_rows % 16 != 0 || p.groups.tile_rows > kMaxAttentionTile) return cudaErrorInvalidValue;
    const Memory<C> layout(p);
    const int threads = 128 * layout.teams;
    if (cudaError_t status = allow_shared_memory(attention_kernel<C>, layout.bytes)) return status;
    const unsigned blocks = static_cast<unsigned>(x.B) * x.H * max_tiles(x, p.groups.tile_rows);
    attention_kernel<C><<<blocks, C::kGroups ? threads : std::min(threads, 2 * p.groups.tile_rows), layout.bytes, stream>>>(p, layout);
    if (cudaError_t status = cudaGetLastError()) return status;
    if (x.s <= 1) return cudaSuccess;
    const std::int64_t rows = std::int64_t(x.B) * x.H * x.queries.max_length;
    merge_kernel<typename C::T><<<static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps), 32 * kMergeWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
