// Attention to shared and gathered units (see expert_attention_fwd.cu) for sm_90a and 16-bit elements, by specialists. A block stays on its
// multiprocessor and takes one piece of work (queries of one expert, from the list of work) after the other:
//   two warps bring queries, 64 of one pass at a time, half of the rows each, into a ring of sets;
//   two warps bring units, 64 at a time, half of the rows each, into a ring of stages: first the shared units, then the expert's keys and
//   values, gathered by index; the first also hands out the pieces;
//   whole warpgroups attend: every pass belongs to one of them, in turn. Units that fit in the ring stay there for all passes of a piece,
//   others come again for every round of passes.
#include "launch.h"
#include "specialists.cuh"

namespace mita {
namespace {

struct alignas(16) Piece {
  Work work;  // no entries: the last one
  int b, h;
};

template <class C> struct Specialists : C {
  static constexpr int kGroups = C::DP == 64 ? 4 : 3;  // warpgroups that attend
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kUnits = 64, kStages = C::DP == 64 ? 8 : 4, kSets = C::DP == 64 ? 8 : 5, kPieces = 4;
  struct Shared {
    TileStorage<typename C::T, C::DP, kPassRows> queries[kSets];
    UnitStage<typename C::T, C::DP, kUnits> stages[kStages];
    Piece pieces[kPieces];
    std::int32_t entries[kSets][kPassRows];  // -1 behind the last
    alignas(16) std::int32_t numbers[4][32];  // of the rows that a warp brings
    std::int32_t counts[kStages][2];         // of the units in each half
    std::uint64_t of_pieces[kPieces][2], of_queries[kSets][2], of_units[kStages][2];
  };
};

template <class C> __global__ void __launch_bounds__(Specialists<C>::kThreads, 1) attention_specialists_kernel(const AttentionParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Specialists<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kTiles = L::kUnits / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  auto& shared = *reinterpret_cast<typename L::Shared*>(memory);
  Ring<L::kPieces> piece{window.of(shared.of_pieces), 0};
  Ring<L::kSets> set{window.of(shared.of_queries), 0};
  Ring<L::kStages> stage{window.of(shared.of_units), 0};
  if (threadIdx.x == 0) {  // loads arrive by themselves, lane by lane
    piece.init(1, L::kThreads), set.init(2 * (32 + 1), 128), stage.init(2 * (32 + 1), 128 * L::kGroups);
    fence_barriers();
  }
  __syncthreads();

  const Problem& x = p.problem;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, slots = max(x.s, 1);
  const int shared_tiles = p.units.shared ? ceil_div(x.M, L::kUnits) : 0, tiles = shared_tiles + (x.s > 0 ? ceil_div(x.K, L::kUnits) : 0);
  const bool resident = tiles <= L::kStages;
  const auto passes_of = [](const Work& work) { return ceil_div(work.entries, kPassRows); };
  const auto stages_of = [&](int passes) { return resident ? tiles : tiles * ceil_div(passes, L::kGroups); };
  const auto take = [&]() -> const Piece& {
    piece.wait_there();
    return shared.pieces[piece.at()];
  };
  const auto give_back = [&] {
    piece.done().arrive();
    ++piece.count;
  };

  if (group == L::kGroups) {
    if constexpr (DP == 128) keep_registers<80>();
    const int half = warp % 2;  // of the rows of a tile
    const RowList listed{window.of(shared.numbers[warp])};
    const auto list = [&](int number) {  // of the lane's row
      __syncwarp();
      shared.numbers[warp][lane] = number;
      __syncwarp();
    };
    if (warp < 2) {
      // The entry of the lane's row in one pass after the other, asked for one pass ahead.
      Ring<L::kPieces> ahead = piece;
      int ahead_pass = 0;
      const auto look_ahead = [&] {
        ahead.wait_there();
        const Piece& its = shared.pieces[ahead.at()];
        const int row = ahead_pass + 32 * half + lane, entry = row < its.work.entries ? entry_of(p.groups, x, x.s, its.b * x.H + its.h, its.work, row) : -1;
        ahead_pass += kPassRows;
        if (ahead_pass >= its.work.entries && its.work.entries > 0) ahead_pass = 0, ++ahead.count;
        return entry;
      };
      int coming_entry = look_ahead();
      for (const Piece* its = &take(); its->work.entries > 0; its = &take()) {
        const int b = its->b, h = its->h;
        for (int left_entries = its->work.entries; left_entries > 0; left_entries -= kPassRows, ++set.count) {
          const int entry = coming_entry;
          list(entry < 0 ? -1 : query_of(entry, slots));
          coming_entry = look_ahead();
          set.wait_free();
          shared.entries[set.at()][32 * half + lane] = entry;
          load_rows_by_warp<32, T, DP>(listed, __all_sync(kAllLanes, entry >= 0), x.D,
                                       Copy<T, DP>(shared.queries[set.at()].in(window).from_row(32 * half), p.q, b, h, span(x.queries, b).start));
          set.there().arrive_loaded();
          __syncwarp();
          if (lane == 0) set.there().arrive();
        }
        give_back();
      }
    } else {
      // The first of these warps hands out the pieces too, each while the one before it is brought: the next of all heads' lists. Experts have all
      // sizes, so a block that took many ahead would be late at the end.
      const int of_head = max_tiles(x, p.groups.tile_rows);
      const unsigned all = static_cast<unsigned>(x.B * x.H) * of_head;
      unsigned next = blockIdx.x;
      Ring<L::kPieces> coming = piece;
      bool all_out = half == 1;
      const auto hand_out = [&] {
        while (!all_out && coming.count < piece.count + 2) {
          Piece own{};
          while (own.work.entries <= 0) {
            if (p.groups.taken) next = take_next(p.groups.taken, all, lane);
            if (all_out = next >= all; all_out) break;
            const int bh = next / of_head, b = bh / x.H;
            own = {find_work(p.groups.tiles, x, x.s, bh, span(x.queries, b).length, next % of_head, p.groups.tile_rows), b, bh % x.H};
            next += gridDim.x;
          }
          coming.wait_free();
          if (lane == 0) {
            shared.pieces[coming.at()] = own;
            coming.there().arrive();
          }
          __syncwarp();
          ++coming.count;
        }
      };
      hand_out();
      for (const Piece* its = &take(); its->work.entries > 0; its = &take()) {
        const int b = its->b, h = its->h;
        const Span keys = span(x.keys, b);
        const std::int32_t* const indices = p.units.indices + (std::int64_t(b * x.H + h) * x.M + its->work.expert) * x.K;
        for (int n = stages_of(passes_of(its->work)), tile = 0; n > 0; --n, ++stage.count, tile = tile + 1 == tiles ? 0 : tile + 1) {
          const bool dense = tile < shared_tiles;
          const int unit = (dense ? tile : tile - shared_tiles) * L::kUnits + 32 * half + lane, head = dense ? h : h / (x.H / x.Hkv);
          const int number = dense ? unit : unit < x.K ? indices[unit] : -1;
          const bool present = static_cast<unsigned>(number) < static_cast<unsigned>(dense ? x.M : keys.length);
          const int count = __popc(__ballot_sync(kAllLanes, present));
          list(present ? number : -1);
          stage.wait_free();
          const auto& to = shared.stages[stage.at()];
          const std::int64_t start = dense ? 0 : keys.start;
          load_rows_by_warp<32, T, DP>(listed, count == 32, x.D, Copy<T, DP>(to.k.in(window).from_row(32 * half), dense ? p.units.landmarks : p.units.k, b, head, start),
                                       Copy<T, DP>(to.v.in(window).from_row(32 * half), dense ? p.units.compressed : p.units.v, b, head, start));
          stage.there().arrive_loaded();
          if (lane == 0) {
            shared.counts[stage.at()][half] = count;
            stage.there().arrive();
          }
        }
        give_back();
        hand_out();
      }
    }
    wait_loads<0>();
  } else {
    if constexpr (DP == 128) take_registers<144>();
    const int g = lane >> 2, t = lane & 3;
    while (true) {
      const Piece& its = take();
      if (its.work.entries <= 0) break;
      const int passes = passes_of(its.work), own = (group + L::kGroups - int(set.count % L::kGroups)) % L::kGroups;
      auto first = stage;  // of the units, in this round
      for (int pass = own; resident ? pass < passes || pass == own : pass - own < passes; pass += L::kGroups) {
        const bool last = !resident || pass + L::kGroups >= passes;  // of those who need these units
        const auto done = [&](int tile) {
          if (last) (first + tile).done().arrive();
        };
        if (pass >= passes) {
          for (int tile = 0; tile < tiles; ++tile) {
            (first + tile).wait_there();
            done(tile);
          }
        } else {
          const auto queries = shared.queries[(set + pass).at()].in(window);
          const std::uint32_t entries = window.of(shared.entries[(set + pass).at()]) + 4 * 16 * warp;
          (set + pass).wait_there();
          OnlineSoftmax<T> softmax;
          float out[DP / 8][4];
          clear(out);
          pin(out);
#pragma unroll 1
          for (int tile = 0; tile < tiles; ++tile) {
            (first + tile).wait_there();
            fence_loads();
            const auto& at = shared.stages[(first + tile).at()];
            float s[kTiles][4];
            wait_products<C, 0>(out);  // all four would not fit: out, weights, s and what is left
            if (opaque(tile) > 0) done(tile - 1);
            product<C>(s, GroupRows<T, DP>{queries}, at.k.in(window), lane);
            wait_products<C, 0>(s);
            const bool dense = tile < shared_tiles;
            const auto& counts = shared.counts[(first + tile).at()];
            const int count = counts[0] + counts[1];
            const float scale = positive_scale(s, (dense ? p.landmark_scale : p.scale) * kLogit<T>);
            if (count < L::kUnits) mask_last_logits(s, count, lane);
            if (dense && slots > 1)  // only the first slot of a query has the shared units
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (load_shared_int(entries + 4 * (g + 8 * i)) % slots != 0) mask_row(s, i);
            softmax.update(s, scale, out);
            Weights<T, kTiles> weights(s);
            add_weighted_rows<C>(out, weights, at.v.in(window), lane);
          }
          wait_products<C, 0>(out);
          if (tiles > 0) done(tiles - 1);
          softmax.finish();

          const int b = its.b, h = its.h;
          const std::int64_t entry0 = std::int64_t(b * x.H + h) * x.queries.max_length * slots;
          const auto entry = [entries](int i) { return load_shared_int(entries + 4 * i); };
          float factor[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            factor[i] = softmax.factor(i);
            if (t == 0 && entry(g + 8 * i) >= 0) (x.s > 1 ? p.partial_lse : p.lse)[entry0 + entry(g + 8 * i)] = softmax.lse(i);
          }
          if (x.s > 1) {
            store_partial_rows<C>(out, factor, x.D, lane, [&](int i) { return entry(i) < 0 ? nullptr : p.partial_out + (entry0 + entry(i)) * x.D; });
          } else {
            const auto rows = queries.from_row(16 * warp);
            store_rows_by_warp(rows, out, factor, x.D, lane, head_rows<T>(p.out, b, h, span(x.queries, b).start), p.out.row, entry);
          }
          (set + pass).done().arrive();
        }
        if (!resident) first = first + tiles;
      }
      set.count += passes;
      stage.count += stages_of(passes);
      give_back();
    }
  }
#else
  __trap();
#endif
}

}  // namespace

cudaError_t launch_specialist_attention(const AttentionParams& p, cudaStream_t stream) {
  return dispatch(p.problem.dtype, p.problem.D, true, [&](auto config) {
    using C = decltype(config);
    if constexpr (C::kGroups) {
      const std::int64_t pieces = std::int64_t(p.problem.B) * p.problem.H * max_tiles(p.problem, p.groups.tile_rows);
      return launch_specialists(attention_specialists_kernel<C>, Specialists<C>::kThreads, sizeof(typename Specialists<C>::Shared), pieces, stream, p);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mita
