// What a block does of grouping queries by expert, for the kernels that only group, and for that which pools and routes them as well.
#pragma once
#include <cub/block/block_scan.cuh>

#include "device.cuh"

namespace mita {

// Of some experts: their entries, and the pieces of these. Where tiles come by their number of passes, those of one are counted in the lowest kPassBits of
// `tiles`, those of two in the next, and so on.
constexpr int kPassBits = 12, kMostPasses = kMaxSmallTile / kSmallPassRows;
static_assert(kPassBits * kMostPasses <= 64);
struct Pieces {
  int entries, segments;
  std::uint64_t tiles;
  __device__ Pieces operator+(const Pieces& other) const { return {entries + other.entries, segments + other.segments, tiles + other.tiles}; }
};

// Prefix sums over the experts of a head, and the lists of work that come of them: pieces of tile_rows or segment_rows entries, expert by expert; of tiles, with
// pass_rows, the number of entries in a pass, first those of most passes. size(m) is the number of an expert's entries; a thread has experts of its own.
template <int THREADS> struct Lists {
  using Scan = cub::BlockScan<Pieces, THREADS, cub::BLOCK_SCAN_WARP_SCANS>;
  typename Scan::TempStorage storage;

  struct Sums {
    Pieces before, all;  // of the experts before this thread's own, and of all
  };
  // All threads must call it.
  template <class Size> __device__ Sums sum(const GroupParams& p, Size size) {
    Sums sums{};
    each_own(p, size, sums.before, [](int, int, const Pieces&) {});
    Scan(storage).ExclusiveScan(sums.before, sums.before, Pieces{}, [](const Pieces& a, const Pieces& b) { return a + b; }, sums.all);
    return sums;
  }
  // Where the entries of all experts begin.
  template <class Size> __device__ static void store_starts(const GroupParams& p, Size size, Sums sums, int* first) {
    each_own(p, size, sums.before, [&](int m, int, const Pieces& before) { first[m] = before.entries; });
    if (threadIdx.x == 0) first[p.problem.M] = sums.all.entries;
  }
  template <class Size> __device__ static void write_tiles(const GroupParams& p, int bh, Size size, Sums sums) {
    const int most = max_tiles(p.problem, p.tile_rows), most_passes = passes(p, p.tile_rows);
    Work* const tiles = p.tiles + std::int64_t(bh) * most;
    const auto of_passes = [&](std::uint64_t counts, int n) { return p.pass_rows ? static_cast<int>(counts >> kPassBits * (n - 1)) & ((1 << kPassBits) - 1) : static_cast<int>(counts); };
    const auto of_more_passes = [&](int n) {
      int sum = 0;
#pragma unroll 1
      for (int i = most_passes; i > n; --i) sum += of_passes(sums.all.tiles, i);
      return sum;
    };
    each_own(p, size, sums.before, [&](int m, int entries, const Pieces& before) {
      const int whole = entries / p.tile_rows, rest = entries - whole * p.tile_rows, rest_passes = passes(p, rest);
      int place = of_passes(before.tiles, most_passes);
#pragma unroll 1
      for (int i = 0; i < whole; ++i, ++place) tiles[place] = {m, before.entries + i * p.tile_rows, p.tile_rows, place};
      if (rest_passes < most_passes) place = of_more_passes(rest_passes) + of_passes(before.tiles, rest_passes);
      if (rest > 0) tiles[place] = {m, before.entries + whole * p.tile_rows, rest, place};
    });
    fill(tiles, of_more_passes(0), most);
    if (bh == 0 && threadIdx.x == 0) *p.taken = 0;
  }
  template <class Size> __device__ static void write_segments(const GroupParams& p, int bh, Size size, Sums sums) {
    const int most = max_tiles(p.problem, p.segment_rows);
    Work* const segments = p.segments + std::int64_t(bh) * most;
    std::int32_t* const starts = p.segment_starts + std::int64_t(bh) * (p.problem.M + 1);
    each_own(p, size, sums.before, [&](int m, int entries, const Pieces& before) {
      starts[m] = before.segments;
#pragma unroll 1
      for (int i = 0, place = before.segments; i < entries; i += p.segment_rows, ++place)
        segments[place] = {m, before.entries + i, min(p.segment_rows, entries - i), place};
    });
    fill(segments, sums.all.segments, most);
    if (threadIdx.x == 0) starts[p.problem.M] = sums.all.segments;
  }

 private:
  __device__ static int passes(const GroupParams& p, int entries) { return p.pass_rows && entries > 0 ? ceil_div(entries, p.pass_rows) : 1; }
  // f(m, size(m), what comes before m); then `before` is what comes before the next thread's.
  template <class Size, class F> __device__ static void each_own(const GroupParams& p, Size size, Pieces& before, F f) {
    const int each = ceil_div(p.problem.M, THREADS), first = threadIdx.x * each;
#pragma unroll 1
    for (int m = first; m < min(p.problem.M, first + each); ++m) {
      const int entries = size(m), whole = entries / p.tile_rows, rest = entries - whole * p.tile_rows;
      f(m, entries, before);
      const auto tiles = [&](int count, int passes) { return static_cast<std::uint64_t>(count) << (p.pass_rows ? kPassBits * (passes - 1) : 0); };
      before = before + Pieces{entries, ceil_div(entries, p.segment_rows), tiles(whole, passes(p, p.tile_rows)) + tiles(rest > 0, passes(p, rest))};
    }
  }
  __device__ static void fill(Work* list, int count, int most) {
#pragma unroll 1
    for (int i = count + threadIdx.x; i < most; i += THREADS) list[i] = {0, 0, 0, 0};
  }
};

__device__ inline std::int32_t* entries_of(const GroupParams& p, int bh) { return p.entries + std::int64_t(bh) * p.problem.queries.max_length * p.problem.s; }

}  // namespace mita
