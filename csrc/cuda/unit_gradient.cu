// Gradients of the units of a softmax, the "keys" and "values" that rows attended to. Three sums, one kernel (UnitRole):
//   shared:   units = landmarks and compressed values, rows = all queries, cut into parts
//   routed:   units = the gathered keys and values of an expert, rows = one segment of its queries
//   compress: units = keys and values, rows = the landmarks; the epilogue adds what the routed sums left for each key
//
// One warp owns 16 units and keeps their dk and dv in registers (two warps above 128 columns, half of them each); row tiles (q, dout,
// lse, delta) pass by, two stages deep:
//   P^T = exp(scale * k q^T - lse)      dv += P^T dout
//   dS^T = P^T * (v dout^T - delta)     dk += dS^T q
// (For sm_90a, unit_gradient_sm90.cu has specialists for the first two, of more than 64 units above 64 columns.)
// Every sum has one owner and a fixed order: no atomics. Partial sums are fp32, routed ones of 16-bit elements in 16 bits with a factor for each row.
#include "device.cuh"
#include "launch.h"

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

// What the routed sums left for the keys of one block, added in shared memory to their gradients in the order of its list.
template <class C> struct RoutedSums {
  using T = Routed<typename C::T>;
  static constexpr int kUnits = Layout<C>::kUnits;
  float dk[kUnits][C::DP + 8], dv[kUnits][C::DP + 8];  // free of bank conflicts for rows and for accumulators

  // The gradients of this warp's units, from accumulators or into them.
  template <class F> __device__ void each_pair(F&& f) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 0; d < C::kColumns / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int unit = row_of_warp<C>(warp) + lane / 4 + 4 * i, column = column_of_warp<C>() + 8 * d + 2 * (lane & 3);
        f(d, i, *reinterpret_cast<float2*>(&dk[unit][column]), *reinterpret_cast<float2*>(&dv[unit][column]));
      }
  }

  // The sums of one query head. A warp adds those of its own units.
  __device__ void add(const UnitGradientParams& p, int bh, int key0) {
    const Problem& x = p.problem;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, unit0 = key0 % kKeyBlock;
    const KeyRange range = p.groups.key_ranges[std::int64_t(bh) * ceil_div(x.keys.max_length, kKeyBlock) + key0 / kKeyBlock];
    const std::int64_t row0 = std::int64_t(bh) * max_tiles(x, p.groups.segment_rows) * x.K;
    __syncthreads();
    for (int i = range.first + lane; i - lane < range.last; i += 32) {
      KeyEntry mine = i < range.last ? p.groups.key_entries[row0 + i] : KeyEntry{0, -1};
      mine.key -= unit0;
      const bool own = i < range.last && mine.key >> 4 == warp / C::kSharers;
      float factors[2] = {1.0f, 1.0f};
      if constexpr (sizeof(T) == 2)
        if (own) {
          const std::int64_t at = (row0 + mine.row) * ceil_div(x.D, kFactorColumns) + column_of_warp<C>() / kFactorColumns;
          factors[0] = p.routed_dk.factors[at], factors[1] = p.routed_dv.factors[at];
        }
      unsigned left = __ballot_sync(kAllLanes, own);
      while (left) left = add_few(p, row0, mine, factors, left, lane);
    }
    __syncthreads();
  }

  // The first few entries of a warp's `left` lanes: all their rows are on their way before the first one is added.
  __device__ unsigned add_few(const UnitGradientParams& p, std::int64_t row0, const KeyEntry& mine, const float (&factors)[2], unsigned left, int lane) {
    constexpr int kColumns = C::kColumns / 32, kBytes = kColumns * sizeof(T), kFew = 64 / kBytes;
    using Columns = std::conditional_t<kBytes == 4, float, std::conditional_t<kBytes == 8, float2, float4>>;  // of one lane
    const int column = column_of_warp<C>() + kColumns * lane, D = p.problem.D;
    const auto add = [](float* sum, const Columns& more, float factor) {
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < kColumns; i += 2) {
          const float2 two = unpack<T>(reinterpret_cast<const std::uint32_t*>(&more)[i / 2]);
          sum[i] = fmaf(two.x, factor, sum[i]), sum[i + 1] = fmaf(two.y, factor, sum[i + 1]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[i] += reinterpret_cast<const float*>(&more)[i];
      }
    };
    const auto load = [&](const void* sums, int row) { return *reinterpret_cast<const Columns*>(static_cast<const T*>(sums) + (row0 + row) * D + column); };
    int unit[kFew];
    Columns k[kFew], v[kFew];
    float of_k[kFew], of_v[kFew];
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      const int from = __ffs(left) - 1, row = __shfl_sync(kAllLanes, mine.row, max(from, 0));
      unit[i] = from < 0 ? -1 : __shfl_sync(kAllLanes, mine.key, from);
      if constexpr (sizeof(T) == 2) of_k[i] = __shfl_sync(kAllLanes, factors[0], max(from, 0)), of_v[i] = __shfl_sync(kAllLanes, factors[1], max(from, 0));
      if (from >= 0 && column < D) k[i] = load(p.routed_dk.numbers, row), v[i] = load(p.routed_dv.numbers, row);
      left &= left - 1;
    }
    if (column < D)
#pragma unroll
      for (int i = 0; i < kFew; ++i)
        if (unit[i] >= 0) add(&dk[unit[i]][column], k[i], of_k[i]), add(&dv[unit[i]][column], v[i], of_v[i]);
    return left;
  }
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
  // Rows of elements E, through the block's own units.
  const auto out = [&](auto* base, std::int64_t pitch, const auto& tile, const auto& sums, const float (&factor)[2], int stored) {
    using E = std::remove_pointer_t<decltype(base)>;
    store_rows<C>(Tile<E, DP>{tile.in(window).from_row(row_of_warp<C>(warp)).address}, sums, factor, x.D, lane, base, pitch, [=](int i) { return own + i < stored ? own + i : -1; });
  };
  if (routed) {
    const auto out_routed = [&](const RoutedRows& to, const auto& tile, const auto& sums) {
      using E = Routed<T>;
      E* const numbers = static_cast<E*>(to.numbers) + row0 * x.D;
      if constexpr (L::kHalf) {
        const FixedRows fixed(sums);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (const int row = own + g + 8 * i; lane % 4 == 0 && row < units)
            to.factors[(row0 + row) * ceil_div(x.D, kFactorColumns) + column_of_warp<C>() / kFactorColumns] = fixed.back[i];
        out(numbers, x.D, tile, sums, fixed.to, units);
      } else {
        out(numbers, x.D, tile, sums, one, units);
      }
    };
    out_routed(p.routed_dk, shared.k, dk), out_routed(p.routed_dv, shared.v, dv);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row_of_warp<C>(warp) + g + 8 * i >= present)  // keys beyond a short sequence
#pragma unroll
      for (int d = 0; d < C::kColumns / 8; ++d) dk[d][2 * i] = dk[d][2 * i + 1] = dv[d][2 * i] = dv[d][2 * i + 1] = 0.0f;
  if (p.groups.key_ranges != nullptr) {
    RoutedSums<C>& sums = *reinterpret_cast<RoutedSums<C>*>(memory);  // all tiles are free by now
    __syncthreads();
    sums.each_pair([&](int d, int i, float2& k, float2& v) { k = make_float2(dk[d][i], dk[d][i + 1]), v = make_float2(dv[d][i], dv[d][i + 1]); });
    for (int i = 0; i < group; ++i) sums.add(p, b * x.H + h * group + i, u0);
    sums.each_pair([&](int d, int i, float2& k, float2& v) { dk[d][i] = k.x, dk[d][i + 1] = k.y, dv[d][i] = v.x, dv[d][i + 1] = v.y; });
  }
  __syncthreads();
  const Span stored_keys = span(x.keys, opaque(b));
  const int stored = x.keys.starts ? stored_keys.length : units;
  out(head_rows<T>(p.dk, b, h, stored_keys.start), p.dk.row, shared.k, dk, one, stored), out(head_rows<T>(p.dv, b, h, stored_keys.start), p.dv.row, shared.v, dv, one, stored);
}

}  // namespace

cudaError_t launch_unit_gradient(const UnitGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (fits_unit_specialists(p)) return launch_unit_specialists(p, stream);
  const bool compress = p.role == UnitRole::compress;
  const int units = units_of(p);
  return dispatch(x, units > 48, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const int warps = C::kGroups ? 4 : std::min(L::kWarps, ceil_div(units, 16) * C::kSharers);
    const bool collects = compress && p.groups.key_ranges != nullptr;
    const std::size_t tiles = offsetof(typename L::Shared, v) + rows_of_block<C>(32 * warps) * C::DP * sizeof(typename C::T);
    const std::size_t bytes = collects ? std::max(tiles, sizeof(RoutedSums<C>)) : tiles;
    if (cudaError_t status = allow_shared_memory(unit_gradient_kernel<C>, bytes)) return status;
    const unsigned blocks = static_cast<unsigned>(x.B) * (compress ? x.Hkv : x.H) * parts_of(p) * ceil_div(units, rows_of_block<C>(32 * warps));
    unit_gradient_kernel<C><<<blocks, 32 * warps, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
