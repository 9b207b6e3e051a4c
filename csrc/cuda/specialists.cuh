// Kernels of specialists, for sm_90a: the warps of a block, each in its role, meet at barriers in shared memory. Some bring rows into
// rings of tiles, whole warpgroups work on them.
#pragma once
#include "device.cuh"

namespace mita {

// A barrier in shared memory. Each time that `arrivals` of it have come, a phase is complete.
struct Barrier {
  std::uint32_t address;
  __device__ void init(int arrivals) const { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory"); }
  __device__ void arrive() const { asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(address) : "memory"); }
  // Once all loads that this thread has started are done.
  __device__ void arrive_loaded() const { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory"); }
  __device__ void wait(int parity) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over: }" ::"r"(address), "r"(parity)
        : "memory");
#endif
  }
};

// The places of a ring in turn, each with two barriers: is something there, and are all done with it? A barrier knows the last phase from
// the one before, no more: those who wait for a place must have seen its last use, or a later one of another place that was there, and done, in order.
// Every thread that reads or writes a place by itself arrives by itself, too: compute-sanitizer follows no order from the lanes of a warp
// to one that arrives for all. What only wgmma reads, one lane may give back.
template <int SIZE> struct Ring {
  std::uint32_t barriers;  // shared address of SIZE pairs
  unsigned count;          // of the place in question, from the first one on
  __device__ unsigned at() const { return count % SIZE; }
  __device__ Ring operator+(int n) const { return {barriers, count + n}; }
  __device__ Barrier there() const { return {barriers + 16 * at()}; }
  __device__ Barrier done() const { return {barriers + 16 * at() + 8}; }
  __device__ void wait_there() const { there().wait(count / SIZE & 1); }
  __device__ void wait_free() const { done().wait((count / SIZE & 1) ^ 1); }
  __device__ void init(int arrivals, int readers) const {
    for (int i = 0; i < SIZE; ++i) (*this + i).there().init(arrivals), (*this + i).done().init(readers);
  }
};

// Numbers of rows, listed in shared memory from a multiple of 16 bytes on.
struct RowList {
  std::uint32_t address;
  __device__ int operator()(int i) const { return load_shared_int(address + 4 * i); }
  __device__ int4 four(int i) const {  // i: a multiple of 4
    const float4 bits = load_shared4(address + 4 * i);
    return reinterpret_cast<const int4&>(bits);
  }
};

// The warpgroup of a thread, its warp there and its lane, for roles without registers to keep them in: made anew wherever they are wanted.
__device__ inline unsigned this_thread() { return opaque(threadIdx.x); }  // unsigned: a division less
__device__ inline int this_group() { return this_thread() / 128; }
__device__ inline int this_warp() { return this_thread() % 128 / 32; }
__device__ inline int this_lane() { return this_thread() % 32; }

// Starts copying ROWS rows with one warp. source(i) is the number of row i, negative for zeros. Usually all are whole. A lane has four rows, one after the
// other, at a time.
template <int ROWS, class T, int DP, class Source, class... Copies> __device__ inline void load_rows_by_warp(Source source, bool whole, int D, const Copies&... copies) {
  constexpr int kChunks = Tile<T, DP>::kChunks, kRows = 32 / kChunks, kBatch = 4 * kRows;  // rows at once, and for whose numbers one waits
  static_assert(ROWS % kBatch == 0);
  const int lane = this_lane(), c = lane % kChunks, own = lane / kChunks;
  const bool inside = c * kChunk<T> < D;
  const auto each = [&](auto&& copy) {
#pragma unroll
    for (int first = 0; first < ROWS; first += kBatch) {
      int4 number;
      if constexpr (std::is_same_v<Source, RowList>) number = source.four(first + 4 * own);
      else number = make_int4(source(first + 4 * own), source(first + 4 * own + 1), source(first + 4 * own + 2), source(first + 4 * own + 3));
      const int numbers[4] = {number.x, number.y, number.z, number.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) copy(i, first * Tile<T, DP>::kRowBytes, numbers[i]);  // at the same place of their panels
    }
  };
  // The place of the first row, in a panel; that of one of the three behind it. By exclusive or: of a sum that is a part of the address of a load with a policy, ptxas
  // 13.0 makes an illegal instruction.
  const auto place_of = [&](const auto& copy) { return copy.target.chunk(4 * own / 8 * 8, c / 8 * 8) ^ (4 * own % 8 * 128 + 16 * ((c ^ 4 * own) % 8)); };
  const auto behind = [](std::uint32_t place, int i) { return place ^ (128 + 16) * i; };
  const auto load = [&](auto... places) {
    if (whole && D == DP) each([&](int i, int offset, int number) { (copies.whole(behind(places, i) + offset, c, number), ...); });
    else each([&](int i, int offset, int number) { (copies.part(behind(places, i) + offset, c, number, inside && number >= 0), ...); });
  };
  load(place_of(copies)...);
}

// Columns 16k and up of the accumulators of 16 rows, rounded, into a tile; or all of them: operand A of `wgmma_transposed`. address: of chunk
// lane / 16 of row lane % 16.
template <class T> __device__ inline void store_weights(std::uint32_t address, int k, const Operand& weights) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at_step<T>(address, k)), "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3])
               : "memory");
#endif
}
template <class T, int KT> __device__ inline void store_weights(std::uint32_t address, const Weights<T, KT>& weights) {
#pragma unroll
  for (int k = 0; k < KT / 2; ++k)
    store_weights<T>(address, k, {weights.packed[2 * k][0], weights.packed[2 * k][1], weights.packed[2 * k + 1][0], weights.packed[2 * k + 1][1]});
}

// Whole rows out of accumulators, as `store_rows` does it, but from 16 rows of a tile that are free again for the warp afterwards. Row i goes to row
// index(i) behind `base`, nowhere if that is negative.
template <class T, int DP, class Index>
__device__ inline void store_rows_by_warp(const Tile<T, DP>& rows, const float (&acc)[DP / 8][4], const float (&factor)[2], int D, int lane, T* base,
                                          std::int64_t pitch, Index index) {
  const std::uint32_t address = rows.chunk(lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < DP / 16; ++k) {
    std::uint32_t two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) two[i] = pack<T>(acc[2 * k + i / 2][2 * (i % 2)] * factor[i % 2], acc[2 * k + i / 2][2 * (i % 2) + 1] * factor[i % 2]);
    store_weights<T>(address, k, two);
  }
  __syncwarp();
  constexpr int kChunks = DP / kChunk<T>, kRows = 32 / kChunks, kPlaces = 8 / kRows;  // rows at once; places repeat after eight rows
  if (const int c = lane % kChunks, own = lane / kChunks; c * kChunk<T> < D) {
    base += c * kChunk<T>;
    std::uint32_t places[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) places[i] = rows.chunk(own + kRows * i, c);
#pragma unroll
    for (int i = 0; i < 16 / kRows; ++i) {
      const int to = index(kRows * i + own);
      const float4 chunk = load_shared4(places[i % kPlaces] + i / kPlaces * 8 * Tile<T, DP>::kRowBytes);
      if (to >= 0) *reinterpret_cast<float4*>(row_behind(base, pitch * sizeof(T), to)) = chunk;
    }
  }
  __syncwarp();
}

// Work of all sizes is taken by number, of `all`, from a counter in device memory (Groups::taken), by all lanes of one warp. Every block finds none left
// once, and then the counter is 0 again.
__device__ inline unsigned take_next(unsigned* taken, unsigned all, int lane) {
  return __shfl_sync(kAllLanes, lane == 0 ? atomicInc(taken, all + gridDim.x - 1) : 0u, 0);
}

// Registers of each thread of a warpgroup from here on, out of what the block has: those who bring rows leave some to the others.
template <int NUMBER> __device__ inline void keep_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(NUMBER));
#endif
}
template <int NUMBER> __device__ inline void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(NUMBER));
#endif
}

// For barriers: what was initialised is visible to all.
__device__ inline void fence_barriers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One block on every multiprocessor, or for every piece of work where there are fewer.
template <class... Params> inline cudaError_t launch_specialists(bool early, void (*kernel)(Params...), int threads, std::size_t bytes, std::int64_t pieces, cudaStream_t stream, const Params&... p) {
  int multiprocessors;
  if (cudaError_t status = device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount)) return status;
  return launch(early, kernel, static_cast<unsigned>(std::min<std::int64_t>(multiprocessors, pieces)), threads, bytes, stream, p...);
}
template <class... Params> inline cudaError_t launch_specialists(void (*kernel)(Params...), int threads, std::size_t bytes, std::int64_t pieces, cudaStream_t stream, const Params&... p) {
  return launch_specialists(false, kernel, threads, bytes, pieces, stream, p...);
}

}  // namespace mita
