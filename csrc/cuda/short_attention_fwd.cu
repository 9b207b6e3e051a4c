// Short sequences: the whole forward pass of one (batch, head) by one block, which holds its queries, keys and values in shared memory;
// two blocks fill a multiprocessor, or a larger one alone. The warps of a block take items of one phase after the other, and meet between phases:
//   1. pool: 16 bytes of a landmark, the mean of its tokens, by two threads
//   2. route: the experts of 16 queries; score: 16 landmarks and 32 keys
//   3. select: the keys of two experts, and what all keys weigh in their landmarks' compressed values; order the queries by expert
//   4. compress: 16 columns of the values of 16 landmarks; the keys of an expert in ascending order; the order of the queries, for the backward pass
//   5. attend: up to 8 queries of one expert, which are the columns of all products, as experts have few. The output replaces the queries
// On sm_90a many units are attended to by masks: 64 queries by a warpgroup, all landmarks and keys 32 at a time, where bits say what an expert has chosen.
#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

// Warps of a block. One of two: of the usual 25 rows of scores 13 take two each, while one orders the queries; H200: with 12 or 16 warps 4 to 7 % more time. Alone, with
// 256 keys: 14 warps take 1 to 10 % longer, 28 as long.
constexpr int kWarps = 14, kWarpsAlone = 20, kDP = 64;
constexpr int kUnits = 32, kTiles = kUnits / 8;  // of one tile
constexpr int kQueries = 8;                      // of one expert at a time
constexpr int kRowLanes = 16;                    // of a warp that select from one row of scores
// Queries, or keys, of one head at most. H200, forward with 12 to 3072 heads against that by other kernels: a block alone takes 53 to 92 % at 256 tokens with up to 49 units of
// each kind, 71 to 102 % at 289 with 64; with 144 heads, the second wave of which is a few, up to 107 %. At 325 and more 65 to 107 % with up to 25, 77 to 127 % with 36 and 49.
constexpr int kMostRows = 448, kMostRowsOfMany = 320, kKeysOfTwo = 256;
// With many units, whatever the heads. H200, 1 to 32 of them, by masks against other kernels: 49 to 91 % up to 197, 84 to 107 % at 257, 90 to 120 % at 320.
constexpr int kRowsOfFewHeads = 256;

// Shared memory of a block: where what begins, in bytes; queries at 0. Tiles are read in whole pieces of 16 or 32 rows: what lies behind
// queries, keys and landmarks is masked, but behind values must be zeros.
//   scores [M, pitch]: of a landmark; then, of 16 bits each, the weights of all values in its compressed value, of which factors [M] multiply the sum
//   compressed: before there are any, the windows of the landmarks
//   heads [3]: where landmarks, compressed values and outputs of this head begin
//   counts [M]: the queries of every expert; experts [N]; entries [N]: the queries in the order of their experts, of which a tile is a piece
//   members [M, kRowLanes]: bit l of the j-th is set where key l + kRowLanes j is an expert's, bit l + kRowLanes where key l + kRowLanes (j + kRowLanes) is
//   indices [M, chosen_pitch]: its keys, in an order with few bank conflicts, and behind them the last one again
// Indices, experts and entries have 16 bits.
struct Memory {
  int k, v, scores, landmarks, compressed, tiles, heads, tile_count, counts, factors, members, indices, experts, entries, bytes;
  int pitch;  // floats: no bank conflicts in storing scores
  int chosen_pitch;
  Memory(const Problem& x, bool masked) {
    constexpr int kRow = kDP * 2;
    const int N = x.queries.max_length, L = x.keys.max_length;
    pitch = round_up(L - 8, 32) + 8;
    chosen_pitch = round_up(std::min(x.K, std::max(L, 1)), kUnits);
    k = round_up(N, 8) * kRow;
    v = k + round_up(L, 8) * kRow;
    scores = v + round_up(L, masked ? kUnits : 16) * kRow;
    landmarks = scores + round_up(x.M * pitch * 4, kPanel);
    compressed = landmarks + round_up(x.M, 8) * kRow;
    tiles = compressed + round_up(x.M, kUnits) * kRow;
    heads = tiles + (N / kQueries + std::min(N, x.M)) * static_cast<int>(sizeof(Work));
    tile_count = heads + 3 * 8;
    counts = tile_count + 4;
    factors = counts + x.M * 4;
    members = round_up(factors + x.M * 4, 8);
    indices = members + x.M * kRowLanes * 4;
    experts = indices + x.M * chosen_pitch * 2;
    entries = experts + N * 2;
    bytes = entries + N * 2;
  }
};

// Of every other four rows of weights, neighbouring chunks are swapped: no bank conflicts.
__device__ inline int swapped_chunks(int m) { return 16 * (m >> 2 & 1); }

// What all rows of scores have in common. In a normal distribution the k best of `length` scores would be so many deviations above the mean, and one of them so many
// deviations apart from the next.
struct Selection {
  int length, k;
  float deviations, apart;
  __device__ Selection(int length, int k) : length(length), k(k) {
    const float share = __fdividef(static_cast<float>(k), static_cast<float>(length));
    deviations = logistic_quantile(0.0f, 1.0f, share), apart = __fdividef(0.59f, static_cast<float>(k) * (1.001f - share));
  }
};

// The k best of a row of scores, of which lane l of kRowLanes has those of keys l, l + kRowLanes, ...: bit j for key l + kRowLanes j. The other lanes do the same with
// another row; one that is not `present` has none. Behind the last key scores are -infinity. members: bits of lane j, of the other row in the upper half, for the j-th keys
// of all lanes, then for those kRowLanes further. A threshold is looked for by how many scores too many, or too few, reach the one before; where that is one, it is behind the
// lowest of those, or at the highest of the others. Where this leads nowhere, as there are equal scores or some that are not finite, bits are bisected.
template <class T, int SLOTS> __device__ inline unsigned select(const float (&score)[SLOTS], bool present, const Selection& s, unsigned (&members)[ceil_div(SLOTS, kRowLanes)]) {
  constexpr int kRounds = 16, kInterpolations = 6;
  const int lane = threadIdx.x % 32, own = lane % kRowLanes, keys = present ? s.length - own : 0, k = present ? s.k : 0;
  const unsigned expected = s.k + (__all_sync(kAllLanes, present) ? s.k << 16 : 0);
  const auto count = [&](auto&& add) {  // of both rows, 16 bits each
    int n[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) add(n[j % 2], j);
    return __reduce_add_sync(kAllLanes, lane < kRowLanes ? n[0] + n[1] : (n[0] + n[1]) << 16);
  };
  const auto of_row = [&](unsigned all) { return static_cast<int>(lane < kRowLanes ? all & 0xffff : all >> 16); };
  float sum = 0.0f, squares = 0.0f, low = 0.0f, high = 0.0f;
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    const float its = kRowLanes * j < keys ? score[j] : 0.0f;
    sum += its, squares = fmaf(its, its, squares);
  }
  const float inverse = reciprocal<T>(static_cast<float>(s.length)), mean = sum_of_lanes<kRowLanes>(sum) * inverse;
  const float variance = fmaf(sum_of_lanes<kRowLanes>(squares), inverse, -mean * mean), deviation = variance * rsqrtf(variance);
  float least = fmaf(s.deviations, deviation, mean), of_one = s.apart * deviation;
  int over = 0, above = 0, below = 0;  // how many more than k reach `least`, how many more `low`, how many fewer `high`; 0: not known yet
  const auto reach = [&] {
    return count([&](int& n, int j) { asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(n) : "f"(score[j]), "f"(least)); });
  };
  unsigned all = ~expected, chosen = 0;
  for (unsigned& its : members) its = 0;
  const auto take = [&](int j, bool its) {
    const unsigned together = __ballot_sync(kAllLanes, its);
    if (its) chosen += 1u << j;
    if (own == j % kRowLanes) members[j / kRowLanes] = together;
  };
  if (s.k < s.length) {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      all = reach(), over = of_row(all) - k;
      const bool near = -1 <= over && over <= 1;
      if (__all_sync(kAllLanes, near)) break;
      if (near) continue;
      if (over > 0) low = least, above = over;
      else high = least, below = -over;
      if (above > 0 && below > 0) {
        const float part = round < kInterpolations ? static_cast<float>(above) * reciprocal<T>(static_cast<float>(above + below)) : 0.5f;
        least = fmaf(fminf(fmaxf(part, 0.1f), 0.9f), high - low, low);
      } else {
        least = fmaf(static_cast<float>(over), of_one, least), of_one *= 1.5f;
      }
    }
    if (all != expected) {
      float next = -kInfinity;
#pragma unroll
      for (int j = 0; j < SLOTS; ++j) {
        const float its = over > 0 ? -score[j] : score[j];
        if ((score[j] >= least) == (over > 0)) next = fmaxf(next, its);
      }
#pragma unroll
      for (int d = 1; d < kRowLanes; d *= 2) next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, d));
      const float lowest = 0.0f - next;  // of those that reach `least`: the number above it
      if (over > 0) least = __int_as_float(__float_as_int(lowest) + (lowest < 0.0f ? -1 : 1));
      if (over < 0) least = next;
      all = reach();
    }
  }
  if (all == expected) {
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) take(j, score[j] >= least);
    return present ? chosen : 0;
  }
  std::uint32_t key[SLOTS], kth = 0;  // of an order of all scores; 0: no key
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) key[j] = kRowLanes * j < keys ? ordered(score[j]) : 0;
#pragma unroll 1
  for (std::uint32_t bit = s.k < s.length ? 1u << 31 : 0; bit; bit >>= 1)
    if (of_row(count([&](int& n, int j) { n += key[j] >= (kth | bit); })) >= k) kth |= bit;
  int ties = k - of_row(count([&](int& n, int j) { n += key[j] > kth; }));  // that are chosen: the first ones
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    const unsigned equal = of_row(__ballot_sync(kAllLanes, key[j] == kth));
    take(j, key[j] > kth || (key[j] == kth && __popc(equal & ((1u << own) - 1)) < ties));
    ties -= __popc(equal);
  }
  return chosen;
}

// Writes the keys of a row that `select` chose. Keys of lanes l and l + 8 are in the same banks: first one key of each such eighth, then another one of each, and so on, so
// that few of eight neighbours meet.
__device__ inline void list_by_banks(std::uint32_t list, unsigned chosen) {
  const int lane = threadIdx.x % 32, own = __popc(chosen), others = __shfl_xor_sync(kAllLanes, own, 8), turn = lane & 8 ? others : 0;
  int before = 0;
#pragma unroll 1
  for (int i = 0; const unsigned some = __ballot_sync(kAllLanes, i < own + others); ++i) {
    const unsigned eighths = some >> (lane & 16) & 0xff;
    if (static_cast<unsigned>(i - turn) < static_cast<unsigned>(own)) {
      const int j = 31 - __clz(chosen);
      store_shared_short(list + 2 * (before + __popc(eighths & ((1u << lane % 8) - 1))), kRowLanes * j + lane % kRowLanes);
      chosen ^= 1u << j;
    }
    before += __popc(eighths);
  }
}

// ONCE: there are shared units, and a tile has room for them all, as for the keys of an expert. Nothing is kept from one tile of units to the next then: 5 % less time.
// MASKED: products of warpgroups, 64 queries and 32 of all keys or landmarks, take the place of those by lists; what an expert did not choose is masked by bits, so that
// K costs nothing there.
template <class T, bool ONCE, int WARPS, bool MASKED> __global__ void __launch_bounds__(32 * WARPS, WARPS == kWarps ? 2 : 1) short_attention_kernel(const ShortParams p, const Memory layout) {
  using C = Config<T, kDP>;
  constexpr int kThreads = 32 * WARPS;
  constexpr int kLoaders = (WARPS - 1) / 3;  // warps that bring queries, or keys, or values; the last ones prepare what else is wanted
  constexpr int kChunks = kDP / kChunk<T>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const auto tile = [&](int at) { return Tile<T, kDP>{window.address + at}; };
  const auto q = tile(0), k = tile(layout.k), v = tile(layout.v), z = tile(layout.landmarks), c = tile(layout.compressed);
  float* const scores = reinterpret_cast<float*>(memory + layout.scores);
  int &tile_count = *reinterpret_cast<int*>(memory + layout.tile_count), *const counts = reinterpret_cast<int*>(memory + layout.counts);
  float* const factors = reinterpret_cast<float*>(memory + layout.factors);
  Work* const tiles = reinterpret_cast<Work*>(memory + layout.tiles);
  auto *const experts = reinterpret_cast<std::uint16_t*>(memory + layout.experts),
             *const entries = reinterpret_cast<std::uint16_t*>(memory + layout.entries);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int bh = blockIdx.x, b = bh / x.H, h = bh % x.H, M = x.M;
  const Span queries = span(x.queries, b), keys = span(x.keys, b);
  const int N = queries.length, L = keys.length, chosen = min(x.K, L);
  const int kv = x.H == x.Hkv ? h : h / (x.H / x.Hkv);
  const auto load = [&](int loader, const Tile<T, kDP>& to, const Rows& rows, int head, const Span& from, int count) {
    if (warp / kLoaders == loader) load_sequence<T, kDP, 32 * kLoaders>(to, rows, b, head, from, x.D, count);
  };
  load(0, q, p.q, h, queries, round_up(N, 8));
  if (!p.pool) load(0, z, p.landmarks, h, {0, M}, round_up(M, 8));
  load(1, k, p.k, kv, keys, round_up(L, 8));
  load(2, v, p.v, kv, keys, MASKED ? round_up(x.keys.max_length, kUnits) : round_up(L, 16));
  commit_loads();
  const int spare = threadIdx.x - 32 * 3 * kLoaders, spares = kThreads - 32 * 3 * kLoaders;
  T** const heads = reinterpret_cast<T**>(memory + layout.heads);
  if (spare == 0) {
    if (MASKED) tile_count = 0;
    heads[0] = head_rows<T>(p.landmarks, b, h, 0);
    heads[1] = head_rows<T>(p.compressed, b, h, 0);
    heads[2] = head_rows<T>(p.out, b, h, queries.start);
  }
#pragma unroll 1
  for (int i = M * kChunks + spare; spare >= 0 && i < round_up(M, kUnits) * kChunks; i += spares) store_shared4(c.address + 16 * i, make_uint4(0, 0, 0, 0));
  const Windows windows = windows_of(p.windows, x.queries, N);
  int4* const window_of = reinterpret_cast<int4*>(memory + layout.compressed);
#pragma unroll 1
  for (int m = spare; 0 <= m && m < M; m += spares) {
    counts[m] = 0;
    if (!p.pool) continue;
    const auto tokens = PooledTokens::of<int>(windows, m);
    window_of[m] = make_int4(tokens.first, tokens.width | pool_shares<T>(x, windows) << 16, tokens.area, tokens.inverse_width());
  }
  if (warp < kLoaders) wait_loads<0>();
  __syncthreads();

  // 1. pool
  if (p.pool) {
    T* const landmarks = heads[0];
    for (unsigned i = threadIdx.x; i < round_up(M * kChunks * 2, 32); i += kThreads) {
      const int m = i / (2 * kChunks), chunk = i / 2 % kChunks;
      const int4 its = window_of[min(m, M - 1)];
      const Four<T> mean = mean_by_pair<T>(PooledTokens{its.x, its.y & 0xffff, its.z, windows.gw}, its.w, its.y >> 16, [&](int n) {
        const float4 four = load_shared4(q.chunk(n, chunk));
        return reinterpret_cast<const Vector<T>&>(four);
      });
      if (m >= M) continue;
      const int column = chunk * kChunk<T> + static_cast<int>(i % 2 * 4);
      const uint2 bits = reinterpret_cast<const uint2&>(mean);
      store_shared2(z.chunk(m, chunk) + i % 2 * 8, __uint_as_float(bits.x), __uint_as_float(bits.y));
      if (column < x.D) *reinterpret_cast<uint2*>(landmarks + m * x.D + column) = bits;
    }
  }
  wait_loads<0>();
  __syncthreads();

  // 2. route and score
  const int landmark_tiles = ceil_div(M, 16), key_tiles = ceil_div(L, kUnits), query_tiles = ceil_div(N, 16);
  for (int item = warp; item < query_tiles + landmark_tiles * key_tiles; item += WARPS) {
    SharedRows<T, kDP> rows;
    float s[kTiles][4];
    if (item < query_tiles) {
      rows.load(q.from_row(16 * item), lane);
      BestLandmark best;
#pragma unroll 1
      for (int first = 0; first < M; first += kUnits) {
        product<C>(s, rows, z.from_row(first), lane);
        best.update(s, first, M);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int n = 16 * item + g + 8 * i; t == 0 && n < N) {
          const int expert = best.of_row(i);
          experts[n] = static_cast<std::uint16_t>(expert);
          p.experts[std::int64_t(bh) * x.queries.max_length + n] = expert;
          atomicAdd(&counts[expert], 1);
        }
    } else {
      const int first = (item - query_tiles) / landmark_tiles * kUnits, m0 = (item - query_tiles) % landmark_tiles * 16;
      rows.load(z.from_row(m0), lane);
      product<C>(s, rows, k.from_row(first), lane);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int m = m0 + g + 8 * i; m < M)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
            if (const int key = first + 8 * n + 2 * t; key < L) *reinterpret_cast<float2*>(scores + m * layout.pitch + key) = make_float2(s[n][2 * i], s[n][2 * i + 1]);
    }
  }
  for (int n = N + threadIdx.x; n < x.queries.max_length; n += kThreads) p.experts[std::int64_t(bh) * x.queries.max_length + n] = -1;
  __syncthreads();

  // 3. order the queries, and the tiles of all experts; select, with all keys of a row in the registers of half a warp
  const Selection selection(L, chosen);
  const auto select_rows = [&](int m, auto slots) {  // m: of this lane's half of the warp
    constexpr int kSlots = decltype(slots)::value;
    const int own = lane % kRowLanes, keys = m < M ? L - own : 0;  // keys of this lane: kRowLanes apart, less than that
    const std::uint32_t row = window.address + layout.scores + 4 * min(m, M - 1) * layout.pitch;
    float score[kSlots], weight[kSlots], extreme = -kInfinity, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) score[j] = kRowLanes * j < keys ? __int_as_float(load_shared_int(row + 4 * own + 4 * kRowLanes * j)) : -kInfinity;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) extreme = fmaxf(extreme, score[j]);
    const float scale = p.scale * kLogit<T>;
    if (!(scale > 0.0f)) {
      extreme = kInfinity;
#pragma unroll
      for (int j = 0; j < kSlots; ++j) extreme = fminf(extreme, kRowLanes * j < keys ? score[j] : kInfinity);
      extreme = -extreme;
    }
#pragma unroll
    for (int d = 1; d < kRowLanes; d *= 2) extreme = fmaxf(extreme, __shfl_xor_sync(kAllLanes, extreme, d));
    const float base = extreme == -kInfinity ? 0.0f : extreme * fabsf(scale);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) weight[j] = exponential<T>(fmaf(score[j], scale, -base));
    if (!(scale > 0.0f))
#pragma unroll
      for (int j = 0; j < kSlots; ++j) weight[j] = kRowLanes * j < keys ? weight[j] : 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) sum += weight[j];
    sum = sum_of_lanes<kRowLanes>(sum);
    if (m < M && own == 0) factors[m] = sum == 0.0f ? 0.0f : reciprocal<T>(sum), p.landmark_lse[std::int64_t(bh) * M + m] = log_sum<T>(base, sum);
    __syncwarp();  // all have their scores
    const int columns = m < M ? round_up(L, 16) - own : 0;
    const std::uint32_t first = row + (2 * own ^ swapped_chunks(m));
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (kRowLanes * j < columns) store_shared_short(first + 2 * kRowLanes * j, pack<T>(weight[j], 0.0f));

    unsigned members[ceil_div(kSlots, kRowLanes)], both = 0;
    const unsigned its = select<T>(score, m < M, selection, members);
#pragma unroll
    for (int i = 0; i < ceil_div(kSlots, kRowLanes); ++i) both |= (members[i] >> (lane & 16) & 0xffff) << kRowLanes * i;
    if (m < M) store_shared(window.address + layout.members + 4 * (m * kRowLanes + own), both);
    if (MASKED) return;
    const std::uint32_t list = window.address + layout.indices + 2 * m * layout.chosen_pitch;
    list_by_banks(list, its);
    __syncwarp();
    if (m < M && chosen > 0)
      for (int i = chosen + own; i < layout.chosen_pitch; i += kRowLanes) store_shared_short(list + 2 * i, load_shared_short(list + 2 * (chosen - 1)));
  };
  for (int item = warp; item <= round_up(M, 4) / 2; item += WARPS) {
    if (item == 0) {
      if (MASKED && !p.groups.entries) continue;
      const int made = order_by_expert(experts, N, kQueries, counts, M, entries, tiles);
      if (!MASKED && lane == 0) tile_count = made;
      continue;
    }
    // Two rows that are two apart: no bank conflicts.
    const int m0 = (item - 1) / 2 * 4 + (item - 1) % 2, m = m0 + 2 * (lane / kRowLanes);
    if (m0 >= M) continue;
    if (L <= kRowLanes * 13) select_rows(m, std::integral_constant<int, 13>{});  // 197 keys are usual
    else if (WARPS == kWarps || L <= kKeysOfTwo) select_rows(m, std::integral_constant<int, kKeysOfTwo / kRowLanes>{});
    else if (L <= kRowLanes * 20) select_rows(m, std::integral_constant<int, 20>{});
    else select_rows(m, std::integral_constant<int, kMostRows / kRowLanes>{});
  }
  __syncthreads();

  // 4. compress
  const int compressions = landmark_tiles * (kDP / 16), items = compressions + ceil_div(M, 2) + (p.groups.entries != nullptr);
  const auto compress = [&](int item) {
    if (item == compressions + ceil_div(M, 2)) {
      write_groups(p.groups, bh, entries, counts);
      return;
    }
    if (item >= compressions) {
      const int own = lane % kRowLanes, m = 2 * (item - compressions) + lane / kRowLanes;
      const unsigned both = m < M ? load_shared_int(window.address + layout.members + 4 * (m * kRowLanes + own)) : 0;
      std::int32_t* const to = p.indices + (std::int64_t(bh) * M + m) * x.K;
      for (int i = 0, before = 0; i < (WARPS == kWarps ? 1 : 2); ++i) {
        unsigned left = both >> kRowLanes * i & 0xffff;
        const int here = __popc(left), through = before + sum_through_lane<kRowLanes>(here);
#pragma unroll 1
        for (std::int32_t* next = to + (through - here); left; left &= left - 1) *next++ = kRowLanes * (own + kRowLanes * i) + __ffs(left) - 1;
        before = __shfl_sync(kAllLanes, through, kRowLanes - 1, kRowLanes);
      }
      for (int i = chosen + own; m < M && i < x.K; i += kRowLanes) to[i] = -1;
      return;
    }
    const int m0 = item / (kDP / 16) * 16, column = item % (kDP / 16) * 16;
    const int own = min(m0 + (lane & 15), M - 1);
    const std::uint32_t weights = window.address + layout.scores + 4 * own * layout.pitch + (16 * (lane >> 4) ^ swapped_chunks(own));
    const auto values = operand(v, lane & 15, column / kChunk<T> + (lane >> 4));
    float sum[2][4];
    clear(sum);
#pragma unroll 4
    for (int step = 0; step < ceil_div(L, 16); ++step) {
      std::uint32_t w[4], r[4];
      ldmatrix(w, weights + 32 * step);
      ldmatrix_transposed(r, values(0, step));
      mma<T>(sum[0], w, r[0], r[1]);
      mma<T>(sum[1], w, r[2], r[3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const int m = m0 + g + 8 * i; m < M) {
        const float factor = factors[m];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const std::uint32_t two = pack<T>(sum[n][2 * i] * factor, sum[n][2 * i + 1] * factor);
          store_shared(c.chunk(m, column / kChunk<T> + n) + 4 * t, two);
          if (column + 8 * n < x.D) *reinterpret_cast<std::uint32_t*>(row_behind(heads[1] + column + 8 * n + 2 * t, p.compressed.row * sizeof(T), m)) = two;
        }
      }
  };
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // By masks: warps that have attended to the keys, or have no queries, compress, and then it is the landmarks' turn. A warp has 16 of its warpgroup's 64 queries.
  if constexpr (MASKED) {
    using G = Config<T, kDP, true>;
    const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), row0 = 16 * warp, group0 = row0 / 64 * 64;
    const bool has_rows = row0 < N;
    std::uint32_t mask_rows[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) mask_rows[i] = window.address + layout.members + 4 * kRowLanes * (has_rows ? experts[min(row0 + g + 8 * i, N - 1)] : 0);
    const Matrix<kDP> rows_at(window.address, false), sums_at(window.address, true);
    Matrix<kDP> own = rows_at;
    own.advance(group0 * (kDP * 2));
    float out[kDP / 8][4], s[kTiles][4], maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};
    clear(out);
    const auto attend = [&](int steps, int keys, int values, float scale, auto bits_of) {
      if (group0 >= x.queries.max_length) return;
      Matrix<kDP> unit_keys = rows_at, unit_values = sums_at;
      unit_keys.low += keys >> 4, unit_values.low += values >> 4;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        begin_products(s);
        wgmma_tiles<T>(s, own, unit_keys);
        commit_products();
        wait_products<G, 0>(s, out);
        Weights<T, kTiles> weights;
        if (has_rows) {
          const unsigned bits[2] = {bits_of(0, step), bits_of(1, step)};
          float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              s[j][i] = bits[i / 2] >> (8 * j + i % 2) & 1 ? s[j][i] * scale : -kInfinity;
              highest[i / 2] = fmaxf(highest[i / 2], s[j][i]);
            }
#pragma unroll
          for (int d = 1; d < 4; d *= 2)
#pragma unroll
            for (int i = 0; i < 2; ++i) highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAllLanes, highest[i], d));
          if (__any_sync(kAllLanes, highest[0] > maximum[0] || highest[1] > maximum[1])) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float rescale = highest[i] == -kInfinity ? 0.0f : exponential<T>(maximum[i] - highest[i]);
              sum[i] *= rescale, maximum[i] = highest[i];
#pragma unroll
              for (int d = 0; d < kDP / 8; ++d) out[d][2 * i] *= rescale, out[d][2 * i + 1] *= rescale;
            }
          }
          const float base[2] = {maximum[0] == -kInfinity ? 0.0f : maximum[0], maximum[1] == -kInfinity ? 0.0f : maximum[1]};
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i / 2] += s[j][i] = exponential<T>(s[j][i] - base[i / 2]);
          weights = Weights<T, kTiles>(s);
        }
        begin_products(out, weights.packed);
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) wgmma_weighted(out, weights, i, unit_values.at(16 * i * (kDP * 2)));
        commit_products();
        unit_keys.advance(kUnits * kDP * 2), unit_values.advance(kUnits * kDP * 2);
      }
      wait_products<G, 0>(out);
    };
    attend(ceil_div(x.keys.max_length, kUnits), layout.k, layout.v, p.scale * kLogit<T>, [&](int i, int step) {
      const float2 two = load_shared2(mask_rows[i] + 8 * (step % (kRowLanes / 2)));
      return __byte_perm(__float_as_uint(two.x), __float_as_uint(two.y), step < kRowLanes / 2 ? 0x5410 : 0x7632) >> 2 * t;
    });
    for (int item; (item = __shfl_sync(kAllLanes, lane == 0 ? atomicAdd(&tile_count, 1) : 0, 0)) < items;) compress(item);
    fence_loads();
    __syncthreads();
    if (p.shared)
      attend(ceil_div(M, kUnits), layout.landmarks, layout.compressed, p.landmark_scale * kLogit<T>, [&](int, int step) {
        const int left = M - kUnits * step;
        return (left < kUnits ? (1u << left) - 1 : ~0u) >> 2 * t;
      });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], d);
      if (const int n = row0 + g + 8 * i; t == 0 && n < N) p.lse[std::int64_t(bh) * x.queries.max_length + n] = log_sum<T>(maximum[i], sum[i]);
    }
    const float factor[2] = {sum[0] == 0.0f ? 0.0f : reciprocal<T>(sum[0]), sum[1] == 0.0f ? 0.0f : reciprocal<T>(sum[1])};
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");  // all have read the queries that are now replaced
    if (has_rows)
      store_rows<C>(q.from_row(row0), out, factor, x.D, lane, head_rows<T>(p.out, b, h, queries.start), p.out.row, [&](int i) { return row0 + i < N ? row0 + i : -1; });
    return;
  }
#endif
  if constexpr (!MASKED)
    for (int item = warp; item < items; item += WARPS) compress(item);
  __syncthreads();

  // 5. attend: units are rows, queries columns
  T* const out_rows = heads[2] + lane % kChunks * kChunk<T>;
  const int units = max(p.shared ? M : 0, chosen);
  // Where the row and the chunk lie that a lane brings of 16 keys, and of 16 values, which are transposed.
  const int row_of[2] = {lane & 15, (lane & 7) + (lane >> 4 << 3)}, chunk_of[2] = {lane >> 4, lane >> 3 & 1};
  const std::uint32_t of_shared[2] = {z.chunk(row_of[0], chunk_of[0]), c.chunk(row_of[1], chunk_of[1])};
  const float scale[2] = {p.landmark_scale * kLogit<T>, p.scale * kLogit<T>};
  for (int item = warp; item < tile_count; item += WARPS) {
    const Work work = tiles[item];
    const std::uint32_t list = window.address + layout.entries + 2 * work.first, of_expert = window.address + layout.indices + 2 * work.expert * layout.chosen_pitch;
    const auto query = [&](int i) { return load_shared_short(list + 2 * min(i, work.entries - 1)); };  // behind the last one the same again
    const std::uint32_t own = q.chunk(query(lane & 7), lane >> 3);
    std::uint32_t rows[2][4];
    ldmatrix(rows[0], own);
    ldmatrix(rows[1], at_step<T>(own, 2));
    float out[kDP / 16][4], maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};
    clear(out);
#pragma unroll 1
    for (int first = 0; first < (ONCE ? 1 : units); first += kUnits) {
      const int counts_of[2] = {p.shared ? M - first : 0, chosen - first};
      std::uint32_t place[2][2][2];  // of shared units and those of the expert, keys and values
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          place[0][r][i] = of_shared[r] + (first + 16 * i) * (kDP * 2);
          if (ONCE || counts_of[1] > 0) place[1][r][i] = (r ? v : k).chunk(load_shared_short(of_expert + 2 * (first + 16 * i + row_of[r])), chunk_of[r]);
        }
      float s[2][2][4], factor[2];
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        if (ONCE || counts_of[kind] > 0) {
          constexpr float kZero[4] = {};
#pragma unroll
          for (int step = 0; step < kDP / 16; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              std::uint32_t a[4];
              ldmatrix(a, at_step<T>(place[kind][0][i], step));
              const std::uint32_t b0 = rows[step / 2][step % 2 * 2], b1 = rows[step / 2][step % 2 * 2 + 1];
              if (step == 0) mma<T>(s[kind][i], a, b0, b1, kZero);
              else mma<T>(s[kind][i], a, b0, b1);
            }
        }
        factor[kind] = positive_scale(s[kind], scale[kind]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (16 * i + g + 8 * (e / 2) >= counts_of[kind]) s[kind][i][e] = -kInfinity;
      }
      float rescale[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float highest[2];
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) highest[kind] = fmaxf(fmaxf(s[kind][0][j], s[kind][0][2 + j]), fmaxf(s[kind][1][j], s[kind][1][2 + j])) * factor[kind];
        float raised = fmaxf(highest[0], highest[1]);
        if (!ONCE) raised = fmaxf(raised, maximum[j]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) raised = fmaxf(raised, __shfl_xor_sync(kAllLanes, raised, d));
        const float base = raised == -kInfinity ? 0.0f : raised;
        if (!ONCE) rescale[j] = exponential<T>(maximum[j] - base), sum[j] *= rescale[j];
        maximum[j] = raised;
#pragma unroll
        for (int kind = 0; kind < 2; ++kind)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = j; e < 4; e += 2) sum[j] += s[kind][i][e] = exponential<T>(fmaf(s[kind][i][e], factor[kind], -base));
      }
      if (!ONCE && first > 0)
#pragma unroll
        for (int d = 0; d < kDP / 16; ++d)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[d][e] *= rescale[e % 2];
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        if (!ONCE && counts_of[kind] <= 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const std::uint32_t b0 = transposed(pack<T>(s[kind][i][0], s[kind][i][1])), b1 = transposed(pack<T>(s[kind][i][2], s[kind][i][3]));
#pragma unroll
          for (int d = 0; d < kDP / 16; ++d) {
            std::uint32_t a[4];
            ldmatrix_transposed(a, at_step<T>(place[kind][1][i], d));
            mma<T>(out[d], a, b0, b1);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], d);
    if (const int i = 2 * t + g; g < 2 && i < work.entries)
      p.lse[std::int64_t(bh) * x.queries.max_length + query(i)] = log_sum<T>(g ? maximum[1] : maximum[0], g ? sum[1] : sum[0]);
#pragma unroll
    for (int j = 0; j < 2; ++j) sum[j] = sum[j] == 0.0f ? 0.0f : reciprocal<T>(sum[j]);
    __syncwarp();  // all have read what is now replaced
    std::uint32_t rounded[kDP / 8];
#pragma unroll
    for (int d = 0; d < kDP / 8; ++d) rounded[d] = pack<T>(out[d / 2][d % 2 * 2] * sum[0], out[d / 2][d % 2 * 2 + 1] * sum[1]);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at_step<T>(own, 2 * i)), "r"(rounded[4 * i]), "r"(rounded[4 * i + 1]),
                   "r"(rounded[4 * i + 2]), "r"(rounded[4 * i + 3]) : "memory");
#else
    const std::uint32_t written = q.chunk(query(g), 0) + 4 * t;
#pragma unroll
    for (int d = 0; d < kDP / 8; ++d) store_shared(written ^ 16 * d, transposed(rounded[d]));
#endif
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kQueries; i += 32 / kChunks)
      if (const int n = query(i + lane / kChunks); i + lane / kChunks < work.entries && lane % kChunks * kChunk<T> < x.D)
        *reinterpret_cast<float4*>(row_behind(out_rows, p.out.row * sizeof(T), n)) = load_shared4(q.chunk(n, lane % kChunks));
  }
}

// By masks, where lists would be of several tiles, and where all values enter all outputs anyway, as shared units: a weight of 0 leaves what is not a number. H200, 132 and 384
// heads: 57 to 100 % of the time by lists, of few units 99 to 124 %.
bool masks(const Problem& x, bool shared) {
  int most;
  return shared && (x.M > kUnits || x.K > kUnits) && has_warpgroups(x.dtype, x.D) && x.queries.max_length <= 16 * kWarpsAlone &&
         device_attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess && Memory(x, true).bytes <= most;
}

// Warps of a block, as the current device has room for two of them on a multiprocessor, or one; 0 where other kernels are to take this.
struct Choice {
  int warps;
  bool masked;
};
Choice choice_of(const Problem& x, bool shared) {
  const int rows = std::max(x.queries.max_length, x.keys.max_length);
  const bool few = x.M <= kUnits && x.K <= kUnits;
  if (x.dtype == Dtype::fp32 || x.D > kDP || x.D % kCudaHeadDimStep != 0 || x.s != 1 || rows > (few ? kMostRows : kMostRowsOfMany)) return {0, false};
  const bool masked = masks(x, shared);
  if (masked && rows <= kRowsOfFewHeads) return {kWarpsAlone, true};
  const int bytes = Memory(x, false).bytes;
  int most;
  if (!masked && x.keys.max_length <= kKeysOfTwo && device_attribute(most, cudaDevAttrMaxSharedMemoryPerMultiprocessor) == cudaSuccess && 2 * (bytes + kReservedMemory) <= most)
    return {kWarps, false};
  if (x.M > kUnits && std::int64_t(x.B) * x.H * 4 < kMultiprocessors) return {0, false};  // many landmarks of few heads would take longer than by many blocks
  const bool fits = masked || (device_attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess && bytes <= most);
  return {fits ? kWarpsAlone : 0, masked};
}

}  // namespace

bool fits_short_attention(const Problem& x, bool shared) { return choice_of(x, shared).warps > 0; }

cudaError_t launch_short_attention(const ShortParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const Choice choice = choice_of(x, p.shared);
  if (choice.warps == 0) return cudaErrorInvalidValue;
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    const bool once = p.shared && x.M <= kUnits && x.K <= kUnits && x.keys.max_length > 0 && !vary(x.keys);
    const Memory layout(x, choice.masked);
    const auto kernel = choice.masked            ? short_attention_kernel<T, false, kWarpsAlone, true>
                        : choice.warps == kWarps ? (once ? short_attention_kernel<T, true, kWarps, false> : short_attention_kernel<T, false, kWarps, false>)
                        : once                   ? short_attention_kernel<T, true, kWarpsAlone, false>
                                                 : short_attention_kernel<T, false, kWarpsAlone, false>;
    return launch(kernel, static_cast<unsigned>(x.B) * x.H, 32 * choice.warps, layout.bytes, stream, p, layout);
  });
}

}  // namespace mita
