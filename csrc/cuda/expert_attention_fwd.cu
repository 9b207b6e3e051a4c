// Gather, softmax and product in one kernel: every query attends to the M shared units (landmarks, compressed values) and to
// the K keys of its expert, in one online softmax.
//
// attention: one block per tile of queries of one expert (from the list of work). It takes 64 queries or fewer at a time, one warp
//   16 of them (two warps above 128 columns, half of the output each), while the next ones are on their way. Units come in tiles:
//   first the shared units, as dense rows, then the expert's keys and values, gathered by index. Where all of them fit in shared
//   memory they stay there; else they pass by for every pass. Queries are gathered and outputs scattered as whole rows. On sm_90a
//   the kernel of expert_attention_sm90.cu takes its place, up to 128 columns.
// small: experts with few queries. A block holds the shared units of its head in shared memory; each of its warps takes one tile of queries after the other,
//   and walks through it 16 at a time, with the expert's keys and values in a place of its own, which fills again while the warp ends its last 16; of more than
//   64 keys a part after the other, for every 16 queries. Queries go from memory straight into operands, outputs straight back.
// merge: with s > 1 experts per query every (query, slot) entry leaves a partial output and lse (slot 0 has the shared units);
//   one warp per query combines its s parts in slot order.
#include "device.cuh"
#include "launch.h"
#include "small.cuh"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr int kRows = kAttentionRows<sizeof(typename C::T), C::DP>, kThreads = 2 * kRows * C::kSharers;
  static constexpr int kUnits = C::DP <= 128 ? 32 : kRows / 4;                          // of one tile, by memory
  static constexpr int kBlocks = sizeof(typename C::T) == 4 ? 1 : C::DP == 64 ? 4 : 2;  // of a multiprocessor, by registers
  static constexpr int kMemory = 99 * 1024;                                             // of a block
  using Stage = UnitStage<typename C::T, C::DP, kUnits>;
  using Queries = TileStorage<typename C::T, C::DP, kRows>;
};

// Shared memory of a block: stages of units, queries (two sets where there is more than one pass), its entries, and the indices of its
// expert's keys.
template <class C> struct Memory {
  using L = Layout<C>;
  int stages;
  std::size_t queries, entries, indices, bytes;
  __host__ __device__ Memory(const AttentionParams& p) {
    const Problem& x = p.problem;
    const std::size_t sets = p.groups.tile_rows > L::kRows ? 2 : 1, rest = sets * sizeof(typename L::Queries) + (p.groups.tile_rows + x.K) * sizeof(std::int32_t);
    const int tiles = (p.units.shared ? ceil_div(x.M, L::kUnits) : 0) + (x.s > 0 ? ceil_div(x.K, L::kUnits) : 0);
    stages = max(2, min(tiles, static_cast<int>((L::kMemory - rest) / sizeof(typename L::Stage))));
    queries = stages * sizeof(typename L::Stage);
    entries = queries + sets * sizeof(typename L::Queries);
    indices = entries + p.groups.tile_rows * sizeof(std::int32_t);
    bytes = indices + x.K * sizeof(std::int32_t);
  }
};

template <class C>
__global__ void __launch_bounds__(Layout<C>::kThreads, Layout<C>::kBlocks) attention_kernel(const AttentionParams p, const Memory<C> layout) {
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int tiles = max_tiles(x, p.groups.tile_rows), bh = blockIdx.x / tiles, b = bh / x.H, h = bh % x.H;
  const Work work = find_work(p.groups.tiles, x, x.s, bh, span(x.queries, b).length, blockIdx.x % tiles, p.groups.tile_rows);
  if (work.entries <= 0) return;
  const int slots = max(x.s, 1), rows = rows_of_block<C>(blockDim.x), passes = ceil_div(work.entries, rows);
  const auto queries_of = [&](int pass) { return queries[pass & 1].in(window); };
  const auto load_queries = [&](int pass) {
    const int first = pass * rows, batch = opaque(b);
    load_rows<T, DP>(rows, x.D, work.entries - first, [list = window.of(*entries) + 4 * first, slots](int i) { return query_of(load_shared_int(list + 4 * i), slots); },
                     Copy<T, DP>(queries_of(pass), p.q, batch, opaque(h), span(x.queries, batch).start));
  };
  for (int i = threadIdx.x; i < work.entries; i += blockDim.x) entries[i] = entry_of(p.groups, x, x.s, bh, work, i);
  int gathered = 0;
  if (x.s > 0) gathered = load_indices(indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, span(x.keys, b).length);
  else __syncthreads();
  const auto units = UnitTiles<kUnits>::of(p.units.shared ? x.M : 0, gathered, window.of(*indices), true);
  const bool resident = units.tiles <= layout.stages;
  const auto load_units = [&](int tile, int to) { units.load(stage[to], window, p.units, x, opaque(b), opaque(h), tile); };
  load_queries(0);
  const int under_way = layout.stages - 1;  // tiles, where they pass by
  for (int tile = 0; tile < (resident ? units.tiles : under_way); ++tile) {
    load_units(tile, tile);
    if (resident && tile + 1 == units.tiles && 1 < passes) load_queries(1);
    commit_loads();
  }
  if (units.tiles == 0) {
    commit_loads();
    wait_loads<0>();
    __syncthreads();
  }

  int pass = 0;
  // Waits for a tile; returns its stage.
  const auto arrive = [&](int tile) {
    if (resident) {
      if (pass == 0) {
        wait_all_but(units.tiles - 1 - tile);
        __syncthreads();
      }
      return tile;
    }
    wait_all_but(under_way - 1);
    __syncthreads();
    // The stage of the tile before is free now. The next pass begins with the first tile again.
    const int at = pass * units.tiles + tile, coming = tile + under_way;
    const bool wraps = coming >= units.tiles, last = pass + 1 >= passes;
    if (tile == 0 && pass + 1 < passes) load_queries(pass + 1);
    if (!wraps || !last) load_units(wraps ? coming - units.tiles : coming, (at + under_way) % layout.stages);
    commit_loads();
    return at % layout.stages;
  };
#pragma unroll 1
  for (; pass < passes; ++pass) {
    const auto own = [&](int i) { return pass * rows + row_of_warp<C>(warp) + g + 8 * i; };  // entries of the lane's two rows
    const bool busy = pass * rows + row_of_warp<C>(warp) < work.entries;
    if (resident && pass > 0) {
      wait_loads<0>();
      __syncthreads();
      if (pass + 1 < passes) load_queries(pass + 1);
      commit_loads();
    }
    OwnRows<C> q;
    OnlineSoftmax<T> softmax;
    float out[C::kColumns / 8][4];
    clear(out);
    for (int tile = 0; tile < units.tiles; ++tile) {
      auto& at = stage[arrive(tile)];
      if (tile == 0) q.load(queries_of(pass).from_row(row_of_warp<C>(warp)), lane);
      if (!busy) continue;
      float s[kTiles][4];
      product<C>(s, q, at.k.in(window), lane);
      const bool dense = units.is_shared(tile);
      const float scale = positive_scale(s, (dense ? p.landmark_scale : p.scale) * kLogit<T>);
      if (units.count(tile) < kUnits) mask_logits(s, units.count(tile), lane);
      if (dense && slots > 1)  // only the first slot of a query has the shared units
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (own(i) < work.entries && entries[own(i)] % slots != 0) mask_row(s, i);
      softmax.update(s, scale, out);
      Weights<T, kTiles> weights(s);
      add_weighted_rows<C>(out, weights, at.v.in(window), lane);
    }
    if (!busy) continue;
    softmax.finish();

    const std::int64_t entry0 = std::int64_t(opaque(bh)) * x.queries.max_length * slots;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = softmax.factor(i);
      if (t == 0 && column_of_warp<C>() == 0 && own(i) < work.entries) (x.s > 1 ? p.partial_lse : p.lse)[entry0 + entries[own(i)]] = softmax.lse(i);
    }
    const auto entry = [list = window.of(*entries) + 4 * (pass * rows + row_of_warp<C>(warp)), present = work.entries - pass * rows - row_of_warp<C>(warp)](int i) {
      return i < present ? load_shared_int(list + 4 * i) : -1;
    };
    if (x.s > 1)
      store_partial_rows<C>(out, factor, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : p.partial_out + (entry0 + entry(i)) * x.D; });
    else
      store_rows<C>(queries_of(pass).from_row(row_of_warp<C>(warp)), out, factor, x.D, lane, head_rows<T>(p.out, opaque(b), opaque(h), span(x.queries, b).start), p.out.row, entry);
  }
}

// ---- small experts -------------------------------------------------------------------------------------------------

// See small.cuh. MANY: are there more shared units, or keys of an expert, than one tile has?
template <int W, int KT, bool MANY> constexpr int kSmallWarps = W > 64 && MANY ? 8 : W == 64 && KT == 4 && !MANY ? 16 : 12;  // of a multiprocessor, by registers

struct Head : SmallHead {
  const unsigned char* q;
  unsigned char* out;
  float* lse;
  float* partial_out;
};

template <class T, int W, int KT, bool MANY>
__global__ void __launch_bounds__(32 * kSmallWarps<W, KT, MANY>, 1) small_kernel(const AttentionParams p, const int parts, const int shared_tiles) {
  using Place = SmallRows<W>;
  constexpr int kTiles = MANY ? 1 : 2, kEight = Place::kEight;  // kTiles: of a step
  constexpr bool kSeveral = MANY && 8 * KT == kSmallExpertKeys;  // may an expert's keys be several tiles?
  extern __shared__ __align__(kPanel) unsigned char memory[];
  __shared__ Head head;
  __shared__ unsigned taken;
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, warps = blockDim.x / 32;
  // Tiles of an expert's units, of which the warp's place has one at a time; each is so many steps behind the one before.
  const int slots = x.s, own_tiles = kSeveral ? ceil_div(x.K, 8 * KT) : 1, stride = (own_tiles + shared_tiles) / own_tiles;
  constexpr int kPlace = kSmallPlace<W, KT>;
  const std::uint32_t shared_units = window.address, units = shared_units + kPlace * (shared_tiles + warp);
  const RowCopy<W> copy_row(x.D, lane);
  const SmallTiles<W, KT> its(head, reinterpret_cast<Coming<>*>(memory + kPlace * (shared_tiles + warps))[warp], taken, window, units, copy_row, lane);
  wait_for_kernel_before();
  {
    const int bh = blockIdx.x / parts, b = bh / x.H, h = bh % x.H;
    load_shared_units<T, W, KT>(shared_units, copy_row, x, p.units, bh, shared_tiles);
    if (threadIdx.x == 0) {
      const std::int64_t entry0 = std::int64_t(bh) * x.queries.max_length * slots, start = span(x.queries, b).start;
      const auto bytes_of = [&](const Rows& rows) { return reinterpret_cast<unsigned char*>(head_rows<T>(rows, b, h, start)); };
      taken = 0;
      head = {SmallHead::of<T>(x, p.units, p.groups.tiles, p.groups.tile_rows, p.groups.entries, bh, blockIdx.x % parts),
              bytes_of(p.q), bytes_of(p.out), (x.s > 1 ? p.partial_lse : p.lse) + entry0, p.partial_out + entry0 * x.D};
    }
  }
  __syncthreads();

  Fragment<W> q[2];
  const auto load_queries = [&](int first, int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_fragment<W>(q[i], head.q, query_of(its.entry(first + g + 8 * i, count), slots), small_pitch(p.q), x.D, t);
  };
  its.take(parts);
  commit_loads();
  its.arrived();
  int size = its.look(x.K), gathered = 0, expert = its.coming.work.expert;
  __syncthreads();
  if (size <= 0) return;
  its.arrived();
  its.take(parts);
  if (gathered = its.order_keys(x.K); gathered > 0) its.bring(0, head.k, p.units.k);
  commit_loads();
  if (gathered > 0) its.bring(kEight * KT, head.v, p.units.v);
  commit_loads();
  load_queries(0, size);

#pragma unroll 1
  while (size > 0) {
    if (!kSeveral) {
      wait_own_loads<1>();  // all but the values
      __syncwarp();
    }
    int next_size = 0, next_gathered = 0;
#pragma unroll 1
    for (int first = 0; first < size; first += kSmallPassRows) {
      const bool last = first + kSmallPassRows >= size;
      const int own[2] = {its.entry(first + g, size), its.entry(first + g + 8, size)};
      if (!kSeveral && last) {
        __syncwarp();  // all have read what is now replaced
        next_size = its.look(x.K);
      }
      OnlineSoftmax<T> softmax;
      float out[W / 8][4];
      if (MANY) clear(out);
      constexpr float kZero[4] = {};
      // The expert's units and the shared ones are a tile each, both in one step; or there are several tiles, one in each step, the first of the expert's.
      int own_tile = 0;  // the expert's, this or the next one
#pragma unroll 1
      for (int step = 0; step == 0 || (MANY && step < own_tiles + shared_tiles); ++step) {
        const bool begins = kSeveral ? own_tile < own_tiles && step == own_tile * stride : step == 0, ends = !MANY || step + 1 == own_tiles + shared_tiles;
        const auto is_own = [&](int i) { return begins && i == 0; };
        const bool ends_round = own_tile + 1 == own_tiles, leaves = last && ends_round, moves = leaves || own_tiles > 1;  // does the place get another expert's, or other units?
        const int next_key = ends_round ? 0 : 8 * KT * (own_tile + 1);
        if (kSeveral && begins) {
          wait_own_loads<1>();  // all but the values
          __syncwarp();
          if (leaves) next_size = its.look(x.K), expert = its.coming.work.expert;
          else if (moves) its.ask_for_keys(expert, x.K, next_key);
        }
        int count[kTiles];
        std::uint32_t from[kTiles];
        float s[kTiles][KT][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int tile = kSeveral ? step - own_tile : kTiles * step + i - 1;  // of the shared ones
          count[i] = is_own(i) ? gathered : tile < shared_tiles ? x.M - 8 * KT * tile : 0;
          from[i] = is_own(i) ? units : shared_units + kPlace * tile;
          if (count[i] <= 0) {
            clear_here(s[i]);
            continue;
          }
          product_with_rows<T, W, KT>(s[i], q, from[i]);
        }
        float scale[kTiles], highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          scale[i] = positive_scale(s[i], (is_own(i) ? p.scale : p.landmark_scale) * kLogit<T>);
          mask_last_logits(s[i], count[i], lane);
        }
        if (slots > 1)  // only the first slot of a query has the shared units
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (!is_own(i) && own[h] % slots != 0) mask_row(s[i], h);
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) highest[h] = fmaxf(highest[h], highest_of(s[i], h) * scale[i]);
        const auto raised = softmax.raise(highest);
        if (MANY) softmax.rescale(raised, out);
        Weights<T, KT> weights[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          softmax.add(raised, s[i], scale[i]);
          weights[i] = Weights<T, KT>(s[i]);
        }
        if (begins) {
          its.arrived();
          if (moves) {
            if (leaves) its.take(parts);
            if (!leaves || next_size > 0) {
              if (next_gathered = its.order_keys(x.K - next_key); next_gathered > 0) its.bring(0, head.k, p.units.k);
            }
            commit_loads();
          }
        }
        if (ends && !(last && next_size <= 0)) load_queries(last ? 0 : first + kSmallPassRows, last ? next_size : size);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (count[i] > 0) {
            const std::uint32_t rows = from[i] + kEight * KT, pairs = rows + Place::place_of(lane % 8, lane / 16) + lane / 8 % 2 * kEight;
            const std::uint32_t last_rows = rows + Place::place_of(lane % 8, lane / 8) + kEight * (KT - 1);
            const auto& w = weights[i].packed;
#pragma unroll
            for (int n = 0; n + 1 < KT; n += 2)
#pragma unroll
              for (int d = 0; d < W / 8; d += 2) {
                std::uint32_t v[4];
                ldmatrix_transposed(v, Place::behind(pairs, d) + kEight * n);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  float(&sum)[4] = out[d + j];
                  const auto add = [&](const float(&to)[4]) { mma<T>(sum, {w[n][0], w[n][1], w[n + 1][0], w[n + 1][1]}, v[2 * j], v[2 * j + 1], to); };
                  if (!MANY && i + n == 0) add(kZero);
                  else add(sum);
                }
              }
            if constexpr (KT % 2 != 0)
#pragma unroll
              for (int d = 0; d < W / 8; d += 4) {
                std::uint32_t v[4];
                ldmatrix_transposed(v, Place::behind(last_rows, d));
#pragma unroll
                for (int j = 0; j < 4; ++j) mma<T>(out[d + j], w[KT - 1][0], w[KT - 1][1], v[j]);
              }
          } else if (!MANY && i == 0) {
            clear_here(out);
          }
          if (is_own(i) && moves) {
            __syncwarp();
            if (next_gathered > 0) its.bring(kEight * KT, head.v, p.units.v);
            commit_loads();
            if (kSeveral) gathered = next_gathered;
          }
        }
        if (kSeveral && begins) ++own_tile;
      }
      softmax.finish();

      const float factor[2] = {softmax.factor(0), softmax.factor(1)};
      const auto present = [&](int i) { return first + g + 8 * i < size; };
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t == 0 && present(i)) head.lse[own[i]] = softmax.lse(i);
      if (x.s > 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float* const to = head.partial_out + std::int64_t(own[i]) * x.D + 2 * t;
#pragma unroll
          for (int d = 0; d < W / 8; ++d)
            if (present(i) && 8 * d < x.D) *reinterpret_cast<float2*>(to + 8 * d) = make_float2(out[d][2 * i] * factor[i], out[d][2 * i + 1] * factor[i]);
        }
      } else {
        store_small_rows<T, W>(out, factor, x.D, lane, [&](int i) { return present(i) ? head.out + own[i] * (p.out.row * 2) : nullptr; });
      }
    }
    size = next_size;
    if (!kSeveral) gathered = next_gathered;
  }
}

template <class T, int W, int KT, bool MANY> cudaError_t launch_small(const AttentionParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const int shared_tiles = small_shared_tiles<KT>(x, p.units);
  return launch_by_warps(p.early, small_kernel<T, W, KT, MANY>, small_tiles(x, p.groups.tile_rows), kSmallWarps<W, KT, MANY>, kSmallPlace<W, KT> * shared_tiles, kSmallBytes<W, KT>, stream, p,
                         shared_tiles);
}

constexpr int kMergeWarps = 4;

template <class C> __global__ void __launch_bounds__(32 * kMergeWarps) merge_kernel(const AttentionParams p) {
  using T = typename C::T;
  const Problem& x = p.problem;
  const std::int64_t row = std::int64_t(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  const int N = x.queries.max_length, lane = threadIdx.x % 32;
  if (row >= std::int64_t(x.B) * x.H * N) return;
  const int n = static_cast<int>(row % N), bh = static_cast<int>(row / N);
  const Span queries = span(x.queries, bh / x.H);
  if (n >= queries.length) return;
  T* out = head_rows<T>(p.out, bh / x.H, bh % x.H, queries.start + n);
  const float* lse = p.partial_lse + row * x.s;
  float maximum = -kInfinity, sum = 0.0f, value[C::DP / 32] = {};
  for (int i = 0; i < x.s; ++i) maximum = fmaxf(maximum, lse[i]);
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  for (int i = 0; i < x.s; ++i) {
    const float weight = expf(lse[i] - base);
    sum += weight;
#pragma unroll
    for (int j = 0; j < C::DP / 32; ++j)
      if (lane + 32 * j < x.D) value[j] += weight * p.partial_out[(row * x.s + i) * x.D + lane + 32 * j];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int j = 0; j < C::DP / 32; ++j)
    if (lane + 32 * j < x.D) out[lane + 32 * j] = from_float<T>(value[j] * factor);
  if (lane == 0) p.lse[row] = log_sum<float>(maximum, sum);
}

}  // namespace

cudaError_t launch_expert_attention(const AttentionParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (p.groups.tile_rows < 16 || p.groups.tile_rows % 16 != 0 || p.groups.tile_rows > kMaxAttentionTile) return cudaErrorInvalidValue;
  const auto small = [&](auto element, auto columns) {
    using T = decltype(element);
    constexpr int W = decltype(columns)::value;
    if (x.K <= 32) return small_shared_tiles<4>(x, p.units) > 1 ? launch_small<T, W, 4, true>(p, stream) : launch_small<T, W, 4, false>(p, stream);
    if (x.K <= 40 && small_shared_tiles<5>(x, p.units) <= 1) return launch_small<T, W, 5, false>(p, stream);
    if (x.K <= 56 && small_shared_tiles<7>(x, p.units) <= 1) return launch_small<T, W, 7, false>(p, stream);
    return small_shared_tiles<8>(x, p.units) > 1 || x.K > kSmallExpertKeys ? launch_small<T, W, 8, true>(p, stream) : launch_small<T, W, 8, false>(p, stream);
  };
  const auto blocks = [&](auto config) {
    using C = decltype(config);
    const Memory<C> layout(p);
    const int threads = std::min(Layout<C>::kThreads, 2 * p.groups.tile_rows * C::kSharers);
    return launch(attention_kernel<C>, static_cast<unsigned>(x.B) * x.H * max_tiles(x, p.groups.tile_rows), threads, layout.bytes, stream, p, layout);
  };
  const cudaError_t status = small_experts(x)               ? by_columns<64>(x, small)
                             : has_warpgroups(x.dtype, x.D) ? launch_specialist_attention(p, stream)
                                                            : dispatch(x, blocks);
  if (status != cudaSuccess || x.s <= 1) return status;
  return dispatch(x.dtype, x.D, [&](auto config) {
    const std::int64_t rows = std::int64_t(x.B) * x.H * x.queries.max_length;
    return launch(merge_kernel<decltype(config)>, static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps), 32 * kMergeWarps, 0, stream, p);
  });
}

}  // namespace mita
