// Device vocabulary of all kernels: elements, sequences, shared-memory tiles, asynchronous row loads, the two warp-level
// matrix products that attention is made of, and the online softmax.
//
// One layout rules everything: a warp owns 16 rows. In an accumulator acc[n][4], lane = 4*g + t holds
//   acc[n][0..1] = row g,     columns 8n + 2t, 8n + 2t + 1
//   acc[n][2..3] = row g + 8, the same columns
// which is the fragment layout of mma.m16n8k16 and of its first operand, so that probabilities go from the first product
// into the second without leaving the registers. fp32 uses the same layout with fused multiply-adds: exact fp32. So do mma.m16n8k8,
// where fp32 may be rounded to TF32, and wgmma, the product of four warps at once on sm_90a: such kernels differ from the others in
// their products alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dispatch.h"

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Hopper is built for as 9.0a: 9.0 alone has no wgmma"
#endif

namespace mita {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- elements ------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Tf32 x) { return x.x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline Tf32 from_float<Tf32>(float x) { return {x}; }
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

template <class T> __device__ inline float2 unpack(std::uint32_t two);
template <> __device__ inline float2 unpack<__half>(std::uint32_t two) { return __half22float2(reinterpret_cast<const __half2&>(two)); }
template <> __device__ inline float2 unpack<__nv_bfloat16>(std::uint32_t two) { return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)); }

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
// The natural logarithm of sum * exponential(maximum); -infinity for an empty sum. And 1 / x.
template <class T> __device__ inline float log_sum(float maximum, float sum) {
  if (sum == 0.0f) return -kInfinity;
  if constexpr (sizeof(T) == 2) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(sum));
    return (maximum + y) * kLn2;
  } else {
    return maximum + logf(sum);
  }
}
template <class T> __device__ inline float reciprocal(float x) {
  if constexpr (sizeof(T) == 2) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  } else {
    return __frcp_rn(x);
  }
}

// Gradients of a softmax over many units are products with probabilities of 1e-5 and less, where fp16 has few bits left:
// as operands they are scaled by powers of two, and the sums scaled back. A probability cannot exceed 1; the gradient of a
// logit is its product with a difference of order 1, and 2^6 leaves it room up to 1000.
template <class T> constexpr int kProbabilityShift = std::is_same_v<T, __half> ? 14 : 0;
template <class T> constexpr int kGradientShift = std::is_same_v<T, __half> ? 6 : 0;
__host__ __device__ constexpr float power_of_2(int n) { return n < 0 ? 0.5f * power_of_2(n + 1) : n > 0 ? 2.0f * power_of_2(n - 1) : 1.0f; }

// What makes the logit gradients of a row sum to dlse: (sum P dP - dlse) / sum P, as a large logsumexp is rounded and P does not sum to 1.
template <class T> __device__ inline float exact_delta(float sum, float total) { return total > 0.0f ? sum * reciprocal<T>(total) : 0.0f; }

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
__device__ inline const unsigned char* opaque(const unsigned char* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// ---- rows and sequences --------------------------------------------------------------------------------------------

struct Span {
  std::int64_t start;  // first row in the tensor
  int length;
};

// A caller's lengths cannot be checked without waiting for the device; out of range they must not be out of bounds.
__device__ inline Span span(const Sequences& s, int b) {
  const auto within = [](int x, int low, int high) { return min(max(x, low), high); };
  if (!s.starts) return {0, s.lengths ? within(s.lengths[b], 0, s.max_length) : s.max_length};
  const int start = within(s.starts[b], 0, s.rows), end = within(s.starts[b + 1], start, s.rows);
  return {start, min(end - start, s.max_length)};
}

template <class T> __device__ inline T* head_rows(const Rows& x, int b, int head, std::int64_t start) {
  return static_cast<T*>(x.data) + b * x.batch + head * x.head + start * x.row;
}

// Token n of N lies in the windows [first, last) of M; window m covers the tokens [first, last) of N with M and N swapped.
struct Range {
  int first, last;
};
// Products that fit in 32 bits are divided as they are. Division of 64 bits is two float estimates and an exact correction: integer
// division would be a call, and calls spill.
__device__ inline int floor_div(int a, int size) { return a / size; }
__device__ inline int floor_div(std::int64_t a, int size) {
  const float inverse = __frcp_rn(static_cast<float>(size));
  std::int64_t quotient = static_cast<std::int64_t>(static_cast<float>(a) * inverse);
  quotient += static_cast<std::int64_t>(static_cast<float>(a - quotient * size) * inverse);
  const std::int64_t rest = a - quotient * size;
  return static_cast<int>(quotient + (rest >= size) - (rest < 0));
}
template <class Product> __device__ inline int bound_of_overlapping(int i, int size, int other, bool end) {
  return floor_div(Product(i + end) * other + (end ? size - 1 : 0), size);
}
template <class Product = std::int64_t> __device__ inline Range overlapping(int i, int size, int other) {
  return {bound_of_overlapping<Product>(i, size, other, false), bound_of_overlapping<Product>(i, size, other, true)};
}

__device__ inline bool is_pooled(const Windows& w, int n) { return n >= w.prefix && n - w.prefix < w.gh * w.gw; }

// The pooling windows of a sequence: 1-D windows follow its own length.
__device__ inline Windows windows_of(Windows w, const Sequences& queries, int length) {
  if (vary(queries)) w.gw = w.gh == 1 ? length : w.gw;
  return w;
}

// 16 bytes of a row in registers.
template <class T> union Vector {
  uint4 bits;
  T element[kChunk<T>];
};

template <class T> __device__ inline Vector<T> load_vector(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }

// Lanes of a row whose parts are summed, each with four columns, or more of a row of more than 128.
__host__ __device__ inline int lanes_of_sum(int D) { return D <= 64 ? 16 : 32; }

// Adds parts, `step` numbers from one to the next, in their order: of N rows, `apart` numbers from each other, four numbers each. FEW parts are on their way
// before the first one is added. In the place of one that is not there the last one is loaded again, which is quicker than a branch.
template <int FEW, int N> __device__ inline void add_in_order(float4 (&sums)[N], const float* from, unsigned apart, unsigned step, int parts) {
#pragma unroll 1
  for (int first = 0; first < parts; first += FEW) {
    float4 its[FEW][N];
#pragma unroll
    for (int i = 0; i < FEW; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n) its[i][n] = *reinterpret_cast<const float4*>(from + min(first + i, parts - 1) * step + n * apart);
#pragma unroll
    for (int i = 0; i < FEW; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (first + i < parts) sums[n].x += its[i][n].x, sums[n].y += its[i][n].y, sums[n].z += its[i][n].z, sums[n].w += its[i][n].w;
  }
}

template <class T> struct alignas(4 * sizeof(T)) Four {
  T element[4];
};
template <class T> __device__ inline Four<T> rounded(const float4& x) { return {{from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)}}; }

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
__device__ inline int load_shared_int(std::uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline int load_shared_short(std::uint32_t address) {
  std::uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline int load_shared_byte(std::uint32_t address) {
  std::uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_shared_short(std::uint32_t address, std::uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<std::uint16_t>(x)) : "memory");
}
__device__ inline void store_shared4(std::uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ inline void store_shared2(std::uint32_t address, float lo, float hi) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(lo), "f"(hi) : "memory");
}
__device__ inline void store_shared(std::uint32_t address, std::uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// ROWS x DP elements; 16-byte chunks of a row are permuted by the row number, which makes the accesses of ldmatrix, of
// the fp32 products and of whole-row copies free of bank conflicts. 16-bit rows are cut into panels of 128 bytes, and eight
// rows of one panel lie together: the layout that wgmma reads.
constexpr int kPanel = 8 * 128;  // bytes
template <class T, int DP> struct Tile {
  static constexpr int kChunks = DP / kChunk<T>, kRowBytes = DP * sizeof(T);
  std::uint32_t address;
  __device__ std::uint32_t chunk(int row, int c) const {
    if constexpr (kRowBytes == 64) return address + row * kRowBytes + 16 * ((c ^ row >> 1) & 3);
    else if constexpr (kRowBytes == 128) return address + row * kRowBytes + 16 * ((c ^ row) & 7);
    else if constexpr (sizeof(T) == 2) return address + (row >> 3) * (8 * kRowBytes) + (c >> 3) * kPanel + (row & 7) * 128 + 16 * ((c ^ row) & 7);
    else return address + row * kRowBytes + 16 * (c ^ (row & 7));
  }
  __device__ Tile from_row(int row) const { return {address + row * kRowBytes}; }                                       // row: a multiple of 8
  __device__ Tile from_column(int column) const { return {address + column / 64 * (sizeof(T) == 2 ? kPanel : 256)}; }  // column: of 64
};

template <class T, int DP, int ROWS> struct alignas(kPanel) TileStorage {
  T data[ROWS * DP];
  __device__ Tile<T, DP> in(const Window& window) const { return {window.of(data)}; }
};

__device__ inline void commit_loads() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void wait_own_loads() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
// What arrived, or this thread has written, is visible to wgmma too, once the block has passed a barrier.
__device__ inline void fence_loads() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
template <int PENDING> __device__ inline void wait_loads() {
  wait_own_loads<PENDING>();
  fence_loads();
}

// The same for a number that is known only here; less may stay under way.
__device__ inline void wait_all_but(int pending) {
  if (pending >= 3) wait_loads<3>();
  else if (pending == 2) wait_loads<2>();
  else if (pending == 1) wait_loads<1>();
  else wait_loads<0>();
}

// Starts copying the number at `index`; zero where that is negative. Evidence: with a null pointer instead, of which nothing is read, two kernels met
// illegal addresses, in some versions of them.
template <class E> __device__ inline void load_number(std::uint32_t target, const E* numbers, int index) {
  static_assert(sizeof(E) == 4);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(numbers + max(index, 0)), "r"(index < 0 ? 0 : 4) : "memory");
}
// `count` numbers, number i from index(i), with all threads of the block.
template <class E, class Index> __device__ inline void load_numbers(std::uint32_t target, int count, const E* numbers, Index index) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) load_number(target + 4 * i, numbers, index(i));
}

// Rows of a tensor on their way into a tile, and the chunk of each that one thread brings.
template <class T, int DP> struct Copy {
  Tile<T, DP> target;
  const unsigned char* source;  // row 0
  std::int64_t pitch;           // bytes from row to row

  __device__ Copy(Tile<T, DP> target, const Rows& rows, int b, int head, std::int64_t start)
      : Copy(target, head_rows<T>(rows, b, head, start), rows.row) {}
  __device__ Copy(Tile<T, DP> target, const T* row0, std::int64_t row)  // row: elements from row to row
      : target(target), source(reinterpret_cast<const unsigned char*>(row0)), pitch(row * std::int64_t(sizeof(T))) {}
  // Chunk c of a row to this place.
  __device__ void whole(std::uint32_t place, int c, std::uint32_t index) const {
    asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global [%0], [from], 16; }" ::"r"(place), "r"(index),
                 "r"(static_cast<std::uint32_t>(pitch)), "l"(source + 16 * c)
                 : "memory");
  }
  // The same, or zeros.
  __device__ void part(std::uint32_t place, int c, int index, bool valid) const {
    asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global [%0], [from], 16, %4; }" ::"r"(place), "r"(max(index, 0)),
                 "r"(static_cast<std::uint32_t>(pitch)), "l"(source + 16 * c), "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ void vector(int row, int c, int index, bool valid) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target.chunk(row, c)), "l"(source + max(index, 0) * pitch + 16 * c), "r"(valid ? 16 : 0)
                 : "memory");
  }
};

// The same, of rows that nobody reads again soon: they leave the L2 first.
template <class T, int DP> struct PassingCopy : Copy<T, DP> {
  std::uint64_t policy;
  template <class... Args> __device__ PassingCopy(const Args&... args) : Copy<T, DP>(args...) { asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy)); }
  __device__ void whole(std::uint32_t place, int c, std::uint32_t index) const {
    asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global.L2::cache_hint [%0], [from], 16, %4; }" ::"r"(place), "r"(index),
                 "r"(static_cast<std::uint32_t>(this->pitch)), "l"(this->source + 16 * c), "l"(policy)
                 : "memory");
  }
};

// Two numbers that are read again soon: they leave the L2 last.
__device__ inline void store_to_stay(float* to, float x, float y) {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x), "f"(y), "l"(policy) : "memory");
}
// By THREADS threads, once all have read what they want of `bytes` bytes: what they are from here on does not matter, and need not be written to memory.
template <int THREADS> __device__ inline void discard(const void* from, std::int64_t bytes) {
  constexpr int kLine = 128;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(from) + kLine - 1) / kLine * kLine, last = reinterpret_cast<std::uintptr_t>(from) + bytes;
  for (std::uintptr_t line = first + threadIdx.x % THREADS * kLine; line + kLine <= last; line += THREADS * kLine)
    asm volatile("discard.global.L2 [%0], %1;" ::"l"(line), "n"(kLine) : "memory");
}

// Starts copying `rows` rows into one or more tiles with all threads of the block. source(i), i < present, is the row of the
// tensors that becomes row i. The others become zeros, as do the columns from D to DP: probability 0 times garbage would be NaN
// if the garbage is. The usual case, whole vectors of whole rows, has a loop of its own: a thread's rows there lie a multiple of
// eight apart, at the same place of their panels, and what is neither computed nor tested is most of the instructions.
template <class T, int DP, class Source, class... Copies>
__device__ inline void load_rows(int rows, int D, int present, Source source, const Copies&... copies) {
  constexpr int kChunks = Tile<T, DP>::kChunks;
  const int c = threadIdx.x % kChunks, first = threadIdx.x / kChunks, step = blockDim.x / kChunks;
  const bool inside = c * kChunk<T> < D;
  const auto source_of = [&](int row) { return row < present ? source(row) : -1; };
  if (present >= rows && D == DP && step % 8 == 0 && rows % (2 * step) == 0) {
    std::uint32_t place = Tile<T, DP>{0}.chunk(first, c);
#pragma unroll 1
    for (int row = first; row < rows; row += 2 * step) {
      const std::uint32_t one = source(row), other = source(row + step);
      (copies.whole(copies.target.address + place, c, one), ...);
      place += step * Tile<T, DP>::kRowBytes;
      (copies.whole(copies.target.address + place, c, other), ...);
      place += step * Tile<T, DP>::kRowBytes;
    }
  } else {
#pragma unroll 1
    for (int row = first; row < rows; row += step) {
      const int from = source_of(row);
      (copies.vector(row, c, from, inside && from >= 0), ...);
    }
  }
}

// ---- the two products, by warps ---------------------------------------------------------------------------------------

__device__ inline void ldmatrix(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline void ldmatrix_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Of 8 x 8 numbers of 16 bits, two neighbours of a row in each lane, as `ldmatrix` gives them: the transpose.
__device__ inline std::uint32_t transposed(std::uint32_t two) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(two));
  return two;
}

// d = A B + c by one warp, A [16 x 16] and B [16 x 8]; of 8 columns and rows where elements are TF32, which is rounded to before the product: tensor cores would cut the
// rest off.
template <class T> __device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const float (&c)[4]);
// The same, A [16 x 8] and B [8 x 8] of 16-bit elements; d is c.
template <class T> __device__ inline void mma(float (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b);
#define MITA_MMA_OF(T, SHAPE, TYPES) \
  template <> __device__ inline void mma<T>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const float (&c)[4]) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
#define MITA_HALF_MMA_OF(T, TYPES) \
  MITA_MMA_OF(T, "m16n8k16", TYPES) \
  template <> __device__ inline void mma<T>(float (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) { \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPES ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                 : "r"(a0), "r"(a1), "r"(b)); \
  }
MITA_HALF_MMA_OF(__nv_bfloat16, "bf16.bf16")
MITA_HALF_MMA_OF(__half, "f16.f16")
MITA_MMA_OF(Tf32, "m16n8k8", "tf32.tf32")
#undef MITA_HALF_MMA_OF
#undef MITA_MMA_OF
template <class T> __device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) { mma<T>(c, a, b0, b1, c); }
template <class T> __device__ inline std::uint32_t rounded(std::uint32_t x) {
  if constexpr (std::is_same_v<T, Tf32>) asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(x));
  return x;
}

// Chunk 2k + b of a row lies at (address of chunk b) ^ 32k within a panel: at most one instruction, and no register per k.
template <class T> __device__ inline std::uint32_t at_step(std::uint32_t address, int k) { return (address ^ (32 * (k & 3))) + (sizeof(T) == 2 ? kPanel : 128) * (k >> 2); }

template <int N> __device__ inline void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
}

// ---- the two products, by warpgroups (sm_90a) ----------------------------------------------------------------------

// The compiler may neither read these registers before the products that fill them are done, nor write them afterwards.
template <int N, int I> __device__ inline void pin(float (&x)[N][I]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < I; ++i) asm volatile("" : "+f"(x[n][i])::"memory");
}
template <int N, int I> __device__ inline void pin(std::uint32_t (&x)[N][I]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < I; ++i) asm volatile("" : "+r"(x[n][i])::"memory");
}

// A tile in shared memory as wgmma wants it described: its address, and the bytes between panels (where rows are summed over)
// and between groups of eight rows, which lie together unless another distance is given. `offset` bytes further on it is described by one addition.
template <int DP> struct Matrix {
  std::uint32_t low;
  __device__ explicit Matrix(std::uint32_t address, bool sums_rows) : low(__shfl_sync(kAllLanes, address >> 4 | (sums_rows ? kPanel >> 4 << 16 : 0), 0)) {}
  __device__ void advance(int offset) { low += offset >> 4; }
  __device__ std::uint64_t at(int offset, int eight_rows = 8 * DP * 2) const { return std::uint64_t(eight_rows >> 4 | 1 << 30) << 32 | (low + (offset >> 4)); }
};

using Operand = std::uint32_t[4];  // [64 x 16] of A in registers, a lane's share

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class... Registers> __device__ inline void begin_products(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// acc = A B^T or acc += A B^T, A [64 x 16] and B [64 x 16] in shared memory.
template <class T> __device__ inline void wgmma(float (&acc)[8][4], std::uint64_t a, std::uint64_t b, bool accumulate);
// The same, B [32 x 16]; and with A in registers.
template <class T> __device__ inline void wgmma(float (&acc)[4][4], std::uint64_t a, std::uint64_t b, bool accumulate);
template <class T> __device__ inline void wgmma_rows(float (&acc)[4][4], const Operand& a, std::uint64_t b, bool accumulate);
template <class T> __device__ inline void wgmma_rows(float (&acc)[8][4], const Operand& a, std::uint64_t b, bool accumulate);  // B [64 x 16]
// acc = A^T B or acc += A^T B, A [16 x 64] and B [16 x 64] in shared memory.
template <class T> __device__ inline void wgmma_transposed(float (&acc)[8][4], std::uint64_t a, std::uint64_t b, bool accumulate = true);
// acc += A^T B, A [16 x 64] and B [16 x 8] in shared memory: with ones in B, the sums of A's rows, in every column.
template <class T> __device__ inline void wgmma_sum(float (&acc)[1][4], std::uint64_t a, std::uint64_t b);
// acc += A B, A [64 x 16] in registers, B [16 x 64] or [16 x 128] in shared memory.
template <class T> __device__ inline void wgmma(float (&acc)[8][4], const Operand& a, std::uint64_t b);
template <class T> __device__ inline void wgmma(float (&acc)[16][4], const Operand& a, std::uint64_t b);

#define MITA_8(a, n) "+f"(a[n][0]), "+f"(a[n][1]), "+f"(a[n][2]), "+f"(a[n][3]), "+f"(a[n + 1][0]), "+f"(a[n + 1][1]), "+f"(a[n + 1][2]), "+f"(a[n + 1][3])
#define MITA_16(a, n) MITA_8(a, n), MITA_8(a, n + 2)
#define MITA_32(a, n) MITA_8(a, n), MITA_8(a, n + 2), MITA_8(a, n + 4), MITA_8(a, n + 6)
#define MITA_PLACES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MITA_PLACES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MITA_PLACES_64 MITA_PLACES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MITA_WGMMA(SHAPE, TYPE, PLACES, PREDICATE) \
  "{ .reg .pred p; setp.ne.u32 p, " PREDICATE ", 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" PLACES "}, "
#define MITA_WGMMA_OF(T, TYPE) \
  template <> __device__ inline void wgmma<T>(float (&acc)[8][4], std::uint64_t a, std::uint64_t b, bool accumulate) { \
    asm volatile(MITA_WGMMA("m64n64k16", TYPE, MITA_PLACES_32, "%34") "%32, %33, p, 1, 1, 0, 0; }" \
                 : MITA_32(acc, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))); \
  } \
  template <> __device__ inline void wgmma<T>(float (&acc)[4][4], std::uint64_t a, std::uint64_t b, bool accumulate) { \
    asm volatile(MITA_WGMMA("m64n32k16", TYPE, MITA_PLACES_16, "%18") "%16, %17, p, 1, 1, 0, 0; }" \
                 : MITA_16(acc, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))); \
  } \
  template <> __device__ inline void wgmma_rows<T>(float (&acc)[4][4], const Operand& a, std::uint64_t b, bool accumulate) { \
    asm volatile(MITA_WGMMA("m64n32k16", TYPE, MITA_PLACES_16, "%21") "{%16,%17,%18,%19}, %20, p, 1, 1, 0; }" \
                 : MITA_16(acc, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))); \
  } \
  template <> __device__ inline void wgmma_rows<T>(float (&acc)[8][4], const Operand& a, std::uint64_t b, bool accumulate) { \
    asm volatile(MITA_WGMMA("m64n64k16", TYPE, MITA_PLACES_32, "%37") "{%32,%33,%34,%35}, %36, p, 1, 1, 0; }" \
                 : MITA_32(acc, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))); \
  } \
  template <> __device__ inline void wgmma_transposed<T>(float (&acc)[8][4], std::uint64_t a, std::uint64_t b, bool accumulate) { \
    asm volatile(MITA_WGMMA("m64n64k16", TYPE, MITA_PLACES_32, "%34") "%32, %33, p, 1, 1, 1, 1; }" \
                 : MITA_32(acc, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))); \
  } \
  template <> __device__ inline void wgmma_sum<T>(float (&acc)[1][4], std::uint64_t a, std::uint64_t b) { \
    asm volatile(MITA_WGMMA("m64n8k16", TYPE, "%0,%1,%2,%3", "%6") "%4, %5, p, 1, 1, 1, 0; }" \
                 : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]) : "l"(a), "l"(b), "r"(1)); \
  } \
  template <> __device__ inline void wgmma<T>(float (&acc)[8][4], const Operand& a, std::uint64_t b) { \
    asm volatile(MITA_WGMMA("m64n64k16", TYPE, MITA_PLACES_32, "%37") "{%32,%33,%34,%35}, %36, p, 1, 1, 1; }" \
                 : MITA_32(acc, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1)); \
  } \
  template <> __device__ inline void wgmma<T>(float (&acc)[16][4], const Operand& a, std::uint64_t b) { \
    asm volatile(MITA_WGMMA("m64n128k16", TYPE, MITA_PLACES_64, "%69") "{%64,%65,%66,%67}, %68, p, 1, 1, 1; }" \
                 : MITA_32(acc, 0), MITA_32(acc, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1)); \
  }
MITA_WGMMA_OF(__nv_bfloat16, "bf16")
MITA_WGMMA_OF(__half, "f16")
#undef MITA_WGMMA_OF
#undef MITA_WGMMA
#undef MITA_PLACES_64
#undef MITA_PLACES_32
#undef MITA_PLACES_16
#undef MITA_32
#undef MITA_16
#undef MITA_8

// Waits until no more than PENDING of this thread's last products are on their way; the earlier ones are in their registers.
template <class C, int PENDING, class... Registers> __device__ inline void wait_products(Registers&... registers) {
  if constexpr (C::kGroups) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    (pin(registers), ...);
  }
}
#else  // kernels of warpgroups are never launched on other architectures
template <class... Registers> __device__ inline void begin_products(Registers&...) { __trap(); }
__device__ inline void commit_products() {}
template <class T, int N> __device__ inline void wgmma(float (&)[N][4], std::uint64_t, std::uint64_t, bool) {}
template <class T, int N> __device__ inline void wgmma_rows(float (&)[N][4], const Operand&, std::uint64_t, bool) {}
template <class T> __device__ inline void wgmma_transposed(float (&)[8][4], std::uint64_t, std::uint64_t, bool = true) {}
template <class T> __device__ inline void wgmma_sum(float (&)[1][4], std::uint64_t, std::uint64_t) {}
template <class T, int N> __device__ inline void wgmma(float (&)[N][4], const Operand&, std::uint64_t) {}
template <class C, int PENDING, class... Registers> __device__ inline void wait_products(Registers&...) {}
#endif

// acc = A B^T over all columns, A of 64 rows: a tile, or in registers.
template <class T, int DP, int N> __device__ inline void wgmma_tiles(float (&acc)[N][4], const Matrix<DP>& a, const Matrix<DP>& b) {
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) wgmma<T>(acc, a.at(32 * (k & 3) + kPanel * (k >> 2)), b.at(32 * (k & 3) + kPanel * (k >> 2)), k > 0);
}
template <class T, int DP, int N> __device__ inline void wgmma_tiles(float (&acc)[N][4], const Operand (&a)[DP / 16], const Matrix<DP>& b) {
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) wgmma_rows<T>(acc, a[k], b.at(32 * (k & 3) + kPanel * (k >> 2)), k > 0);
}

// ---- the two products, by either -----------------------------------------------------------------------------------

// Rows of an operand by warps: those of a tile as they lie there, or by a list of their numbers, sixteen at a time. Address (k, n) is that of
// a lane's chunk of columns 16k and up, of the n-th sixteen rows.
template <class T, int DP> struct TileOperand {
  std::uint32_t address;
  __device__ std::uint32_t operator()(int k, int n) const { return at_step<T>(address, k) + n * 16 * DP * static_cast<int>(sizeof(T)); }
};
template <class T, int DP> __device__ inline TileOperand<T, DP> operand(const Tile<T, DP>& tile, int row, int c) { return {tile.chunk(row, c)}; }

template <class T, int DP, int ROWS> struct ListedRows {
  Tile<T, DP> tile;
  std::uint32_t list;  // shared address of 16-bit numbers
  int count;           // of them, at least 1; behind them the last one again
};
template <class T, int ROWS> struct ListedOperand {
  std::uint32_t address[ROWS / 16];
  __device__ std::uint32_t operator()(int k, int n) const { return at_step<T>(address[n], k); }
};
template <class T, int DP, int ROWS> __device__ inline ListedOperand<T, ROWS> operand(const ListedRows<T, DP, ROWS>& rows, int row, int c) {
  ListedOperand<T, ROWS> result;
#pragma unroll
  for (int n = 0; n < ROWS / 16; ++n) result.address[n] = rows.tile.chunk(load_shared_short(rows.list + 2 * min(16 * n + row, rows.count - 1)), c);
  return result;
}

// The first operand of `product`. Rows of one warp in shared memory, read again for every product:
template <class T, int DP> struct SharedRows {
  Tile<T, DP> tile;
  std::uint32_t address;
  __device__ void load(Tile<T, DP> rows, int lane) {
    tile = rows;
    address = rows.chunk(lane & 15, lane >> 4);
  }
  __device__ void load(const ListedRows<T, DP, 16>& rows, int lane) { address = operand(rows, lane & 15, lane >> 4).address[0]; }
  __device__ void fragment(std::uint32_t (&a)[4], int k) const { ldmatrix(a, at_step<T>(address, k)); }
};

// the same, kept in registers (fp32 has no use for that: its rows stay in shared memory):
template <class T, int DP> struct HeldRows {
  Tile<T, DP> tile;
  std::uint32_t held[sizeof(T) == 2 ? DP / 16 : 1][4];
  __device__ void load(Tile<T, DP> rows, int lane) {
    tile = rows;
    const std::uint32_t address = rows.chunk(lane & 15, lane >> 4);
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int k = 0; k < DP / 16; ++k) ldmatrix(held[k], at_step<T>(address, k));
  }
  __device__ void fragment(std::uint32_t (&a)[4], int k) const {
    static_assert(sizeof(T) == 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = held[k][i];
  }
};

// and rows of a warpgroup in shared memory, which wgmma reads itself.
template <class T, int DP> struct GroupRows {
  Tile<T, DP> tile;
  __device__ void load(Tile<T, DP> rows, int) { tile = rows; }
};

template <class C> using StoredRows = std::conditional_t<C::kGroups, GroupRows<typename C::T, C::DP>, SharedRows<typename C::T, C::DP>>;
// What the forward kernels use. Evidence: with 64 columns, held rows spill at 128 registers, which four blocks of a multiprocessor
// leave to each thread; with 256 they alone are 64 registers.
template <class C> using OwnRows = std::conditional_t<C::kGroups || C::DP != 128 || sizeof(typename C::T) == 4, StoredRows<C>, HeldRows<typename C::T, C::DP>>;

// Rows of a block of so many threads; where those of a warp begin, and those of its first operand: of its warpgroup, or its own.
template <class C> __host__ __device__ constexpr int rows_of_block(unsigned threads) { return threads / (2 * C::kSharers); }
template <class C> __device__ inline int row_of_warp(int warp) { return 16 * (warp / C::kSharers); }
template <class C> __device__ inline int own_rows(int warp) { return C::kGroups ? warp / 4 * 64 : row_of_warp<C>(warp); }
// Where the columns begin that this warp sums: 0 in the one that also writes what is said of a whole row.
template <class C> __device__ inline int column_of_warp() {
  if constexpr (C::kSharers == 1) return 0;
  else return threadIdx.x / 32 % C::kSharers * C::kColumns;
}
template <class C, class Rows> __device__ inline Rows own_columns(const Rows& rows) {
  if constexpr (C::kSharers == 1) return rows;
  else return rows.from_column(column_of_warp<C>());
}
// Until all warps that share these rows are here.
template <class C> __device__ inline void wait_for_sharers() {
  if constexpr (C::kSharers == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / 32 / C::kSharers), "n"(32 * C::kSharers) : "memory");
}

// The second operand of `add_weighted_rows`: weights rounded to T, in the accumulator layout.
template <class T, int KT> struct Weights {
  static constexpr bool kHalf = sizeof(T) == 2;
  std::conditional_t<kHalf, std::uint32_t, float> packed[KT][kHalf ? 2 : 4];
  Weights() = default;
  __device__ explicit Weights(const float (&w)[KT][4]) {
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
      for (int i = 0; i < (kHalf ? 2 : 4); ++i)
        if constexpr (kHalf) packed[n][i] = pack<T>(w[n][2 * i], w[n][2 * i + 1]);
        else packed[n][i] = __uint_as_float(rounded<T>(__float_as_uint(w[n][i])));
  }
  // The sum of the lane's share of its upper or lower row, as rounded.
  __device__ float sum(int i) const {
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < KT; ++n)
      if constexpr (kHalf) {
        const float2 two = unpack<T>(packed[n][i]);
        total += two.x + two.y;
      } else {
        total += packed[n][2 * i] + packed[n][2 * i + 1];
      }
    return total;
  }
};

// acc += P B, of the weights' columns from 16k on, B [16 x 64] or [16 x 128] in shared memory.
template <class T, int KT, int N> __device__ inline void wgmma_weighted(float (&acc)[N][4], const Weights<T, KT>& p, int k, std::uint64_t b) {
  wgmma<T>(acc, {p.packed[2 * k][0], p.packed[2 * k][1], p.packed[2 * k + 1][0], p.packed[2 * k + 1][1]}, b);
}

// acc[rows x 8*NT] = A[rows x DP] B[8*NT x DP]^T, for example logits = queries keys^T. A warpgroup's result, here as below, is there after
// `wait_products`.
template <class C, int NT, class A, class B, class T = typename C::T, int DP = C::DP>
__device__ inline void product(float (&acc)[NT][4], const A& a_rows, const B& b_rows, int lane) {
  if constexpr (C::kGroups) {
    const Matrix<DP> a(a_rows.tile.address, false), b(b_rows.address, false);
    begin_products(acc);
    wgmma_tiles<T>(acc, a, b);
    commit_products();
  } else if constexpr (!std::is_same_v<T, float>) {
    const auto address = operand(b_rows, (lane & 7) + (NT > 1 ? (lane >> 4) << 3 : 0), (lane >> 3) & 1);
    constexpr int kSteps = DP * sizeof(T) / 32;
    constexpr float kZero[4] = {};
    if (sizeof(T) == 4) clear(acc);
#pragma unroll(sizeof(T) == 2 ? kSteps : 4)  // TF32: loaded further ahead, it spills
    for (int k = 0; k < kSteps; ++k) {
      const auto add = [&](int n, std::uint32_t b0, std::uint32_t b1, const std::uint32_t (&a)[4]) {
        if (sizeof(T) == 2 && k == 0) mma<T>(acc[n], a, b0, b1, kZero);
        else mma<T>(acc[n], a, rounded<T>(b0), rounded<T>(b1));
      };
      std::uint32_t a[4], b[4];
      a_rows.fragment(a, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = rounded<T>(a[i]);
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        ldmatrix(b, address(k, n / 2));
        add(n, b[0], b[1], a);
        if (n + 1 < NT) add(n + 1, b[2], b[3], a);
      }
    }
  } else {
    clear(acc);
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

// acc[rows x DP] += P[rows x 8*KT] V[8*KT x DP], for example output += probabilities values; of the columns of this warp.
template <class C, int KT, class V, class T = typename C::T, int DP = C::DP>
__device__ inline void add_weighted_rows(float (&acc)[C::kColumns / 8][4], Weights<T, KT>& p, const V& rows_of_v, int lane) {
  const V v_rows = own_columns<C>(rows_of_v);
  if constexpr (C::kGroups) {
    const Matrix<DP> rows(v_rows.address, true);
    begin_products(acc, p.packed);
#pragma unroll
    for (int k = 0; k < KT / 2; ++k) wgmma_weighted(acc, p, k, rows.at(k * 16 * DP * sizeof(T)));
    commit_products();
  } else if constexpr (sizeof(T) == 2) {
    static_assert(KT % 2 == 0);
    const auto address = operand(v_rows, lane & 15, lane >> 4);
#pragma unroll
    for (int k = 0; k < KT / 2; ++k) {
      const std::uint32_t a[4] = {p.packed[2 * k][0], p.packed[2 * k][1], p.packed[2 * k + 1][0], p.packed[2 * k + 1][1]};
#pragma unroll
      for (int d = 0; d < C::kColumns / 16; ++d) {
        std::uint32_t b[4];
        ldmatrix_transposed(b, address(d, k));
        mma<T>(acc[2 * d], a, b[0], b[1]);
        mma<T>(acc[2 * d + 1], a, b[2], b[3]);
      }
    }
  } else if constexpr (std::is_same_v<T, Tf32>) {
    // Eight units of a step in an order that leaves the weights where they are: 0, 2, 4, 6, 1, 3, 5, 7.
    const int g = lane >> 2, t = lane & 3;
    const std::uint32_t even = v_rows.chunk(2 * t, g >> 2) + 4 * (g & 3), odd = v_rows.chunk(2 * t + 1, g >> 2) + 4 * (g & 3);
#pragma unroll
    for (int n = 0; n < KT; ++n) {
      std::uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(p.packed[n][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int d = 0; d < C::kColumns / 8; ++d) {
        const auto value = [&](std::uint32_t address) { return rounded<T>(load_shared_int(at_step<T>(address, d) + n * (8 * 4 * DP))); };
        mma<T>(acc[d], a, value(even), value(odd));
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
        __syncwarp();  // else the compiler loads the rows to come first, and spills
        const int owner = (lane & ~3) | (i >> 1);
        const float upper = __shfl_sync(kAllLanes, p.packed[n][i & 1], owner), lower = __shfl_sync(kAllLanes, p.packed[n][2 + (i & 1)], owner);
#pragma unroll
        for (int d = 0; d < C::kColumns / 8; ++d) {
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

// ---- online softmax ------------------------------------------------------------------------------------------------

// Of a lane's upper or lower row. Looks over NaN, unless all are.
template <int NT> __device__ inline float highest_of(const float (&scores)[NT][4], int h) {
  float highest = fmaxf(scores[0][2 * h], scores[0][2 * h + 1]);
#pragma unroll
  for (int n = 1; n < NT; ++n) highest = fmaxf(highest, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
  return highest;
}

// Running maximum and sum of the two rows of a lane; a row's four lanes hold the same maximum, and their own shares of the sum
// until `finish`. The maximum may lag behind by kSlack, which every element type has room for: what was accumulated is seldom rescaled.
template <class T> struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};

  // Raises the maximum to the largest logit. highest: that which the lane has of a row, or NaN.
  struct Raised {
    float base[2], rescale[2];  // what probabilities are relative to from here on, and by what those of before are to be multiplied
    bool grown;
  };
  __device__ Raised raise(const float (&highest)[2]) {
    Raised raised{};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = fmaxf(highest[h], __shfl_xor_sync(kAllLanes, highest[h], 1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
      if (!(m > maximum[h] + kSlack)) m = maximum[h];
      raised.base[h] = m == -kInfinity ? 0.0f : m;  // nothing but absent units so far: exp(-inf - 0) = 0, never NaN
      raised.rescale[h] = exponential<T>(maximum[h] - raised.base[h]);
      raised.grown |= m > maximum[h] && maximum[h] != -kInfinity;  // else nothing was accumulated
      maximum[h] = m;
    }
    return raised;
  }
  template <int DT> __device__ void rescale(const Raised& raised, float (&acc)[DT][4]) {
    if (__any_sync(kAllLanes, raised.grown))
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] *= raised.rescale[h];
#pragma unroll
        for (int d = 0; d < DT; ++d) acc[d][2 * h] *= raised.rescale[h], acc[d][2 * h + 1] *= raised.rescale[h];
      }
  }
  // scores -> probabilities of scale * score.
  template <int NT> __device__ void add(const Raised& raised, float (&scores)[NT][4], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) sum[h] += scores[n][i] = exponential<T>(fmaf(scores[n][i], scale, -raised.base[h]));
  }
  // All of it. scale > 0; highest: the largest score.
  template <int NT, int DT> __device__ void update(float (&scores)[NT][4], const float (&highest)[2], float scale, float (&acc)[DT][4]) {
    const Raised raised = raise({highest[0] * scale, highest[1] * scale});
    rescale(raised, acc);
    add(raised, scores, scale);
  }
  template <int NT, int DT> __device__ void update(float (&scores)[NT][4], float scale, float (&acc)[DT][4]) {
    update(scores, {highest_of(scores, 0), highest_of(scores, 1)}, scale, acc);
  }

  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
    }
  }
  // Of the finished upper or lower row: what divides by its sum, and the natural logarithm of it all.
  __device__ float factor(int h) const { return sum[h] == 0.0f ? 0.0f : reciprocal<T>(sum[h]); }
  __device__ float lse(int h) const { return log_sum<T>(maximum[h], sum[h]); }
};

// ---- work by expert ------------------------------------------------------------------------------------------------

// The `item`-th piece of at most `rows` entries of a list of work. With s = 0 there are no experts: the rows as they come.
__device__ inline Work find_work(const Work* list, const Problem& x, int s, int bh, int length, int item, int rows) {
  if (s == 0) return {0, item * rows, min(rows, length - item * rows), item};
  return list[std::int64_t(bh) * max_tiles(x, rows) + item];
}
__device__ inline int entry_of(const Groups& groups, const Problem& x, int s, int bh, const Work& work, int i) {
  return s == 0 ? work.first + i : groups.entries[std::int64_t(bh) * x.queries.max_length * s + work.first + i];
}
__device__ inline int query_of(int entry, int slots) { return slots == 1 ? entry : entry / slots; }

// ---- units ---------------------------------------------------------------------------------------------------------

template <class T, int DP, int UNITS> struct UnitStage {
  TileStorage<T, DP, UNITS> k, v;
};

// The units of a query, cut into tiles of UNITS: first the shared ones, then the keys of its expert, or all keys.
template <int UNITS> struct UnitTiles {
  std::uint32_t indices;        // shared address of the expert's keys
  bool listed;                  // are there such indices? Else all keys
  int shared, gathered;         // units of either kind; the valid indices come first
  int shared_tiles, tiles;

  __device__ static UnitTiles of(int shared, int gathered, std::uint32_t indices, bool listed) {
    return {indices, listed, shared, gathered, ceil_div(shared, UNITS), ceil_div(shared, UNITS) + ceil_div(gathered, UNITS)};
  }
  __device__ bool is_shared(int tile) const { return tile < shared_tiles; }
  __device__ int first(int tile) const { return (is_shared(tile) ? tile : tile - shared_tiles) * UNITS; }
  __device__ int count(int tile) const { return (is_shared(tile) ? shared : gathered) - first(tile); }  // UNITS or more: full

  template <class T, int DP>
  __device__ void load(UnitStage<T, DP, UNITS>& stage, const Window& window, const Units& units, const Problem& x, int b, int h, int tile) const {
    const int u0 = first(tile), present = count(tile);
    const bool dense = is_shared(tile);
    const int head = dense ? h : h / (x.H / x.Hkv);
    const std::int64_t start = dense ? 0 : span(x.keys, b).start;
    const Copy<T, DP> k(stage.k.in(window), dense ? units.landmarks : units.k, b, head, start), v(stage.v.in(window), dense ? units.compressed : units.v, b, head, start);
    if (listed && !dense) load_rows<T, DP>(UNITS, x.D, present, [list = indices + 4 * u0](int i) { return load_shared_int(list + 4 * i); }, k, v);
    else load_rows<T, DP>(UNITS, x.D, present, [u0](int i) { return u0 + i; }, k, v);
  }
};

// Copies an expert's K indices to shared memory; returns how many come before the empty slots. All threads must call it, and it
// is a barrier for them.
__device__ inline int load_indices(std::int32_t* target, const std::int32_t* indices, int K, int length) {
  int valid = 0;
  for (int base = 0; base < K; base += blockDim.x) {
    const int i = base + threadIdx.x, index = i < K ? indices[i] : -1;
    if (i < K) target[i] = index;
    valid += __syncthreads_count(static_cast<unsigned>(index) < static_cast<unsigned>(length));
  }
  return valid;
}

// The scale that `OnlineSoftmax::update` takes: what is no positive number is multiplied in at once.
template <int NT> __device__ inline float positive_scale(float (&scores)[NT][4], float scale) {
  if (scale > 0.0f) return scale;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] *= scale;
  return 1.0f;
}

// Logits of units that do not exist.
template <int NT> __device__ inline void mask_logits(float (&s)[NT][4], int count, int lane) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + 2 * (lane & 3) + (i & 1) >= count) s[n][i] = -kInfinity;
}

// The same where there are few such units, or seldom any: a branch for every eight of them, which is waited for where there are many.
template <int NT> __device__ inline void mask_last_logits(float (&s)[NT][4], int count, int lane) {
  const int own = count - 2 * (lane & 3);
#pragma unroll
  for (int n = NT - 1; n >= 0; --n) {
    if (8 * (n + 1) <= count) break;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + (i & 1) >= own) s[n][i] = -kInfinity;
  }
}

// All logits of a lane's upper or lower row: units that this query does not have.
template <int NT> __device__ inline void mask_row(float (&s)[NT][4], int i) {
#pragma unroll
  for (int n = 0; n < NT; ++n) s[n][2 * i] = s[n][2 * i + 1] = -kInfinity;
}

// ---- whole rows out of accumulators --------------------------------------------------------------------------------

// Row `row` behind `base`, rows of `pitch` bytes: one instruction, which the compiler would make three.
template <class E> __device__ inline E* row_behind(E* base, std::uint32_t pitch, int row) {
  E* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(row), "r"(pitch), "l"(base));
  return to;
}

// Writes the warp's 16 accumulator rows through its own 16 rows of a tile (free by now), so that global memory sees
// whole 16-byte chunks. Row i goes to row index(i) behind `base`, nowhere if that is negative.
template <class C, class Index, class T = typename C::T>
__device__ inline void store_rows(const Tile<T, C::DP>& rows, const float (&acc)[C::kColumns / 8][4], const float (&factor)[2], int D, int lane, T* base, std::int64_t pitch, Index index) {
  const int g = lane >> 2, t = lane & 3, first = column_of_warp<C>();
  const Tile<T, C::DP> tile = own_columns<C>(rows);
  wait_for_sharers<C>();
#pragma unroll
  for (int d = 0; d < C::kColumns / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t to = tile.chunk(g + 8 * h, (8 * d + 2 * t) / kChunk<T>) + (8 * d + 2 * t) % kChunk<T> * sizeof(T);
      if constexpr (sizeof(T) == 2) store_shared(to, pack<T>(acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]));
      else store_shared2(to, acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]);
    }
  __syncwarp();
  constexpr int kChunks = C::kColumns / kChunk<T>, kRows = 32 / kChunks;  // at once
  const int c = lane % kChunks;
  if (first + c * kChunk<T> >= D) return;
  base += first + c * kChunk<T>;
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    const int row = i + lane / kChunks, to = index(row);
    const float4 x = load_shared4(tile.chunk(row, c));
    if (to >= 0) *reinterpret_cast<float4*>(row_behind(base, pitch * sizeof(T), to)) = x;
  }
}

// fp32 rows (partial sums) straight from the accumulators.
template <class C, class RowPointer>
__device__ inline void store_partial_rows(const float (&acc)[C::kColumns / 8][4], const float (&factor)[2], int D, int lane, RowPointer row_pointer) {
  const int g = lane >> 2, t = lane & 3, first = column_of_warp<C>();
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (float* target = row_pointer(g + 8 * h))
#pragma unroll
      for (int d = 0; d < C::kColumns / 8; ++d)
        if (first + 8 * d < D) *reinterpret_cast<float2*>(target + first + 8 * d + 2 * t) = make_float2(acc[d][2 * h] * factor[h], acc[d][2 * h + 1] * factor[h]);
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Programmatic dependent launch: a kernel that may start before the one ahead of it in the stream has ended waits for all that this wrote, in every block;
// and that one says from when on it may.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Starts a kernel with so much dynamic shared memory, as far as the device has it. 48 KB with its static one a kernel may have anyway; 16 KB are more than
// enough for that. `early`, where it is sm_90a code that waits as above: while the kernel ahead of it runs.
template <class... Params, class... Args>
inline cudaError_t launch(bool early, void (*kernel)(Params...), dim3 blocks, unsigned threads, std::size_t bytes, cudaStream_t stream, const Args&... args) {
  if (bytes > 32 * 1024)
    if (cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) return status;
  cudaLaunchAttribute attribute{cudaLaunchAttributeProgrammaticStreamSerialization};
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t how{blocks, threads, bytes, stream, &attribute, early};
  return cudaLaunchKernelEx(&how, kernel, args...);
}
template <class... Params, class... Args>
inline cudaError_t launch(void (*kernel)(Params...), dim3 blocks, unsigned threads, std::size_t bytes, cudaStream_t stream, const Args&... args) {
  return launch(false, kernel, blocks, threads, bytes, stream, args...);
}

}  // namespace mita
