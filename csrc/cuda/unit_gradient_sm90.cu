// Gradients of units (see unit_gradient.cu) for sm_90a, 16-bit elements of 65 to 128 columns and more than 64 units, by specialists; of keys where they have
// as many heads as the landmarks. A block stays on its multiprocessor and takes one item after the other: 128 units, and a part of the queries, a segment of
// an expert's, or the landmarks:
//   one warp hands out the items, has what queries left for keys near, and lists their rows, 64 at a time, with what is said of each;
//   two warps bring the rows of such lists, one q, one dout, into a ring of sets;
//   one warp brings the units of items into a ring of two stages;
//   two warpgroups weigh and sum, each for half of the units, as blocks do elsewhere: each at its own pace, so that one multiplies while the other weighs.
#include "launch.h"
#include "routed.cuh"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 128, kUnits = 128, kGroups = 2;
constexpr int kSets = 3, kItems = 3, kStages = 2;
constexpr int kThreads = 128 * (kGroups + 1);
enum { kNone = -1, kEnd = -2 };  // in the place of a query: there is none; there are no more

template <class T> struct Item {
  Work work;          // the queries
  int bh, unit0;
  int tiles;          // of queries; negative: there are no more items
  int present;        // units that there could be: landmarks, or keys of the sequence
  const T *q, *dout;  // rows 0
  const float *lse, *delta;
  const T* units[2];
  const std::int32_t *entries, *indices;  // of the first query; null: queries, or units, as they come
};

template <class T> struct Shared {
  UnitStage<T, kDP, kUnits> stages[kStages];
  struct {
    TileStorage<T, kDP, kPassRows> q, dout;
  } sets[kSets];
  struct {
    const T *q, *dout;
    alignas(16) std::int32_t query[kPassRows];
    float lse[kPassRows], delta[kPassRows];
  } lists[kSets];
  Item<T> items[kItems];
  alignas(16) std::int32_t numbers[kKeyBlock];  // of units on their way
  std::uint64_t of_items[kItems][2], of_lists[kSets][2], of_sets[kSets][2], of_stages[kStages][2];
};
static_assert(sizeof(Shared<__half>) <= 227 * 1024);

template <class T> __global__ void __launch_bounds__(kThreads, 1) unit_specialists_kernel(const UnitGradientParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_kernel_start();
  using C = Config<T, kDP, true>;
  constexpr int kTiles = kPassRows / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  Window window(memory);
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  unsigned items = 0, sets = 0;  // counted by every role; a list is free when its set is
  const auto item = [&] { return Ring<kItems>{window.of(shared.of_items), items}; };
  const auto stage = [&] { return Ring<kStages>{window.of(shared.of_stages), items}; };
  const auto list = [&] { return Ring<kSets>{window.of(shared.of_lists), sets}; };
  const auto set = [&] { return Ring<kSets>{window.of(shared.of_sets), sets}; };
  if (threadIdx.x == 0) {  // loads arrive by themselves, lane by lane
    item().init(32, 32 + 128 * kGroups), stage().init(32, 128 * kGroups), list().init(32, 1), set().init(3 * 32, 128 * kGroups);
    fence_barriers();
  }
  __syncthreads();
  window.address = opaque(window.address);  // nothing of the above is kept: registers

  const Problem& x = p.problem;
  const auto routed = [&] { return p.role == UnitRole::routed; };
  const auto compress = [&] { return p.role == UnitRole::compress; };
  const auto the_item = [&]() -> auto& { return shared.items[item().at()]; };
  const auto the_list = [&]() -> auto& { return shared.lists[set().at()]; };

  if (this_group() == kGroups) {
    keep_registers<56>();
    // Starts copying 64 rows into a tile; number(i) is that of row i, negative for zeros.
    const auto bring = [&](const Tile<T, kDP>& tile, const T* row0, std::int64_t pitch, bool whole, auto number) {
      load_rows_by_warp<64, T, kDP>(number, whole, x.D, Copy<T, kDP>(tile, row0, pitch));
    };
    if (this_warp() == 0) {
      // Experts have all sizes: their items are taken from a counter.
      unsigned next = blockIdx.x;
#pragma unroll 1
      for (bool more = true; more; ++items) {
        item().wait_free();
        const int blocks = ceil_div(units_of(p), kUnits), parts = parts_of(p);
        const unsigned all = static_cast<unsigned>(x.B * x.H) * parts * blocks;
        if (this_lane() == 0) the_item().tiles = -1;
#pragma unroll 1
        for (bool found = false; more && !found;) {
          if (routed()) next = take_next(p.groups.taken, all, this_lane());
          const unsigned number = next;
          next += gridDim.x;
          more = number < all;
          if (!more) break;
          const int unit0 = number % blocks * kUnits, part = number / blocks % parts, bh = number / blocks / parts, b = bh / x.H;
          const Span keys = p.role == UnitRole::shared ? Span{0, x.M} : span(x.keys, b);
          const Span queries = compress() ? Span{0, unit0 < keys.length ? p.landmark_rows : 0} : span(x.queries, b);
          const int rows = ceil_div(ceil_div(queries.length, kPassRows), parts) * kPassRows;
          const Work work = routed() ? p.groups.segments[bh * parts + part] : Work{0, part * rows, max(0, min(rows, queries.length - part * rows)), part};
          found = !routed() || work.entries > 0;
          if (found && this_lane() == 0) {
            const int h = bh % x.H, unit_head = routed() ? h / (x.H / x.Hkv) : h;
            const std::int64_t statistics = std::int64_t(bh) * (compress() ? x.M : x.queries.max_length);
            the_item() = {work, bh, unit0, ceil_div(work.entries, kPassRows), keys.length, head_rows<T>(p.row_q, b, h, queries.start),
                          head_rows<T>(p.row_dout, b, h, queries.start), p.lse + statistics, p.delta + statistics,
                          {head_rows<T>(p.unit_k, b, unit_head, keys.start), head_rows<T>(p.unit_v, b, unit_head, keys.start)},
                          routed() ? p.groups.entries + statistics * x.s + work.first : nullptr, routed() ? p.indices + (std::int64_t(bh) * x.M + work.expert) * x.K : nullptr};
          }
        }
        __syncwarp();
        item().there().arrive();
        if (compress() && p.groups.key_ranges && more) {
          RoutedList lists[kUnits / kKeyBlock];
#pragma unroll
          for (int i = 0; i < kUnits / kKeyBlock; ++i)
            if (const int key0 = the_item().unit0 + i * kKeyBlock; key0 < the_item().present) lists[i] = RoutedList(p, the_item().bh, key0);
#pragma unroll
          for (int i = 0; i < kUnits / kKeyBlock; ++i) lists[i].ask(p, this_lane());
#pragma unroll
          for (int i = 0; i < kUnits / kKeyBlock; ++i) lists[i].prefetch(p, this_lane());
        }
#pragma unroll 1
        for (int row0 = 0, tile = 0; tile < the_item().tiles; row0 += kPassRows, ++tile, ++sets) {
          const auto& its = the_item();
          int query[2];  // asked for before there is room
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = row0 + 32 * i + this_lane();
            query[i] = row >= its.work.entries ? kNone : its.entries ? query_of(its.entries[row], x.s) : its.work.first + row;
          }
          set().wait_free();
          auto& to = the_list();
          if (this_lane() == 0) to.q = its.q, to.dout = its.dout;
#pragma unroll
          for (int i = 0; i < 2; ++i) to.query[32 * i + this_lane()] = query[i];
          list().there().arrive();
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            load_number(window.of(to.lse) + 4 * (32 * i + this_lane()), its.lse, query[i]);
            load_number(window.of(to.delta) + 4 * (32 * i + this_lane()), its.delta, query[i]);
          }
          set().there().arrive_loaded();
        }
      }
      set().wait_free();
      if (this_lane() == 0) the_list().query[0] = kEnd;
      list().there().arrive();
    } else if (this_warp() < 3) {
#pragma unroll 1
      for (;; ++sets) {
        list().wait_there();
        const RowList query{window.of(the_list().query)};
        if (query(0) == kEnd) break;
        const auto& to = shared.sets[set().at()];
        const bool q = this_warp() == 1;
        bring((q ? to.q : to.dout).in(window), q ? the_list().q : the_list().dout, (q ? p.row_q : p.row_dout).row, query(kPassRows - 1) >= 0, query);
        set().there().arrive_loaded();
      }
    } else {
#pragma unroll 1
      for (;; ++items) {
        item().wait_there();
        const auto& its = the_item();
        if (its.tiles < 0) break;
        stage().wait_free();
        const auto& to = shared.stages[stage().at()];
#pragma unroll 1
        for (int first = 0; first < kUnits; first += kKeyBlock) {
          int number[kKeyBlock / 32], valid = 0;
#pragma unroll
          for (int i = 0; i < kKeyBlock / 32; ++i) {
            number[i] = its.unit0 + first + 32 * i + this_lane();
            if (its.indices) number[i] = number[i] < x.K ? its.indices[number[i]] : -1;
          }
#pragma unroll
          for (int i = 0; i < kKeyBlock / 32; ++i) {
            const bool present = static_cast<unsigned>(number[i]) < static_cast<unsigned>(its.present);
            shared.numbers[32 * i + this_lane()] = present ? number[i] : -1;
            valid += __popc(__ballot_sync(kAllLanes, present));
          }
          __syncwarp();
#pragma unroll 1
          for (int tensor = 0; tensor < 2; ++tensor)  // one after the other: what they share is fetched once
            bring((tensor ? to.v : to.k).in(window).from_row(first), its.units[tensor], (tensor ? p.unit_v : p.unit_k).row, valid == kKeyBlock, RowList{window.of(shared.numbers)});
          __syncwarp();
        }
        stage().there().arrive_loaded();
        item().done().arrive();
      }
    }
    wait_loads<0>();
  } else {
    take_registers<224>();
    constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>), kOne[2] = {1.0f, 1.0f};
    const auto own_units = [&](const auto& tile) { return tile.in(window).from_row(64 * this_group()); };
#pragma unroll 1
    for (;; ++items) {
      item().wait_there();
      if (the_item().tiles < 0) break;
      stage().wait_there();
      float dk[kDP / 8][4], dv[kDP / 8][4];
      clear(dk);
      clear(dv);
#pragma unroll 1
      for (int left = the_item().tiles; left > 0; --left, ++sets) {
        window.address = opaque(window.address);
        set().wait_there();
        fence_loads();
        const auto rows = [&]() -> auto& { return shared.sets[set().at()]; };
        const auto& units = shared.stages[stage().at()];
        float probability[kTiles][4], gradient[kTiles][4];
        product<C>(probability, GroupRows<T, kDP>{own_units(units.k)}, rows().q.in(window), this_lane());
        product<C>(gradient, GroupRows<T, kDP>{own_units(units.v)}, rows().dout.in(window), this_lane());
        window.address = opaque(window.address);
        const auto number = [&](const auto& numbers, int n) { return load_shared2(window.of(numbers) + 8 * (this_lane() & 3) + 32 * n); };
        const float scale = p.scale * kLogit<T>;
        wait_products<C, 1>(probability);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 lse = number(the_list().lse, n);
          // A row that attended to nothing gives nothing; absent rows are zeros, and so is all that they give.
          const auto offset = [](float l) { return l == -kInfinity ? -kInfinity : kProbabilityShift<T> - l * kLogit<T>; };
          const float offsets[2] = {offset(lse.x), offset(lse.y)};
#pragma unroll
          for (int i = 0; i < 4; ++i) probability[n][i] = exponential<T>(fmaf(probability[n][i], scale, offsets[i & 1]));
        }
        wait_products<C, 0>(gradient);
        Weights<T, kTiles> weights, dlogits;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 delta = number(the_list().delta, n);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const auto dlogit = [&](int j, float delta) { return probability[n][2 * i + j] * kRescale * (gradient[n][2 * i + j] - delta); };
            dlogits.packed[n][i] = pack<T>(dlogit(0, delta.x), dlogit(1, delta.y));
            weights.packed[n][i] = pack<T>(probability[n][2 * i], probability[n][2 * i + 1]);
            asm volatile("" : "+r"(dlogits.packed[n][i]), "+r"(weights.packed[n][i]));  // one after the other: registers
          }
        }
        window.address = opaque(window.address);
        add_weighted_rows<C>(dv, weights, rows().dout.in(window), this_lane());
        add_weighted_rows<C>(dk, dlogits, rows().q.in(window), this_lane());
        wait_products<C, 0>(dv, dk);
        set().done().arrive();
      }
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[d][i] *= p.scale * power_of_2(-kGradientShift<T>), dv[d][i] *= power_of_2(-kProbabilityShift<T>);

      const int own = the_item().unit0 + 64 * this_group() + 16 * this_warp(), count = units_of(p);
      if (compress()) {
        const int bh = the_item().bh, present = the_item().present, b = bh / x.H, h = bh % x.H;
        item().done().arrive();
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (own + this_lane() / 4 + 8 * i >= present)  // beyond a short sequence
#pragma unroll
            for (int d = 0; d < kDP / 8; ++d) dk[d][2 * i] = dk[d][2 * i + 1] = dv[d][2 * i] = dv[d][2 * i + 1] = 0.0f;
        if (p.groups.key_ranges && own < present) {
          RoutedList list(p, bh, own);
          list.ask(p, this_lane());
          list.add<C, Fixed>(p, dk, dv, own % kKeyBlock, this_lane());
        }
        const Span keys = span(x.keys, b);
        const int stored = x.keys.starts ? keys.length : count;
        const auto store = [&](const Rows& rows, const auto& tile, const auto& sums) {
          const auto its = own_units(tile).from_row(16 * this_warp());
          store_rows_by_warp(its, sums, kOne, x.D, this_lane(), head_rows<T>(rows, b, h, keys.start), rows.row,
                             [=](int i) { return own + i < stored ? own + i : -1; });
        };
        store(p.dk, shared.stages[stage().at()].k, dk), store(p.dv, shared.stages[stage().at()].v, dv);
        stage().done().arrive();
        continue;
      }
      const std::int64_t row0 = (std::int64_t(the_item().bh) * parts_of(p) + the_item().work.place) * count;  // of partial and routed sums
      item().done().arrive();
      if (routed()) {
        store_rounded_rows<C>(dk, dv, 1.0f, 1.0f, x.D, this_lane(), rounded_rows_from(p.routed_dk, row0, x.D), rounded_rows_from(p.routed_dv, row0, x.D),
                              [=](int i) { return own + i < count ? own + i : -1; });
      } else {
        const auto row_in = [&](float* partial) { return [=](int i) { return own + i < count ? partial + (row0 + own + i) * x.D : nullptr; }; };
        store_partial_rows<C>(dk, kOne, x.D, this_lane(), row_in(p.partial_dk));
        store_partial_rows<C>(dv, kOne, x.D, this_lane(), row_in(p.partial_dv));
      }
      stage().done().arrive();
    }
  }
#else
  __trap();
#endif
}

}  // namespace

bool fits_unit_specialists(const UnitGradientParams& p) {
  const Problem& x = p.problem;
  const bool sums = p.role == UnitRole::routed || (p.role == UnitRole::compress && p.groups.key_ranges);
  return has_warpgroups(x.dtype, x.D) && x.D > kDP / 2 && units_of(p) > kUnits / 2 && (p.role != UnitRole::compress || x.H == x.Hkv) && (!sums || p.routed_dk.factors);
}

cudaError_t launch_unit_specialists(const UnitGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_unit_specialists(p)) return cudaErrorInvalidValue;
  const std::int64_t items = std::int64_t(x.B) * x.H * parts_of(p) * ceil_div(units_of(p), kUnits);
  return dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return launch_specialists(unit_specialists_kernel<T>, kThreads, sizeof(Shared<T>), items, stream, p);
    else return cudaErrorInvalidValue;
  });
}

}  // namespace mita
