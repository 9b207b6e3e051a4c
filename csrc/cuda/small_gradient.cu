// Gradients of 16-bit elements by warps that work on their own:
//   rows:  of queries (see row_gradient.cu) of one small expert each, and of shared units no more than a tile has, above 64 columns;
//   units: of the keys and values of a small expert (see unit_gradient.cu), 16 of them, by a segment of its queries;
//   keys:  of all keys and values, 16 at a time, by few landmarks, and what queries left for them as keys of their experts, above 64 columns.
// A warp that sums rows has all units of a query at hand at once, so delta is exact, and needs no `out`. Where keys are nearly the same, dq is what is left when dS cancels,
// and its rounding does not cancel with it: dS has 32 bits in dq, a rounded part and the rounded rest.
#include "launch.h"
#include "routed.cuh"
#include "small.cuh"

namespace mita {
namespace {

// ---- rows ----------------------------------------------------------------------------------------------------------

template <int W, int KT> constexpr int kRowWarps = KT == 4 && W <= 96 ? 12 : 8;  // of a multiprocessor, by registers
template <int W> constexpr int kUnitWarps = W <= 96 ? 12 : 8;

struct RowHead : SmallHead {
  const unsigned char *q, *dout;
  unsigned char* dq;
  const float *lse, *dlse;
  float* delta;
};

template <class T, int W, int KT>
__global__ void __launch_bounds__(32 * kRowWarps<W, KT>, 1) small_row_gradient_kernel(const RowGradientParams p, const int parts, const int shared_tiles) {
  using Place = SmallRows<W>;
  constexpr int kEight = Place::kEight, kTiles = 2;  // of the expert, and the shared one
  extern __shared__ __align__(kPanel) unsigned char memory[];
  __shared__ RowHead head;
  __shared__ unsigned taken;
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, warps = blockDim.x / 32;
  constexpr int kPlace = kSmallPlace<W, KT>;
  const std::uint32_t units[kTiles] = {window.address + kPlace * (shared_tiles + warp), window.address};
  const RowCopy<W> copy_row(x.D, lane);
  const SmallTiles<W, KT> its(head, reinterpret_cast<Coming<>*>(memory + kPlace * (shared_tiles + warps))[warp], taken, window, units[0], copy_row, lane);
  {
    const int bh = blockIdx.x / parts, b = bh / x.H, h = bh % x.H;
    load_shared_units<T, W, KT>(units[1], copy_row, x, p.units, bh, shared_tiles);
    if (threadIdx.x == 0) {
      const std::int64_t row0 = std::int64_t(bh) * x.queries.max_length, start = span(x.queries, b).start;
      const auto bytes_of = [&](const Rows& rows) { return reinterpret_cast<unsigned char*>(head_rows<T>(rows, b, h, start)); };
      taken = 0;
      head = {SmallHead::of<T>(x, p.units, p.groups.tiles, p.groups.tile_rows, p.groups.entries, bh, blockIdx.x % parts),
              bytes_of(p.q), bytes_of(p.dout), bytes_of(p.dq), p.lse + row0, p.dlse ? p.dlse + row0 : nullptr, p.delta + row0};
    }
  }
  __syncthreads();

  Fragment<W> q[2], dout[2];
  float lse[2], dlse[2];
  const auto load_queries = [&](int first, int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = its.entry(first + g + 8 * i, count);
      load_fragment<W>(q[i], head.q, query, small_pitch(p.q), x.D, t);
      load_fragment<W>(dout[i], head.dout, query, small_pitch(p.dout), x.D, t);
      lse[i] = head.lse[query], dlse[i] = head.dlse ? head.dlse[query] : 0.0f;
    }
  };
  const auto bring_values = [&](int count) {
    if (count > 0) its.bring(kEight * KT, head.v, p.units.v);
    commit_loads();
  };
  const auto bring_keys = [&](int count) {
    if (count > 0) its.bring(0, head.k, p.units.k);
    commit_loads();
  };
  its.take(parts);
  commit_loads();
  its.arrived();
  int size = its.look(x.K), gathered = 0;
  __syncthreads();
  if (size <= 0) return;
  its.arrived();
  its.take(parts);
  gathered = its.order_keys(x.K);
  bring_values(gathered), bring_keys(gathered);
  load_queries(0, size);

#pragma unroll 1
  while (size > 0) {
    wait_own_loads<1>();  // all but the keys
    __syncwarp();
    int next_size = 0, next_gathered = 0;
#pragma unroll 1
    for (int first = 0; first < size; first += kSmallPassRows) {
      const bool last = first + kSmallPassRows >= size;
      const int own[2] = {its.entry(first + g, size), its.entry(first + g + 8, size)};
      if (last) {
        __syncwarp();  // all have read what is now replaced
        next_size = its.look(x.K);
      }
      const int count[kTiles] = {gathered, shared_tiles > 0 ? x.M : 0};
      const auto product = [&](float (&sum)[kTiles][KT][4], const Fragment<W>(&rows)[2], int tensor) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          if (count[i] > 0) product_with_rows<T, W, KT>(sum[i], rows, units[i] + tensor);
          else clear_here(sum[i]);
      };
      float s[kTiles][KT][4], gradient[kTiles][KT][4];
      product(gradient, dout, kEight * KT);
      its.arrived();
      if (last) {
        its.take(parts);
        if (next_size > 0) next_gathered = its.order_keys(x.K);
        bring_values(next_gathered);
      }
      product(s, q, 0);
      float total[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f}, offset[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) offset[h] = lse[h] == -kInfinity ? kInfinity : lse[h] * kLogit<T>;  // a row that attended to nothing
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float scale = (i == 0 ? p.scale : p.landmark_scale) * kLogit<T>;
#pragma unroll
        for (int n = 0; n < KT; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) s[i][n][j] = fmaf(s[i][n][j], scale, -offset[j / 2]);
        mask_last_logits(s[i], count[i], lane);
#pragma unroll
        for (int n = 0; n < KT; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[i][n][j] = exponential<T>(s[i][n][j]);
            total[j / 2] += s[i][n][j], delta[j / 2] = fmaf(s[i][n][j], gradient[i][n][j], delta[j / 2]);
          }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) delta[h] += __shfl_xor_sync(kAllLanes, delta[h], d), total[h] += __shfl_xor_sync(kAllLanes, total[h], d);
        delta[h] = exact_delta<T>(delta[h] - dlse[h], total[h]);
      }
      std::uint32_t rounded[kTiles][KT][2], rest[kTiles][KT][2];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float factor = (i == 0 ? p.scale : p.landmark_scale) * power_of_2(kGradientShift<T>);
#pragma unroll
        for (int n = 0; n < KT; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto dlogit = [&](int j) { return s[i][n][2 * h + j] * factor * (gradient[i][n][2 * h + j] - delta[h]); };
            const float lo = dlogit(0), hi = dlogit(1);
            rounded[i][n][h] = pack<T>(lo, hi);
            rest[i][n][h] = pack<T>(lo - unpack<T>(rounded[i][n][h]).x, hi - unpack<T>(rounded[i][n][h]).y);
          }
      }
      if (!(last && next_size <= 0)) load_queries(last ? 0 : first + kSmallPassRows, last ? next_size : size);
      float dq[W / 8][4];
      clear(dq);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (count[i] > 0) {
          const std::uint32_t pairs = units[i] + Place::place_of(lane % 8, lane / 16) + lane / 8 % 2 * kEight;
          const std::uint32_t last_rows = units[i] + Place::place_of(lane % 8, lane / 8) + kEight * (KT - 1);
#pragma unroll
          for (int n = 0; n + 1 < KT; n += 2)
#pragma unroll
            for (int d = 0; d < W / 8; d += 2) {
              std::uint32_t k[4];
              ldmatrix_transposed(k, Place::behind(pairs, d) + kEight * n);
              const auto add = [&](const std::uint32_t (&w)[KT][2]) {
#pragma unroll
                for (int j = 0; j < 2; ++j) mma<T>(dq[d + j], {w[n][0], w[n][1], w[n + 1][0], w[n + 1][1]}, k[2 * j], k[2 * j + 1]);
              };
              add(rounded[i]), add(rest[i]);
            }
          if constexpr (KT % 2 != 0)
#pragma unroll
            for (int d = 0; d < W / 8; d += 4) {
              std::uint32_t k[4];
              ldmatrix_transposed(k, Place::behind(last_rows, d));
#pragma unroll
              for (int j = 0; j < 4; ++j)
                for (const auto& w : {rounded[i][KT - 1], rest[i][KT - 1]}) mma<T>(dq[d + j], w[0], w[1], k[j]);
            }
        }
      }
      if (last) {
        __syncwarp();
        bring_keys(next_gathered);
      }
      constexpr float kUnshifted[2] = {power_of_2(-kGradientShift<T>), power_of_2(-kGradientShift<T>)};
      const auto present = [&](int i) { return first + g + 8 * i < size; };
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t == 0 && present(i)) head.delta[own[i]] = delta[i];
      store_small_rows<T, W>(dq, kUnshifted, x.D, lane, [&](int i) { return present(i) ? head.dq + own[i] * (p.dq.row * 2) : nullptr; });
    }
    size = next_size, gathered = next_gathered;
  }
}

template <class T, int W, int KT> cudaError_t launch_rows(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const int shared_tiles = small_shared_tiles<KT>(x, p.units);
  return launch_by_warps(false, small_row_gradient_kernel<T, W, KT>, small_tiles(x, p.groups.tile_rows), kRowWarps<W, KT>, kSmallPlace<W, KT> * shared_tiles, kSmallBytes<W, KT>, stream, p,
                         shared_tiles);
}

// ---- units of experts ----------------------------------------------------------------------------------------------

// Of 16 units, by 16 rows: what an operand of `mma` takes.
using OfUnits = std::uint32_t[2][2];
// P^T and dS^T of the units whose keys and values lie at `k` and `v`, by rows at `q` and `dout`. numbers: lse of the rows, then their delta; a row of lse -inf gives nothing.
template <class T, int W>
__device__ inline void weigh(OfUnits& weights, OfUnits& dlogits, std::uint32_t k, std::uint32_t v, std::uint32_t q, std::uint32_t dout, std::uint32_t numbers, float scale) {
  using Place = SmallRows<W>;
  const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const auto product = [&](float (&sum)[2][4], std::uint32_t units, std::uint32_t rows) {
    constexpr float kZero[4] = {};
    units += Place::place_of(g, t), rows += Place::place_of(g, t);
#pragma unroll
    for (int four = 0; four < W / 32; ++four) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        load_half(a[r], Place::behind(units, 4 * four) + Place::kEight * r);
        load_half(b[r], Place::behind(rows, 4 * four) + Place::kEight * r);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (four + j == 0) mma<T>(sum[r], {a[0][0], a[1][0], a[0][1], a[1][1]}, b[r][0], b[r][1], kZero);
          else mma<T>(sum[r], {a[0][2 * j], a[1][2 * j], a[0][2 * j + 1], a[1][2 * j + 1]}, b[r][2 * j], b[r][2 * j + 1]);
    }
  };
  float s[2][4], gradient[2][4];
  product(s, k, q), product(gradient, v, dout);
  constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 lse = load_shared2(numbers + 32 * n + 8 * t), delta = load_shared2(numbers + 64 + 32 * n + 8 * t);
    const auto offset = [](float l) { return l == -kInfinity ? -kInfinity : kProbabilityShift<T> - l * kLogit<T>; };
    const float offsets[2] = {offset(lse.x), offset(lse.y)};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[n][j] = exponential<T>(fmaf(s[n][j], scale * kLogit<T>, offsets[j & 1]));
      gradient[n][j] = s[n][j] * kRescale * (gradient[n][j] - (j & 1 ? delta.y : delta.x));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      weights[n][h] = pack<T>(s[n][2 * h], s[n][2 * h + 1]);
      dlogits[n][h] = pack<T>(gradient[n][2 * h], gradient[n][2 * h + 1]);
    }
  }
}
// sum += w rows.
template <class T, int W> __device__ inline void add_rows(float (&sum)[W / 8][4], const OfUnits& w, std::uint32_t rows) {
  using Place = SmallRows<W>;
  const int lane = threadIdx.x % 32;
  const std::uint32_t pairs = rows + Place::place_of(lane % 8, lane / 16) + lane / 8 % 2 * Place::kEight;
#pragma unroll
  for (int d = 0; d < W / 8; d += 2) {
    std::uint32_t b[4];
    ldmatrix_transposed(b, Place::behind(pairs, d));
#pragma unroll
    for (int j = 0; j < 2; ++j) mma<T>(sum[d + j], {w[0][0], w[0][1], w[1][0], w[1][1]}, b[2 * j], b[2 * j + 1]);
  }
}

constexpr int kMostSegment = 320;  // queries
struct UnitHead : SmallHead {
  const unsigned char *q, *dout;
  const float *lse, *delta;
};
// Bytes: 16 rows of one tensor, and of two; then lse and delta of 16 rows.
template <int W> struct RowSet {
  static constexpr int kRows = 2 * SmallRows<W>::kEight, kSet = 2 * kRows, kNumbers = 2 * 16 * 4;
};
// Of a warp: 16 keys and their values, two sets of 16 queries, the numbers of these, and what comes.
template <int W> struct UnitMemory : RowSet<W> {
  static constexpr int kSets = 3 * RowSet<W>::kSet, kNumbers = 2 * RowSet<W>::kNumbers, kBytes = kSets + kNumbers + static_cast<int>(sizeof(Coming<kMostSegment>));
};

// A warp takes 16 units of an expert, and one segment of its queries, 16 at a time.
template <class T, int W> __global__ void __launch_bounds__(32 * kUnitWarps<W>, 1) small_unit_gradient_kernel(const UnitGradientParams p, const int parts) {
  using Place = SmallRows<W>;
  using Memory = UnitMemory<W>;
  using C = Config<T, W>;
  constexpr int kRows = Memory::kRows;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  __shared__ UnitHead head;
  __shared__ unsigned taken;
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, slices = ceil_div(x.K, 16);
  const std::uint32_t units = window.address + Memory::kSets * warp, sets = units + Memory::kSet, numbers = window.address + Memory::kSets * warps + Memory::kNumbers * warp;
  const RowCopy<W> copy_row(x.D, lane);
  const SmallTiles<W, 2, kMostSegment> its(head, reinterpret_cast<Coming<kMostSegment>*>(memory + (Memory::kSets + Memory::kNumbers) * warps)[warp], taken, window, units, copy_row, lane);
  if (threadIdx.x == 0) {
    const int bh = blockIdx.x / parts, b = bh / x.H, h = bh % x.H;
    const std::int64_t row0 = std::int64_t(bh) * x.queries.max_length, start = span(x.queries, b).start;
    const auto bytes_of = [&](const Rows& rows) { return reinterpret_cast<const unsigned char*>(head_rows<T>(rows, b, h, start)); };
    taken = 0;
    head = {SmallHead::of<T>(x, {false, {}, {}, p.unit_k, p.unit_v, p.indices}, p.groups.segments, p.groups.segment_rows, p.groups.entries, bh, blockIdx.x % parts),
            bytes_of(p.row_q), bytes_of(p.row_dout), p.lse + row0, p.delta + row0};
  }
  __syncthreads();

  const auto bring_units = [&] { its.bring(0, head.k, p.unit_k), its.bring(kRows, head.v, p.unit_v); };
  const auto set_of = [&](int set) { return sets + Memory::kSet * set; };
  const auto numbers_of = [&](int set) { return numbers + RowSet<W>::kNumbers * set; };
  const auto bring_queries = [&](int set, int first, int count) {
    const auto query = [&](int i) { return query_of(its.entry(i, count), x.s); };
    const auto bring = [&](std::uint32_t to, const unsigned char* rows, const Rows& from) {
#pragma unroll
      for (int n = 0; n < 4; ++n) copy_row(to, n, rows + copy_row.chunk, query(first + 4 * n + lane / 8), small_pitch(from));
    };
    bring(set_of(set), head.q, p.row_q), bring(set_of(set) + kRows, head.dout, p.row_dout);
    const std::uint32_t to = numbers_of(set) + 4 * lane;  // lse of 16 queries, then their delta
    const int own = first + lane % 16;
    if (own < count) load_number(to, lane < 16 ? head.lse : head.delta, query(own));
    else store_shared(to, __float_as_uint(lane < 16 ? -kInfinity : 0.0f));  // gives nothing
  };
  its.take(parts, slices);
  commit_loads();
  its.arrived();
  int slice = its.coming.slice, place = its.coming.work.place, size = its.look(x.K, 16 * slice), set = 0;
  __syncthreads();
  if (size <= 0) return;
  its.arrived();
  int gathered = its.order_keys(x.K - 16 * slice);
  its.take(parts, slices);
  if (gathered > 0) bring_units(), bring_queries(set, 0, size);
  commit_loads();

#pragma unroll 1
  while (size > 0) {
    int next_size = 0, next_gathered = 0, next_slice = 0, next_place = 0;
    float dk[W / 8][4], dv[W / 8][4];
    clear(dk), clear(dv);
#pragma unroll 1
    for (int first = 0; first < size; first += kSmallPassRows, set ^= 1) {
      const bool last = gathered <= 0 || first + kSmallPassRows >= size;
      its.arrived();
      if (last) {
        next_slice = its.coming.slice, next_place = its.coming.work.place;
        next_size = its.look(x.K, 16 * next_slice);
      } else {
        bring_queries(set ^ 1, first + kSmallPassRows, size);
        commit_loads();
      }
      const std::uint32_t q = set_of(set), dout = q + kRows;
      OfUnits weights, dlogits;
      if (gathered > 0) weigh<T, W>(weights, dlogits, units, units + kRows, q, dout, numbers_of(set), p.scale);
      if (last) {
        its.arrived();
        its.take(parts, slices);
        if (next_size > 0) {
          if (next_gathered = its.order_keys(x.K - 16 * next_slice); next_gathered > 0) bring_units(), bring_queries(set ^ 1, 0, next_size);
        }
        commit_loads();
      }
      if (gathered <= 0) break;
      add_rows<T, W>(dv, weights, dout), add_rows<T, W>(dk, dlogits, q);
    }
    if (gathered > 0) {
      const float k_factor = p.scale * power_of_2(-kGradientShift<T>), v_factor = power_of_2(-kProbabilityShift<T>);
      const std::int64_t row0 = (std::int64_t(blockIdx.x / parts) * head.tile_count + place) * x.K;
      const auto index = [&](int i) { return 16 * slice + i < x.K ? 16 * slice + i : -1; };
      if (p.routed_dk.factors) {
        store_rounded_rows<C>(dk, dv, k_factor, v_factor, x.D, lane, rounded_rows_from(p.routed_dk, row0, x.D), rounded_rows_from(p.routed_dv, row0, x.D), index);
      } else {
        const auto store = [&](const RoutedRows& to, const auto& sums, float factor) {
          const float factors[2] = {factor, factor};
          store_routed_rows<C>(sums, factors, x.D, lane, static_cast<float*>(to.numbers) + row0 * routed_pitch(x.D), index);
        };
        store(p.routed_dk, dk, k_factor), store(p.routed_dv, dv, v_factor);
      }
    }
    set ^= gathered <= 0;  // that of the next
    size = next_size, gathered = next_gathered, slice = next_slice, place = next_place;
  }
}

// ---- keys ----------------------------------------------------------------------------------------------------------

// Of a block, in shared memory: sets of 16 landmarks and the gradients of their compressed values, then their numbers. Of a warp: 16 keys and their values.
template <int W> __host__ __device__ constexpr int landmark_bytes(int sets) { return (RowSet<W>::kSet + RowSet<W>::kNumbers) * sets; }

// A warp takes 16 keys after 16 keys of a head.
template <class T, int W> __global__ void __launch_bounds__(32 * kUnitWarps<W>, 1) small_key_gradient_kernel(const UnitGradientParams p, const int parts) {
  using Memory = RowSet<W>;
  using C = Config<T, W>;
  constexpr int kRows = Memory::kRows;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, warps = blockDim.x / 32, sets = ceil_div(p.landmark_rows, 16);
  const int bh = blockIdx.x / parts, b = bh / x.H, h = bh % x.H;
  const std::uint32_t numbers = window.address + Memory::kSet * sets, units = window.address + landmark_bytes<W>(sets) + Memory::kSet * warp;
  const RowCopy<W> copy_row(x.D, lane);
  const Span keys = span(x.keys, b);
  const auto rows_of = [&](const Rows& rows, std::int64_t start) { return reinterpret_cast<unsigned char*>(head_rows<T>(rows, b, h, start)); };
  for (int n = warp; n < 4 * sets; n += warps) {
    const std::uint32_t to = window.address + Memory::kSet * (n / 4);
    const auto copy = [&](int tensor, const Rows& rows) {
      copy_row(to + tensor, n % 4, rows_of(rows, 0) + copy_row.chunk, min(4 * n + lane / 8, p.landmark_rows - 1), small_pitch(rows));
    };
    copy(0, p.row_q), copy(kRows, p.row_dout);
  }
  for (int i = threadIdx.x; i < 32 * sets; i += blockDim.x) {
    const int landmark = i / 32 * 16 + i % 16;
    const bool lse = i % 32 < 16, present = landmark < p.landmark_rows;
    store_shared(numbers + 4 * i, __float_as_uint(present ? (lse ? p.lse : p.delta)[std::int64_t(bh) * x.M + landmark] : lse ? -kInfinity : 0.0f));
  }
  const auto bring = [&](int key) {
    const auto copy = [&](int tensor, const Rows& rows) {
#pragma unroll
      for (int n = 0; n < 4; ++n)
        copy_row(units + tensor, n, rows_of(rows, keys.start) + copy_row.chunk, min(key + 4 * n + lane / 8, keys.length - 1), small_pitch(rows));
    };
    if (sets > 0 && key < keys.length) copy(0, p.unit_k), copy(kRows, p.unit_v);
    commit_loads();
  };
  const int step = 16 * parts * warps, stored = x.keys.starts ? keys.length : x.keys.max_length;
  const auto list_of = [&](int key) { return p.groups.key_ranges && key < keys.length ? RoutedList(p, bh, key) : RoutedList(); };
  int key = 16 * (blockIdx.x % parts * warps + warp);
  RoutedList next = list_of(key);
  bring(key);
  wait_own_loads<0>();
  __syncthreads();
#pragma unroll 1
  for (; key < stored; key += step) {
    RoutedList list = next;
    if (key < keys.length) list.ask_for(p, key % kKeyBlock, lane);
    next = list_of(key + step);
    wait_own_loads<0>();
    __syncwarp();
    float dk[W / 8][4], dv[W / 8][4];
    clear(dk), clear(dv);
#pragma unroll 1
    for (int set = 0; set < sets; ++set) {
      const std::uint32_t z = window.address + Memory::kSet * set;
      OfUnits weights, dlogits;
      weigh<T, W>(weights, dlogits, units, units + kRows, z, z + kRows, numbers + Memory::kNumbers * set, p.scale);
      add_rows<T, W>(dv, weights, z + kRows), add_rows<T, W>(dk, dlogits, z);
    }
    __syncwarp();
    bring(key + step);
    const float k_factor = p.scale * power_of_2(-kGradientShift<T>), v_factor = power_of_2(-kProbabilityShift<T>);
#pragma unroll
    for (int d = 0; d < W / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool present = key + g + i / 2 * 8 < keys.length;  // else beyond a short sequence
        dk[d][i] = present ? dk[d][i] * k_factor : 0.0f, dv[d][i] = present ? dv[d][i] * v_factor : 0.0f;
      }
    list.template add<C, Fixed>(p, dk, dv, key % kKeyBlock, lane);
    constexpr float kOne[2] = {1.0f, 1.0f};
    const auto store = [&](const Rows& rows, const float (&sums)[W / 8][4]) {
      store_small_rows<T, W>(sums, kOne, x.D, lane, [&](int i) { return key + g + 8 * i < stored ? rows_of(rows, keys.start) + (key + g + 8 * i) * (rows.row * 2) : nullptr; });
    };
    store(p.dk, dk), store(p.dv, dv);
  }
}

}  // namespace

// (Up to 64 columns there is one pass for queries and units, attention_gradient_sm90.cu.) H200, backward with 16 to 128 heads against that by specialists: 79 to 100 % at up to 64
// queries of an expert; of 128 columns and more than 32 units of either kind 74 to 105 % at up to 32, 92 to 111 % at 40, 94 to 117 % at 48.
bool fits_small_row_gradient(const Problem& x) {
  const bool few_units = std::max(x.M, x.K) <= kSmallExpertKeys / 2;
  return x.D > 64 && x.s == 1 && x.M <= kSmallExpertKeys && x.K <= kSmallExpertKeys && small_experts(x) && (small_columns(x.D) < 128 || few_units || x.queries.max_length <= 32 * x.M);
}

cudaError_t launch_small_row_gradient(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_small_row_gradient(x) || p.role != RowRole::attention) return cudaErrorInvalidValue;
  return by_columns<96>(x, [&](auto element, auto columns) {
    using T = decltype(element);
    constexpr int W = decltype(columns)::value;
    const int most = std::max(x.M, x.K);
    return most <= 32   ? launch_rows<T, W, 4>(p, stream)
           : most <= 40 ? launch_rows<T, W, 5>(p, stream)
           : most <= 56 ? launch_rows<T, W, 7>(p, stream)
                        : launch_rows<T, W, 8>(p, stream);
  });
}

// H200, backward against that by blocks or specialists. Units of experts: 78 to 100 %, of 64 columns and 70 to 256 landmarks 90 to 105 %. Keys: 86 to 96 %; of 128 columns 91 to
// 103 % with up to 49 landmarks, 97 to 102 % with 64.
bool fits_small_unit_gradient(const UnitGradientParams& p) {
  const Problem& x = p.problem;
  if (p.role == UnitRole::routed) return small_experts(x) && p.groups.segment_rows <= kMostSegment;
  const bool sums = p.groups.key_ranges != nullptr;
  return p.role == UnitRole::compress && x.dtype != Dtype::fp32 && x.D > 64 && x.D <= 128 && x.D % kCudaHeadDimStep == 0 && x.H == x.Hkv &&
         p.landmark_rows <= (small_columns(x.D) < 128 ? 64 : 48) && (!sums || p.routed_dk.factors);
}

cudaError_t launch_small_unit_gradient(const UnitGradientParams& p, cudaStream_t stream) {
  if (!fits_small_unit_gradient(p)) return cudaErrorInvalidValue;
  const Problem& x = p.problem;
  const int slices = ceil_div(x.K, 16), sets = ceil_div(p.landmark_rows, 16);
  if (p.role == UnitRole::routed)
    return by_columns<64>(x, [&](auto element, auto columns) {
      constexpr int W = decltype(columns)::value;
      return launch_by_warps(false, small_unit_gradient_kernel<decltype(element), W>, x.M * slices, kUnitWarps<W>, 0, UnitMemory<W>::kBytes, stream, p);
    });
  return by_columns<96>(x, [&](auto element, auto columns) {
    constexpr int W = decltype(columns)::value;
    return launch_by_warps(false, small_key_gradient_kernel<decltype(element), W>, ceil_div(x.keys.max_length, 16), kUnitWarps<W>, landmark_bytes<W>(sets), RowSet<W>::kSet, stream, p);
  });
}

}  // namespace mita
