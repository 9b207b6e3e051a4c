// Short sequences: the whole forward pass of one (batch, head) by one block, which holds its queries, keys and values in shared memory;
// two blocks fill a multiprocessor. The warps of a block take items of one phase after the other, and meet between phases:
//   1. pool: 16 bytes of a landmark, the mean of its tokens, by a thread
//   2. route: the experts of 16 queries; score: 16 landmarks and 32 keys
//   3. order the queries by expert; compress: the values of 16 landmarks; select: the keys of 2 experts
//   4. attend: up to 16 queries of one expert. Units are operands where they lie, and the output replaces the queries
#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kDP = 64;
constexpr int kUnits = 32, kTiles = kUnits / 8;  // of one tile

// Shared memory of a block: where what begins, in bytes; queries at 0. Tiles are read in whole pieces of 16 or 32 rows: what lies behind
// queries, keys, scores and landmarks is masked, but behind values must be zeros. counts: queries of every expert. entries [N]: the queries
// in the order of their experts, of which a tile is a piece. indices [M, K], experts [N] and entries are 16 bits each.
struct Memory {
  int k, v, scores, landmarks, compressed, tiles, tile_count, counts, indices, experts, entries, bytes;
  int pitch;  // floats from one row of scores to the next: no bank conflicts in storing them
  explicit Memory(const Problem& x) {
    constexpr int kRow = kDP * 2;
    const int N = x.queries.max_length, L = x.keys.max_length;
    pitch = round_up(L - 8, 32) + 8;
    k = round_up(N, 8) * kRow;
    v = k + round_up(L, 8) * kRow;
    scores = v + round_up(L, kUnits) * kRow;
    landmarks = scores + round_up(x.M * pitch * 4, kPanel);
    compressed = landmarks + round_up(x.M, 8) * kRow;
    tiles = compressed + round_up(x.M, kUnits) * kRow;
    tile_count = tiles + (N / 16 + std::min(N, x.M)) * static_cast<int>(sizeof(Work));
    counts = tile_count + 4;
    indices = counts + x.M * 4;
    experts = indices + x.M * x.K * 2;
    entries = experts + N * 2;
    bytes = entries + N * 2;
  }
};

template <class T> __global__ void __launch_bounds__(kThreads, 2) short_attention_kernel(const ShortParams p, const Memory layout) {
  using C = Config<T, kDP>;
  constexpr int kChunks = kDP / kChunk<T>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const auto tile = [&](int at) { return Tile<T, kDP>{window.address + at}; };
  const auto q = tile(0), k = tile(layout.k), v = tile(layout.v), z = tile(layout.landmarks), c = tile(layout.compressed);
  float* const scores = reinterpret_cast<float*>(memory + layout.scores);
  int &tile_count = *reinterpret_cast<int*>(memory + layout.tile_count), *const counts = reinterpret_cast<int*>(memory + layout.counts);
  Work* const tiles = reinterpret_cast<Work*>(memory + layout.tiles);
  auto *const indices = reinterpret_cast<std::uint16_t*>(memory + layout.indices), *const experts = reinterpret_cast<std::uint16_t*>(memory + layout.experts),
             *const entries = reinterpret_cast<std::uint16_t*>(memory + layout.entries);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int bh = blockIdx.x, b = bh / x.H, h = bh % x.H, M = x.M;
  const Span queries = span(x.queries, b), keys = span(x.keys, b);
  const int N = queries.length, L = keys.length, chosen = min(x.K, L);
  const auto load = [&](const Tile<T, kDP>& to, const Rows& rows, int head, const Span& from, int count) {
    load_sequence<T, kDP, kThreads>(to, rows, b, head, from, x.D, count);
  };
  load(q, p.q, h, queries, round_up(N, 8));
  if (!p.pool) load(z, p.landmarks, h, {0, M}, round_up(M, 8));
  commit_loads();
  load(k, p.k, h / (x.H / x.Hkv), keys, round_up(L, 8));
  load(v, p.v, h / (x.H / x.Hkv), keys, round_up(L, kUnits));
  commit_loads();
  for (int m = threadIdx.x; m < M; m += kThreads) counts[m] = 0;
  for (int i = threadIdx.x; i < round_up(M, kUnits) * kChunks; i += kThreads) store_shared4(c.address + 16 * i, make_uint4(0, 0, 0, 0));
  wait_loads<1>();
  __syncthreads();

  // 1. pool
  if (p.pool) {
    const Windows w = windows_of(p.windows, x.queries, N);
    const int shares = pool_shares<T>(x, w);
    T* const landmarks = head_rows<T>(p.landmarks, b, h, 0);
    for (int i = threadIdx.x; i < M * kChunks; i += kThreads) {
      const int m = i / kChunks, chunk = i % kChunks;
      const Vector<T> mean = mean_by_thread<T>(PooledTokens::of<int>(w, m), shares, [&](int n) {
        const float4 four = load_shared4(q.chunk(n, chunk));
        return reinterpret_cast<const Vector<T>&>(four);
      });
      store_shared4(z.chunk(m, chunk), mean.bits);
      if (chunk * kChunk<T> < x.D) *reinterpret_cast<uint4*>(landmarks + m * x.D + chunk * kChunk<T>) = mean.bits;
    }
  }
  wait_loads<0>();
  __syncthreads();

  // 2. route and score
  const int landmark_tiles = ceil_div(M, 16), key_tiles = ceil_div(L, kUnits), query_tiles = ceil_div(N, 16);
  for (int item = warp; item < query_tiles + landmark_tiles * key_tiles; item += kWarps) {
    SharedRows<T, kDP> rows;
    float s[kTiles][4];
    if (item < query_tiles) {
      rows.load(q.from_row(16 * item), lane);
      BestLandmark best;
#pragma unroll 1
      for (int first = 0; first < M; first += kUnits) {
        product<C>(s, rows, z.from_row(first), lane);
        best.update(s, first, M);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int n = 16 * item + g + 8 * i; t == 0 && n < N) {
          const int expert = best.of_row(i);
          experts[n] = static_cast<std::uint16_t>(expert);
          p.experts[std::int64_t(bh) * x.queries.max_length + n] = expert;
          atomicAdd(&counts[expert], 1);
        }
    } else {
      const int first = (item - query_tiles) / landmark_tiles * kUnits, m0 = (item - query_tiles) % landmark_tiles * 16;
      rows.load(z.from_row(m0), lane);
      product<C>(s, rows, k.from_row(first), lane);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int m = m0 + g + 8 * i; m < M)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
            if (const int key = first + 8 * n + 2 * t; key < L) *reinterpret_cast<float2*>(scores + m * layout.pitch + key) = make_float2(s[n][2 * i], s[n][2 * i + 1]);
    }
  }
  for (int n = N + threadIdx.x; n < x.queries.max_length; n += kThreads) p.experts[std::int64_t(bh) * x.queries.max_length + n] = -1;
  __syncthreads();

  // 3. order the queries, compress, select
  for (int item = warp; item <= landmark_tiles + ceil_div(opaque(M), 2); item += kWarps) {  // opaque: registers
    if (item > landmark_tiles) {
      const int m = 2 * (item - landmark_tiles - 1) + lane / 16, length = m < M ? opaque(L) : 0;
      const float* row = scores + m * layout.pitch;
      std::uint16_t* const list = indices + m * x.K;
      select_row<16, kShortKeys>(length, min(x.K, length), [&](int key) { return *reinterpret_cast<const float4*>(row + key); },
                                [&](int i, int key) { list[i] = static_cast<std::uint16_t>(key); });
    } else if (item > 0) {
      const int m = 16 * (item - 1) + opaque(g);
      OnlineSoftmax<T> softmax;
      float values[kDP / 8][4];
      clear(values);
      const auto row = [&](int i) { return window.address + layout.scores + 4 * (min(m + 8 * i, M - 1) * layout.pitch + 2 * t); };
      const std::uint32_t upper = row(0), lower = row(1);
#pragma unroll 1
      for (int first = 0; first < L; first += kUnits) {
        float s[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 one = load_shared2(upper + 4 * first + 32 * n), other = load_shared2(lower + 4 * first + 32 * n);
          s[n][0] = one.x, s[n][1] = one.y, s[n][2] = other.x, s[n][3] = other.y;
        }
        const float positive = positive_scale(s, p.scale * kLogit<T>);
        if (first + kUnits > L) mask_logits(s, L - first, lane);
        softmax.update(s, positive, values);
        Weights<T, kTiles> weights(s);
        add_weighted_rows<C>(values, weights, v.from_row(first), lane);
      }
      softmax.finish();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (m + 8 * i >= M) continue;
        const float factor = softmax.factor(i);
        if (t == 0) p.landmark_lse[std::int64_t(bh) * M + m + 8 * i] = softmax.lse(i);
#pragma unroll
        for (int n = 0; n < kDP / 8; ++n) store_shared(c.chunk(m + 8 * i, n) + 4 * t, pack<T>(values[n][2 * i] * factor, values[n][2 * i + 1] * factor));
      }
    } else {  // the queries in the order of their experts, and the tiles of all experts
      const int tiles_made = order_by_expert(experts, N, counts, M, entries, tiles);
      if (lane == 0) tile_count = tiles_made;
    }
  }
  __syncthreads();

  // 4. attend. Head and batch are not kept until here: registers.
  const int head = opaque(blockIdx.x), batch = head / x.H;
  T* const out_rows = head_rows<T>(p.out, batch, head - batch * x.H, span(x.queries, batch).start);
  for (int i = threadIdx.x; i < M * x.K; i += kThreads)
    p.indices[std::int64_t(head) * M * x.K + i] = chosen == x.K || i % x.K < chosen ? indices[i] : -1;
  for (int i = threadIdx.x; i < M * kChunks; i += kThreads)
    if (const int m = i / kChunks, chunk = i % kChunks; chunk * kChunk<T> < x.D)
      *reinterpret_cast<float4*>(head_rows<T>(p.compressed, batch, head - batch * x.H, m) + chunk * kChunk<T>) = load_shared4(c.chunk(m, chunk));
  for (int item = warp; item < tile_count; item += kWarps) {
    const Work work = tiles[item];
    const std::uint16_t* const list = entries + work.first;
    SharedRows<T, kDP> rows;
    rows.load(ListedRows<T, kDP, 16>{q, window.of(*list), work.entries}, lane);
    OnlineSoftmax<T> softmax;
    float out[kDP / 8][4];
    clear(out);
    const auto attend = [&](const auto& unit_keys, const auto& unit_values, int count, float scale) {
      float s[kTiles][4];
      product<C>(s, rows, unit_keys, lane);
      const float positive = positive_scale(s, scale * kLogit<T>);
      if (count < kUnits) mask_logits(s, count, lane);
      softmax.update(s, positive, out);
      Weights<T, kTiles> weights(s);
      add_weighted_rows<C>(out, weights, unit_values, lane);
    };
#pragma unroll 1
    for (int first = 0; p.shared && first < M; first += kUnits) attend(z.from_row(first), c.from_row(first), M - first, p.landmark_scale);
#pragma unroll 1
    for (int first = 0; first < chosen; first += kUnits) {
      const std::uint32_t of_expert = window.of(indices[work.expert * x.K + first]);
      attend(ListedRows<T, kDP, kUnits>{k, of_expert, chosen - first}, ListedRows<T, kDP, kUnits>{v, of_expert, chosen - first}, chosen - first, p.scale);
    }
    softmax.finish();
    __syncwarp();  // all have read what is now replaced
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i >= work.entries) continue;
      const int n = list[g + 8 * i];
      const float factor = softmax.factor(i);
      if (t == 0) p.lse[std::int64_t(head) * x.queries.max_length + n] = softmax.lse(i);
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d) store_shared(q.chunk(n, d) + 4 * t, pack<T>(out[d][2 * i] * factor, out[d][2 * i + 1] * factor));
    }
    __syncwarp();
    if (const int chunk = lane % kChunks; chunk * kChunk<T> < x.D)
      for (int i = lane / kChunks; i < work.entries; i += 32 / kChunks)
        *reinterpret_cast<float4*>(out_rows + list[i] * p.out.row + chunk * kChunk<T>) = load_shared4(q.chunk(list[i], chunk));
  }
}

}  // namespace

// Two blocks must fit on a multiprocessor: alone, a block waits too often.
bool fits_short_attention(const Problem& x) {
  if (x.dtype == Dtype::fp32 || x.D > kDP || x.D % kCudaHeadDimStep != 0 || x.s != 1 || x.keys.max_length > kShortKeys || x.queries.max_length > kShortKeys) return false;
  int most;
  return device_attribute(most, cudaDevAttrMaxSharedMemoryPerMultiprocessor) == cudaSuccess && 2 * (Memory(x).bytes + kReservedMemory) <= most;
}

cudaError_t launch_short_attention(const ShortParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_short_attention(x)) return cudaErrorInvalidValue;
  return dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      const Memory layout(x);
      return launch(short_attention_kernel<T>, static_cast<unsigned>(x.B) * x.H, kThreads, layout.bytes, stream, p, layout);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mita
