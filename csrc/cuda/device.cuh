// Device vocabulary of all kernels: elements, sequences, shared-memory tiles, asynchronous row loads, the two warp-level
// matrix products that attention is made of, and the online softmax.
//
// One layout rules everything: a warp owns 16 rows. In an accumulator acc[n][4], lane = 4*g + t holds
//   acc[n][0..1] = row g,     columns 8n + 2t, 8n + 2t + 1
//   acc[n][2..3] = row g + 8, the same columns
// which is the fragment layout of mma.m16n8k16 and of its first operand, so that probabilities go from the first product
// into the second without leaving the registers. fp32 uses the same layout with fused multiply-adds: exact fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mita {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// ---- elements ------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes, the unit of every load

// Two neighbouring columns as one register of a 16-bit mma operand.
template <class T> __device__ inline std::uint32_t pack(float lo, float hi);
template <> __device__ inline std::uint32_t pack<__half>(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const std::uint32_t&>(h);
}
template <> __device__ inline std::uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const std::uint32_t&>(h);
}

// Logits are kept in base 2 for 16-bit elements, one multiplication less, and in base e for fp32, where that multiplication
// would round large logits once more than the definition does. kLogit<T> scales natural logits to that base.
template <class T> constexpr float kLogit = sizeof(T) == 2 ? kLog2e : 1.0f;
template <class T> __device__ inline float exponential(float x) {
  if constexpr (sizeof(T) == 2) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  } else {
    return expf(x);
  }
}
// The natural logarithm of sum * exponential(maximum); -infinity for an empty sum.
template <class T> __device__ inline float log_sum(float maximum, float sum) {
  if (sum == 0.0f) return -kInfinity;
  return sizeof(T) == 2 ? (maximum + log2f(sum)) * kLn2 : maximum + logf(sum);
}

// Gradients of a softmax over many units are products with probabilities of 1e-5 and less, where fp16 has few bits left:
// as operands they are scaled by powers of two, and the sums scaled back. A probability cannot exceed 1; the gradient of a
// logit is its product with a difference of order 1, and 2^6 leaves it room up to 1000.
template <class T> constexpr int kProbabilityShift = std::is_same_v<T, __half> ? 14 : 0;
template <class T> constexpr int kGradientShift = std::is_same_v<T, __half> ? 6 : 0;
__host__ __device__ constexpr float power_of_2(int n) { return n < 0 ? 0.5f * power_of_2(n + 1) : n > 0 ? 2.0f * power_of_2(n - 1) : 1.0f; }

// Scores in their total order as unsigned integers: NaN lowest (1), -0 = +0; 0 is left for "no key".
__device__ inline std::uint32_t ordered(float score) {
  if (score != score) return 1;
  const std::uint32_t bits = __float_as_uint(score + 0.0f);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// The same number, from which the compiler computes nothing ahead of a loop: what it would keep there, it spills.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- rows and sequences --------------------------------------------------------------------------------------------

struct Span {
  std::int64_t start;  // first row in the tensor
  int length;
};

__device__ inline Span span(const Sequences& s, int b) {
  if (s.starts) return {s.starts[b], s.starts[b + 1] - s.starts[b]};
  return {0, s.lengths ? s.lengths[b] : s.max_length};
}

template <class T> __device__ inline T* head_rows(const Rows& x, int b, int head, std::int64_t start) {
  return static_cast<T*>(x.data) + b * x.batch + head * x.head + start * x.row;
}

// Token n of N lies in the windows [first, last) of M; window m covers the tokens [first, last) of N with M and N swapped.
struct Range {
  int first, last;
};
// The division is two float estimates and an exact correction: integer division of 64 bits is a call, and calls spill.
__device__ inline int floor_div(std::int64_t a, int size) {
  const float inverse = __frcp_rn(static_cast<float>(size));
  std::int64_t quotient = static_cast<std::int64_t>(static_cast<float>(a) * inverse);
  quotient += static_cast<std::int64_t>(static_cast<float>(a - quotient * size) * inverse);
  const std::int64_t rest = a - quotient * size;
  return static_cast<int>(quotient + (rest >= size) - (rest < 0));
}
__device__ inline Range overlapping(int i, int size, int other) {
  return {floor_div(std::int64_t(i) * other, size), floor_div(std::int64_t(i + 1) * other + (size - 1), size)};
}

// Calls f(m, 1 / |window m|) for every pooling window m that holds token n, in ascending order: the gradient of pooling.
template <class F> __device__ inline void for_each_window(const Windows& w, int n, F&& f) {
  const int cell = n - w.prefix;
  if (cell < 0 || cell >= w.gh * w.gw) return;
  const Range rows = overlapping(cell / w.gw, w.gh, w.mh), columns = overlapping(cell % w.gw, w.gw, w.mw);
  for (int i = rows.first; i < rows.last; ++i) {
    const Range height = overlapping(i, w.mh, w.gh);
    for (int j = columns.first; j < columns.last; ++j) {
      const Range width = overlapping(j, w.mw, w.gw);
      f(i * w.mw + j, 1.0f / static_cast<float>((height.last - height.first) * (width.last - width.first)));
    }
  }
}

// The pooling windows of a sequence: 1-D windows follow its own length.
__device__ inline Windows windows_of(Windows w, const Sequences& queries, int length) {
  if (queries.lengths || queries.starts) w.gw = w.gh == 1 ? length : w.gw;
  return w;
}

// 16 bytes of a row in registers.
template <class T> union Vector {
  uint4 bits;
  T element[kChunk<T>];
};

template <class T> __device__ inline Vector<T> load_vector(const T* p, bool aligned) {
  Vector<T> v;
  if (aligned) {
    v.bits = *reinterpret_cast<const uint4*>(p);
  } else {
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) v.element[e] = p[e];
  }
  return v;
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// Shared memory by its 32-bit address. The address of the block's memory is taken once, in an instruction that the compiler
// does not repeat: on sm_90 every other way to it reads a special register.
struct Window {
  const unsigned char* memory;
  std::uint32_t address;
  __device__ explicit Window(const unsigned char* memory) : memory(memory) {
    asm volatile("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(memory));
  }
  template <class X> __device__ std::uint32_t of(const X& x) const {
    return address + static_cast<std::uint32_t>(reinterpret_cast<const unsigned char*>(&x) - memory);
  }
};

__device__ inline float4 load_shared4(std::uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ inline float2 load_shared2(std::uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_shared2(std::uint32_t address, float lo, float hi) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(lo), "f"(hi) : "memory");
}
__device__ inline void store_shared(std::uint32_t address, std::uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// ROWS x DP elements; 16-byte chunks of a row are permuted by the row number, which makes the accesses of ldmatrix, of
// the fp32 products and of whole-row copies free of bank conflicts.
template <class T, int DP> struct Tile {
  static constexpr int kChunks = DP / kChunk<T>, kRowBytes = DP * sizeof(T);
  std::uint32_t address;
  __device__ std::uint32_t chunk(int row, int c) const { return address + row * kRowBytes + 16 * (c ^ (row & 7)); }
  __device__ Tile from_row(int row) const { return {address + row * kRowBytes}; }  // row: a multiple of 8
};

template <class T, int DP, int ROWS> struct alignas(256) TileStorage {
  T data[ROWS * DP];
  __device__ Tile<T, DP> in(const Window& window) const { return {window.of(data)}; }
};

__device__ inline void commit_loads() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void wait_loads() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Starts copying `count` numbers, number i from source(i), with all threads of the block; zeros where that is null.
template <class Source> __device__ inline void load_numbers(std::uint32_t target, int count, Source source) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float* from = source(i);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target + 4 * i), "l"(from), "r"(from ? 4 : 0) : "memory");
  }
}

// Rows of a tensor on their way into a tile, and the chunk of each that one thread brings.
template <class T, int DP> struct Copy {
  Tile<T, DP> target;
  const unsigned char* source;  // row 0
  std::int64_t pitch;           // bytes from row to row
  bool aligned;

  __device__ Copy(Tile<T, DP> target, const Rows& rows, int b, int head, std::int64_t start)
      : target(target), source(reinterpret_cast<const unsigned char*>(head_rows<T>(rows, b, head, start))), pitch(rows.row * std::int64_t(sizeof(T))), aligned(rows.aligned) {}
  __device__ void whole(int row, int c, unsigned index) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target.chunk(row, c)), "l"(source + index * pitch + 16 * c) : "memory");
  }
  __device__ void vector(int row, int c, int index, bool valid) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target.chunk(row, c)), "l"(source + max(index, 0) * pitch + 16 * c), "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ void elements(int row, int c, int index, bool valid) const {
    Vector<T> v{};
    if (valid) v = load_vector(reinterpret_cast<const T*>(source + index * pitch + 16 * c), false);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(target.chunk(row, c)), "r"(v.bits.x), "r"(v.bits.y), "r"(v.bits.z), "r"(v.bits.w) : "memory");
  }
};

// Starts copying `rows` rows into one or more tiles with all threads of the block. index(i) is the row of the tensors that
// becomes row i, or -1; `full` says that it never is -1. Absent rows become zeros, as do the columns from D to DP: probability
// 0 times garbage would be NaN if the garbage is. The usual case, whole vectors of whole rows, has a loop of its own: what it
// does not test is a third of the instructions of an attention kernel.
template <class T, int DP, class Index, class... Copies>
__device__ inline void load_rows(int rows, int D, bool full, Index index, const Copies&... copies) {
  constexpr int kChunks = Tile<T, DP>::kChunks;
  const int c = threadIdx.x % kChunks, first = threadIdx.x / kChunks, step = blockDim.x / kChunks;
  const bool inside = c * kChunk<T> < D, aligned = (copies.aligned && ...);
  if (full && aligned && D == DP) {
#pragma unroll 1
    for (int row = first; row < rows; row += 2 * step) {
      const bool two = row + step < rows;
      const int one = index(row), other = two ? index(row + step) : 0;
      (copies.whole(row, c, one), ...);
      if (two) (copies.whole(row + step, c, other), ...);
    }
  } else if (aligned) {
#pragma unroll 1
    for (int row = first; row < rows; row += step) {
      const int source = index(row);
      (copies.vector(row, c, source, inside && source >= 0), ...);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < rows; row += step) {
      const int source = index(row);
      (copies.elements(row, c, source, inside && source >= 0), ...);
    }
  }
}

// ---- the two products ----------------------------------------------------------------------------------------------

__device__ inline void ldmatrix(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline void ldmatrix_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

template <class T> __device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <> __device__ inline void mma<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<__half>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// In these tiles, aligned as their rows are long, chunk 2k + b of a row lies at (address of chunk b) ^ 32k: one instruction,
// and no register per k.
__device__ inline std::uint32_t at_step(std::uint32_t address, int k) { return address ^ (32 * k); }

// The 16 rows of a warp as the first operand of `add_product`: in shared memory, read again for every product.
template <class T, int DP> struct SharedRows {
  Tile<T, DP> tile;
  std::uint32_t address;
  __device__ void load(Tile<T, DP> rows, int lane) {
    tile = rows;
    address = rows.chunk(lane & 15, lane >> 4);
  }
  __device__ void fragment(std::uint32_t (&a)[4], int k) const { ldmatrix(a, at_step(address, k)); }
};

// The same, kept in registers (fp32 has no use for that: its rows stay in shared memory).
template <class T, int DP> struct HeldRows {
  Tile<T, DP> tile;
  std::uint32_t held[sizeof(T) == 2 ? DP / 16 : 1][4];
  __device__ void load(Tile<T, DP> rows, int lane) {
    tile = rows;
    const std::uint32_t address = rows.chunk(lane & 15, lane >> 4);
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int k = 0; k < DP / 16; ++k) ldmatrix(held[k], at_step(address, k));
  }
  __device__ void fragment(std::uint32_t (&a)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = held[k][i];
  }
};

// What the forward kernels use. Evidence: with 64 columns, held rows spill at 128 registers, which four blocks of a multiprocessor
// leave to each thread.
template <class T, int DP> using OwnRows = std::conditional_t<DP == 64, SharedRows<T, DP>, HeldRows<T, DP>>;

// acc[16 x 8*NT] += A[16 x DP] B[8*NT x DP]^T, for example logits = queries keys^T.
template <class T, int DP, int NT, class A>
__device__ inline void add_product(float (&acc)[NT][4], const A& a_rows, Tile<T, DP> b_rows, int lane) {
  if constexpr (sizeof(T) == 2) {
    static_assert(NT % 2 == 0);
    const std::uint32_t address = b_rows.chunk((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
#pragma unroll
    for (int k = 0; k < DP / 16; ++k) {
      std::uint32_t a[4], b[4];
      a_rows.fragment(a, k);
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        ldmatrix(b, at_step(address, k) + n * 8 * DP * sizeof(T));
        mma<T>(acc[n], a, b[0], b[1]);
        mma<T>(acc[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const int g = lane >> 2, t = lane & 3;
    // Eight terms apart from the sum, as a tree: an eighth of the roundings meets the large numbers.
    const auto dot = [](float4 x, float4 y) { return fmaf(x.y, y.y, x.x * y.x) + fmaf(x.w, y.w, x.z * y.z); };
#pragma unroll 1
    for (int c = 0; c < DP / 4; c += 2) {
      float4 a[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i / 2][i % 2] = load_shared4(a_rows.tile.chunk(g + 8 * (i / 2), c + i % 2));
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 b0 = load_shared4(b_rows.chunk(8 * n + 2 * t + j, c)), b1 = load_shared4(b_rows.chunk(8 * n + 2 * t + j, c + 1));
          acc[n][j] += dot(a[0][0], b0) + dot(a[0][1], b1);
          acc[n][2 + j] += dot(a[1][0], b0) + dot(a[1][1], b1);
        }
    }
  }
}

// acc[16 x DP] += P[16 x 8*KT] V[8*KT x DP], for example output += probabilities values. P has the accumulator layout.
template <class T, int DP, int KT>
__device__ inline void add_weighted_rows(float (&acc)[DP / 8][4], const float (&p)[KT][4], Tile<T, DP> v_rows, int lane) {
  if constexpr (sizeof(T) == 2) {
    static_assert(KT % 2 == 0);
    const std::uint32_t address = v_rows.chunk(lane & 15, lane >> 4);
#pragma unroll
    for (int k = 0; k < KT / 2; ++k) {
      const std::uint32_t a[4] = {pack<T>(p[2 * k][0], p[2 * k][1]), pack<T>(p[2 * k][2], p[2 * k][3]),
                                  pack<T>(p[2 * k + 1][0], p[2 * k + 1][1]), pack<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
      for (int d = 0; d < DP / 16; ++d) {
        std::uint32_t b[4];
        ldmatrix_transposed(b, at_step(address, d) + k * 16 * DP * sizeof(T));
        mma<T>(acc[2 * d], a, b[0], b[1]);
        mma<T>(acc[2 * d + 1], a, b[2], b[3]);
      }
    }
  } else {
    // The chunk permutation splits into a part known at compile time and one of two lane offsets: few registers.
    const int t = lane & 3;
    const std::uint32_t columns[2] = {v_rows.address + 16 * (t >> 1) + 8 * (t & 1), v_rows.address + 16 * ((t >> 1) ^ 1) + 8 * (t & 1)};
#pragma unroll
    for (int n = 0; n < KT; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int owner = (lane & ~3) | (i >> 1);
        const float upper = __shfl_sync(0xffffffffu, p[n][i & 1], owner), lower = __shfl_sync(0xffffffffu, p[n][2 + (i & 1)], owner);
#pragma unroll
        for (int d = 0; d < DP / 8; ++d) {
          const float2 v = load_shared2(columns[i & 1] + (8 * n + i) * (4 * DP) + 16 * ((2 * d) ^ (i & 6)));
          acc[d][0] = fmaf(upper, v.x, acc[d][0]);
          acc[d][1] = fmaf(upper, v.y, acc[d][1]);
          acc[d][2] = fmaf(lower, v.x, acc[d][2]);
          acc[d][3] = fmaf(lower, v.y, acc[d][3]);
        }
      }
    }
  }
}

template <int N> __device__ inline void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
}

// ---- online softmax ------------------------------------------------------------------------------------------------

// Running maximum and sum of the two rows of a lane; a row's four lanes hold the same maximum, and their own shares of the sum
// until `finish`.
template <class T> struct OnlineSoftmax {
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};

  // logits -> probabilities relative to the running maximum; rescales what was accumulated before.
  template <int NT, int DT> __device__ void update(float (&logits)[NT][4], float (&acc)[DT][4]) {
    float base[2], rescale[2];
    bool grown = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = maximum[h];
#pragma unroll
      for (int n = 0; n < NT; ++n) m = fmaxf(m, fmaxf(logits[n][2 * h], logits[n][2 * h + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      base[h] = m == -kInfinity ? 0.0f : m;  // nothing but absent units so far: exp(-inf - 0) = 0, never NaN
      rescale[h] = exponential<T>(maximum[h] - base[h]);
      grown |= m > maximum[h];
      maximum[h] = m;
    }
    if (__any_sync(0xffffffffu, grown))  // seldom, after the first tiles
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] *= rescale[h];
#pragma unroll
        for (int d = 0; d < DT; ++d) acc[d][2 * h] *= rescale[h], acc[d][2 * h + 1] *= rescale[h];
      }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) sum[h] += logits[n][i] = exponential<T>(logits[n][i] - base[h]);
  }

  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    }
  }
};

// ---- work by expert ------------------------------------------------------------------------------------------------

// Some queries of one expert. With s = 0 there are no experts: the queries as they come.
struct WorkItem {
  int expert, entries, slots;   // slots: max(s, 1); an entry is query * slots + slot
  const std::int32_t* list;     // null: entries are first, first + 1, ...
  int first;
  __device__ int entry(int i) const { return list ? list[first + i] : first + i; }
  __device__ int query_of(int entry) const { return slots == 1 ? entry : entry / slots; }
};

// The `item`-th piece of at most `rows` entries in the order of `table` (prefix sums [BH, M+1]); entries <= 0: beyond the last.
// All threads of the block must call it, once. It stays in shared memory: it would hold registers all the time.
__device__ inline const WorkItem& find_work(const std::int32_t* table, const Groups& groups, const Problem& x, int s, int bh, int length, int item, int rows) {
  __shared__ WorkItem work;
  if (threadIdx.x == 0) work = s == 0 ? WorkItem{0, min(rows, length - item * rows), 1, nullptr, item * rows} : WorkItem{0, 0, s, nullptr, 0};
  __syncthreads();
  if (s == 0) return work;
  table += std::int64_t(bh) * (x.M + 1);
  for (int m = threadIdx.x; m < x.M; m += blockDim.x)
    if (const int tile = table[m]; tile <= item && item < table[m + 1]) {
      const std::int32_t* starts = groups.first + std::int64_t(bh) * (x.M + 1) + m;
      const int first = starts[0] + (item - tile) * rows;
      work = {m, min(rows, starts[1] - first), s, groups.entries + std::int64_t(bh) * x.queries.max_length * s, first};
    }
  __syncthreads();
  return work;
}

// ---- units ---------------------------------------------------------------------------------------------------------

template <class T, int DP, int UNITS> struct UnitStage {
  TileStorage<T, DP, UNITS> k, v;
};

// The units of a query, cut into tiles of UNITS: first the shared ones, then the keys of its expert, or all keys.
template <int UNITS> struct UnitTiles {
  const std::int32_t* indices;  // of the expert's keys, in shared memory; null: all keys
  int shared, gathered;         // units of either kind; the valid indices come first
  int shared_tiles, tiles;

  // In shared memory, like the work item: all threads must call it, once.
  __device__ static const UnitTiles& of(int shared, int gathered, const std::int32_t* indices) {
    __shared__ UnitTiles units;
    if (threadIdx.x == 0) units = {indices, shared, gathered, ceil_div(shared, UNITS), ceil_div(shared, UNITS) + ceil_div(gathered, UNITS)};
    __syncthreads();
    return units;
  }
  __device__ bool is_shared(int tile) const { return tile < shared_tiles; }
  __device__ int first(int tile) const { return (is_shared(tile) ? tile : tile - shared_tiles) * UNITS; }
  __device__ int count(int tile) const { return (is_shared(tile) ? shared : gathered) - first(tile); }  // UNITS or more: full

  template <class T, int DP>
  __device__ void load(UnitStage<T, DP, UNITS>& stage, const Window& window, const Units& units, const Problem& x, int b, int h, int tile) const {
    const int u0 = first(tile), present = count(tile);
    const bool full = present >= UNITS;
    if (is_shared(tile)) {
      load_rows<T, DP>(UNITS, x.D, full, [&](int i) { return i < present ? u0 + i : -1; }, Copy<T, DP>(stage.k.in(window), units.landmarks, b, h, 0),
                       Copy<T, DP>(stage.v.in(window), units.compressed, b, h, 0));
    } else {
      const std::int64_t start = span(x.keys, b).start;
      const int head = h / (x.H / x.Hkv);
      load_rows<T, DP>(UNITS, x.D, full, [&](int i) { return i < present ? indices ? indices[u0 + i] : u0 + i : -1; },
                       Copy<T, DP>(stage.k.in(window), units.k, b, head, start), Copy<T, DP>(stage.v.in(window), units.v, b, head, start));
    }
  }
};

// Copies an expert's K indices to shared memory; returns how many come before the empty slots. All threads must call it.
__device__ inline int load_indices(std::int32_t* target, const std::int32_t* indices, int K, int length) {
  __shared__ int valid;
  const auto present = [&](int index) { return static_cast<unsigned>(index) < static_cast<unsigned>(length); };
  if (threadIdx.x == 0) valid = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < K; i += blockDim.x) {
    const int index = indices[i];
    target[i] = index;
    if (present(index) && (i + 1 == K || !present(indices[i + 1]))) valid = i + 1;
  }
  __syncthreads();
  return valid;
}

// Logits of units that do not exist.
template <int NT> __device__ inline void mask_logits(float (&s)[NT][4], int count, int lane) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + 2 * (lane & 3) + (i & 1) >= count) s[n][i] = -kInfinity;
}

// ---- whole rows out of accumulators --------------------------------------------------------------------------------

// Writes the warp's 16 x D accumulator rows through its own 16 rows of a tile (free by now), so that global memory sees
// whole 16-byte chunks. row_pointer(i) is null for rows not to be stored. The rows must be 16-byte aligned.
template <class T, int DP, class RowPointer>
__device__ inline void store_rows(Tile<T, DP> tile, const float (&acc)[DP / 8][4], const float (&factor)[2], int D, int lane, RowPointer row_pointer) {
  const int g = lane >> 2, t = lane & 3;
  __syncwarp();
#pragma unroll
  for (int d = 0; d < DP / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t to = tile.chunk(g + 8 * h, (8 * d + 2 * t) / kChunk<T>) + (8 * d + 2 * t) % kChunk<T> * sizeof(T);
      if constexpr (sizeof(T) == 2) store_shared(to, pack<T>(acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]));
      else store_shared2(to, acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]);
    }
  __syncwarp();
  constexpr int kChunks = Tile<T, DP>::kChunks;
#pragma unroll 4
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, c = i % kChunks;
    if (c * kChunk<T> >= D) continue;
    if (T* target = row_pointer(row)) *reinterpret_cast<float4*>(target + c * kChunk<T>) = load_shared4(tile.chunk(row, c));
  }
}

// fp32 rows (partial sums) straight from the accumulators.
template <int DP, class RowPointer>
__device__ inline void store_partial_rows(const float (&acc)[DP / 8][4], const float (&factor)[2], int D, int lane, RowPointer row_pointer) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (float* target = row_pointer(g + 8 * h))
#pragma unroll
      for (int d = 0; d < DP / 8; ++d)
        if (8 * d < D) *reinterpret_cast<float2*>(target + 8 * d + 2 * t) = make_float2(acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]);
}

// ---- shared memory of a launch -------------------------------------------------------------------------------------

// Allows a kernel more dynamic shared memory than the default, as far as the device has it.
template <class Kernel> inline cudaError_t allow_shared_memory(Kernel kernel, std::size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace mita
