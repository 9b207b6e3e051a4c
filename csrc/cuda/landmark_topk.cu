// The top-K keys of every landmark, exactly in the total order (larger score, then lower key index; NaN last).
//
// A candidate is one 64-bit number, ordered(score) above the complement of its key index: all candidates differ, so every
// comparison is decided, and nothing depends on the timing of threads. Indices come out ascending; -1 fills the rest.
//
// short rows: of up to kShortKeys scores eight lanes per landmark, of up to kWarpScores one warp, the scores in its registers.
// long rows: of each group of consecutive keys only the largest score is known. The K best keys lie in the K best groups, in the
//   total order of maxima and group indices: K groups in front of a key's would hold K keys in front of it. One block per landmark
//   1. takes the K best groups. Where there are many, a rank of a stratified sample so low that fewer than K maxima above it are
//      a 6-sigma event cuts them down first; should it have left fewer than K or more than fit, all of them are looked at,
//   2. computes the scores of their keys again,
//   3. takes the K best of those.
//   Rows of up to kWarpScores maxima, where K is at most kWarpTopk, are the work of one warp in the same three steps.
#include <cub/block/block_radix_sort.cuh>

#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

using u32 = std::uint32_t;
using u64 = unsigned long long;
constexpr u32 kAllBits = 0xffffffffu;

__device__ u64 candidate(u32 ordered_score, int index) { return u64(ordered_score) << 32 | (kAllBits - static_cast<u32>(index)); }
// The lowest score that a candidate at or above this one can have; -infinity where that is no number.
__device__ float least_score(u64 candidate) {
  const float score = score_of(static_cast<u32>(candidate >> 32));
  return score == score ? score : -kInfinity;
}
__device__ u32 index_of(u64 candidate) { return kAllBits - static_cast<u32>(candidate); }

constexpr int kThreads = 128;  // few: most of the time is latency, and many rows hide it
constexpr int kWarpScores = 2048, kWarpTopk = 64;

// The keys of groups of them: key i of the list.
struct GroupedKeys {
  const u32* groups;
  __device__ int operator[](int i) const { return static_cast<int>(groups[i / kGroupKeys] * kGroupKeys) + i % kGroupKeys; }
};

// The scores of `count` keys with landmark m, by THREADS threads; put(i, key, score). 16-bit elements: a warp takes 16 keys at once, as a
// product with eight times the same landmark. A lane has 16-byte chunks of two rows straight from memory; products so meet the columns
// in an order of their own. fp32: a key has four lanes, each every fourth chunk of its row.
template <class C, int THREADS, class Put> __device__ void score_keys(const LandmarkParams& p, int bh, int m, const GroupedKeys& keys, int count, Put put) {
  using T = typename C::T;
  const Problem& x = p.problem;
  const int b = bh / x.H, h = bh % x.H, thread = threadIdx.x % THREADS, lane = thread % 32, t = lane % 4, chunks = x.D / kChunk<T>;
  const Span all = span(x.keys, b);
  const T *rows = head_rows<T>(p.k, b, h / (x.H / x.Hkv), all.start), *landmark = head_rows<T>(p.landmarks, b, h, m);
  constexpr int kChunks = C::DP / kChunk<T> / 4, kAtOnce = kChunks > 2 ? 1 : 2;  // of a lane; of rows, by registers
  const auto load = [&](Vector<T>(&to)[kChunks], const T* row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) to[c] = t + 4 * c < chunks ? load_vector(row + (t + 4 * c) * kChunk<T>) : Vector<T>{};
  };
  const auto row_of = [&](int i) { return rows + min(keys[i], all.length - 1) * p.k.row; };
  Vector<T> z[kChunks];
  load(z, landmark);
  if constexpr (sizeof(T) == 2) {
#pragma unroll(kAtOnce)
    for (int first = thread / 32 * 16; first < count; first += THREADS / 2) {
      const int own[2] = {min(first + lane / 4, count - 1), min(first + lane / 4 + 8, count - 1)};
      Vector<T> upper[kChunks], lower[kChunks];
      load(upper, row_of(own[0]));
      load(lower, row_of(own[1]));
      float score[4] = {};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const std::uint32_t one[4] = {upper[c].bits.x, lower[c].bits.x, upper[c].bits.y, lower[c].bits.y}, other[4] = {upper[c].bits.z, lower[c].bits.z, upper[c].bits.w, lower[c].bits.w};
        mma<T>(score, one, z[c].bits.x, z[c].bits.y);
        mma<T>(score, other, z[c].bits.z, z[c].bits.w);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (t == 0 && first + lane / 4 + 8 * i < count) put(own[i], keys[own[i]], score[2 * i]);
    }
  } else {
#pragma unroll(kAtOnce)
    for (int first = thread / 4; first - lane / 4 < count; first += THREADS / 4) {
      const int own = min(first, count - 1);
      Vector<T> v[kChunks];
      load(v, row_of(own));
      float score = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) score = fmaf(z[c].element[e], v[c].element[e], score);
      score += __shfl_xor_sync(kAllLanes, score, 1);
      score += __shfl_xor_sync(kAllLanes, score, 2);
      if (t == 0 && first < count) put(own, keys[own], score);
    }
  }
}

// ---- rows in registers ---------------------------------------------------------------------------------------------

template <int LANES, int MOST> __global__ void __launch_bounds__(kThreads) topk_rows_kernel(const LandmarkParams p) {
  const Problem& x = p.problem;
  const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / LANES;
  const bool exists = row < std::int64_t(x.B) * x.H * x.M;
  const int length = exists ? span(x.keys, static_cast<int>(row / x.M / x.H)).length : 0, k = min(x.K, length);
  const float* scores = p.scores + row * score_pitch(x.keys.max_length, 1);
  std::int32_t* indices = p.indices + row * x.K;
  if (exists)
    for (int i = k + threadIdx.x % LANES; i < x.K; i += LANES) indices[i] = -1;
  select_row<LANES, MOST>(length, k, [&](int key) { return *reinterpret_cast<const float4*>(scores + key); },
                          [&](int i, int key) { indices[i] = key; });
}

template <class C, int MOST> __global__ void __launch_bounds__(kThreads) topk_groups_kernel(const LandmarkParams p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ __align__(16) float scores_of[kWarps][kWarpTopk * kGroupKeys];
  __shared__ u32 groups_of[kWarps][kWarpTopk];
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + warp;
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  const int m = static_cast<int>(row % x.M), bh = static_cast<int>(row / x.M), b = bh / x.H;
  const int length = span(x.keys, b).length, k = min(x.K, length), row_groups = ceil_div(length, kGroupKeys), groups = min(x.K, row_groups);
  std::int32_t* indices = p.indices + row * x.K;
  float* const scores = scores_of[warp];
  u32* const group = groups_of[warp];
  for (int i = k + lane; i < x.K; i += 32) indices[i] = -1;
  if (k == 0) return;
  const float* maxima = p.scores + row * score_pitch(x.keys.max_length, kGroupKeys);
  select_row<32, MOST>(row_groups, groups, [&](int i) { return *reinterpret_cast<const float4*>(maxima + i); }, [&](int i, int j) { group[i] = j; });
  __syncwarp();
  const GroupedKeys keys{group};
  const int count = groups * kGroupKeys - (static_cast<int>(group[groups - 1]) == row_groups - 1 ? row_groups * kGroupKeys - length : 0);
  score_keys<C, 32>(p, bh, m, keys, count, [&](int i, int, float score) { scores[i] = score; });
  __syncwarp();
  select_row<32, kWarpTopk * kGroupKeys>(count, k, [&](int i) { return *reinterpret_cast<const float4*>(scores + i); }, [&](int i, int j) { indices[i] = keys[j]; });
}

// ---- long rows -----------------------------------------------------------------------------------------------------

constexpr int kMinCapacity = 2048, kMaxCapacity = 11264;  // candidates: 88 KB, within the 99 KB of the smallest devices
constexpr int kCountedTopk = 256;     // up to here the chosen are put in order by counting
using Sort = cub::BlockRadixSort<u32, kThreads, kMaxTopk / kThreads>;

struct Selection {  // scratch of the functions below
  u32 histogram[256];
  u64 prefix, differing;
  int rank, bucket, count;
};

// The k-th largest of the n different numbers value(0..n-1): radix digits from the first bit in which they differ, until a digit's
// bucket is taken whole. Returns a number that exactly k of them reach.
template <class Value> __device__ u64 kth_largest(Selection& s, int n, int k, Value value) {
  const u64 any = value(0);
  u64 differing = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) differing |= value(i) ^ any;
  if (threadIdx.x == 0) s.differing = 0;
  __syncthreads();
  const u32 high = __reduce_or_sync(kAllLanes, static_cast<u32>(differing >> 32)), low = __reduce_or_sync(kAllLanes, static_cast<u32>(differing));
  if (threadIdx.x % 32 == 0) atomicOr(&s.differing, u64(high) << 32 | low);
  __syncthreads();
  int known = 64 - __clzll(static_cast<long long>(s.differing | 1));  // bits from here on are the same in all
  if (threadIdx.x == 0) s.prefix = known < 64 ? any >> known << known : 0, s.rank = k;
  for (;;) {
    const int shift = max(known - 8, 0);
    for (int i = threadIdx.x; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    const u64 prefix = s.prefix;
    const int rank = s.rank;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const u64 v = value(i);
      if (known == 64 || v >> known == prefix >> known) atomicAdd(&s.histogram[(v >> shift) & ((1u << (known - shift)) - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane i sums the digits 255-8i .. 248-8i, highest first, and finds the one that holds the rank
      u32 sum = 0;
      for (int j = 0; j < 8; ++j) sum += s.histogram[255 - 8 * threadIdx.x - j];
      u32 through = sum;
      for (int d = 1; d < 32; d <<= 1) {
        const u32 other = __shfl_up_sync(kAllLanes, through, d);
        if (static_cast<int>(threadIdx.x) >= d) through += other;
      }
      u32 above = through - sum;
      if (above < static_cast<u32>(rank) && through >= static_cast<u32>(rank)) {
        int digit = 255 - 8 * threadIdx.x;
        while (above + s.histogram[digit] < static_cast<u32>(rank)) above += s.histogram[digit--];
        s.prefix = prefix | u64(digit) << shift;
        s.rank = rank - static_cast<int>(above);
        s.bucket = static_cast<int>(s.histogram[digit]);
      }
    }
    __syncthreads();
    known = shift;
    if (s.rank == s.bucket || shift == 0) return s.prefix;
  }
}

// The number of a row's K best that fall into a sample of one in `stride` is binomial with mean K / stride; the threshold is
// the first rank that 6 standard deviations do not reach.
struct Sampling {
  int stride, rank, capacity;
};
__host__ __device__ inline Sampling sampling(int groups, int K) {
  if (groups <= kMinCapacity) return {1, 0, groups};
  const int stride = sample_stride(groups);
  const float mean = static_cast<float>(K) / stride;
  const int rank = static_cast<int>(mean + 6.0f * sqrtf(mean) + 5.0f);
  return {stride, rank, min(kMaxCapacity, max(max(kMinCapacity, groups / stride), 2 * stride * rank))};
}

// The indices of the k largest candidates, in any order.
template <class Value> __device__ void choose(Selection& s, u32* chosen, int n, int k, Value value) {
  const u64 kth = kth_largest(s, n, k, value);
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (const u64 c = value(i); c >= kth) chosen[atomicAdd(&s.count, 1)] = index_of(c);
  __syncthreads();
}

// The k best groups of a row of maxima.
__device__ void choose_groups(Selection& s, u32* chosen, u64* candidates, const float* maxima, int groups, int k, const Sampling& plan) {
  const auto in_row = [&](int i) { return candidate(ordered(maxima[i]), i); };
  const auto in_candidates = [&](int i) { return candidates[i]; };
  if (groups <= plan.capacity) {
    for (int i = threadIdx.x; i < groups; i += kThreads) candidates[i] = in_row(i);
    __syncthreads();
    return choose(s, chosen, groups, k, in_candidates);
  }
  const int samples = groups / plan.stride;
  for (int i = threadIdx.x; i < samples; i += kThreads) candidates[i] = in_row(sampled_group(i, plan.stride));
  __syncthreads();
  const u64 threshold = samples > plan.rank ? kth_largest(s, samples, plan.rank, in_candidates) : 0;
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();

  // Four maxima a load and four loads in flight.
  const float least = least_score(threshold);
  constexpr int kLoads = 4, kStride = 4 * kThreads;
  for (int base = 4 * threadIdx.x; base < groups; base += kLoads * kStride) {
    float4 four[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l)
      if (base + l * kStride < groups) four[l] = *reinterpret_cast<const float4*>(maxima + base + l * kStride);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (base + l * kStride >= groups) break;
      const float score[4] = {four[l].x, four[l].y, four[l].z, four[l].w};
      // Nearly all maxima end here. NaN is below no number, and may be above the threshold.
      if (score[0] < least && score[1] < least && score[2] < least && score[3] < least) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = base + l * kStride + j;
        const u64 c = candidate(ordered(score[j]), i);
        if (i < groups && c >= threshold) {
          const int at = atomicAdd(&s.count, 1);
          if (at < plan.capacity) candidates[at] = c;
        }
      }
    }
  }
  __syncthreads();
  const int count = s.count;
  __syncthreads();
  if (count < k || count > plan.capacity) choose(s, chosen, groups, k, in_row);
  else choose(s, chosen, count, k, in_candidates);
}

// Dynamic shared memory: candidates, or the scores of K groups, or what sorting needs; then K groups and the chosen keys.
struct LongLayout {
  std::size_t groups, keys, bytes;
  __host__ __device__ LongLayout(const Sampling& plan, int K, int group) {
    groups = max(plan.capacity * sizeof(u64), (K * group + 1) / 2 * 2 * sizeof(u32));
    if (K > kCountedTopk) groups = max(groups, (sizeof(typename Sort::TempStorage) + 7) / 8 * 8);
    keys = groups + K * sizeof(u32);
    bytes = keys + (K > kCountedTopk ? kMaxTopk : K) * sizeof(u32);
  }
};

// The k best keys of the chosen groups, whose scores are computed again.
template <class C> __device__ void choose_keys(Selection& s, u32* chosen, const u32* group, int groups, int k, u32* scores, const LandmarkParams& p, int bh, int m) {
  const Problem& x = p.problem;
  const int b = bh / x.H, count = groups * kGroupKeys, length = span(x.keys, b).length;
  const GroupedKeys keys{group};
  score_keys<C, kThreads>(p, bh, m, keys, count, [&](int i, int key, float score) { scores[i] = key < length ? ordered(score) : 0; });
  __syncthreads();
  choose(s, chosen, count, k, [&](int i) { return candidate(scores[i], keys[i]); });
}

template <class C> __global__ void __launch_bounds__(kThreads, C::DP == 64 ? 7 : C::DP == 128 ? 6 : 3) topk_long_kernel(const LandmarkParams p, const Sampling plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Selection selection;
  const Problem& x = p.problem;
  const LongLayout layout(plan, x.K, p.group);
  u32 *const group = reinterpret_cast<u32*>(memory + layout.groups), *const chosen = reinterpret_cast<u32*>(memory + layout.keys);
  const std::int64_t row = blockIdx.x;
  const int m = static_cast<int>(row % x.M), bh = static_cast<int>(row / x.M);
  const Span keys = span(x.keys, bh / x.H);
  std::int32_t* indices = p.indices + row * x.K;
  const int k = min(x.K, keys.length), row_groups = ceil_div(keys.length, p.group), groups = min(x.K, row_groups);
  for (int i = k + threadIdx.x; i < x.K; i += kThreads) indices[i] = -1;
  if (k == 0) return;
  choose_groups(selection, p.group == 1 ? chosen : group, reinterpret_cast<u64*>(memory), p.scores + row * score_pitch(x.keys.max_length, p.group), row_groups, groups, plan);
  if (p.group > 1) choose_keys<C>(selection, chosen, group, groups, k, reinterpret_cast<u32*>(memory), p, bh, m);

  if (x.K <= kCountedTopk) {
    for (int i = threadIdx.x; i < k; i += kThreads) {
      int before = 0;
      for (int j = 0; j < k; ++j) before += chosen[j] < chosen[i];
      indices[before] = static_cast<std::int32_t>(chosen[i]);
    }
  } else {
    constexpr int kItems = kMaxTopk / kThreads;
    u32 item[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) item[i] = threadIdx.x * kItems + i < k ? chosen[threadIdx.x * kItems + i] : kAllBits;
    Sort(*reinterpret_cast<typename Sort::TempStorage*>(memory)).Sort(item);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (threadIdx.x * kItems + i < k) indices[threadIdx.x * kItems + i] = static_cast<std::int32_t>(item[i]);
  }
}

// The first of the sizes that is large enough, as a constant.
template <int... SIZES, class F> cudaError_t dispatch_size(int size, F&& f) {
  cudaError_t status = cudaErrorInvalidValue;
  bool found = false;
  ((found || size > SIZES || (found = true, status = f(std::integral_constant<int, SIZES>{}), true)), ...);
  return status;
}

}  // namespace

cudaError_t launch_landmark_topk(const LandmarkParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.K < 1 || x.K > kMaxTopk) return cudaErrorInvalidValue;
  const unsigned rows = static_cast<unsigned>(x.B) * x.H * x.M;
  const int row_scores = ceil_div(x.keys.max_length, p.group);
  const auto rows_of = [&](auto lanes) {
    return [&, lanes](auto most) {
      topk_rows_kernel<lanes, most><<<static_cast<unsigned>((std::int64_t(rows) * lanes + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
      return cudaGetLastError();
    };
  };
  if (p.group == 1 && row_scores <= kShortKeys) return dispatch_size<128, kShortKeys>(row_scores, rows_of(std::integral_constant<int, 8>{}));
  if (p.group == 1 && row_scores <= kWarpScores) return dispatch_size<512, 768, 1152, 1664, kWarpScores>(row_scores, rows_of(std::integral_constant<int, 32>{}));
  if (p.group > 1 && row_scores <= kWarpScores && x.K <= kWarpTopk)
    return dispatch(x.dtype, x.D, [&](auto config) {
      return dispatch_size<1024, kWarpScores>(row_scores, [&](auto most) {
        topk_groups_kernel<decltype(config), most><<<ceil_div(rows, kThreads / 32), kThreads, 0, stream>>>(p);
        return cudaGetLastError();
      });
    });
  const Sampling plan = sampling(row_scores, x.K);
  const std::size_t bytes = LongLayout(plan, x.K, p.group).bytes;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    if (cudaError_t status = allow_shared_memory(topk_long_kernel<C>, bytes)) return status;
    topk_long_kernel<C><<<rows, kThreads, bytes, stream>>>(p, plan);
    return cudaGetLastError();
  });
}

}  // namespace mita
