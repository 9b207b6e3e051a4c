// Gradients of attention where experts have so many keys, and so few queries, that what these leave for those would be more than all products of queries and
// keys are: the 64 rows of a warpgroup meet all others, and what a query's expert did not choose is masked by bits. K costs nothing, nothing is listed, nothing
// held. For up to 64 columns, on sm_90a, with shared units.
//   experts: of every expert a bit for every key
//   rows:    128 queries a block; their units pass by twice: for delta, then for logit gradients dS and with them dq. dS has 32 bits there, a rounded part and the
//            rounded rest: where keys are nearly the same, dq is what is left when dS cancels, and its rounding would not cancel with it
//   keys:    128 keys a block; landmarks, which compressed them, pass by, then queries
#include "device.cuh"
#include "launch.h"
#include "masks.cuh"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kDP = 64, kRow = kDP * 2;
constexpr int kOwn = 16 * kWarps, kPassing = 64, kStages = 3;  // rows of a block; of a stage
constexpr int kStep = 32;                                      // rows that keys meet at a time: registers
[[maybe_unused]] constexpr int kTiles = kStep / 8;
constexpr int kExpertWarps = 8;

__global__ void __launch_bounds__(32 * kExpertWarps) expert_masks_kernel(const MaskedGradientParams p) {
  extern __shared__ std::uint32_t words[];
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t row = std::int64_t(blockIdx.x) * kExpertWarps + warp;
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  std::uint32_t* const own = words + warp * p.pitch;
  const int length = span(x.keys, static_cast<int>(row / (x.H * x.M))).length;
  for (int i = lane; i < p.pitch; i += 32) own[i] = 0;
  __syncwarp();
  for (int slot = lane; slot < x.K; slot += 32)
    if (const int key = p.indices[row * x.K + slot]; static_cast<unsigned>(key) < static_cast<unsigned>(length)) atomicOr(own + key / kStep, 1u << bit_of(key % kStep));
  __syncwarp();
  for (int i = lane; i < p.pitch; i += 32) p.masks[row * p.pitch + i] = own[i];
}

// Shared memory: the block's own rows of two tensors, stages of passing ones, then what is said of them.
constexpr int kOwnBytes = 2 * kOwn * kRow, kStageBytes = 2 * kPassing * kRow, kRest = kOwnBytes + kStages * kStageBytes;

// The block's own ones, from row `first` of a sequence on.
template <class T> __device__ inline void load_own(std::uint32_t to, const Rows& one, const Rows& other, int b, int h, const Span& from, int first, int D) {
  const Span rest{from.start + first, from.length - first};
  load_sequence<T, kDP, kThreads>({to}, one, b, h, rest, D, kOwn);
  load_sequence<T, kDP, kThreads>({to + kOwn * kRow}, other, b, h, rest, D, kOwn);
}
// Two tensors of one head whose rows pass by, a stage after the other: landmarks, or a sequence. In shared memory: registers.
template <class T> struct Passing {
  const T *one, *other;
  int pitch, other_pitch, rows;
  __device__ void set(const Rows& first, const Rows& second, int b, int h, const Span& from) {
    one = head_rows<T>(first, b, h, from.start), other = head_rows<T>(second, b, h, from.start);
    pitch = static_cast<int>(first.row), other_pitch = static_cast<int>(second.row), rows = from.length;
  }
  __device__ void bring(std::uint32_t to, int first, int D) const {
    constexpr int kChunks = kDP / kChunk<T>, kAtOnce = kThreads / kChunks;
    const unsigned thread = opaque(threadIdx.x);
    const int own = thread / kChunks, c = thread % kChunks, present = c * kChunk<T> < D ? rows - first : 0;
    const std::uint32_t place = Tile<T, kDP>{to}.chunk(own, c);
    const Copy<T, kDP> copies[2] = {{{to}, one, pitch}, {{to}, other, other_pitch}};
#pragma unroll
    for (int step = 0; step < kPassing; step += kAtOnce)
#pragma unroll
      for (int i = 0; i < 2; ++i) copies[i].part(place + (kPassing * i + step) * kRow, c, first + own + step, own + step < present);
  }
};
// Both, a tile after the other, the landmarks' first; where they lie in the ring of stages.
template <class T> struct Stages {
  const Passing<T> (&passing)[2];
  const std::uint32_t ring;
  const int landmark_tiles, D;
  int stage = 0;  // of the tile that is worked on
  __device__ bool is_dense(int tile) const { return tile < landmark_tiles; }
  // To the stage `ahead` of it.
  __device__ void bring(int tile, int ahead) const {
    const int to = stage + ahead < kStages ? stage + ahead : stage + ahead - kStages;
    passing[!is_dense(tile)].bring(ring + to * kStageBytes, kPassing * (is_dense(tile) ? tile : tile - landmark_tiles), D);
    commit_loads();
  }
  // Waits for that tile; `next`, if there is such a tile, is on its way then.
  __device__ void arrive(int next, int tiles) const {
    wait_loads<1>();
    __syncthreads();
    if (next < tiles) bring(next, 2);
    else commit_loads();
  }
  __device__ void advance() { stage = stage + 1 < kStages ? stage + 1 : 0; }
};

template <class T> __global__ void __launch_bounds__(kThreads, 2) masked_row_gradient_kernel(const MaskedGradientParams p, const int parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP>;
  using G = Config<T, kDP, true>;
  constexpr float kUnshifted = power_of_2(-kGradientShift<T>), kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
  extern __shared__ __align__(kPanel) unsigned char memory[];
  __shared__ Passing<T> passing[2];
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int bh = blockIdx.x / parts, b = bh / x.H, h = bh - b * x.H, block0 = blockIdx.x % parts * kOwn;
  const Span queries = span(x.queries, b);
  const int N = queries.length;
  if (block0 >= N) return;
  const Tile<T, kDP> q{window.address}, dout{window.address + kOwn * kRow};
  const int landmark_tiles = ceil_div(x.M, kPassing), tiles = landmark_tiles + ceil_div(x.keys.max_length, kPassing);
  if (threadIdx.x == 0) passing[0].set(p.landmarks, p.compressed, b, h, {0, x.M}), passing[1].set(p.k, p.v, b, h, span(x.keys, b));
  Stages<T> stages{passing, window.address + kOwnBytes, landmark_tiles, x.D};
  load_own<T>(q.address, p.q, p.dout, b, h, queries, block0, x.D);
  // The bits of every query, and of all landmarks.
  const std::uint32_t masks = window.address + kRest;
  for (int i = warp; i < kOwn; i += kWarps) {
    const int n = min(block0 + i, N - 1), expert = min(max(p.experts[std::int64_t(bh) * x.queries.max_length + n], 0), x.M - 1);
    const std::uint32_t* const from = p.masks + (std::int64_t(bh) * x.M + expert) * p.pitch;
    for (int c = lane; c < p.pitch / 4; c += 32)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(masks + 4 * p.pitch * i + 16 * c), "l"(from + 4 * c) : "memory");
  }
  __syncthreads();
  stages.bring(0, 0), stages.bring(1, 1);
  if (warp == 0)
    for (int i = 0; i < 2 * landmark_tiles; ++i) {
      const unsigned bits = __ballot_sync(kAllLanes, i * kStep + unit_of(lane) < x.M);
      if (lane == 0) store_shared(masks + 4 * (p.pitch * kOwn + i), bits);
    }

  const int own0 = 16 * warp, row0 = block0 + own0;
  float lse[2], delta[2] = {}, total[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + g + 8 * i;
    lse[i] = offset_of<T>(n < N ? p.lse[std::int64_t(bh) * x.queries.max_length + n] : -kInfinity);
  }
  const std::uint32_t own_masks = masks + 4 * p.pitch * (own0 + g) + t, landmark_masks = masks + 4 * p.pitch * kOwn + t;
  const Matrix<kDP> rows_at(window.address, false), sums_at(window.address, true);
  Matrix<kDP> unit_keys = rows_at, unit_values = rows_at, unit_sums = sums_at;
  const auto weigh = [&](float (&s)[kPassing / 8][4], unsigned upper, unsigned lower, float scale) {
#pragma unroll
    for (int j = 0; j < kPassing / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = exponential<T>(has(i / 2 ? lower : upper, j, i % 2) ? fmaf(s[j][i], scale * kLogit<T>, -lse[i / 2]) : -kInfinity);
  };
  // take(bits of the upper row, of the lower one, scale), for 64 units after 64 units. again: do they all pass by once more?
  const auto for_all_units = [&](bool again, int first, int last, auto&& take) {
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      wait_products<G, 0>();  // which read the tile before
      stages.arrive(tile + 2 < tiles || !again ? tile + 2 : tile + 2 - tiles, tiles);
      const int at = (kOwnBytes + stages.stage * kStageBytes) >> 4;
      unit_keys.low = rows_at.low + at, unit_values.low = unit_keys.low + (kPassing * kRow >> 4), unit_sums.low = sums_at.low + at;
      const bool dense = stages.is_dense(tile);
      const std::uint32_t bits = dense ? landmark_masks + 8 * tile : own_masks + 8 * (tile - landmark_tiles), lower = dense ? 0 : 32 * p.pitch;
      const float scale = dense ? p.landmark_scale : p.scale;
      take(load_shared_byte(bits) | load_shared_byte(bits + 4) << 8, load_shared_byte(bits + lower) | load_shared_byte(bits + 4 + lower) << 8, scale);
      stages.advance();
    }
  };
  {
    std::uint32_t own[kDP / 16][4], given[kDP / 16][4];
    wait_loads<1>();
    __syncthreads();
    const auto rows = operand(q, own0 + (lane & 15), lane >> 4), gradients = operand(dout, own0 + (lane & 15), lane >> 4);
#pragma unroll
    for (int step = 0; step < kDP / 16; ++step) ldmatrix(own[step], rows(step, 0)), ldmatrix(given[step], gradients(step, 0));
    for_all_units(true, 0, tiles, [&](unsigned upper, unsigned lower, float scale) {
      float s[kPassing / 8][4], d[kPassing / 8][4];
      begin_products(s, d, own, given);
      wgmma_tiles<T>(s, own, unit_keys);
      commit_products();
      wgmma_tiles<T>(d, given, unit_values);
      commit_products();
      wait_products<G, 1>(s);
      weigh(s, upper, lower, scale);
      wait_products<G, 0>(d);
#pragma unroll
      for (int j = 0; j < kPassing / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i / 2] += s[j][i], delta[i / 2] = fmaf(s[j][i], d[j][i], delta[i / 2]);
    });
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 1; j < 4; j *= 2) delta[i] += __shfl_xor_sync(kAllLanes, delta[i], j), total[i] += __shfl_xor_sync(kAllLanes, total[i], j);
    const int n = row0 + g + 8 * i;
    const std::int64_t at = std::int64_t(bh) * x.queries.max_length + n;
    const float dlse = p.dlse && n < N ? p.dlse[at] : 0.0f;
    delta[i] = exact_delta<T>(delta[i] - dlse * power_of_2(kProbabilityShift<T>), total[i]);
    if (t == 0 && n < N) p.delta[at] = delta[i];
  }
  float dq[kDP / 8][4];
  clear(dq);
  Matrix<kDP> own_rows = rows_at, given_rows = rows_at;
  own_rows.advance(warp / 4 * 64 * kRow), given_rows.advance(kOwn * kRow + warp / 4 * 64 * kRow);
  const auto differentiate = [&](unsigned upper, unsigned lower, float scale) {
    float s[kPassing / 8][4], d[kPassing / 8][4];
    begin_products(s, d);
    wgmma_tiles<T>(s, own_rows, unit_keys);
    commit_products();
    wgmma_tiles<T>(d, given_rows, unit_values);
    commit_products();
    wait_products<G, 1>(s, dq);
    Weights<T, kPassing / 8> rounded, rest;
    weigh(s, upper, lower, scale);
    wait_products<G, 0>(d);
#pragma unroll
    for (int j = 0; j < kPassing / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lo = s[j][2 * i] * kRescale * (d[j][2 * i] - delta[i]), hi = s[j][2 * i + 1] * kRescale * (d[j][2 * i + 1] - delta[i]);
        split<T>(lo, hi, rounded.packed[j][i], rest.packed[j][i]);
      }
    begin_products(dq, rounded.packed, rest.packed);
#pragma unroll
    for (const auto* w : {&rounded, &rest})
#pragma unroll
      for (int i = 0; i < kPassing / 16; ++i) wgmma_weighted(dq, *w, i, unit_sums.at(16 * i * kRow));
    commit_products();
  };
  for_all_units(false, 0, landmark_tiles, differentiate);
  wait_products<G, 0>(dq);
  const float ratio = p.landmark_scale / p.scale;
#pragma unroll
  for (int j = 0; j < kDP / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[j][i] *= ratio;
  for_all_units(false, landmark_tiles, tiles, differentiate);
  wait_products<G, 0>(dq);
  __syncthreads();
  const float factor[2] = {p.scale * kUnshifted, p.scale * kUnshifted};
  store_rows<C>(q.from_row(own0), dq, factor, x.D, lane, head_rows<T>(p.dq, b, h, queries.start), p.dq.row, [&](int i) { return row0 + i < N ? row0 + i : -1; });
#endif
}

// Words of a key's bits in shared memory, for all queries: an odd number. And the rows whose statistics are held.
__host__ __device__ inline int key_mask_pitch(const Problem& x) { return ceil_div(x.queries.max_length, kPassing) * 2 + 1; }
__host__ __device__ inline int passing_rows(const Problem& x) { return (ceil_div(x.M, kPassing) + ceil_div(x.queries.max_length, kPassing)) * kPassing; }

template <class T> __global__ void __launch_bounds__(kThreads, 2) masked_key_gradient_kernel(const MaskedGradientParams p, const int parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP>;
  using G = Config<T, kDP, true>;
  constexpr float kUnshifted = power_of_2(-kGradientShift<T>), kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
  extern __shared__ __align__(kPanel) unsigned char memory[];
  __shared__ Passing<T> passing[2];
  const Window window(memory);
  const Problem& x = p.problem;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int bh = blockIdx.x / parts, b = bh / x.H, h = bh - b * x.H, block0 = blockIdx.x % parts * kOwn;
  const Span keys = span(x.keys, b);
  const int L = keys.length;
  if (block0 >= L) return;
  const Tile<T, kDP> k{window.address};
  const int landmark_tiles = ceil_div(x.M, kPassing), tiles = landmark_tiles + ceil_div(x.queries.max_length, kPassing);
  if (threadIdx.x == 0) passing[0].set(p.landmarks, p.dcompressed, b, h, {0, x.M}), passing[1].set(p.q, p.dout, b, h, span(x.queries, b));
  Stages<T> stages{passing, window.address + kOwnBytes, landmark_tiles, x.D};
  load_own<T>(k.address, p.k, p.v, b, h, keys, block0, x.D);
  __syncthreads();
  stages.bring(0, 0), stages.bring(1, 1);

  // lse and delta of landmarks and queries; of every key a bit for every query.
  const std::uint32_t statistics = window.address + kRest, key_masks = statistics + 8 * passing_rows(x);
  const int N = span(x.queries, b).length, pitch = key_mask_pitch(x);
  for (int i = threadIdx.x; i < passing_rows(x); i += kThreads) {
    const int n = i - kPassing * landmark_tiles;
    const bool landmark = n < 0, present = landmark ? i < x.M : n < N;
    const std::int64_t at = landmark ? std::int64_t(bh) * x.M + i : std::int64_t(bh) * x.queries.max_length + n;
    store_shared2(statistics + 8 * i, offset_of<T>(present ? (landmark ? p.landmark_lse : p.lse)[at] : -kInfinity), present ? (landmark ? p.landmark_delta : p.delta)[at] : 0.0f);
  }
#pragma unroll 2
  for (int word = warp; word < pitch - 1; word += kWarps) {
    const int n = word * kStep + unit_of(lane);
    uint4 its = {};
    if (n < N) {
      const int expert = min(max(p.experts[std::int64_t(bh) * x.queries.max_length + n], 0), x.M - 1);
      its = *reinterpret_cast<const uint4*>(p.masks + (std::int64_t(bh) * x.M + expert) * p.pitch + block0 / kStep);
    }
    const std::uint32_t words[kOwn / kStep] = {its.x, its.y, its.z, its.w};
#pragma unroll
    for (int i = 0; i < kOwn / kStep; ++i) store_shared(key_masks + 4 * ((i * kStep + unit_of(lane)) * pitch + word), transposed_bits(words[i]));
  }

  const int own0 = 16 * warp, row0 = block0 + own0;
  float dk[kDP / 8][4], dv[kDP / 8][4];
  clear(dk), clear(dv);
  const Matrix<kDP> rows_at(window.address, false), sums_at(window.address, true);
  Matrix<kDP> own_keys = rows_at, own_values = rows_at;
  own_keys.advance(warp / 4 * 64 * kRow), own_values.advance(kOwn * kRow + warp / 4 * 64 * kRow);
  const std::uint32_t own_masks = key_masks + 4 * pitch * (own0 + g) + t;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    stages.arrive(tile + 2, tiles);
    Matrix<kDP> row_keys = rows_at, row_values = rows_at, key_sums = sums_at, value_sums = sums_at;
    const int at = (kOwnBytes + stages.stage * kStageBytes) >> 4;
    row_keys.low += at, key_sums.low += at, row_values.low += at + (kPassing * kRow >> 4), value_sums.low += at + (kPassing * kRow >> 4);
    const bool dense = stages.is_dense(tile);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float s[kTiles][4], d[kTiles][4];
      Weights<T, kTiles> probabilities, dlogits;
      begin_products(s, d);
      wgmma_tiles<T>(s, own_keys, row_keys);
      commit_products();
      wgmma_tiles<T>(d, own_values, row_values);
      commit_products();
      const std::uint32_t bits_at = own_masks + 4 * (2 * (tile - landmark_tiles) + half);
      const unsigned bits[2] = {dense ? ~0u : load_shared_byte(bits_at), dense ? ~0u : load_shared_byte(bits_at + 32 * pitch)};
      const std::uint32_t its_statistics = statistics + 8 * (tile * kPassing + half * kStep + 2 * t);  // lse and delta of a lane's two columns of eight
      wait_products<G, 1>(s);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 two = load_shared4(its_statistics + 64 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = exponential<T>(has(bits[i / 2], j, i % 2) ? fmaf(s[j][i], p.scale * kLogit<T>, -(i & 1 ? two.z : two.x)) : -kInfinity);
#pragma unroll
        for (int i = 0; i < 2; ++i) probabilities.packed[j][i] = pack<T>(s[j][2 * i], s[j][2 * i + 1]);
        __syncwarp();  // else all statistics are loaded first, and registers spill
      }
      wait_products<G, 0>(d);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 two = load_shared4(its_statistics + 64 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) d[j][i] = s[j][i] * kRescale * (d[j][i] - (i & 1 ? two.w : two.y));
#pragma unroll
        for (int i = 0; i < 2; ++i) dlogits.packed[j][i] = pack<T>(d[j][2 * i], d[j][2 * i + 1]);
        __syncwarp();
      }
      begin_products(dk, dv, probabilities.packed, dlogits.packed);
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        wgmma_weighted(dv, probabilities, i, value_sums.at(16 * i * kRow));
        wgmma_weighted(dk, dlogits, i, key_sums.at(16 * i * kRow));
      }
      commit_products();
      wait_products<G, 0>(dk, dv);
      row_keys.advance(kStep * kRow), row_values.advance(kStep * kRow), key_sums.advance(kStep * kRow), value_sums.advance(kStep * kRow);
    }
    stages.advance();
  }
  __syncthreads();
  const auto index = [&](int i) { return row0 + i < L ? row0 + i : -1; };
  const float k_factor[2] = {p.scale * kUnshifted, p.scale * kUnshifted}, v_factor[2] = {power_of_2(-kProbabilityShift<T>), power_of_2(-kProbabilityShift<T>)};
  store_rows<C>(k.from_row(own0), dk, k_factor, x.D, lane, head_rows<T>(p.dk, b, h, keys.start), p.dk.row, index);
  store_rows<C>(k.from_row(own0), dv, v_factor, x.D, lane, head_rows<T>(p.dv, b, h, keys.start), p.dv.row, index);
#endif
}

int row_bytes(const Problem& x) { return kRest + 4 * (masked_gradient_pitch(x) * kOwn + round_up(2 * ceil_div(x.M, kPassing), 4)); }
int key_bytes(const Problem& x) { return kRest + 8 * passing_rows(x) + 4 * key_mask_pitch(x) * kOwn; }

// f(element, blocks, those of a head)
template <class F> cudaError_t by_blocks(const Problem& x, const Sequences& rows, F&& f) {
  const int parts = ceil_div(rows.max_length, kOwn);
  return dispatch_16_bits(x.dtype, [&](auto element) { return f(element, static_cast<unsigned>(x.B) * x.H * parts, parts); });
}

}  // namespace

// Words of an expert's bits, and of a query's in shared memory: whole chunks of 16 bytes, an odd number of them, so that banks are free of conflicts.
int masked_gradient_pitch(const Problem& x) { return (ceil_div(ceil_div(std::max(x.keys.max_length, x.M), kStep), 4) | 1) * 4; }

// H200: by masks a query with one key or landmark takes some 4 ps; by lists a key of an expert takes 0.42 ns up to 64 landmarks and keys, in one pass, 0.65 ns up to 64 landmarks,
// 0.95 ns above, and as long where there are fewer than 32. Backward by masks against that, 192 to 1536 heads: 44 to 68 % (289 and 401 tokens, 64 of both; 289, 49), 80 to 86 %
// (1025, with 80 of both, 100 and 64, 49 and 200), 47 % (1025, 128), 30 % (577, 100), 7 % (197, 128). Of few blocks the kernels of one pass take less: 289 and 401 tokens with 64
// of both 121 and 160 % with 12 heads, 89 and 93 % with 48.
bool fits_masked_gradient(const Problem& x, float scale, float landmark_scale) {
  if (!has_warpgroups(x.dtype, x.D) || x.D > kDP || x.D % kCudaHeadDimStep != 0 || x.s != 1 || x.H != x.Hkv || !have_ratio(landmark_scale, scale)) return false;
  const int queries = round_up(x.queries.max_length, kOwn), keys = round_up(x.keys.max_length, kOwn);
  const bool one_pass = x.M <= 64 && x.K <= 64;  // of lists, over queries and units
  const std::int64_t listed = std::int64_t(x.M) * std::max(x.K, 32) * (x.M > 64 ? 235 : one_pass ? 105 : 160), masked = std::int64_t(queries) * (keys + x.M);
  int most;
  return listed > masked && (!one_pass || std::int64_t(x.B) * x.H * (queries / kOwn) >= 192) && device_attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess &&
         std::max(row_bytes(x), key_bytes(x)) <= most;
}

cudaError_t launch_masked_row_gradient(const MaskedGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const std::int64_t experts = std::int64_t(x.B) * x.H * x.M;
  const unsigned by_warps = static_cast<unsigned>((experts + kExpertWarps - 1) / kExpertWarps);
  if (cudaError_t status = launch(expert_masks_kernel, by_warps, 32 * kExpertWarps, 4 * kExpertWarps * p.pitch, stream, p)) return status;
  return by_blocks(x, x.queries, [&](auto element, unsigned blocks, int parts) {
    return launch(masked_row_gradient_kernel<decltype(element)>, blocks, kThreads, row_bytes(x), stream, p, parts);
  });
}

cudaError_t launch_masked_key_gradient(const MaskedGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return by_blocks(x, x.keys, [&](auto element, unsigned blocks, int parts) {
    return launch(masked_key_gradient_kernel<decltype(element)>, blocks, kThreads, key_bytes(x), stream, p, parts);
  });
}

}  // namespace mita
