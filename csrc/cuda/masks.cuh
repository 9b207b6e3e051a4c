// Gradients by masks: what experts chose as bits, 32 units a word, in the order in which a lane of `wgmma`'s accumulators finds those of its own columns in a byte.
#pragma once
#include "device.cuh"

namespace mita {

// The bit of unit i of 32: lane t of four has those of columns 8j + 2t, 8j + 2t + 1 in byte t.
__device__ inline int bit_of(int i) { return (i >> 1 & 3) * 8 + (i >> 3) * 2 + (i & 1); }
__device__ inline int unit_of(int bit) { return (bit >> 1 & 3) * 8 + (bit >> 3) * 2 + (bit & 1); }

// Bit i of lane j for bit j of lane i.
__device__ inline std::uint32_t transposed_bits(std::uint32_t x) {
  const int lane = threadIdx.x % 32;
  std::uint32_t mask = 0xffff;
#pragma unroll
  for (int d = 16; d > 0; d /= 2, mask ^= mask << d) {
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, x, d);
    x = lane & d ? (x & ~mask) | (other >> d & mask) : (x & mask) | (other & mask) << d;
  }
  return x;
}

// Of such bytes, column i of the eight columns j.
__device__ inline bool has(unsigned bits, int j, int i) { return (bits >> (2 * j + i & 31) & 1) != 0; }

// What the exponents of a row's probabilities lack, which are shifted from the start. Where it attended to nothing, or is not there, infinity.
template <class T> __device__ inline float offset_of(float lse) { return lse == -kInfinity ? kInfinity : lse * kLogit<T> - kProbabilityShift<T>; }

// Two numbers rounded, and the rounded rests.
template <class T> __device__ inline void split(float lo, float hi, std::uint32_t& rounded, std::uint32_t& rest) {
  rounded = pack<T>(lo, hi);
  const float2 two = unpack<T>(rounded);
  rest = pack<T>(lo - two.x, hi - two.y);
}

}  // namespace mita
