// The top-K keys of every landmark, exactly in the total order (larger score, then lower key index; NaN last).
//
// A candidate is one 64-bit number, ordered(score) above the complement of its key index: all candidates differ, so every
// comparison is decided, and nothing depends on the timing of threads. Indices come out ascending; -1 fills the rest.
//
// short rows: of up to kShortKeys scores eight lanes per landmark, of up to kWarpScores one warp, the scores in its registers. Where these are fp16, those of keys that
//   it does not tell apart, or else of all, are computed again. More blocks of the same launch put the landmarks' compressed values together (stages.cuh).
// long rows: of each group of consecutive keys only the largest score is known, and what bounds the others (kGroupKeys). The K best keys lie
//   in the K best groups, in the total order of maxima and group indices: K groups in front of a key's would hold K keys in front of it.
//   One block per landmark
//   1. takes the K best groups. Where there are many, a rank of a stratified sample so low that fewer than K maxima above it are
//      a 6-sigma event cuts them down first; should it have left fewer than K or more than fit, all of them are looked at,
//   2. tells closed groups from open ones. Where all but the best key are below the least of the K maxima, these are not among the K best,
//   3. is done if all groups are closed. Else it computes the scores again of the best keys of closed groups, and of all keys of open ones,
//   4. and takes the K best of those.
//   Rows of up to kPartGroups maxima, where K is at most kWarpTopk, are the work of one warp in the same steps; of four times as many and twice
//   K, that of four warps, of which each first takes the K best of a part.
#include <cub/block/block_radix_sort.cuh>

#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

using u32 = std::uint32_t;
using u64 = unsigned long long;
constexpr u32 kAllBits = 0xffffffffu;

__device__ float score_of(std::uint32_t ordered) { return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered); }
__device__ u64 candidate(u32 ordered_score, int index) { return u64(ordered_score) << 32 | (kAllBits - static_cast<u32>(index)); }
// The lowest score that a candidate at or above this one can have; -infinity where that is no number.
__device__ float least_score(u64 candidate) {
  const float score = score_of(static_cast<u32>(candidate >> 32));
  return score == score ? score : -kInfinity;
}
__device__ u32 index_of(u64 candidate) { return kAllBits - static_cast<u32>(candidate); }

// The k best of a row of up to MOST scores, k <= length: emit(i, key), i = 0 .. k - 1, ascending keys. LANES lanes select from one row, so a
// warp from 32 / LANES of them; four(key) are the scores of four keys, of which the first is one. No loop over keys depends on the
// length: its tests would be a quarter of all instructions.
// The threshold is looked for until exactly k scores reach it: from where it is in a normal distribution, in growing steps until it
// is between two bounds, then between these. Where steps and means lead nowhere, bits are bisected; ties are cut by position.
template <int LANES, int MOST, class Four, class Emit> __device__ void select_row(int length, int k, Four four, Emit emit) {
  static_assert(MOST % (4 * LANES) == 0);
  constexpr int kGroup = 4 * LANES, kGroups = MOST / kGroup, kWords = ceil_div(kGroups, 8), kSteps = 8, kMeans = 16;
  constexpr std::uint32_t kTop = 0xff800001u;  // above infinity
  const int lane = threadIdx.x % LANES;
  const auto each_group = [&](auto&& f) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) f(j);
  };

  std::uint32_t key[kGroups][4];  // 0: no key
  each_group([&](int j) {  // all loads before the first use
    const int first = j * kGroup + 4 * lane;
    const float4 x = first < length ? four(first) : float4{};
    key[j][0] = __float_as_uint(x.x), key[j][1] = __float_as_uint(x.y), key[j][2] = __float_as_uint(x.z), key[j][3] = __float_as_uint(x.w);
  });
  float sum = 0.0f, squares = 0.0f;
  each_group([&](int j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool present = j * kGroup + 4 * lane + e < length;
      const float score = present ? __uint_as_float(key[j][e]) : 0.0f;
      key[j][e] = present ? ordered(score) : 0;
      sum += score;
      squares = fmaf(score, score, squares);
    }
  });
  const auto count = [&](std::uint32_t least) {
    int below[4] = {0, 0, 0, 0};  // negative
    each_group([&](int j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) asm("{ .reg .u32 x; sub.cc.u32 x, %1, %2; subc.u32 %0, %0, 0; }" : "+r"(below[e]) : "r"(key[j][e]), "r"(least));
    });
    return MOST + sum_of_lanes<LANES>((below[0] + below[1]) + (below[2] + below[3]));
  };
  const float share = static_cast<float>(k) / static_cast<float>(length), mean = sum_of_lanes<LANES>(sum) / static_cast<float>(length);
  const float deviation = sqrtf(sum_of_lanes<LANES>(squares) / static_cast<float>(length) - mean * mean);
  float guess = logistic_quantile(mean, deviation, share);
  float step = 0.6f * deviation * rsqrtf(static_cast<float>(length) * share * (1.001f - share));

  // At least k keys reach `low`, fewer than k reach `high`.
  std::uint32_t low = 1, high = kTop;
  bool exact = k == length, done = exact || k == 0;  // exact: k keys reach `low`
  for (int i = 0; __any_sync(kAllLanes, !done); ++i) {
    const bool between = low > 1 && high < kTop;
    std::uint32_t middle = low + (high - low) / 2;
    if (i < (between ? kMeans : kSteps)) middle = ordered(between ? 0.5f * score_of(low) + 0.5f * score_of(high) : guess);
    middle = max(low + 1, min(middle, high - 1));
    const int n = count(middle);
    if (done) continue;
    (n >= k ? low : high) = middle;
    guess += n >= k ? step : -step;
    step *= 2.0f;
    exact = n == k;
    done = exact || high - low <= 1;
  }

  // Four bits for a group. f(group, bit, how many come before it).
  using Set = std::uint32_t[kWords];
  const auto each_of = [&](const Set& set, auto&& f) {
    int before = 0;
#pragma unroll
    for (int first = 0; first < kGroups; first += 4) {
      const auto bits = [&](int j) { return first + j < kGroups ? set[(first + j) / 8] >> 4 * ((first + j) % 8) & 15 : 0; };
      std::uint32_t own = 0;  // in each group, 8 bits
#pragma unroll
      for (int j = 0; j < 4; ++j) own |= __popc(bits(j)) << 8 * j;
      std::uint32_t through = sum_through_lane<LANES>(own);
      const std::uint32_t all = __shfl_sync(kAllLanes, through, LANES - 1, LANES);
      through -= own;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int rank = before + (through >> 8 * j & 255);
        for (std::uint32_t left = bits(j); left; left &= left - 1) f(first + j, __ffs(left) - 1, rank++);
        before += all >> 8 * j & 255;
      }
    }
  };
  Set chosen = {}, equal = {};
  const std::uint32_t least = exact ? low : low + 1;
  int reached = 0;
  each_group([&](int j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) chosen[j / 8] |= key[j][e] >= least ? 1u << (j % 8 * 4 + e) : 0;
  });
  if (__any_sync(kAllLanes, !exact)) {
    each_group([&](int j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) equal[j / 8] |= key[j][e] == low && !exact ? 1u << (j % 8 * 4 + e) : 0;
    });
#pragma unroll
    for (int w = 0; w < kWords; ++w) reached += __popc(chosen[w]);
    reached = sum_of_lanes<LANES>(reached);
    each_of(equal, [&](int j, int e, int rank) {
      if (rank < k - reached) chosen[j / 8] |= 1u << (j % 8 * 4 + e);
    });
  }
  each_of(chosen, [&](int j, int e, int rank) { emit(rank, j * kGroup + 4 * lane + e); });
}

constexpr int kThreads = 128;  // few: most of the time is latency, and many rows hide it
constexpr int kPartGroups = 1024;

// The second number of a group, next to the least of the K best maxima.
__device__ bool is_open(u32 others, u32 least) { return (others | (kGroupKeys - 1)) >= max(least, u32(kGroupKeys)) - kGroupKeys; }  // -0 there is +0 here
__device__ u32 best_key(u32 group, u32 others) { return group * kGroupKeys + others % kGroupKeys; }

// The scores of `count` keys with landmark m, by THREADS threads: of key_of(i); put(i, score). 16-bit elements: a warp takes 16 keys at once, as a
// product with eight times the same landmark. A lane has 16-byte chunks of two rows straight from memory; products so meet the columns
// in an order of their own. fp32: a key has four lanes, each every fourth chunk of its row.
template <class C, int THREADS, class KeyOf, class Put> __device__ void score_keys(const LandmarkParams& p, int bh, int m, int count, KeyOf key_of, Put put) {
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
  const auto row_of = [&](int i) { return rows + min(key_of(i), all.length - 1) * p.k.row; };
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
        if (t == 0 && first + lane / 4 + 8 * i < count) put(own[i], score[2 * i]);
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
      if (t == 0 && first < count) put(own, score);
    }
  }
}

// ---- rows in registers ---------------------------------------------------------------------------------------------

// What select_by_counts leaves for all lanes of a warp: keys whose scores are equal, and their exact scores; then a bit for every key of the row.
constexpr int kFew = 128;
struct Few {
  union {
    std::uint16_t keys[kFew];
    u32 chosen[kWarpScores / 32];
  };
  float scores[kFew];
};

// Of every four hexadecimal digits, the two in the middle change places.
__device__ inline u32 swap_middle_digits(u32 x) { return (x & 0xf00ff00f) | (x & 0x0f000f00) >> 4 | (x & 0x00f000f0) << 4; }

// What a lane has of a row of up to MOST scores, four keys of every group. Is a score above a bound, or equal to it: a bit for each, in words of up to 32. NaN never is.
// And the lowest one above a bound, or the highest one that is not. Bounds are rounded as scores are. The bits of a word have an order of their own, from which `in_order`
// brings them into that of the keys.
constexpr int kGroup = 4 * 32;
template <class S, int MOST> struct LaneScores;
template <int MOST> struct LaneScores<float, MOST> {
  static constexpr int kGroups = MOST / kGroup;
  float4 score[kGroups];
  int own_keys;
  __device__ LaneScores(const float* row, int length) {
    const int first = 4 * (threadIdx.x % 32), rest = max(length - first, 0);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) score[j] = kGroup * j + first < length ? *reinterpret_cast<const float4*>(row + kGroup * j + first) : float4{};
    own_keys = rest / kGroup * 4 + min(rest % kGroup, 4);
  }
  __device__ float4 four(int j) const { return score[j]; }
  __device__ float one(int i) const { return i % 4 == 0 ? score[i / 4].x : i % 4 == 1 ? score[i / 4].y : i % 4 == 2 ? score[i / 4].z : score[i / 4].w; }
  __device__ u32 above(float bound, int w) const {  // by a difference and a shift, which leave a bit of it: the first key's is the highest one
    const int bits = min(32, 4 * kGroups - 32 * w), present = min(max(own_keys - 32 * w, 0), bits);
    u32 set = 0;
#pragma unroll
    for (int b = 0; b < bits; ++b) set = __funnelshift_l(__float_as_uint(bound - one(32 * w + b)), set, 1);
    return set >> (bits - present) << (32 - present) % 32;
  }
  template <class Action> __device__ void each(Action action) const {  // action(i, score) for all keys of the lane
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i)
      if (i < own_keys) action(i, one(i));
  }
  __device__ u32 equal(float bound, int w) const {
    u32 set = 0;
    each([&](int i, float x) { set |= i / 32 == w && x == bound ? 1u << (31 - i % 32) : 0; });
    return set;
  }
  __device__ float next(float bound, bool above) const {
    float result = above ? kInfinity : -kInfinity;
    each([&](int, float x) {
      if (above && x > bound) result = fminf(result, x);
      if (!above && x <= bound) result = fmaxf(result, x);
    });
    return result;
  }
  static __device__ float rounded(float bound) { return bound; }
  static __device__ u32 in_order(u32 set) { return __brev(set); }
  static __device__ int place_in_order(int bit) { return 31 - bit; }
};
template <int MOST> struct LaneScores<__half, MOST> {
  static constexpr int kGroups = MOST / kGroup;
  uint2 score[kGroups];
  __device__ LaneScores(const __half* row, int length) {  // NaN is stored behind the last key of a tile
    const int first = 4 * (threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) score[j] = kGroup * j + first < length ? *reinterpret_cast<const uint2*>(row + kGroup * j + first) : uint2{kAllBits, kAllBits};
  }
  __device__ float4 four(int j) const {
    const float2 lo = unpack<__half>(score[j].x), hi = unpack<__half>(score[j].y);
    return {lo.x, lo.y, hi.x, hi.y};
  }
  __device__ __half2 pair(int i) const { return reinterpret_cast<const __half2&>(i % 2 ? score[i / 2].y : score[i / 2].x); }
  template <class Compare> __device__ u32 bits(float bound, int w, Compare compare) const {  // two at once: the first ones of pairs in the lower bits, the others in the upper ones
    const __half2 its = __float2half2_rn(bound);
    u32 set = 0;
#pragma unroll
    for (int i = 0; i < 16 && 8 * w + i / 2 < kGroups; ++i) set |= compare(pair(16 * w + i), its) & 0x10001u << i;
    return set;
  }
  __device__ u32 above(float bound, int w) const {
    return bits(bound, w, [](__half2 x, __half2 y) { return __hgt2_mask(x, y); });
  }
  __device__ u32 equal(float bound, int w) const {
    return bits(bound, w, [](__half2 x, __half2 y) { return __heq2_mask(x, y); });
  }
  __device__ float next(float bound, bool above) const {
    constexpr u32 kMost = 0x7c007c00, kLeast = 0xfc00fc00;  // infinities
    const __half2 its = __float2half2_rn(bound);
    const auto of = [](u32 x) { return reinterpret_cast<const __half2&>(x); };
    __half2 result = of(above ? kMost : kLeast);
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const __half2 x = pair(i);
      const u32 mask = __hgt2_mask(x, its), bits = reinterpret_cast<const u32&>(x);
      result = above ? __hmin2(result, of((bits & mask) | (kMost & ~mask))) : __hmax2(result, of((bits & ~mask) | (kLeast & mask)));
    }
    const float2 two = unpack<__half>(reinterpret_cast<const u32&>(result));
    return above ? fminf(two.x, two.y) : fmaxf(two.x, two.y);
  }
  static __device__ float rounded(float bound) { return __half2float(__float2half_rn(bound)); }
  static __device__ u32 in_order(u32 set) {  // every bit of the upper half behind its neighbour of the lower one
    set = swap_middle_digits(__byte_perm(set, 0, 0x3120));
    set = (set & 0xc3c3c3c3) | (set & 0x30303030) >> 2 | (set & 0x0c0c0c0c) << 2;
    return (set & 0x99999999) | (set & 0x44444444) >> 1 | (set & 0x22222222) << 1;
  }
  static __device__ int place_in_order(int bit) { return 2 * (bit % 16) + bit / 16; }
};

// What select_row does, by a warp: looks for a bound that k scores are above, by how many more or fewer are above the one before; where that is one, the K-th is the
// next score. Of scores that are equal, the best by what score_again(count) leaves in few.scores of few.keys. False, and nothing done, where this leads nowhere.
template <int MOST, class S, class Again, class Emit> __device__ bool select_by_counts(const S* row, int length, int k, Few& few, Again score_again, Emit emit) {
  using Scores = LaneScores<S, MOST>;
  constexpr int kGroups = Scores::kGroups, kWords = ceil_div(kGroups, 8), kRounds = 16, kInterpolations = 6;
  static_assert(MOST <= kWarpScores && MOST % kGroup == 0);
  const int lane = threadIdx.x % 32;
  if (length < kGroup || k == 0 || k >= length) return false;
  const Scores scores(row, length);
  // In a logistic distribution of the same mean and deviation, which every second group gives, k scores would be above this bound, and one of them so far from the next.
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kGroups; j += 2)
    if ((j + 1) * kGroup <= length) {
      const float4 x = scores.four(j);
      sum += x.x, squares = fmaf(x.x, x.x, squares), sum += x.y, squares = fmaf(x.y, x.y, squares);
      sum += x.z, squares = fmaf(x.z, x.z, squares), sum += x.w, squares = fmaf(x.w, x.w, squares);
    }
  const float inverse = 1.0f / (kGroup * ceil_div(length / kGroup, 2)), share = __fdividef(static_cast<float>(k), static_cast<float>(length));
  const float mean = sum_of_lanes<32>(sum) * inverse, deviation = sqrtf(fmaxf(sum_of_lanes<32>(squares) * inverse - mean * mean, 0.0f));
  float bound = logistic_quantile(mean, deviation, share), of_one = __fdividef(0.59f * deviation, static_cast<float>(k) * (1.001f - share)), low = 0.0f, high = 0.0f;
  int over = 0, above = 0, below = 0;  // how many more than k are above `bound`, how many more `low`, how many fewer `high`; 0: not known yet

  u32 set[kWords];
  const auto count_own = [&](auto&& words) {
    int n = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) n += __popc(words(w));
    return n;
  };
  const auto count_above = [&] { return sum_of_lanes<32>(count_own([&](int w) { return set[w] = scores.above(bound, w); })); };
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    bound = Scores::rounded(bound);
    over = count_above() - k;
    if (-1 <= over && over <= 1) break;
    if (over > 0) low = bound, above = over;
    else high = bound, below = -over;
    if (above > 0 && below > 0) {
      const float part = round < kInterpolations ? __fdividef(static_cast<float>(above), static_cast<float>(above + below)) : 0.5f;
      bound = fmaf(fminf(fmaxf(part, 0.1f), 0.9f), high - low, low);
    } else {
      bound = fmaf(static_cast<float>(over), of_one, bound), of_one *= 1.5f;
    }
  }
  if (over != 0) {
    if (over < -1 || over > 1) {
      if (above == 0) return false;
      bound = low, over = above;
    }
    const u32 next = ordered(scores.next(bound, over > 0));
    bound = score_of(over > 0 ? __reduce_min_sync(kAllLanes, next) : __reduce_max_sync(kAllLanes, next));
    const int missing = k - count_above();
    if (missing != 0) {  // some of those that are equal, or all
      u32 equal[kWords];
      const int own = count_own([&](int w) { return equal[w] = scores.equal(bound, w); }), equals = sum_of_lanes<32>(own);
      if (missing < 0 || missing > equals || equals > kFew) return false;
      if (missing < equals) {
        const int first = sum_through_lane<32>(own) - own;
        const auto each = [&](auto&& action) {
          int to = first;
#pragma unroll
          for (int w = 0; w < kWords; ++w)
#pragma unroll 1
            for (u32 left = equal[w]; left; left &= left - 1) action(to++, w, __ffs(left) - 1);
        };
        each([&](int to, int w, int bit) {
          const int number = 32 * w + Scores::place_in_order(bit);
          few.keys[to] = static_cast<std::uint16_t>(number / 4 * kGroup + 4 * lane + number % 4);
        });
        __syncwarp();
        score_again(equals);
        __syncwarp();
        const auto of = [&](int i) { return candidate(ordered(few.scores[i]), few.keys[i]); };
        each([&](int to, int w, int bit) {
          int better = 0;
          for (int i = 0; i < equals; ++i) better += of(i) > of(to);
          if (better >= missing) equal[w] &= ~(1u << bit);
        });
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) set[w] |= equal[w];
    }
  }

  // A bit for every key of the row. A lane has four bits of each of eight groups; of two neighbours one writes the bytes of four groups, the other one those of the others.
  __syncwarp();
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(few.chosen) + lane / 2 + (lane % 2 ? 4 * kGroup / 8 : 0);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const u32 own = Scores::in_order(set[w]), four = swap_middle_digits(__byte_perm(own, __shfl_xor_sync(kAllLanes, own, 1), lane % 2 ? 0x3726 : 0x5140));
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes[(8 * w + i) * (kGroup / 8)] = static_cast<unsigned char>(four >> 8 * i);
  }
  __syncwarp();
  // From here on a lane has as many keys, one after the other.
  constexpr int kOwn = MOST / 32;
  const u32* const words = few.chosen + kOwn * lane / 32;
  const unsigned shift = kOwn * lane % 32;
  u32 low_bits = __funnelshift_r(words[0], kOwn % 32 ? words[1] : 0, shift), high_bits = 0;
  if (kOwn > 32) high_bits = __funnelshift_r(words[1], kOwn % 32 ? words[2] : 0, shift);
  if (kOwn < 32) low_bits &= (1u << kOwn % 32) - 1;
  if (kOwn > 32 && kOwn < 64) high_bits &= (1u << kOwn % 32) - 1;
  const int own = __popc(low_bits) + __popc(high_bits), most = __reduce_max_sync(kAllLanes, own);
  int at = sum_through_lane<32>(own) - own;
#pragma unroll 1
  for (int i = 0; i < most; ++i)
    if (const u32 left = low_bits ? low_bits : high_bits) {
      emit(at++, kOwn * lane + (low_bits ? 0 : 32) + __ffs(left) - 1);
      (low_bits ? low_bits : high_bits) = left & (left - 1);
    }
  __syncwarp();
  return true;
}

template <int LANES> __host__ __device__ inline unsigned blocks_of_rows(unsigned rows) { return (rows + kThreads / LANES - 1) / (kThreads / LANES); }

// S: of the scores. Registers: H100, 4704 rows of 1601 and 9408 of 1025 fp32 scores, 20.5 and 29.5 us; without spills, and with fewer warps, 20.4 and 33.2.
template <class T, class S, int LANES, int MOST> __global__ void __launch_bounds__(kThreads, MOST <= 1152 ? 8 : MOST <= 1664 ? 6 : 5) topk_rows_kernel(const LandmarkParams p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const Problem& x = p.problem;
  const unsigned rows = x.B * x.H * x.M, blocks = blocks_of_rows<LANES>(rows), row = blockIdx.x * (kThreads / LANES) + threadIdx.x / LANES;
  if (blockIdx.x >= blocks) return combine_parts<T>(p, blockIdx.x - blocks);
  const bool exists = row < rows;
  const unsigned bh = row / x.M;
  const int length = exists ? span(x.keys, bh / x.H).length : 0, k = min(x.K, length);
  float* const scores = p.scores + row * p.pitch;
  std::int32_t* indices = p.indices + std::int64_t(row) * x.K;
  if (exists)
    for (int i = k + threadIdx.x % LANES; i < x.K; i += LANES) indices[i] = -1;
  const auto emit = [&](int i, int key) { indices[i] = key; };
  const auto select = [&] { select_row<LANES, MOST>(length, k, [&](int key) { return *reinterpret_cast<const float4*>(scores + key); }, emit); };
  if constexpr (LANES == 32) {
    __shared__ Few all_few[kThreads / 32];
    Few& few = all_few[threadIdx.x / 32];
    const auto score_again = [&](int count, auto key_of, float* to) {
      if constexpr (sizeof(S) == 2) {
        score_keys<Config<T, 64>, 32>(p, bh, row - bh * x.M, count, key_of, [&](int i, float score) { to[i] = score; });
        __syncwarp();
      }
    };
    const auto among_equals = [&](int count) {
      if constexpr (sizeof(S) == 2) score_again(count, [&](int i) { return int(few.keys[i]); }, few.scores);
      else
        for (int i = threadIdx.x % 32; i < count; i += 32) few.scores[i] = 0.0f;
    };
    if (!select_by_counts<MOST>(reinterpret_cast<const S*>(scores), length, k, few, among_equals, emit)) {
      if (exists) score_again(length, [](int i) { return i; }, scores);
      select();
    }
  } else {
    select();
  }
  if (exists) discard<LANES>(scores, p.pitch * sizeof(S));
}

template <int WARPS> __device__ void wait_for_warps() {
  if constexpr (WARPS == 1) __syncwarp();
  else __syncthreads();
}

// select_row for rows of up to WARPS * PART scores by as many warps, k <= TOPK: each takes the k best of a part, the first warp those of all, and
// is the one that emits. one(key) is a score; found has room for WARPS * k numbers.
template <int WARPS, int PART, int TOPK, class One, class Four, class Emit>
__device__ void select_by_warps(int length, int k, std::uint16_t* found, One one, Four four, Emit emit) {
  if constexpr (WARPS == 1) {
    select_row<32, PART>(length, k, four, emit);
  } else {
    static_assert(TOPK <= PART);
    const int warp = threadIdx.x / 32 % WARPS, first = warp * PART, own = min(max(length - first, 0), PART);
    select_row<32, PART>(own, min(k, own), [&](int i) { return four(first + i); }, [&](int i, int j) { found[warp * k + i] = static_cast<std::uint16_t>(first + j); });
    __syncthreads();
    const int all = length / PART * k + min(k, length % PART);
    const auto score = [&](int i) { return one(found[min(i, all - 1)]); };
    if (warp == 0) select_row<32, WARPS * TOPK>(all, k, [&](int i) { return float4{score(i), score(i + 1), score(i + 2), score(i + 3)}; }, [&](int i, int j) { emit(i, found[j]); });
  }
}

template <class C, int WARPS> __global__ void __launch_bounds__(kThreads, C::DP <= 128 ? 8 : 1) topk_groups_kernel(const LandmarkParams p) {
  constexpr int kTopk = WARPS > 1 ? 2 * kWarpTopk : kWarpTopk, kMost = kTopk * kGroupKeys, kFew = 2 * kTopk;  // keys to choose from: at most, and mostly
  constexpr int kRows = kThreads / 32 / WARPS;
  static_assert(WARPS * kPartGroups * kGroupKeys <= 1 << 16 && (WARPS == 1 || kRows == 1));
  struct alignas(16) Row {
    float scores[kMost];
    std::uint16_t found[WARPS > 1 ? WARPS * kTopk : 1], groups[kTopk], keys[kMost];
    int count;  // of the keys
  };
  __shared__ Row rows[kRows];
  const Problem& x = p.problem;
  const int lane = threadIdx.x % 32;
  const bool first_warp = WARPS == 1 || threadIdx.x < 32;
  const std::int64_t row = std::int64_t(gridDim.x - 1 - blockIdx.x) * kRows + threadIdx.x / 32 / WARPS;  // the last ones first: the L2 still has their scores and keys
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  Row& its = rows[threadIdx.x / 32 / WARPS];
  const int m = static_cast<int>(row % x.M), bh = static_cast<int>(row / x.M), b = bh / x.H;
  const int length = span(x.keys, b).length, k = min(x.K, length), row_groups = ceil_div(length, kGroupKeys), groups = min(x.K, row_groups);
  std::int32_t* indices = p.indices + row * x.K;
  if (first_warp)
    for (int i = k + lane; i < x.K; i += 32) indices[i] = -1;
  if (k == 0) return;
  const float* pairs = p.scores + row * p.pitch;
  const auto maximum = [&](int i) { return pairs[2 * i]; };
  const auto four_maxima = [&](int i) {
    const float4 one = *reinterpret_cast<const float4*>(pairs + 2 * i), other = *reinterpret_cast<const float4*>(pairs + 2 * i + 4);
    return float4{one.x, one.z, other.x, other.z};
  };
  select_by_warps<WARPS, kPartGroups, kTopk>(row_groups, groups, its.found, maximum, four_maxima, [&](int i, int j) { its.groups[i] = static_cast<std::uint16_t>(j); });
  if (first_warp) {
    __syncwarp();
    u32 others[kTopk / 32], least = kAllBits;  // a lane has every 32nd of the groups
#pragma unroll
    for (int i = 0; i < kTopk / 32; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(pairs + 2 * its.groups[min(lane + 32 * i, groups - 1)]);
      least = min(least, ordered(pair.x)), others[i] = __float_as_uint(pair.y);
    }
    least = groups < k ? 0 : __reduce_min_sync(kAllLanes, least);
    int count = 0;  // of keys to choose from, in their order
#pragma unroll
    for (int i = 0; i < kTopk / 32; ++i) {
      const bool exists = lane + 32 * i < groups, open = exists && is_open(others[i], least);
      const u32 closed_groups = __ballot_sync(kAllLanes, exists && !open), open_groups = __ballot_sync(kAllLanes, open), before = (1u << lane) - 1;
      const int own = its.groups[min(lane + 32 * i, groups - 1)], first = count + __popc(closed_groups & before) + kGroupKeys * __popc(open_groups & before);
      if (open)
        for (int e = 0; e < kGroupKeys; ++e) its.keys[first + e] = static_cast<std::uint16_t>(own * kGroupKeys + e);
      else if (exists) its.keys[first] = static_cast<std::uint16_t>(best_key(own, others[i]));
      count += __popc(closed_groups) + kGroupKeys * __popc(open_groups);
      if (__any_sync(kAllLanes, open && own == row_groups - 1)) count -= row_groups * kGroupKeys - length;
    }
    if (lane == 0) its.count = count;
  }
  wait_for_warps<WARPS>();
  discard<32 * WARPS>(pairs, p.pitch * sizeof(float));
  const int count = its.count;
  const auto emit = [&](int i, int j) { indices[i] = its.keys[j]; };
  if (count == k) {
    if (first_warp)
      for (int i = lane; i < k; i += 32) emit(i, i);
    return;
  }
  score_keys<C, 32 * WARPS>(p, bh, m, count, [&](int i) { return int(its.keys[i]); }, [&](int i, float score) { its.scores[i] = score; });
  wait_for_warps<WARPS>();
  const auto four = [&](int i) { return *reinterpret_cast<const float4*>(its.scores + i); };
  if (count > kFew) select_by_warps<WARPS, kMost / WARPS, kTopk>(count, k, its.found, [&](int i) { return its.scores[i]; }, four, emit);
  else if (first_warp) select_row<32, kFew>(count, k, four, emit);
}


// ---- long rows -----------------------------------------------------------------------------------------------------

constexpr int kMinCapacity = 2048, kMaxCapacity = 11264;  // candidates: 88 KB, within the 99 KB of the smallest devices
constexpr int kCountedTopk = 256;     // up to here the chosen are put in order by counting
using Sort = cub::BlockRadixSort<u32, kThreads, kMaxTopk / kThreads>;

struct Selection {  // scratch of the functions below
  u32 histogram[256];
  u64 prefix, differing;
  int rank, bucket, count;
  u32 least;
  int open, closed;
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

// The k best groups of a row of maxima, or of pairs of which these are the first.
__device__ void choose_groups(Selection& s, u32* chosen, u64* candidates, const float* row, bool pairs, int groups, int k, const Sampling& plan) {
  const auto in_row = [&](int i) { return candidate(ordered(row[i << pairs]), i); };
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

  // Four numbers a load and four loads in flight.
  const float least = least_score(threshold);
  const int numbers = groups << pairs;
  constexpr int kLoads = 4, kStride = 4 * kThreads;
  for (int base = 4 * threadIdx.x; base < numbers; base += kLoads * kStride) {
    float4 four[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l)
      if (base + l * kStride < numbers) four[l] = *reinterpret_cast<const float4*>(row + base + l * kStride);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (base + l * kStride >= numbers) break;
      const float score[4] = {four[l].x, four[l].y, four[l].z, four[l].w};
      // Nearly all maxima end here. NaN is below no number, and may be above the threshold.
      if (score[0] < least && score[2] < least && (pairs || (score[1] < least && score[3] < least))) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (score[j] < least || (pairs && j % 2)) continue;
        const int i = (base + l * kStride + j) >> pairs;
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

// Dynamic shared memory: candidates, or the scores of a round, or what sorting needs; then lists of K numbers.
constexpr int kRoundGroups = 1024;  // whose scores fit beside the lists of the largest K
struct LongLayout {
  int round;  // scores of one
  std::size_t lists, bytes;
  __host__ __device__ LongLayout(const Sampling& plan, int K, int group) : round(group == 1 ? 0 : min(K, kRoundGroups) * kGroupKeys) {
    lists = max(plan.capacity * sizeof(u64), round * sizeof(u32));
    if (K > kCountedTopk) lists = max(lists, (sizeof(typename Sort::TempStorage) + 7) / 8 * 8);
    bytes = lists + (K > kRoundGroups ? 3 : 2) * K * sizeof(u32);
  }
};

// The k best keys of the chosen groups: a list of them, one of the three from `lists` on, of which the first holds the groups.
template <class C> __device__ const u32* choose_keys(Selection& s, u32* lists, int groups, int k, u32* scores, int round, const float* pairs, const LandmarkParams& p, int bh, int m) {
  const Problem& x = p.problem;
  const int length = span(x.keys, bh / x.H).length;
  u32 least = groups < k ? 0 : kAllBits;
  for (int i = threadIdx.x; i < groups; i += kThreads) least = min(least, ordered(pairs[2 * lists[i]]));
  if (threadIdx.x == 0) s.least = kAllBits, s.open = s.closed = 0;
  __syncthreads();
  least = __reduce_min_sync(kAllLanes, least);
  if (threadIdx.x % 32 == 0) atomicMin(&s.least, least);
  __syncthreads();
  u32* const choice = lists + x.K;  // open groups, then the keys of closed ones
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    const u32 group = lists[i], others = __float_as_uint(pairs[2 * group + 1]);
    if (is_open(others, s.least)) choice[atomicAdd(&s.open, 1)] = group;
    else choice[groups - 1 - atomicAdd(&s.closed, 1)] = best_key(group, others);
  }
  __syncthreads();
  const int open = s.open, of_open = open * kGroupKeys, count = of_open + groups - open;
  if (open == 0) return choice;

  // In rounds: the best so far, and as many new ones as fit.
  const u32* kept = nullptr;
  for (int first = 0, before = 0, into = 0; first < count; into = 2 * x.K - into) {
    const int fresh = min(count - first, round - before), all = before + fresh;
    const auto key_of = [&](int i) -> u32 {
      if (i < before) return kept[i];
      const int j = first + i - before;
      return j < of_open ? choice[j / kGroupKeys] * kGroupKeys + j % kGroupKeys : choice[j - of_open + open];
    };
    score_keys<C, kThreads>(p, bh, m, all, key_of, [&](int i, float score) { scores[i] = key_of(i) < static_cast<u32>(length) ? ordered(score) : 0; });
    __syncthreads();
    choose(s, lists + into, all, k, [&](int i) { return candidate(scores[i], key_of(i)); });
    kept = lists + into, before = k, first += fresh;
  }
  return kept;
}

template <class C> __global__ void __launch_bounds__(kThreads, C::DP == 64 ? 8 : C::DP == 128 ? 7 : 3) topk_long_kernel(const LandmarkParams p, const Sampling plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Selection selection;
  const Problem& x = p.problem;
  const LongLayout layout(plan, x.K, p.group);
  u32* const lists = reinterpret_cast<u32*>(memory + layout.lists);
  const std::int64_t row = gridDim.x - 1 - blockIdx.x;  // the last ones first: the L2 still has their scores and keys
  const int m = static_cast<int>(row % x.M), bh = static_cast<int>(row / x.M);
  const Span keys = span(x.keys, bh / x.H);
  std::int32_t* indices = p.indices + row * x.K;
  const int k = min(x.K, keys.length), row_groups = ceil_div(keys.length, p.group), groups = min(x.K, row_groups);
  for (int i = k + threadIdx.x; i < x.K; i += kThreads) indices[i] = -1;
  if (k == 0) return;
  const float* numbers = p.scores + row * p.pitch;
  choose_groups(selection, lists, reinterpret_cast<u64*>(memory), numbers, p.group > 1, row_groups, groups, plan);
  const u32* chosen = p.group == 1 ? lists : choose_keys<C>(selection, lists, groups, k, reinterpret_cast<u32*>(memory), layout.round, numbers, p, bh, m);
  discard<kThreads>(numbers, p.pitch * sizeof(float));

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
  const auto rows_of = [&](auto lanes, auto score) {
    return [&, lanes](auto most) {
      return dispatch_dtype(x.dtype, [&](auto element) {
        using T = decltype(element);
        using S = std::conditional_t<sizeof(T) == 2, decltype(score), float>;
        return launch(p.early_choice, topk_rows_kernel<T, S, lanes, most>, blocks_of_rows<lanes>(rows) + combine_blocks(x, kThreads), kThreads, 0, stream, p);
      });
    };
  };
  if (p.group == 1 && row_scores <= kShortKeys) return dispatch_size<128, kShortKeys>(row_scores, rows_of(std::integral_constant<int, 8>{}, float()));
  if (p.group == 1 && row_scores <= kWarpScores) {
    const auto with = [&](auto score) { return dispatch_size<512, 768, 1152, 1664, kWarpScores>(row_scores, rows_of(std::integral_constant<int, 32>{}, score)); };
    return p.halves ? with(__half()) : with(float());
  }
  const auto groups_of = [&](auto warps) {
    return dispatch(x.dtype, x.D, [&](auto config) {
      return launch(topk_groups_kernel<decltype(config), warps>, ceil_div(rows * warps, kThreads / 32), kThreads, 0, stream, p);
    });
  };
  constexpr std::integral_constant<int, 1> one_warp;
  constexpr std::integral_constant<int, kThreads / 32> block;
  if (p.group > 1 && row_scores <= kPartGroups && x.K <= kWarpTopk) return groups_of(one_warp);
  if (p.group > 1 && row_scores <= block * kPartGroups && x.K <= 2 * kWarpTopk) return groups_of(block);
  const Sampling plan = sampling(row_scores, x.K);
  const std::size_t bytes = LongLayout(plan, x.K, p.group).bytes;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    return launch(topk_long_kernel<C>, rows, kThreads, bytes, stream, p, plan);
  });
}

}  // namespace mita
