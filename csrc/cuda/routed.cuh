// Routed sums, what queries leave for the keys of their experts (RoutedRows): how they are rounded, stored, and added to the gradients of keys.
#pragma once
#include "device.cuh"

namespace mita {

// A number n of 16 bits, 14 for bf16, to be multiplied by a power of two, the factor of its row: as good as fp32 for sums that are rounded to T in the end. It is
// stored as an unsigned number of two parts, each of which is exact where it takes the last bits of an element of T: so tensor cores can sum them (RoutedProducts).
struct Fixed {
  std::uint16_t bits;
};
template <class T> constexpr int kPartBits = std::is_same_v<T, __half> ? 8 : 7;
template <class T> constexpr int kFixedZero = 1 << (2 * kPartBits<T> - 1);  // n + this is stored, the last bits of the float n + kFixed
template <class T> constexpr float kFixed = 8388608.0f + kFixedZero<T>;
template <class T> __device__ inline std::uint32_t pack_fixed(float lo, float hi) { return __byte_perm(__float_as_uint(lo + kFixed<T>), __float_as_uint(hi + kFixed<T>), 0x5410); }
template <class T> __device__ inline float2 unpack_fixed(std::uint32_t two) {
  return make_float2(__uint_as_float(__byte_perm(two, 0x4b00, 0x5410)) - kFixed<T>, __uint_as_float(__byte_perm(two, 0x4b00, 0x5432)) - kFixed<T>);
}
template <class T> constexpr int kLeastFactor = std::is_same_v<T, __half> ? -27 : -100;  // its logarithm: eight times that is an element of T, too

// What the rows of accumulators, times `factor`, are multiplied by to be rounded to Fixed, and after that. A row with a number that is not finite becomes all NaN.
template <class T> struct FixedRows {
  float to[2], back[2];  // of a lane's upper and lower row
  template <int DT> __device__ FixedRows(const float (&acc)[DT][4], float factor) {
    const auto highest = [](float x, float y) {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
      return x;
    };
    const auto about_inverse = [](float x) {
      asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
      return x;
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = 0.0f;
#pragma unroll
      for (int d = 0; d < DT; ++d) m = highest(m, highest(fabsf(acc[d][2 * h]), fabsf(acc[d][2 * h + 1])));
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) m = highest(m, __shfl_xor_sync(kAllLanes, m, lanes));
      m *= fabsf(factor);
      const std::uint32_t power = __float_as_uint(fminf((kFixedZero<T> - 1) * about_inverse(m), power_of_2(-kLeastFactor<T>))) & 0x7f800000;
      to[h] = __uint_as_float(power) * factor;
      back[h] = __uint_as_float(0x7f000000 - power) + (m - m);
    }
  }
};

// Rows of routed sums lie as the accumulators of a warp hold them: of every 32 columns lane t of four has eight numbers, one after the other, those of columns
// 8d + 2t and 8d + 2t + 1 for d from 0 to 3. So the i-th two numbers of a row belong to this column and the next one:
__device__ inline int column_of_pair(int i) { return i / 16 * 32 + i % 4 * 8 + i / 4 % 4 * 2; }

// Stores a warp's 16 rows. Row i goes to row index(i) behind `base`, nowhere if that is negative.
template <class C, class E, class Index>
__device__ inline void store_routed_rows(const float (&acc)[C::kColumns / 8][4], const float (&factor)[2], int D, int lane, E* base, Index index) {
  const int first = column_of_warp<C>();
  base += first + 8 * (lane & 3);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (const int row = index((lane >> 2) + 8 * h); row >= 0) {
      E* const to = row_behind(base, routed_pitch(D) * sizeof(E), row);
#pragma unroll
      for (int j = 0; j < C::kColumns / 32; ++j)
        if (first + 32 * j < D) {
          const auto number = [&](int n) { return acc[4 * j + n / 2][2 * h + n % 2] * factor[h]; };
          if constexpr (sizeof(E) == 2) {
            std::uint32_t two[4];
#pragma unroll
            for (int d = 0; d < 4; ++d) two[d] = pack_fixed<typename C::T>(number(2 * d), number(2 * d + 1));
            *reinterpret_cast<uint4*>(to + 32 * j) = {two[0], two[1], two[2], two[3]};
          } else {
#pragma unroll
            for (int n = 0; n < 8; n += 4) *reinterpret_cast<float4*>(to + 32 * j + n) = make_float4(number(n), number(n + 1), number(n + 2), number(n + 3));
          }
        }
    }
}

__device__ inline RoutedRows rounded_rows_from(const RoutedRows& rows, std::int64_t row, int D) {
  return {static_cast<Fixed*>(rows.numbers) + row * routed_pitch(D), rows.factors + row * ceil_div(D, kFactorColumns)};
}

// The same rounded, of keys and of values times a factor each; and the factors of the rows.
template <class C, class Index>
__device__ inline void store_rounded_rows(const float (&dk)[C::kColumns / 8][4], const float (&dv)[C::kColumns / 8][4], float k_factor, float v_factor, int D, int lane, const RoutedRows& to_k,
                                          const RoutedRows& to_v, Index index) {
  const FixedRows<typename C::T> k(dk, k_factor), v(dv, v_factor);
  const auto store = [&](const float (&acc)[C::kColumns / 8][4], const FixedRows<typename C::T>& fixed, const RoutedRows& to) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (const int row = index((lane >> 2) + 8 * h); (lane & 3) == 0 && row >= 0)
        to.factors[unsigned(row) * ceil_div(D, kFactorColumns) + column_of_warp<C>() / kFactorColumns] = fixed.back[h];
    store_routed_rows<C>(acc, fixed.to, D, lane, static_cast<Fixed*>(to.numbers), index);
  };
  store(dk, k, to_k), store(dv, v, to_v);
}

// Adds rows of Fixed, of up to 64 columns, to the gradients of a warp's 16 keys by tensor cores, S R: S has the factor of every row in the line of its key, and R
// is the two parts of the rows' numbers as they are when they take the last bits of two powers of two. What that adds is taken away in the end.
template <class T> struct RoutedProducts {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr std::uint32_t kLow = kHalf ? 0x58005800 : 0x43004300, kHigh = kHalf ? 0x78007800 : 0x46804680;  // 2^7 and 2^15, last bits 2^-3 and 2^5; 2^7 and 2^14, 1 and 2^7
  static constexpr float kAdded = kHalf ? 32768.0f + 128.0f : 16384.0f + 128.0f, kLast = kHalf ? 0.125f : 1.0f;
  float factors[4] = {};  // sums of S

  static __device__ std::uint32_t element_of(int key) { return pack<T>(key, key); }  // twice
  static __device__ std::uint32_t same(std::uint32_t a, std::uint32_t b) {             // all ones where elements are the same
    using Two = std::conditional_t<kHalf, __half2, __nv_bfloat162>;
    return __heq2_mask(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
  }
  // 16 rows. rows: address of chunk lane / 16 of row lane % 16 of a Tile; mask: all ones where a key is that of the lane's upper or lower row, by rows 2 (lane % 4) and
  // 8 + 2 (lane % 4) and those behind them; factor: of the same ones.
  __device__ void add(float (&acc)[8][4], std::uint32_t rows, const std::uint32_t (&mask)[4], const float2 (&factor)[2]) {
    constexpr std::uint32_t kPart = ((1u << kPartBits<T>) - 1) * 0x10001u, kOne = kHalf ? 0x3c003c00 : 0x3f803f80;
    std::uint32_t s[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t two = pack<T>(factor[i].x * (1.0f / kLast), factor[i].y * (1.0f / kLast));
      s[2 * i] = mask[2 * i] & two, s[2 * i + 1] = mask[2 * i + 1] & two;
    }
    mma<T>(factors, s, kOne, kOne);
    const auto part_of = [](std::uint32_t two, std::uint32_t bits) {
      std::uint32_t part;
      asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(part) : "r"(two), "r"(kPart), "r"(bits));  // one instruction
      return part;
    };
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      std::uint32_t two[4], low[4], high[4];
      ldmatrix_transposed(two, rows ^ (16 * j));
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = part_of(two[i], kLow), high[i] = part_of(two[i] >> kPartBits<T>, kHigh);
      mma<T>(acc[j], s, low[0], low[1]), mma<T>(acc[j + 1], s, low[2], low[3]);
      mma<T>(acc[j], s, high[0], high[1]), mma<T>(acc[j + 1], s, high[2], high[3]);
    }
  }
  __device__ void finish(float (&acc)[8][4]) const {
    constexpr float kOffset = -(kAdded + kLast * kFixedZero<T>);
#pragma unroll
    for (int d = 0; d < 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[d][i] = fmaf(factors[i / 2 * 2], kOffset, acc[d][i]);
  }
};

// What queries of one head left for the keys of a block: the list of that, 32 entries at a time, one for each lane.
struct RoutedList {
  std::int64_t row0;  // of the head
  KeyRange range;
  KeyEntry mine;

  __device__ RoutedList() : row0(0), range{0, 0} {}
  __device__ RoutedList(const UnitGradientParams& p, int bh, int key0)
      : row0(std::int64_t(bh) * max_tiles(p.problem, p.groups.segment_rows) * p.problem.K),
        range(p.groups.key_ranges[std::int64_t(bh) * ceil_div(p.problem.keys.max_length, kKeyBlock) + key0 / kKeyBlock]) {}
  __device__ bool has(int lane) const { return range.first + lane < range.last; }
  __device__ void ask(const UnitGradientParams& p, int lane) { mine = has(lane) ? p.groups.key_entries[row0 + range.first + lane] : KeyEntry{0, kKeyBlock}; }
  // The same of the entries of 16 keys alone, of which `key` is the first: `range` becomes theirs, or stays that of the block where that has very many.
  __device__ void ask_for(const UnitGradientParams& p, int key, int lane) {
    constexpr int kMost = 4;
    KeyEntry entries[kMost];
    int before = 0, until = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) entries[i] = has(32 * i + lane) ? p.groups.key_entries[row0 + range.first + 32 * i + lane] : KeyEntry{0, kKeyBlock};
    mine = entries[0];
    if (range.last - range.first > 32 * kMost) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i) before += __popc(__ballot_sync(kAllLanes, entries[i].key < key)), until += __popc(__ballot_sync(kAllLanes, entries[i].key < key + 16));
    const int own = before + lane;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const KeyEntry entry{__shfl_sync(kAllLanes, entries[i].row, own), __shfl_sync(kAllLanes, entries[i].key, own)};
      if (own / 32 == i) mine = entry;
    }
    if (own >= until) mine = {0, kKeyBlock};
    range = {range.first + before, range.first + until};
  }
  __device__ int entries_before(int key) const {  // of the 32
    int count = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      if (__shfl_sync(kAllLanes, mine.key, count + step - 1) < key) count += step;
    return count + (__shfl_sync(kAllLanes, mine.key, count) < key);
  }

  // Has the rows of this lane's entry in the L2 soon.
  __device__ void prefetch(const UnitGradientParams& p, int lane) const {
    const int bytes = routed_pitch(p.problem.D) * sizeof(Fixed);
    for (int i = 0; has(lane) && i < bytes; i += 128)
      for (const RoutedRows* rows : {&p.routed_dk, &p.routed_dv}) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(rows->numbers) + (row0 + mine.row) * bytes + i));
  }

  // Adds them to the gradients of a warp's 16 keys, of which `key` is the first, in the order of the list.
  template <class C, class E> __device__ void add(const UnitGradientParams& p, float (&dk)[C::kColumns / 8][4], float (&dv)[C::kColumns / 8][4], int key, int lane) {
    constexpr int kVectors = C::kColumns / 32, kOfNumbers = sizeof(E) / 2;  // of eight numbers
    struct Row {
      float4 vectors[kVectors][kOfNumbers];
    };
    const int D = p.problem.D, column = column_of_warp<C>();
    const auto load = [&](const RoutedRows& from, int row) {
      const E* const numbers = static_cast<const E*>(from.numbers) + (row0 + row) * routed_pitch(D) + column + 8 * (lane & 3);
      Row result;
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
#pragma unroll
        for (int i = 0; i < kOfNumbers; ++i) result.vectors[j][i] = column + 32 * j < D ? *reinterpret_cast<const float4*>(numbers + 32 * j + 4 * i) : float4{};
      return result;
    };
    const auto factor = [&](const RoutedRows& from) { return sizeof(E) == 2 && has(lane) ? from.factors[(row0 + mine.row) * ceil_div(D, kFactorColumns) + column / kFactorColumns] : 1.0f; };
    constexpr int kFew = sizeof(E) == 2 ? 6 : 32;  // rows of a key among 32 that its four lanes add by themselves
    for (; range.first < range.last; range.first += 32, ask(p, lane)) {
      const float factors[2] = {factor(p.routed_dk), factor(p.routed_dv)};
      // The rows of a key with more are added by the whole warp, key after key: a lane has the same pairs of columns of all of them, as they lie, and the owners of
      // the key get the totals. Latency: lanes of four would wait for one row after the other.
      if constexpr (sizeof(E) == 2) {
        constexpr int kPairs = ceil_div(C::kColumns, 64), kRows = 8;  // pairs of a lane; rows under way
        using Pairs = std::conditional_t<kPairs == 2, uint2, std::uint32_t>;
        const bool more = __shfl_down_sync(kAllLanes, mine.key, kFew) == mine.key && lane + kFew < 32 && mine.key / 16 == key / 16;
#pragma unroll 1
        for (unsigned left = __ballot_sync(kAllLanes, more); __builtin_expect(left != 0, false);) {
          int e = __ffs(left) - 1;
          const int many = __shfl_sync(kAllLanes, mine.key, e);
          const unsigned its = __ballot_sync(kAllLanes, mine.key == many);
          const int end = e + __popc(its), own_lane = opaque(lane), first = column + 2 * kPairs * own_lane, pitch = opaque(routed_pitch(D));  // opaque: registers
          float total[2][2 * kPairs] = {};
#pragma unroll 1
          for (; e < end; e += kRows) {
            Pairs pairs[kRows][2];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const std::int64_t at = (row0 + __shfl_sync(kAllLanes, mine.row, e + i)) * pitch + first;
#pragma unroll
              for (int v = 0; v < 2; ++v)
                pairs[i][v] = e + i < end && first < pitch ? *reinterpret_cast<const Pairs*>(static_cast<const E*>((v ? p.routed_dv : p.routed_dk).numbers) + at) : Pairs{};
            }
#pragma unroll
            for (int i = 0; i < 2 * kRows; ++i) {
              const float back = __shfl_sync(kAllLanes, factors[i % 2], e + i / 2), factor = e + i / 2 < end ? back : 0.0f;
#pragma unroll
              for (int n = 0; n < kPairs; ++n) {
                const float2 two = unpack_fixed<typename C::T>(reinterpret_cast<const std::uint32_t*>(&pairs[i / 2][i % 2])[n]);
                float* const to = &total[i % 2][2 * n];
                to[0] = fmaf(two.x, factor, to[0]), to[1] = fmaf(two.y, factor, to[1]);
              }
            }
          }
#pragma unroll
          for (int d = 0; d < C::kColumns / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float sum = __shfl_sync(kAllLanes, total[i / 2][d % kPairs * 2 + i % 2], (d / 4 * 16 + own_lane % 4 * 4 + d % 4) / kPairs);  // see column_of_pair
#pragma unroll
              for (int h = 0; h < 2; ++h)
                if (key + own_lane / 4 + 8 * h == many) (i / 2 ? dv : dk)[d][2 * h + i % 2] += sum;
            }
          left &= ~its;
        }
      }
      constexpr int kAtOnce = sizeof(E) == 2 ? 2 : 1;  // keys of a lane, as registers allow
#pragma unroll
      for (int h0 = 0; h0 < 2; h0 += kAtOnce) {
        int first[kAtOnce], count[kAtOnce], most = 0;
#pragma unroll
        for (int h = 0; h < kAtOnce; ++h) {
          const int own = key + lane / 4 + 8 * (h0 + h);
          first[h] = entries_before(own), count[h] = entries_before(own + 1) - first[h];
          most = max(most, count[h] = count[h] > kFew ? 0 : count[h]);
        }
        most = __reduce_max_sync(kAllLanes, most);
#pragma unroll 1
        for (int e = 0; e < most; ++e) {
          Row k[kAtOnce], v[kAtOnce];
#pragma unroll
          for (int h = 0; h < kAtOnce; ++h) {
            const int row = __shfl_sync(kAllLanes, mine.row, first[h] + e);
            k[h] = v[h] = Row{};
            if (e < count[h]) k[h] = load(p.routed_dk, row), v[h] = load(p.routed_dv, row);
          }
#pragma unroll
          for (int h = 0; h < kAtOnce; ++h) {
            const auto add = [&](float (&sum)[C::kColumns / 8][4], const Row& more, float its) {
              its = __shfl_sync(kAllLanes, its, first[h] + e);
              const float factor = e < count[h] ? its : 0.0f;
#pragma unroll
              for (int n = 0; n < 8 * kVectors; n += 2) {
                const float* const vector = reinterpret_cast<const float*>(more.vectors[n / 8]);
                float2 two;
                if constexpr (sizeof(E) == 2) two = unpack_fixed<typename C::T>(__float_as_uint(vector[n % 8 / 2]));
                else two = make_float2(vector[n % 8], vector[n % 8 + 1]);
                float* const to = &sum[n / 2][2 * (h0 + h)];
                to[0] = fmaf(two.x, factor, to[0]), to[1] = fmaf(two.y, factor, to[1]);
              }
            };
            add(dk, k[h], factors[0]), add(dv, v[h], factors[1]);
          }
        }
      }
    }
  }
};

}  // namespace mita
