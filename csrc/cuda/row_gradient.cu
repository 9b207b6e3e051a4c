// Gradients of the rows of a softmax, the "queries", and the statistics of those rows. Two sums, one kernel (RowRole):
//   attention: rows = a tile of queries of one expert, taken in passes, units = [landmarks | its gathered keys]; whole rows are scattered
//   landmark:  rows = landmarks, units = all keys, cut into parts
//
// One warp owns 16 rows and keeps their sums in registers (two warps above 128 columns, half of the sums each); unit tiles pass by,
// two stages deep:
//   P = exp(scale * q k^T - lse)    dS = P * (dout v^T - delta)    dq += scale * dS k    kappa += scale * P k
// Where all units of a row pass by one block, it makes delta of the row's dout and out; else launch_delta does. Above 64 columns, small_gradient.cu has
// queries of small experts, and, for sm_90a, row_gradient_sm90.cu specialists for most others.
//
// Where keys are nearly the same, dq is what is left when dS cancels, and roundings do not cancel with it: that of the saved output
// in delta, that of a large lse, that of dS to 16 bits. But what the rows of P and of dS sum to is known: 1 and dlse. What dS, as
// rounded, sums to beyond that, the excess, has moved dq by excess * kappa. The sums before rounding correct delta and the
// weight of a row (one over its sum of P, for fp32) for the unit gradients, which run later. Rows whose units are cut between
// blocks, or whose slots are, leave partial sums, and finish_kernel does the same with their totals.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kRows = kRowGradientRows<sizeof(typename C::T), C::DP>, kWarps = kRows / 16 * C::kSharers;  // at most
  static constexpr int kUnits = C::kGroups ? 64 : C::DP > 128 ? kRows / 2 : kHalf || C::DP == 64 ? 32 : 16;        // of one tile
  static constexpr int kBlocks = !kHalf ? 1 : C::DP == 64 ? 3 : 2;                                                 // of a multiprocessor, by registers
  struct Shared {
    UnitStage<typename C::T, C::DP, kUnits> stage[2];
    std::int32_t entries[kMaxRowGradientTile];
    TileStorage<typename C::T, C::DP, 2 * kRows> rows;  // queries, then their dout; only those of the block are allocated, and behind them
    std::int32_t indices[kMaxTopk];                     // K of the expert's keys
  };
  static_assert(offsetof(Shared, indices) <= 100 * 1024);
  __host__ __device__ static constexpr int allocated_rows(int rows) { return C::DP == 128 && std::is_same_v<typename C::T, Tf32> ? kRows : rows; }  // or it spills
};

// Sums over the units of a lane's two rows: of dS as rounded, of dS, of P. The lane's share until `finish`.
struct RowSums {
  float rounded[2] = {0.0f, 0.0f}, exact[2] = {0.0f, 0.0f}, probability[2] = {0.0f, 0.0f};
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (float* sum : {&rounded[i], &exact[i], &probability[i]}) {
        *sum += __shfl_xor_sync(kAllLanes, *sum, 1);
        *sum += __shfl_xor_sync(kAllLanes, *sum, 2);
      }
  }
};

// What the logit gradients of a row sum to; a row without units has none.
__device__ inline float given(const RowGradientParams& p, std::int64_t at) { return p.dlse && p.lse[at] != -kInfinity ? p.dlse[at] : 0.0f; }

// What the sums of a row say about it: dq = normalizer * (its sum - excess * kappa).
struct Correction {
  float excess, delta, normalizer;  // delta: of the row's delta
  __device__ Correction(float rounded, float exact, float probability, float dlse)
      : normalizer(probability > 0.0f ? 1.0f / probability : 1.0f) {
    excess = rounded * normalizer - dlse;
    delta = exact * normalizer - dlse;
  }
  __device__ void write(const RowGradientParams& p, std::int64_t at, float before) const {
    p.delta[at] = before + delta;
    if (p.normalizer) p.normalizer[at] = normalizer;
  }
};

template <class C> __global__ void __launch_bounds__(32 * Layout<C>::kWarps, Layout<C>::kBlocks) row_gradient_kernel(const RowGradientParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kUnits = L::kUnits, kTiles = kUnits / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, rows = rows_of_block<C>(blockDim.x);
  const bool landmark = p.role == RowRole::landmark, makes_delta = row_gradient_makes_delta(p.role, x.s);
  const int N = x.queries.max_length;

  // What this block works on: `work.entries` rows of one head and the unit tiles [first_tile, last_tile).
  const int block_rows = landmark ? rows : p.groups.tile_rows, blocks = landmark ? ceil_div(x.M, rows) : max_tiles(x, block_rows), parts = landmark ? p.splits : 1;
  const int block = blockIdx.x % blocks, part = blockIdx.x / blocks % parts, bh = blockIdx.x / blocks / parts, b = bh / x.H, h = bh % x.H;
  // Landmarks come as they are, like queries without experts.
  const int experts = landmark ? 0 : x.s;
  const auto slots_of_query = [&] { return landmark ? 1 : max(x.s, 1); };
  const Work work = find_work(p.groups.tiles, x, experts, bh, landmark ? x.M : span(x.queries, b).length, block, block_rows);
  if (work.entries <= 0) return;
  for (int i = threadIdx.x; i < work.entries; i += blockDim.x) shared.entries[i] = entry_of(p.groups, x, experts, bh, work, i);
  const int length = span(x.keys, b).length;
  int gathered = landmark ? length : 0;
  std::int32_t* const indices = reinterpret_cast<std::int32_t*>(shared.rows.data + 2 * L::allocated_rows(rows) * DP);
  if (experts > 0) gathered = load_indices(indices, p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K, x.K, length);
  __shared__ UnitTiles<kUnits> units;  // there are no registers left for it
  if (threadIdx.x == 0) units = UnitTiles<kUnits>::of(!landmark && p.units.shared ? x.M : 0, gathered, window.of(*indices), !landmark);
  __syncthreads();
  const int tiles_per_part = ceil_div(units.tiles, parts), first_tile = part * tiles_per_part, last_tile = min(units.tiles, first_tile + tiles_per_part);
  int buffer = 0;  // the stage of the tile at hand
  if (first_tile < last_tile) units.load(shared.stage[buffer], window, p.units, x, b, h, first_tile);

  const auto is_last = [&](int pass) { return (pass + 1) * rows >= work.entries; };
#pragma unroll 1
  for (int pass = 0; pass * rows < work.entries; ++pass) {
    const auto own = [&](int i) { return pass * rows + row_of_warp<C>(warp) + g + 8 * i; };  // entries of the lane's two rows
    const int batch = opaque(b), head = opaque(h);
    const Tile<T, DP> q_rows = shared.rows.in(window), dout_rows = q_rows.from_row(L::allocated_rows(rows));
    const std::int64_t start = landmark ? 0 : span(x.queries, batch).start;
    load_rows<T, DP>(rows, x.D, work.entries - pass * rows,
                     [list = window.of(shared.entries) + 4 * pass * rows, slots = slots_of_query()](int i) { return query_of(load_shared_int(list + 4 * i), slots); },
                     Copy<T, DP>(q_rows, p.q, batch, head, start), Copy<T, DP>(dout_rows, p.dout, batch, head, start));
    commit_loads();
    StoredRows<C> q, dout;
    q.load(q_rows.from_row(own_rows<C>(warp)), lane);
    dout.load(dout_rows.from_row(own_rows<C>(warp)), lane);
    // Only the first slot of a query has the shared units.
    const auto first_slot = [&](int i) { return slots_of_query() == 1 || (own(i) < work.entries && shared.entries[own(i)] % slots_of_query() == 0); };
    float lse[2], delta[2] = {0.0f, 0.0f};
    const auto statistics = [&](int i) { return std::int64_t(opaque(bh)) * (landmark ? x.M : N) + query_of(shared.entries[own(i)], slots_of_query()); };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool present = own(i) < work.entries;
      lse[i] = present ? p.lse[statistics(i)] * kLogit<T> : kInfinity;
      if (lse[i] == -kInfinity) lse[i] = kInfinity;  // attended to nothing
      if (!makes_delta) delta[i] = present ? p.delta[statistics(i)] : 0.0f;
    }
    if (makes_delta) {
      constexpr int kOwn = Tile<T, DP>::kChunks / 4, kFew = std::min(kOwn, 4);  // chunks of one lane; those under way at once
#pragma unroll
      for (int few = 0; few < kOwn; few += kFew) {
        const auto chunk = [&](int j) { return 4 * (few + j) + t; };
        Vector<T> out[2][kFew];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const T* const row = head_rows<T>(p.out, batch, head, start) + (own(i) < work.entries ? query_of(shared.entries[own(i)], slots_of_query()) : 0) * p.out.row;
#pragma unroll
          for (int j = 0; j < kFew; ++j) out[i][j] = own(i) < work.entries && chunk(j) * kChunk<T> < x.D ? load_vector(row + chunk(j) * kChunk<T>) : Vector<T>{};
        }
        if (few == 0) {
          wait_loads<0>();
          __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < kFew; ++j) {
            const float4 bits = load_shared4(dout_rows.from_row(row_of_warp<C>(warp)).chunk(g + 8 * i, chunk(j)));
            const Vector<T>& dout = reinterpret_cast<const Vector<T>&>(bits);
#pragma unroll
            for (int e = 0; e < kChunk<T>; ++e) delta[i] = fmaf(to_float(dout.element[e]), to_float(out[i][j].element[e]), delta[i]);
          }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) delta[i] += __shfl_xor_sync(kAllLanes, delta[i], d);
        if (own(i) < work.entries && p.dlse) delta[i] -= p.dlse[statistics(i)];
      }
    }
    if (C::kGroups && !is_last(pass)) {  // the next pass finds its rows in the L2; by warps, 64 columns spill
      constexpr int kLine = 128 / sizeof(T);
      if (const int entry = (pass + 1) * rows + threadIdx.x / 2; entry < work.entries) {  // two threads each
        const int query = query_of(shared.entries[entry], slots_of_query());
        const auto prefetch = [&](const Rows& of) {
          const T* const row = head_rows<T>(of, batch, head, start) + query * of.row;
          for (int column = threadIdx.x % 2 * kLine; column < x.D; column += 2 * kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + column));
        };
        prefetch(p.q), prefetch(p.dout);
        if (makes_delta) prefetch(p.out);
      }
    }
    float dq[C::kColumns / 8][4], kappa[C::kColumns / 8][4];
    clear(dq);
    clear(kappa);
    RowSums sums;
    wait_loads<0>();
    if (first_tile >= last_tile) __syncthreads();
    for (int tile = first_tile; tile < last_tile; ++tile, buffer ^= 1) {
      if (tile + 1 < last_tile || !is_last(pass)) units.load(shared.stage[buffer ^ 1], window, p.units, x, opaque(b), opaque(h), tile + 1 < last_tile ? tile + 1 : first_tile);
      commit_loads();
      wait_loads<1>();
      __syncthreads();
      auto& stage = shared.stage[buffer];
      if (C::kGroups || pass * rows + row_of_warp<C>(warp) < work.entries) {
        const bool dense = units.is_shared(tile);
        const float scale = dense ? p.landmark_scale : p.scale;
        float s[kTiles][4], gradient[kTiles][4];
        product<C>(s, q, stage.k.in(window), lane);
        product<C>(gradient, dout, stage.v.in(window), lane);
        wait_products<C, 1>(s);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], scale * kLogit<T>, -lse[i / 2]);
        if (units.count(tile) < kUnits) mask_last_logits(s, units.count(tile), lane);
        if (dense && slots_of_query() > 1)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (!first_slot(i)) mask_row(s, i);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = exponential<T>(s[n][i]);
        wait_products<C, 0>(gradient);
        // Units of constant logits (scale 0) move nothing, but count in the sums.
        const float factor = (scale == 0.0f ? 1.0f : scale) * power_of_2(kGradientShift<T>), inverse = 1.0f / factor;
        float exact[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (!L::kHalf) sums.probability[i / 2] += s[n][i];
            s[n][i] *= factor;
            exact[i / 2] += gradient[n][i] = s[n][i] * (gradient[n][i] - delta[i / 2]);
          }
        Weights<T, kTiles> dlogits(gradient), weights(s);
#pragma unroll
        for (int i = 0; i < 2; ++i) sums.exact[i] += exact[i] * inverse, sums.rounded[i] += dlogits.sum(i) * inverse;
        if (scale != 0.0f) {
          add_weighted_rows<C>(dq, dlogits, stage.k.in(window), lane);
          add_weighted_rows<C>(kappa, weights, stage.k.in(window), lane);
        }
        wait_products<C, 0>(dq, kappa);
      }
      __syncthreads();
    }
    sums.finish();

    const auto entry = [&](int i) { return pass * rows + row_of_warp<C>(warp) + i < work.entries ? shared.entries[pass * rows + row_of_warp<C>(warp) + i] : -1; };
    float unshifted[2] = {power_of_2(-kGradientShift<T>), power_of_2(-kGradientShift<T>)};
    if (landmark || x.s > 1) {
      const std::int64_t row0 = landmark ? (std::int64_t(opaque(bh)) * parts + part) * x.M : std::int64_t(opaque(bh)) * N * slots_of_query();
      const auto row_in = [&](int which) { return [=](int i) { return entry(i) < 0 ? nullptr : p.partial + (2 * (row0 + entry(i)) + which) * x.D; }; };
      store_partial_rows<C>(dq, unshifted, x.D, lane, row_in(0));
      store_partial_rows<C>(kappa, unshifted, x.D, lane, row_in(1));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t == 0 && column_of_warp<C>() == 0 && own(i) < work.entries) {
          float* to = p.partial_sums + 3 * (row0 + shared.entries[own(i)]);
          to[0] = sums.rounded[i], to[1] = sums.exact[i], to[2] = sums.probability[i];
        }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool present = own(i) < work.entries;
        const Correction correct(sums.rounded[i], sums.exact[i], L::kHalf ? 1.0f : sums.probability[i], present ? given(p, statistics(i)) : 0.0f);
        if (t == 0 && column_of_warp<C>() == 0 && present) correct.write(p, statistics(i), delta[i]);
#pragma unroll
        for (int d = 0; d < C::kColumns / 8; ++d)
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; ++j) dq[d][j] -= correct.excess * kappa[d][j];
        unshifted[i] *= correct.normalizer;
      }
      store_rows<C>(q_rows.from_row(row_of_warp<C>(warp)), dq, unshifted, x.D, lane, head_rows<T>(p.dq, batch, head, span(x.queries, batch).start), p.dq.row, entry);
    }
    __syncthreads();  // the next queries take the place of these
  }
}

constexpr int kFinishWarps = 4;

// The rows of which blocks left partial sums: landmarks, or queries with several slots. Some lanes for each.
template <class T> __global__ void __launch_bounds__(32 * kFinishWarps, 10) finish_kernel(const RowGradientParams p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const Problem& x = p.problem;
  const bool landmark = p.role == RowRole::landmark;
  const int rows = landmark ? x.M : x.queries.max_length, lanes = lanes_of_sum(x.D), lane = threadIdx.x % lanes;
  const std::int64_t own = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes, at = min(own, std::int64_t(x.B) * x.H * rows - 1);
  const int row = static_cast<int>(at % rows), bh = static_cast<int>(at / rows);
  const Span sequence = landmark ? Span{0, x.M} : span(x.queries, bh / x.H);
  const bool present = own == at && row < sequence.length;
  int parts = landmark ? p.splits : x.s;
  std::int64_t first_part = std::int64_t(bh) * parts;  // of a head
  if (p.share > 0) {
    const int tiles = ceil_div(x.keys.max_length, kKeyBlock), first_block = bh * tiles / p.share;
    first_part = first_block + bh, parts = ((bh + 1) * tiles - 1) / p.share - first_block + 1;
  }
  const std::int64_t first_row = landmark ? first_part * rows + row : at * parts;
  const int step = landmark ? rows : 1;  // from part to part
  const float* const partial = p.partial + 2 * first_row * x.D;
  const float* const base = p.base + (std::int64_t(bh) * p.base_parts * rows + row) * x.D;

  const float before = p.delta[at];
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int part = lane; part < parts; part += lanes)
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] += p.partial_sums[3 * (first_row + std::int64_t(part) * step) + i];
#pragma unroll
  for (int i = 0; i < 3; ++i)
    for (int other = 1; other < lanes; other *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], other);
  const Correction correct(sums[0], sums[1], sizeof(T) == 2 ? 1.0f : sums[2], given(p, at));
  if (!present) return;
  if (lane == 0) correct.write(p, at, before);
  T* const dq = head_rows<T>(p.dq, bh / x.H, bh % x.H, sequence.start + row);
#pragma unroll 1
  for (int d = 4 * lane; d < x.D; d += 4 * lanes) {
    float4 of[2] = {}, more[1] = {};  // dq, and what it has too much where probabilities do not sum to one; what is to be added
    add_in_order<3>(of, partial + d, x.D, 2 * step * x.D, parts);
    add_in_order<6>(more, base + d, 0, step * x.D, p.base_parts);
    const auto corrected = [&](float base, float sum, float kappa) { return base + correct.normalizer * (sum - correct.excess * kappa); };
    *reinterpret_cast<Four<T>*>(dq + d) = rounded<T>({corrected(more[0].x, of[0].x, of[1].x), corrected(more[0].y, of[0].y, of[1].y), corrected(more[0].z, of[0].z, of[1].z),
                                                      corrected(more[0].w, of[0].w, of[1].w)});
  }
}

}  // namespace

// Specialists bring units again for every two passes, whatever the pieces of an expert: small ones end at about the same time. H100: pieces of 576 rows of
// experts of 512 took 4 % longer than those of 256 or 128; of experts of 4096, pieces of 256 took 2 % longer than those of 896.
int row_gradient_tile_rows(const Problem& x, int entries_per_expert) {
  if (fits_small_row_gradient(x)) return attention_tile_rows(x, entries_per_expert);  // the same, of small experts
  return fits_row_specialists(x, RowRole::attention)
             ? tile_rows(std::clamp(entries_per_expert / 4, 2 * kPassRows, kMaxAttentionTile), entries_per_expert, 2 * kPassRows)
             : tile_rows(kMaxRowGradientTile, entries_per_expert);
}

cudaError_t launch_row_gradient(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const bool landmark = p.role == RowRole::landmark;
  if (!landmark && fits_small_row_gradient(x)) return launch_small_row_gradient(p, stream);
  const int most_rows = landmark ? x.M : p.groups.tile_rows;  // of one pass
  if (most_rows > 48 && fits_row_specialists(x, p.role)) {
    const cudaError_t status = launch_row_specialists(p, stream);
    return landmark && status == cudaSuccess ? launch_row_finish(p, stream) : status;
  }
  return dispatch(x, most_rows > 48, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const int warps = std::min(L::kWarps, C::kGroups ? 4 : ceil_div(most_rows, 16) * C::kSharers);
    if (warps < 1 || p.groups.tile_rows > kMaxRowGradientTile) return cudaErrorInvalidValue;
    const std::size_t bytes =
        offsetof(typename L::Shared, rows) + 2 * L::allocated_rows(rows_of_block<C>(32 * warps)) * C::DP * sizeof(typename C::T) + (landmark ? 0 : x.K * sizeof(std::int32_t));
    const unsigned heads = static_cast<unsigned>(x.B) * x.H;
    const unsigned blocks = landmark ? heads * p.splits * ceil_div(x.M, rows_of_block<C>(32 * warps)) : heads * max_tiles(x, p.groups.tile_rows);
    if (cudaError_t status = launch(row_gradient_kernel<C>, blocks, 32 * warps, bytes, stream, p)) return status;
    return landmark || x.s > 1 ? launch_row_finish(p, stream) : cudaSuccess;
  });
}

cudaError_t launch_row_finish(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch_dtype(x.dtype, [&](auto element) {
    const std::int64_t rows = std::int64_t(x.B) * x.H * (p.role == RowRole::landmark ? x.M : x.queries.max_length), of_block = 32 * kFinishWarps / lanes_of_sum(x.D);
    return launch(p.share > 0, finish_kernel<decltype(element)>, static_cast<unsigned>((rows + of_block - 1) / of_block), 32 * kFinishWarps, 0, stream, p);
  });
}

}  // namespace mita
