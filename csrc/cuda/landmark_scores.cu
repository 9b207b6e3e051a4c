// Landmark scores and compressed values in one pass over the keys and values.
//
// score_compress: one block per (batch, head, part of the key range, group of landmarks); one warp owns 16 landmarks and
// walks over key tiles that the block brings in with cp.async, two stages deep:
//   S = Z k^T  -> the largest of every eight, or all of them, unscaled in fp32: the selection never sees a rounded score
//   online softmax over scale * S, O += P v  -> partial values, maximum and sum of this part
// The keys of a tile are permuted, so that the columns of one lane are consecutive keys.
// combine: one warp per landmark merges the parts in their order, rounds the value once and writes the lse.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kWarps = kHalf ? 8 : 4;   // at most; fewer where there are fewer landmarks
  static constexpr int kKeys = kHalf ? 64 : 32;  // of one tile
  static constexpr int kLaneKeys = kKeys / 4;    // of one lane
  struct Shared {
    struct {
      TileStorage<typename C::T, C::DP, kKeys> k, v;
    } stage[2];
    TileStorage<typename C::T, C::DP, 16 * kWarps> landmarks;  // last: only the rows in use are allocated
  };
  static_assert(sizeof(Shared) <= 96 * 1024);
};

template <class C>
__global__ void __launch_bounds__(32 * Layout<C>::kWarps, C::kGroups && C::DP == 64 ? 2 : 1) score_compress_kernel(const LandmarkParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kKeys = L::kKeys, kTiles = kKeys / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int block_rows = blockDim.x / 2, groups = ceil_div(x.M, block_rows);
  const int m0 = (blockIdx.x % groups) * block_rows, split = blockIdx.x / groups % p.splits, bh = blockIdx.x / groups / p.splits;
  const int b = bh / x.H, h = bh % x.H;
  const Span keys = span(x.keys, b);
  const int tiles = ceil_div(keys.length, kKeys), per_split = ceil_div(tiles, p.splits);
  const int first_tile = split * per_split, last_tile = min(tiles, first_tile + per_split);

  const auto load_stage = [&](int tile) {
    auto& stage = shared.stage[tile & 1];
    const int head = h / (x.H / x.Hkv), key0 = tile * kKeys;
    // Tile row 8n + 2t + i is key t * kLaneKeys + 2n + i. A ragged tile lacks the last of both.
    const auto key_of = [key0, length = keys.length](int row) {
      const int key = key0 + row / 2 % 4 * L::kLaneKeys + row / 8 * 2 + row % 2;
      return key < length ? key : -1;
    };
    load_rows<T, DP>(kKeys, x.D, key0 + kKeys <= keys.length ? kKeys : kKeys - 1, key_of,
                     Copy<T, DP>(stage.k.in(window), p.k, b, head, keys.start), Copy<T, DP>(stage.v.in(window), p.v, b, head, keys.start));
  };

  load_rows<T, DP>(block_rows, x.D, x.M - m0, [m0](int i) { return m0 + i; }, Copy<T, DP>(shared.landmarks.in(window), p.landmarks, b, h, 0));
  if (first_tile < last_tile) load_stage(first_tile);
  commit_loads();
  wait_loads<0>();
  __syncthreads();

  OwnRows<C> landmarks;
  landmarks.load(shared.landmarks.in(window).from_row(own_rows<C>(warp)), lane);
  OnlineSoftmax<T> softmax;
  float values[DP / 8][4];
  clear(values);
  const float scale = p.scale * kLogit<T>;
  const int m = m0 + 16 * warp + g;
  const bool all_scores = p.group == 1;
  const std::int64_t pitch = score_pitch(x.keys.max_length, p.group);
  float* const row_scores = p.scores + (std::int64_t(bh) * x.M + m) * pitch;

  for (int tile = first_tile; tile < last_tile; ++tile) {
    if (tile + 1 < last_tile) load_stage(tile + 1);
    commit_loads();
    wait_loads<1>();
    __syncthreads();
    auto& stage = shared.stage[tile & 1];
    float s[kTiles][4];
    product<C>(s, landmarks, stage.k.in(window), lane);
    wait_products<C, 0>(s);

    const int lane_key = tile * kKeys + t * L::kLaneKeys;
    const auto each_absent = [&](auto&& f) {
      if ((tile + 1) * kKeys > keys.length)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (lane_key + 2 * n + i % 2 >= keys.length) f(s[n][i]);
    };
    each_absent([](float& score) { score = NAN; });
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (m + 8 * i < x.M) {
        float* scores = row_scores + 8 * i * pitch + (all_scores ? lane_key : lane_key / kGroupKeys);
        if (all_scores) {
#pragma unroll
          for (int n = 0; n < kTiles; n += 2)
            *reinterpret_cast<float4*>(scores + 2 * n) = make_float4(s[n][2 * i], s[n][2 * i + 1], s[n + 1][2 * i], s[n + 1][2 * i + 1]);
        } else {
          const auto highest = [&](int first) {  // looks over NaN, unless all are
            float score = fmaxf(s[first][2 * i], s[first][2 * i + 1]);
#pragma unroll
            for (int n = first + 1; n < first + kGroupKeys / 2; ++n) score = fmaxf(score, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            return score;
          };
          if constexpr (kTiles == kGroupKeys) *reinterpret_cast<float2*>(scores) = make_float2(highest(0), highest(kGroupKeys / 2));
          else *scores = highest(0);
        }
      }
    const float positive = positive_scale(s, scale);
    each_absent([](float& logit) { logit = -kInfinity; });
    softmax.update(s, positive, values);
    Weights<T, kTiles> weights(s);
    add_weighted_rows<C>(values, weights, stage.v.in(window), lane);
    wait_products<C, 0>(values);
    __syncthreads();
  }

  softmax.finish();
  const std::int64_t row0 = (std::int64_t(bh) * p.splits + split) * x.M;
  const float one[2] = {1.0f, 1.0f};
  store_partial_rows<DP>(values, one, x.D, lane, [&](int i) {
    const int row = m0 + 16 * warp + i;
    return row < x.M ? p.partial_values + (row0 + row) * x.D : nullptr;
  });
  if (t == 0)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (m + 8 * i < x.M) *reinterpret_cast<float2*>(p.partial_state + 2 * (row0 + m + 8 * i)) = make_float2(softmax.maximum[i], softmax.sum[i]);
}

constexpr int kCombineWarps = 4;

template <class T> __global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(const LandmarkParams p) {
  const Problem& x = p.problem;
  const std::int64_t row = std::int64_t(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t bh = row / x.M, m = row % x.M;
  const auto part = [&](int split) { return (bh * p.splits + split) * x.M + m; };

  float maximum = -kInfinity;
#pragma unroll 8
  for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, p.partial_state[2 * part(i)]);
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  float sum = 0.0f, value[kMaxCudaHeadDim / 32] = {};
#pragma unroll 8
  for (int i = 0; i < p.splits; ++i) {
    const float weight = exponential<T>(p.partial_state[2 * part(i)] - base);
    sum += weight * p.partial_state[2 * part(i) + 1];
#pragma unroll
    for (int j = 0; j < kMaxCudaHeadDim / 32; ++j)
      if (lane + 32 * j < x.D) value[j] += weight * p.partial_values[part(i) * x.D + lane + 32 * j];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int j = 0; j < kMaxCudaHeadDim / 32; ++j)
    if (lane + 32 * j < x.D) static_cast<T*>(p.compressed)[row * x.D + lane + 32 * j] = from_float<T>(value[j] * factor);
  if (lane == 0) p.lse[row] = log_sum<T>(maximum, sum);
}

}  // namespace

cudaError_t launch_landmark_scores(const LandmarkParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x.dtype, x.D, x.M > 48, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const int warps = std::min(L::kWarps, C::kGroups ? ceil_div(x.M, 64) * 4 : ceil_div(x.M, 16)), groups = ceil_div(x.M, 16 * warps);
    const std::size_t bytes = sizeof(typename L::Shared) - (L::kWarps - warps) * 16 * C::DP * sizeof(typename C::T);
    if (cudaError_t status = allow_shared_memory(score_compress_kernel<C>, sizeof(typename L::Shared))) return status;
    score_compress_kernel<C><<<static_cast<unsigned>(x.B) * x.H * p.splits * groups, 32 * warps, bytes, stream>>>(p);
    if (cudaError_t status = cudaGetLastError()) return status;
    const std::int64_t rows = std::int64_t(x.B) * x.H * x.M;
    combine_kernel<typename C::T><<<static_cast<unsigned>((rows + kCombineWarps - 1) / kCombineWarps), 32 * kCombineWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
