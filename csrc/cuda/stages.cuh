// What one warp does of a stage: shared by the kernel of that stage, by those of whole short sequences, and by those which pool
// and route longer ones at once, so that all give the same bits.
#pragma once
#include "device.cuh"

namespace mita {

// ---- pooling -------------------------------------------------------------------------------------------------------

// The tokens of pooling window m: token i of `area`, in line y of the window, counted from the first one of the sequence; of a piece, from `begin` on.
struct PooledTokens {
  int first, width, area, pitch, begin = 0;
  template <class Product> __device__ static PooledTokens of(const Windows& w, int m) {
    const Range rows = overlapping<Product>(m / w.mw, w.mh, w.gh), columns = overlapping<Product>(m % w.mw, w.mw, w.gw);
    const int width = columns.last - columns.first;
    return {w.prefix + rows.first * w.gw + columns.first, width, (rows.last - rows.first) * width, w.gw};
  }
  __device__ int at(int i, int y) const { return first + i + y * (pitch - width); }
  __device__ int inverse_width() const { return (0xffff + width) / max(width, 1); }  // for `mean_by_pair`
  __device__ Range pieces() const { return {first / kPoolPiece, ceil_div(first + area, kPoolPiece)}; }
  __device__ PooledTokens of_piece(int piece) const {
    const int start = piece * kPoolPiece;
    return {start, kPoolPiece, min(first + area - start, kPoolPiece), kPoolPiece, max(first - start, 0)};
  }
};

// A lane owns 16 bytes of a row, neighbouring lanes neighbouring bytes; this many lanes, a power of two, share a row of D elements.
template <class T> __host__ __device__ inline int row_lanes(int D) {
  int lanes = 8;
  while (lanes * kChunk<T> < D) lanes *= 2;
  return lanes;
}
// Shares into which the tokens of a window are cut, sixteen loads or fewer of a lane in each: a power of two. A share is summed in
// 32 / lanes strands, which take its tokens in turn and are added as a tree.
constexpr int kPoolShares = 8, kPieceShares = 4;  // at most; of a piece
template <class T> __host__ __device__ inline int pool_shares(const Problem& x, const Windows& w) {
  if (pools_in_pieces(x, w)) return kPieceShares;
  const std::int64_t tokens = std::int64_t(ceil_div(w.gh, w.mh)) * ceil_div(w.gw, w.mw);
  int shares = 1;
  while (shares < kPoolShares && tokens * row_lanes<T>(x.D) > 32 * 16 * shares) shares *= 2;
  return shares;
}

template <class T> __device__ inline void add(float (&sum)[kChunk<T>], const Vector<T>& v) {
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) sum[e] += to_float(v.element[e]);
}
// Divides sums by how many tokens they are of: by one reciprocal, which the remainder corrects, so that it is rounded as a division is.
struct Mean {
  float count, inverse;
  __device__ explicit Mean(int area) : count(static_cast<float>(area)), inverse(area ? 1.0f / count : 0.0f) {}
  __device__ float operator()(float sum) const {
    const float about = sum * inverse, remainder = fmaf(-about, count, sum);
    return remainder == remainder ? fmaf(remainder, inverse, about) : about;
  }
};
template <class T> __device__ inline Vector<T> mean_of(const float (&sum)[kChunk<T>], int area) {
  Vector<T> result;
  const Mean mean(area);
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) result.element[e] = from_float<T>(mean(sum[e]));
  return result;
}

// The sum of a share by one warp; load(token) are the 16 bytes of this lane.
template <class T, class Load> __device__ inline void sum_share(float (&sum)[kChunk<T>], const PooledTokens& tokens, int lanes, int share, int shares, Load load) {
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) sum[e] = 0.0f;
  constexpr int kFew = 8;  // loads under way; the window's line is counted on, not divided for: registers
  const int step = 32 / lanes * shares, width = max(tokens.width, 1);
  int first = share * (32 / lanes) + threadIdx.x % 32 / lanes;
  if (first < tokens.begin) first += ceil_div(tokens.begin - first, step) * step;
  const int columns = step % width, tokens_on = tokens.at(step, step / width) - tokens.first, to_next_line = tokens.pitch - tokens.width;
  int column = first % width, token = tokens.at(first, first / width);
#pragma unroll 1
  for (int i = first; i < tokens.area;) {
    Vector<T> few[kFew] = {};
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      if (i < tokens.area) few[j] = load(token);
      i += step, column += columns, token += tokens_on;
      if (column >= width) column -= width, token += to_next_line;
    }
#pragma unroll
    for (int j = 0; j < kFew; ++j) add(sum, few[j]);
  }
  for (int d = lanes; d < 32; d *= 2)
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], d);
}
// The same mean by a pair of lanes, each of which gets half of the chunk, for windows of up to 256 tokens of up to eight chunks: i / width = i * inverse / 2^16. All
// lanes of a warp.
template <class T, class Load> __device__ inline Four<T> mean_by_pair(const PooledTokens& tokens, unsigned inverse, int shares, Load load) {
  constexpr int kStrands = 4;  // two of a lane
  const int half = threadIdx.x % 2;
  float total[4] = {};
#pragma unroll 1
  for (int share = 0; share < shares; ++share) {
    float sum[kStrands / 2][kChunk<T>] = {};
    const auto add_token = [&](int r, int i) { add(sum[r], load(tokens.at(i, i * inverse >> 16))); };
    int first = kStrands * share + kStrands / 2 * half;
#pragma unroll 1
    for (; first + 1 < tokens.area; first += kStrands * shares) add_token(0, first), add_token(1, first + 1);
    if (first < tokens.area) add_token(0, first);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float lower = sum[0][e] + sum[1][e], upper = sum[0][e + 4] + sum[1][e + 4];
      const float of_share = (half ? upper : lower) + __shfl_xor_sync(kAllLanes, half ? lower : upper, 1);
      total[e] = share == 0 ? of_share : total[e] + of_share;
    }
  }
  const Mean mean(tokens.area);
  return rounded<T>(float4{mean(total[0]), mean(total[1]), mean(total[2]), mean(total[3])});
}

// ---- compressed values ---------------------------------------------------------------------------------------------

// Of so many blocks, `block` puts the parts of its landmarks of all heads together, in their order, rounds their values once and writes the lse. A landmark has so
// many lanes, each with four columns.
__host__ __device__ inline unsigned combine_lanes(const Problem& x) { return x.D > 64 ? 32 : 16; }
__host__ __device__ inline unsigned combine_blocks(const Problem& x, unsigned threads) {
  const unsigned rows = threads / combine_lanes(x);
  return (unsigned(x.B) * x.H * x.M + rows - 1) / rows;
}
template <class T> __device__ inline void combine_parts(const LandmarkParams& p, unsigned block) {
  const Problem& x = p.problem;
  const unsigned lanes = combine_lanes(x), row = (block * blockDim.x + threadIdx.x) / lanes;
  if (row >= unsigned(x.B) * x.H * x.M) return;
  const unsigned bh = row / x.M, m = row - bh * x.M;
  const auto part = [&](int split) { return (std::int64_t(bh) * p.splits + split) * x.M + m; };
  const auto state = [&](int split) { return reinterpret_cast<const float2*>(p.partial_state)[part(split)]; };
  const unsigned lane = threadIdx.x % lanes;
  float maximum = -kInfinity, sum;
#pragma unroll 4
  for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, state(i).x);
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  for (int column = 4 * lane; column - 4 * static_cast<int>(lane) < x.D; column += 4 * lanes) {
    float value[4] = {};
    sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < p.splits; ++i) {
      const float2 its = state(i);
      const float4 part_value = column < x.D ? *reinterpret_cast<const float4*>(p.partial_values + part(i) * x.D + column) : float4{};
      const float weight = exponential<T>(its.x - base);
      sum += weight * its.y;
      value[0] += weight * part_value.x, value[1] += weight * part_value.y, value[2] += weight * part_value.z, value[3] += weight * part_value.w;
    }
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (column < x.D)
#pragma unroll
      for (int i = 0; i < 4; ++i) static_cast<T*>(p.compressed)[std::int64_t(row) * x.D + column + i] = from_float<T>(value[i] * factor);
  }
  if (lane == 0) p.lse[row] = log_sum<T>(maximum, sum);
}

// ---- selection -----------------------------------------------------------------------------------------------------

// Over LANES lanes: the sum of all, and of those up to this one.
template <int LANES, class X> __device__ inline X sum_of_lanes(X x) {
  if constexpr (LANES == 32 && std::is_same_v<X, int>) {
    return __reduce_add_sync(kAllLanes, x);
  } else {
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    return x;
  }
}
template <int LANES, class X> __device__ inline X sum_through_lane(X x) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int d = 1; d < LANES; d *= 2) {
    const X other = __shfl_up_sync(kAllLanes, x, d, LANES);
    if (lane >= d) x += other;
  }
  return x;
}

// What this share of a logistic distribution reaches.
__device__ inline float logistic_quantile(float mean, float deviation, float share) { return mean + deviation * 0.59f * __logf((1.001f - share) / (share + 0.001f)); }

// ---- routing -------------------------------------------------------------------------------------------------------

// The best landmark so far of each of a lane's two rows: three instructions a score.
struct BestLandmark {
  float score[2] = {-kInfinity, -kInfinity};
  int landmark[2] = {-1, -1};

  // Scores of the landmarks from `first` on, of M; those behind M are made -infinity.
  template <int NT> __device__ void update(float (&s)[NT][4], int first, int M) {
    const int lane = threadIdx.x % 32;
    if (first + 8 * NT > M) mask_logits(s, M - first, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = -kInfinity;  // of the row in this tile, and the lowest landmark that has it
      int lowest = M;
#pragma unroll
      for (int n = 0; n < NT; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
#pragma unroll
      for (int n = NT - 1; n >= 0; --n) {
        if (s[n][2 * h + 1] == highest) lowest = first + 2 * (lane & 3) + 8 * n + 1;
        if (s[n][2 * h] == highest) lowest = first + 2 * (lane & 3) + 8 * n;
      }
      lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, 1));
      lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, 2));
      const bool higher = highest > score[h] || (landmark[h] < 0 && highest == score[h]);  // -infinity is a score too
      if (higher && lowest < M) score[h] = highest, landmark[h] = lowest;
    }
  }
  // Nothing but NaN: the first landmark.
  __device__ int of_row(int h) const { return max(landmark[h], 0); }
  // To experts [N], n being the upper one of the lane's rows; -1 behind the sequence.
  __device__ void store(std::int32_t* experts, int n, int length, int N) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (const int own = n + 8 * h; threadIdx.x % 4 == 0 && own < N) experts[own] = own < length ? of_row(h) : -1;
  }
  // The same rows, into the number of each expert's.
  __device__ void count(std::int32_t* counts, int n, int N) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (threadIdx.x % 4 == 0 && n + 8 * h < N) atomicAdd(counts + of_row(h), 1);
  }
};

// Of a warpgroup's tile of queries; tile(i) are the landmarks from i * LANDMARKS on, of M.
template <class C, int LANDMARKS, class Tiles> __device__ inline BestLandmark route_tile(const GroupRows<typename C::T, C::DP>& queries, Tiles tile, int M) {
  BestLandmark highest;
  for (int m = 0; m < M; m += LANDMARKS) {
    float s[LANDMARKS / 8][4];
    product<C>(s, queries, tile(m / LANDMARKS), threadIdx.x % 32);
    wait_products<C, 0>(s);
    highest.update(s, m, M);
  }
  return highest;
}

// ---- whole short sequences -----------------------------------------------------------------------------------------

// Starts copying `count` rows as they come, one after the other, with THREADS threads in a row; zeros behind the last one of `from`,
// and behind the last column.
template <class T, int DP, int THREADS>
__device__ inline void load_sequence(const Tile<T, DP>& to, const Rows& rows, int b, int head, const Span& from, int D, int count) {
  constexpr int kChunks = Tile<T, DP>::kChunks, kStep = THREADS / kChunks / 8 * 8;  // rows a multiple of eight apart: the same place of their panels
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x % THREADS / kChunks;
  if (first >= kStep) return;
  std::uint32_t target = to.chunk(first, chunk);
  const T* source = head_rows<T>(rows, b, head, from.start + first) + chunk * kChunk<T>;
  const int present = chunk * kChunk<T> < D ? from.length : 0;
#pragma unroll 2
  for (int row = first; row < count; row += kStep, target += kStep * DP * sizeof(T), source += kStep * rows.row)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(row < present ? 16 : 0) : "memory");
}

// A bit for every pooling window, of as many as `Bits` has, that holds token n.
template <class Bits> __device__ inline Bits windows_with(const Windows& w, int n) {
  if (!is_pooled(w, n)) return 0;
  const int cell = n - w.prefix;
  const Range rows = overlapping<int>(cell / w.gw, w.gh, w.mh), columns = overlapping<int>(cell % w.gw, w.gw, w.mw);
  Bits windows = 0;
  for (int i = rows.first; i < rows.last; ++i) windows |= ((Bits(2) << (columns.last - columns.first - 1)) - 1) << (i * w.mw + columns.first);
  return windows;
}

// 16 columns of weights from a chunk on, as the first operand of a sum over their rows.
template <class T, int DP> __device__ inline TileOperand<T, DP> by_columns(const Tile<T, DP>& weights, int chunk) {
  const int lane = threadIdx.x % 32;
  return operand(weights, (lane & 7) + (lane >> 4 << 3), chunk + (lane >> 3 & 1));
}
// acc += weights^T rows, of each of KINDS weights by columns, and the 16 columns of `rows` from `column` on; `count` rows of all.
template <class T, int DP, int KINDS>
__device__ inline void add_transposed(float (&acc)[KINDS][2][4], const TileOperand<T, DP> (&weights)[KINDS], const Tile<T, DP>& rows, int column, int count) {
  const int lane = threadIdx.x % 32;
  const auto b = operand(rows, lane & 15, column / 8 + (lane >> 4));
#pragma unroll 2
  for (int step = 0; step < ceil_div(count, 16); ++step) {
    std::uint32_t w[KINDS][4], r[4];
#pragma unroll
    for (int i = 0; i < KINDS; ++i) ldmatrix_transposed(w[i], weights[i](0, step));
    ldmatrix_transposed(r, b(0, step));
#pragma unroll
    for (int i = 0; i < KINDS; ++i) {
      mma<T>(acc[i][0], w[i], r[0], r[1]);
      mma<T>(acc[i][1], w[i], r[2], r[3]);
    }
  }
}

// One warp puts N queries in the order of their experts, and cuts those of each expert into tiles of `rows`; returns how many. counts [M]: queries
// of every expert, used up.
__device__ inline int order_by_expert(const std::uint16_t* experts, int N, int rows, int* counts, int M, std::uint16_t* entries, Work* tiles) {
  const int lane = threadIdx.x % 32;
  int before = 0;  // entries, and tiles above them
  for (int first = 0; first < M; first += 32) {
    const int m = first + lane, entries_of = m < M ? counts[m] : 0, own = entries_of | ceil_div(entries_of, rows) << 16;
    const int through = sum_through_lane<32>(own), start = before + through - own;
    if (m < M) counts[m] = start & 0xffff;  // where its next query goes
    for (int i = 0; i < own >> 16; ++i) tiles[(start >> 16) + i] = Work{m, (start & 0xffff) + rows * i, min(rows, entries_of - rows * i), 0};
    before += __shfl_sync(kAllLanes, through, 31);
  }
  __syncwarp();
  for (int first = 0; first < N; first += 32) {
    const int n = first + lane, expert = n < N ? experts[n] : -1;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    if (expert >= 0) entries[counts[expert] + __popc(same & ((1u << lane) - 1))] = static_cast<std::uint16_t>(n);
    __syncwarp();
    if (expert >= 0 && lane == __ffs(same) - 1) counts[expert] += __popc(same);
    __syncwarp();
  }
  return before >> 16;
}

// Queries so ordered, where those of every expert end, as a head's entries and segments in `groups`. For one warp.
__device__ inline void write_groups(const GroupParams& groups, int bh, const std::uint16_t* ordered, const int* ends) {
  const Problem& x = groups.problem;
  const int lane = threadIdx.x % 32, rows = groups.segment_rows, most = max_tiles(x, rows);
  Work* const segments = groups.segments + std::int64_t(bh) * most;
  std::int32_t *const starts = groups.segment_starts + std::int64_t(bh) * (x.M + 1), *const entries = groups.entries + std::int64_t(bh) * x.queries.max_length;
  int before = 0;
  for (int first = 0; first < x.M; first += 32) {
    const int m = first + lane, begin = 0 < m && m < x.M ? ends[m - 1] : 0, own = m < x.M ? ends[m] - begin : 0, pieces = ceil_div(own, rows);
    const int through = sum_through_lane<32>(pieces), start = before + through - pieces;
    if (m < x.M) starts[m] = start;
    for (int i = 0; i < pieces; ++i) segments[start + i] = Work{m, begin + rows * i, min(rows, own - rows * i), start + i};
    before += __shfl_sync(kAllLanes, through, 31);
  }
  if (lane == 0) starts[x.M] = before;
  for (int i = before + lane; i < most; i += 32) segments[i] = Work{};
  for (int i = lane; i < ends[x.M - 1]; i += 32) entries[i] = ordered[i];
}

}  // namespace mita
