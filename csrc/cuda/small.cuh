// Small experts (dispatch.h): a warp holds the keys and values of one expert in shared memory, beside shared units that its block has, and 16 of its queries at a time in
// registers. A block has one head, and its warps take one tile of queries after the other from the list of that head.
#pragma once
#include "device.cuh"
#include "launch.h"

namespace mita {

// W: columns of a row in shared memory. KT: eights of units in a tile, of the shared ones as of an expert's.

// The chunks of row `row` behind `base` that a lane holds of eight rows in an operand of `mma`: lane 4g + t every fourth chunk of row g from t on, zeros behind the
// last column. Products so meet the columns in an order of their own, the same in both operands. pitch: bytes from row to row.
template <int W> using Fragment = std::uint32_t[W / 32][4];  // of each chunk, two columns each
template <int W> __device__ inline void load_fragment(Fragment<W>& x, const unsigned char* base, int row, std::uint32_t pitch, int D, int t) {
  const unsigned char* const from = base + 16 * t + std::uint64_t(pitch) * static_cast<std::uint32_t>(row);
#pragma unroll
  for (int i = 0; i < W / 32; ++i) {
    x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
    asm("{ .reg .pred p; setp.gt.s32 p, %5, %6; @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])
        : "l"(from + 64 * i), "r"(D - 8 * t), "r"(32 * i));
  }
}
// Rows in shared memory, whose chunks of 16 bytes are permuted: no bank conflicts among whole rows, nor among the lanes of a fragment, nor among eight rows' parts
// of one column for `ldmatrix`. Rows of 96 columns lie half a turn of the banks apart, those of 64 or 128 are turned by half of that.
template <int W> struct SmallRows {
  static constexpr int kRow = 2 * W, kEight = 8 * kRow, kTurn = W % 64 == 0 ? 8 : 4;  // kTurn: chunks that change places with each other
  static __device__ int place_of(int row, int chunk) { return kRow * row + 16 * (chunk ^ (4 * (kTurn / 8 * row & 1) + (row >> 1 & 3))); }
  // From the address of one of a row's first chunks, of which `chunk` has no bit, to that of one so many chunks behind.
  static __device__ std::uint32_t behind(std::uint32_t address, int chunk) { return (address ^ 16 * (chunk % kTurn)) + 16 * (chunk - chunk % kTurn); }
};
// A lane's chunk of one of four rows there, zeros behind the last column, and its chunk of the columns from 64 on.
template <int W> struct RowCopy {
  using Place = SmallRows<W>;
  int place, chunk, bytes, more;  // where it lies in the first four, where in a row of the source, and how much of it is there, and behind the first 64 columns
  __device__ RowCopy(int D, int lane)
      : place(Place::place_of(lane / 8, lane % 8)), chunk(8 * (lane % 8) < D ? 16 * (lane % 8) : 0), bytes(8 * (lane % 8) < D ? 16 : 0), more(64 + 8 * (lane % 8) < D ? 16 : 0) {}
  // To the `four`-th four rows behind `to`. base: this chunk of the source's first row; row: that of this lane.
  __device__ void operator()(std::uint32_t to, int four, const unsigned char* base, int row, std::uint32_t pitch) const {
    const std::uint32_t target = ((to + place) ^ (32 * (four % 2))) + 4 * Place::kRow * four;
    if constexpr (W == 64) {
      asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global [%0], [from], 16, %4; }" ::"r"(target), "r"(row), "r"(pitch), "l"(base), "r"(bytes)
                   : "memory");
    } else {
      const unsigned char* const from = base + std::uint64_t(pitch) * static_cast<std::uint32_t>(row);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from) : "memory");
      if (W == 128 || threadIdx.x % 8 < 4)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target + 128), "l"(more ? from + 128 : from), "r"(more) : "memory");
    }
  }
};
__device__ inline void load_half(std::uint32_t (&x)[4], std::uint32_t address) {
  const float4 chunk = load_shared4(address);
  x[0] = __float_as_uint(chunk.x), x[1] = __float_as_uint(chunk.y), x[2] = __float_as_uint(chunk.z), x[3] = __float_as_uint(chunk.w);
}

// `clear`, which the compiler else does in any case where it is seldom wanted.
template <int N> __device__ inline void clear_here(float (&acc)[N][4]) {
  const float zero = static_cast<float>(opaque(0));
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = zero;
}

// Where the tensors of one head begin, and their sizes. In shared memory: registers.
struct SmallHead {
  int keys, tile_count, part;
  const unsigned char *k, *v;
  const Work* tiles;
  const std::int32_t *entries, *indices;
  // `list`, of tiles of so many `rows`; part: of the head's tiles.
  template <class T> __device__ static SmallHead of(const Problem& x, const Units& units, const Work* list, int rows, const std::int32_t* entries, int bh, int part) {
    const int b = bh / x.H, h = bh % x.H, tiles = max_tiles(x, rows);
    const Span keys = span(x.keys, b);
    const auto rows_of = [&](const Rows& of) { return reinterpret_cast<const unsigned char*>(head_rows<T>(of, b, h / (x.H / x.Hkv), keys.start)); };
    return {keys.length, tiles, part, rows_of(units.k), rows_of(units.v), list + std::int64_t(bh) * tiles, entries + std::int64_t(bh) * x.queries.max_length * x.s,
            units.indices + std::int64_t(bh) * x.M * x.K};
  }
};

// What a warp works on next, asked for while it is busy with the tile before: first which tile, then its keys and its queries. The keys lie in their order at first,
// then by fours: those of the lanes that copy one row of every four are together.
template <int MOST = kMaxSmallTile> struct Coming {
  Work work;
  alignas(16) std::int32_t slice;  // of its keys
  alignas(16) std::int32_t keys[kSmallExpertKeys], entries[MOST];
};
__device__ inline void load_number(std::uint32_t target, const std::int32_t* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline std::uint32_t small_pitch(const Rows& rows) { return static_cast<std::uint32_t>(rows.row * 2); }

// Shared memory: the keys of the shared units, their values, those of every warp's expert, and for every warp what comes.
template <int KT> int small_shared_tiles(const Problem& x, const Units& units) { return units.shared ? ceil_div(x.M, 8 * KT) : 0; }
template <int W, int KT> constexpr int kSmallPlace = 2 * SmallRows<W>::kEight * KT;                             // of a tile
template <int W, int KT> constexpr int kSmallBytes = kSmallPlace<W, KT> + static_cast<int>(sizeof(Coming<>));  // of a warp

// Copies the shared units, by all warps of the block.
template <class T, int W, int KT> __device__ inline void load_shared_units(std::uint32_t to, const RowCopy<W>& copy_row, const Problem& x, const Units& units, int bh, int shared_tiles) {
  const int lane = threadIdx.x % 32, b = bh / x.H, h = bh % x.H;
  for (int n = threadIdx.x / 32; n < 2 * KT * shared_tiles; n += blockDim.x / 32) {
    const int tile = n / (2 * KT), four = n % (2 * KT);
    const auto copy = [&](int tensor, const Rows& rows) {
      copy_row(to + kSmallPlace<W, KT> * tile + tensor, four, reinterpret_cast<const unsigned char*>(head_rows<T>(rows, b, h, 0)) + copy_row.chunk, min(4 * n + lane / 8, x.M - 1),
               small_pitch(rows));
    };
    copy(0, units.landmarks), copy(SmallRows<W>::kEight * KT, units.compressed);
  }
  commit_loads();
}

// The tiles of a warp, of up to MOST queries, one after the other; or slices of 8 KT of its keys, each with all of the tile.
template <int W, int KT, int MOST = kMaxSmallTile> struct SmallTiles {
  using Coming = mita::Coming<MOST>;
  const SmallHead& head;
  Coming& coming;
  unsigned& taken;  // tiles of this part of the head
  const std::uint32_t units, place, keys, entries;  // addresses: of the expert's units, of `coming` and its lists
  const RowCopy<W>& copy_row;
  const int lane;

  __device__ SmallTiles(const SmallHead& head, Coming& coming, unsigned& taken, const Window& window, std::uint32_t units, const RowCopy<W>& copy_row, int lane)
      : head(head), coming(coming), taken(taken), units(units), place(window.of(coming)), keys(place + offsetof(Coming, keys)), entries(place + offsetof(Coming, entries)),
        copy_row(copy_row), lane(lane) {}

  __device__ static void arrived() {
    wait_own_loads<0>();
    __syncwarp();
  }
  __device__ void take(int parts, int slices = 1) const {
    if (lane == 0) {
      const int item = head.part + parts * static_cast<int>(atomicInc(&taken, 1u << 31)), tile = item / slices;  // an addition would first ask which other lanes add as well
      if (tile < head.tile_count) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(head.tiles + tile) : "memory");
      else coming.work = {0, 0, 0, 0};
      coming.slice = item % slices;
    }
  }
  // At what has been taken; returns its queries. keys: of its expert, from `first_key` on.
  __device__ int look(int K, int first_key = 0) const {
    const Work work = coming.work;
    if (work.entries > 0) {
      load_numbers(entries, head.entries, work.first, work.entries, std::integral_constant<int, MOST>());
      load_numbers(keys, head.indices, work.expert * K + first_key, K - first_key, std::integral_constant<int, 8 * KT>());
    }
    commit_loads();
    return work.entries;
  }
  // Others of an expert's keys.
  __device__ void ask_for_keys(int expert, int K, int first_key) const {
    load_numbers(keys, head.indices, expert * K + first_key, K - first_key, std::integral_constant<int, 8 * KT>());
    commit_loads();
  }
  // Puts the keys that have arrived by fours, the first one in the place of those that are not there; returns how many are. K: how many there may be.
  __device__ int order_keys(int K) const {
    constexpr int kOfLane = ceil_div(KT, 4);
    int key[kOfLane], count = 0;
    bool valid[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      key[i] = load_shared_int(keys + 4 * (lane + 32 * i));
      valid[i] = lane + 32 * i < std::min(K, 8 * KT) && static_cast<unsigned>(key[i]) < static_cast<unsigned>(head.keys);
      count += __popc(__ballot_sync(kAllLanes, valid[i]));
    }
    const int first = __shfl_sync(kAllLanes, key[0], 0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) store_shared(keys + 64 * (lane % 4) + 4 * (lane / 4) + 32 * i, valid[i] ? key[i] : first);
    __syncwarp();
    return count;
  }
  __device__ void bring(int tensor, const unsigned char* rows, const Rows& from) const {
    const std::uint32_t pitch = opaque(small_pitch(from));
    const unsigned char* const base = opaque(rows + copy_row.chunk);
    std::uint32_t row[ceil_div(KT, 2)][4];
#pragma unroll
    for (int n = 0; n < ceil_div(KT, 2); ++n) load_half(row[n], keys + 64 * (lane / 8) + 16 * n);
#pragma unroll
    for (int n = 0; n < 2 * KT; ++n) copy_row(units + tensor, n, base, row[n / 4][n % 4], pitch);
  }
  __device__ int entry(int i, int count) const { return load_shared_int(entries + 4 * min(i, count - 1)); }

 private:
  template <int N> __device__ void load_numbers(std::uint32_t to, const std::int32_t* list, std::int64_t first, int count, std::integral_constant<int, N>) const {
#pragma unroll
    for (int i = 0; i < ceil_div(N, 32); ++i)
      if (lane + 32 * i < count) load_number(to + 4 * lane + 128 * i, list + first + lane + 32 * i);
  }
};

// The warp's 16 rows, of which a lane holds fragments of its upper and its lower one, times 8 KT rows at `from`. Four sums grow by turns, as each step waits for the
// one before.
template <class T, int W, int KT> __device__ inline void product_with_rows(float (&sum)[KT][4], const Fragment<W> (&own)[2], std::uint32_t from) {
  using Place = SmallRows<W>;
  constexpr float kZero[4] = {};
  const int lane = threadIdx.x % 32;
  from += Place::place_of(lane >> 2, lane & 3);
#pragma unroll
  for (int four = 0; four < W / 32; ++four)
#pragma unroll
    for (int n = 0; n < KT; n += 4) {
      std::uint32_t b[4][4];
#pragma unroll
      for (int r = 0; r < 4 && n + r < KT; ++r) load_half(b[r], Place::behind(from, 4 * four) + Place::kEight * (n + r));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t a[4] = {own[0][four][2 * j], own[1][four][2 * j], own[0][four][2 * j + 1], own[1][four][2 * j + 1]};
#pragma unroll
        for (int r = 0; r < 4 && n + r < KT; ++r)
          if (four + j == 0) mma<T>(sum[n + r], a, b[r][0], b[r][1], kZero);
          else mma<T>(sum[n + r], a, b[r][2 * j], b[r][2 * j + 1]);
      }
    }
}

// A row's numbers of a warp's accumulators to whole rows: of every two chunks a lane gives half of what it has for half of its neighbour's, so each has eight bytes of
// one of them. Half h of a lane's rows goes to to(h), nowhere if that is null.
template <class T, int W, class To> __device__ inline void store_small_rows(const float (&acc)[W / 8][4], const float (&factor)[2], int D, int lane, To to) {
  const int t = lane & 3, odd = t & 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    unsigned char* const row = to(h);
    unsigned char* const own = row + 16 * odd + 4 * (t - odd);
#pragma unroll
    for (int d = 0; d < W / 8; d += 2) {
      std::uint32_t two[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) two[j] = pack<T>(acc[d + j][2 * h] * factor[h], acc[d + j][2 * h + 1] * factor[h]);
      const std::uint32_t other = __shfl_xor_sync(kAllLanes, odd ? two[0] : two[1], 1);
      if (row && 8 * (d + odd) < D) *reinterpret_cast<uint2*>(own + 16 * d) = odd ? make_uint2(other, two[1]) : make_uint2(two[0], other);
    }
  }
}

// Tiles of a head, on average.
inline int small_tiles(const Problem& x, int rows) { return std::min(max_tiles(x, rows), x.queries.max_length * x.s / rows + ceil_div(x.M, 2)); }
// Starts a kernel whose warps share `tiles` of every head, on average. Of its blocks so many fit on a multiprocessor that it all takes least long; where that is the same,
// as many warps as have room, in as many blocks as that leaves possible. most_warps: of a multiprocessor. Bytes: of what a block has once, and of a warp. The kernel is told
// how many blocks, parts, a head has.
template <class P, class... Params, class... Args>
cudaError_t launch_by_warps(bool early, void (*kernel)(P, int, Params...), int tiles, int most_warps, int shared_bytes, int warp_bytes, cudaStream_t stream, const P& p, Args... args) {
  constexpr int kReserved = kReservedMemory + kPanel;  // of a block, with its static memory, behind which the other one is aligned
  int memory;
  if (cudaError_t status = device_attribute(memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor)) return status;
  const int heads = p.problem.B * p.problem.H;
  int blocks = 1, warps = 0;
  LeastBusy least{};
  for (int b = 1; b <= 4; ++b) {
    const int w = std::min(most_warps / b, (memory / b - kReserved - shared_bytes) / warp_bytes);
    if (w <= 0) break;
    const LeastBusy busy = least_busy(heads, tiles, w, b * kMultiprocessors, 2);  // the start of a block takes as long as a tile
    if (warps == 0 || busy.time < least.time || (busy.time == least.time && b * w >= blocks * warps)) blocks = b, warps = w, least = busy;
  }
  if (warps == 0) return cudaErrorInvalidValue;
  return launch(early, kernel, static_cast<unsigned>(heads) * least.parts, 32 * warps, shared_bytes + warp_bytes * warps, stream, p, least.parts, args...);
}

// With the smallest W, from LEAST on, that holds the columns.
template <int LEAST, class F> cudaError_t by_columns(const Problem& x, F&& f) {
  const int columns = std::max(small_columns(x.D), LEAST);
  return dispatch_16_bits(x.dtype, [&](auto element) {
    if constexpr (LEAST == 64)
      if (columns == 64) return f(element, std::integral_constant<int, 64>());
    return columns == 96 ? f(element, std::integral_constant<int, 96>()) : f(element, std::integral_constant<int, 128>());
  });
}

}  // namespace mita
