// Gradients of the rows of a softmax (see row_gradient.cu) for sm_90a and 16-bit elements of 65 to 128 columns, by specialists: of queries with one expert, or
// of more than 64 landmarks. A block stays on its multiprocessor and takes one piece of work after the other: queries of one expert, from the list of work, or
// up to 128 landmarks and a part of the keys.
//   one warp hands out the pieces, and lists their rows, 64 of one pass at a time;
//   one warp brings such rows, of q and of dout, into a ring of sets;
//   two warps bring units, 64 at a time, one keys, one values, into a ring of stages: first the shared units, then those of the expert, again for every two
//   passes; or a part of all keys;
//   two warpgroups weigh and sum, a pass each, as blocks do elsewhere: each at its own pace, so that one multiplies while the other weighs.
#include "launch.h"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 128, kUnits = 64, kGroups = 2;
constexpr int kSets = 2 * kGroups, kStages = 3, kPieces = 3;  // every warpgroup has sets of its own, and sees every use of them
constexpr int kThreads = 128 * (kGroups + 1);
enum { kNone = -1, kEnd = -2 };  // in the place of a row: there is none; there are no more passes

template <class T> struct Shared {
  struct {
    TileStorage<T, kDP, kPassRows> q, dout;
  } sets[kSets];
  UnitStage<T, kDP, kUnits> stages[kStages];
  struct {
    const T *q, *dout, *out;  // rows 0 of its head
    T* dq;
    std::int64_t statistics, partial;  // of row 0; where a landmark leaves its partial sums
    std::int32_t tiles;
    alignas(16) std::int32_t row[kPassRows];
  } lists[kSets];
  struct alignas(16) {
    Work work;        // no entries: there is no more
    const T* rows[4];  // of landmarks, compressed values, keys, values
    std::int64_t pitches[4];
    const std::int32_t* indices;
    int bh, keys, first_tile, tiles;  // keys: of the sequence; tiles: of units
  } pieces[kPieces];
  alignas(16) std::int32_t numbers[2][kUnits];  // of the units that a warp brings
  std::int32_t present[kStages];                // units of a stage
  std::uint64_t of_pieces[kPieces][2], of_lists[kSets][2], of_sets[kSets][2], of_stages[kStages][2];
};
static_assert(sizeof(Shared<__half>) <= 227 * 1024);

template <class T, bool LANDMARK> __global__ void __launch_bounds__(kThreads, 1) row_specialists_kernel(const RowGradientParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  constexpr int kTiles = kUnits / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  Window window(memory);
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  unsigned sets = 0, stages = 0, pieces = 0;  // counted by every role that meets them; those who bring sets count all of them, a warpgroup every other one
  const auto piece = [&] { return Ring<kPieces>{window.of(shared.of_pieces), pieces}; };
  const auto list = [&] { return Ring<kSets>{window.of(shared.of_lists), sets}; };  // free when its set is
  const auto set = [&] { return Ring<kSets>{window.of(shared.of_sets), sets}; };
  const auto stage = [&] { return Ring<kStages>{window.of(shared.of_stages), stages}; };
  if (threadIdx.x == 0) {  // loads arrive by themselves, lane by lane
    piece().init(32, 2 * 32), list().init(32, 1), set().init(2 * 32, 128), stage().init(2 * 32 + 1, 128 * kGroups);
    fence_barriers();
  }
  __syncthreads();
  window.address = opaque(window.address);  // nothing of the above is kept: registers

  const Problem& x = p.problem;
  const auto the_list = [&]() -> auto& { return shared.lists[set().at()]; };
  const auto the_piece = [&]() -> auto& { return shared.pieces[piece().at()]; };
  const auto shared_tiles = [&] { return !LANDMARK && p.units.shared ? ceil_div(x.M, kUnits) : 0; };

  if (this_group() == kGroups) {
    keep_registers<56>();
    // Starts copying 64 rows into a tile; number(i) is that of row i, negative for zeros.
    const auto bring = [&](const auto& tile, const T* row0, std::int64_t pitch, bool whole, auto number) {
      load_rows_by_warp<64, T, kDP>(number, whole, x.D, Copy<T, kDP>(tile.in(window), row0, pitch));
    };
    if (this_warp() == 0) {
      unsigned next = blockIdx.x;
#pragma unroll 1
      for (bool more = true; more; ++pieces) {
        piece().wait_free();
        const int blocks = LANDMARK ? ceil_div(x.M, kGroups * kPassRows) : 1, of_head = LANDMARK ? blocks * p.splits : max_tiles(x, p.groups.tile_rows);
        const unsigned all = static_cast<unsigned>(x.B * x.H) * of_head;
        if (this_lane() == 0) the_piece().work.entries = 0;
#pragma unroll 1
        for (bool found = false; more && !found;) {
          if (!LANDMARK) next = take_next(p.groups.taken, all, this_lane());
          const unsigned number = next;
          next += gridDim.x;
          more = number < all;
          if (!more) break;
          const int row0 = number % blocks * kGroups * kPassRows;
          const Work work = LANDMARK ? Work{0, row0, min(kGroups * kPassRows, x.M - row0), static_cast<int>(number % of_head / blocks)} : p.groups.tiles[number];
          found = work.entries > 0;
          if (found && this_lane() == 0) {
            const int bh = number / of_head, b = bh / x.H, h = bh % x.H, key_head = h / (x.H / x.Hkv);
            const Span keys = span(x.keys, b);
            auto& to = the_piece();
            to.work = work, to.bh = bh, to.keys = keys.length;
            to.rows[2] = head_rows<T>(p.units.k, b, key_head, keys.start), to.rows[3] = head_rows<T>(p.units.v, b, key_head, keys.start);
            to.pitches[2] = p.units.k.row, to.pitches[3] = p.units.v.row;
            if (LANDMARK) {
              const int all_tiles = ceil_div(keys.length, kUnits), most = ceil_div(all_tiles, p.splits);
              to.first_tile = work.place * most, to.tiles = max(0, min(most, all_tiles - to.first_tile));
            } else {
              to.first_tile = 0, to.tiles = shared_tiles() + ceil_div(x.K, kUnits);
              to.rows[0] = head_rows<T>(p.units.landmarks, b, h, 0), to.rows[1] = head_rows<T>(p.units.compressed, b, h, 0);
              to.pitches[0] = p.units.landmarks.row, to.pitches[1] = p.units.compressed.row;
              to.indices = p.units.indices + (std::int64_t(bh) * x.M + work.expert) * x.K;
            }
          }
        }
        __syncwarp();
        piece().there().arrive();
        // Passes by twos: the second may be empty.
#pragma unroll 1
        for (int row0 = 0; row0 < the_piece().work.entries; row0 += kGroups * kPassRows) {
#pragma unroll 1
          for (int i = 0; i < kGroups; ++i, ++sets) {
            const int bh = the_piece().bh, b = bh / x.H, h = bh % x.H;
            const Work& work = the_piece().work;
            int row[2];  // asked for before there is room
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              row[j] = row0 + kPassRows * i + 32 * j + this_lane();
              row[j] = row[j] >= work.entries ? kNone : LANDMARK ? work.first + row[j] : p.groups.entries[std::int64_t(bh) * x.queries.max_length + work.first + row[j]];
            }
            set().wait_free();
            auto& to = the_list();
            if (this_lane() == 0) {
              const std::int64_t start = LANDMARK ? 0 : span(x.queries, b).start;
              to.q = head_rows<T>(p.q, b, h, start), to.dout = head_rows<T>(p.dout, b, h, start), to.tiles = the_piece().tiles;
              to.statistics = std::int64_t(bh) * (LANDMARK ? x.M : x.queries.max_length);
              if (LANDMARK) to.partial = (std::int64_t(bh) * p.splits + work.place) * x.M;
              else to.out = head_rows<T>(p.out, b, h, start), to.dq = head_rows<T>(p.dq, b, h, start);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) to.row[32 * j + this_lane()] = row[j];
            list().there().arrive();
            set().there().arrive();
          }
        }
      }
#pragma unroll 1
      for (int i = 0; i < kGroups; ++i, ++sets) {
        set().wait_free();
        if (this_lane() == 0) the_list().row[0] = kEnd;
        list().there().arrive();
        set().there().arrive();
      }
    } else if (this_warp() == 1) {
#pragma unroll 1
      for (int ends = 0; ends < kGroups; ++sets) {
        list().wait_there();
        const RowList row{window.of(the_list().row)};
        ends += row(0) == kEnd;
        if (row(0) >= 0) {
          const bool whole = row(kPassRows - 1) >= 0;
          bring(shared.sets[set().at()].q, the_list().q, p.q.row, whole, row);
          bring(shared.sets[set().at()].dout, the_list().dout, p.dout.row, whole, row);
          if (!LANDMARK)  // products of these with dout are wanted first
#pragma unroll 1
            for (int i = this_lane() / 2; i < kPassRows; i += 16)
              if (const int column = this_lane() % 2 * 64; row(i) >= 0 && column < x.D) asm volatile("prefetch.global.L2 [%0];" ::"l"(the_list().out + row(i) * p.out.row + column));
        }
        set().there().arrive_loaded();
      }
    } else {
#pragma unroll 1
      for (;; ++pieces) {
        piece().wait_there();
        if (the_piece().work.entries <= 0) break;
#pragma unroll 1
        for (int row0 = 0; row0 < the_piece().work.entries; row0 += kGroups * kPassRows) {
#pragma unroll 1
          for (int tile = 0; tile < the_piece().tiles; ++tile, ++stages) {
            const bool dense = LANDMARK || tile < shared_tiles();
            const int tensor = this_warp() - 2, which = (LANDMARK || !dense ? 2 : 0) + tensor, first = (the_piece().first_tile + (dense ? tile : tile - shared_tiles())) * kUnits;
            const auto bring_units = [&](bool whole, auto number) {
              auto& to = shared.stages[stage().at()];
              stage().wait_free();
              bring(tensor ? to.v : to.k, the_piece().rows[which], the_piece().pitches[which], whole, number);
            };
            int present = LANDMARK ? the_piece().keys - first : 0;
            if constexpr (LANDMARK) {
              bring_units(present >= kUnits, [&](int row) { return row < present ? first + row : -1; });
            } else {
              int number[2] = {first + this_lane(), first + 32 + this_lane()};
              if (!dense) {
                const std::int32_t* const indices = the_piece().indices;
#pragma unroll
                for (int i = 0; i < 2; ++i) number[i] = number[i] < x.K ? indices[number[i]] : -1;
              }
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const bool there = static_cast<unsigned>(number[i]) < static_cast<unsigned>(dense ? x.M : the_piece().keys);
                if (!there) number[i] = -1;
                present += __popc(__ballot_sync(kAllLanes, there));
                shared.numbers[tensor][32 * i + this_lane()] = number[i];
              }
              __syncwarp();
              bring_units(present == kUnits, RowList{window.of(shared.numbers[tensor])});
            }
            if (tensor == 0 && this_lane() == 0) shared.present[stage().at()] = present;
            stage().there().arrive_loaded();
            __syncwarp();
            if (tensor == 0 && this_lane() == 0) stage().there().arrive();
          }
        }
        piece().done().arrive();
      }
    }
    wait_loads<0>();
  } else {
    take_registers<224>();
    sets = this_group();
#pragma unroll 1
    for (;; sets += kGroups) {
      set().wait_there();
      const int row0 = load_shared_int(window.of(the_list().row));
      if (row0 == kEnd) break;
      if (row0 < 0) {
#pragma unroll 1
        for (int left = the_list().tiles; left > 0; --left, ++stages) {
          stage().wait_there();
          stage().done().arrive();
        }
        set().done().arrive();
        continue;
      }
      fence_loads();
      const auto own_row = [&](int i) { return load_shared_int(window.of(the_list().row) + 4 * (16 * this_warp() + this_lane() / 4 + 8 * i)); };
      float delta[2] = {0.0f, 0.0f}, lse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = own_row(i);
        const std::int64_t at = the_list().statistics + max(row, 0);
        lse[i] = row < 0 ? kInfinity : p.lse[at] * kLogit<T>;
        if (lse[i] == -kInfinity) lse[i] = kInfinity;  // attended to nothing
        if (LANDMARK) delta[i] = p.delta[at];
        if (!LANDMARK && p.dlse) delta[i] = -p.dlse[at];
      }
      if constexpr (!LANDMARK) {
        // As products of 8 rows with 8, of which only the diagonal is wanted: words 0 and 2 of every chunk in one, 1 and 3 in another. Columns are summed over in
        // the order in which lanes have them.
        constexpr int kOwn = Tile<T, kDP>::kChunks / 4;  // chunks of one lane
        const int g = this_lane() / 4, t = this_lane() % 4;
        Vector<T> out[2][kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int column = (4 * j + t) * kChunk<T> < x.D ? (4 * j + t) * kChunk<T> : 0;  // any, where dout has zeros
#pragma unroll
          for (int i = 0; i < 2; ++i) out[i][j] = load_vector(the_list().out + max(own_row(i), 0) * p.out.row + column);
        }
        const auto rows = shared.sets[set().at()].dout.in(window).from_row(16 * this_warp());
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float products[2][4] = {};
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const float4 chunk = load_shared4(rows.chunk(g + 8 * i, 4 * j + t));
            const uint4& dout = reinterpret_cast<const uint4&>(chunk);
            mma<T>(products[0], {dout.x, dout.y, dout.z, dout.w}, out[i][j].bits.x, out[i][j].bits.z);
            mma<T>(products[1], {dout.x, dout.y, dout.z, dout.w}, out[i][j].bits.y, out[i][j].bits.w);
          }
          delta[i] += __shfl_sync(kAllLanes, g % 2 ? products[0][1] + products[1][3] : products[0][0] + products[1][2], (this_lane() & ~3) | g / 2);
        }
      }
      float dq[kDP / 8][4], kappa[kDP / 8][4], sum_rounded[2] = {0.0f, 0.0f}, sum_exact[2] = {0.0f, 0.0f};
      clear(dq);
      clear(kappa);
#pragma unroll 1
      for (int tile = 0; tile < the_list().tiles; ++tile, ++stages) {
        window.address = opaque(window.address);
        stage().wait_there();
        fence_loads();
        const auto units = [&]() -> auto& { return shared.stages[stage().at()]; };
        const auto& rows = shared.sets[set().at()];
        float s[kTiles][4], gradient[kTiles][4];
        product<C>(s, GroupRows<T, kDP>{rows.q.in(window)}, units().k.in(window), this_lane());
        product<C>(gradient, GroupRows<T, kDP>{rows.dout.in(window)}, units().v.in(window), this_lane());
        window.address = opaque(window.address);
        const float scale = tile < shared_tiles() ? p.landmark_scale : p.scale;
        // Probabilities times a factor, which is a part of the exponent.
        const float factor = (scale == 0.0f ? 1.0f : scale) * power_of_2(kGradientShift<T>), inverse = 1.0f / factor, exponent = __log2f(fabsf(factor));
        wait_products<C, 1>(s);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], scale * kLogit<T>, exponent - lse[i / 2]);
        if (const int present = load_shared_int(window.of(shared.present[stage().at()])); present < kUnits) mask_last_logits(s, present, this_lane());
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = exponential<T>(s[n][i]);
        if (factor < 0.0f)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = -s[n][i];
        wait_products<C, 0>(gradient);
        float exact[2] = {0.0f, 0.0f}, rounded[2] = {0.0f, 0.0f};
        Weights<T, kTiles> dlogits, weights;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const auto dlogit = [&](int j) { return s[n][2 * i + j] * (gradient[n][2 * i + j] - delta[i]); };
            const float lo = dlogit(0), hi = dlogit(1);
            exact[i] += lo, exact[i] += hi;
            dlogits.packed[n][i] = pack<T>(lo, hi);
            const float2 two = unpack<T>(dlogits.packed[n][i]);
            rounded[i] += two.x + two.y;
            weights.packed[n][i] = pack<T>(s[n][2 * i], s[n][2 * i + 1]);
            asm volatile("" : "+r"(dlogits.packed[n][i]), "+r"(weights.packed[n][i]));  // one after the other: registers
          }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum_exact[i] += exact[i] * inverse, sum_rounded[i] += rounded[i] * inverse;
        window.address = opaque(window.address);
        if (scale != 0.0f) {  // units of constant logits move nothing, but count in the sums
          add_weighted_rows<C>(dq, dlogits, units().k.in(window), this_lane());
          add_weighted_rows<C>(kappa, weights, units().k.in(window), this_lane());
        }
        wait_products<C, 0>(dq, kappa);
        stage().done().arrive();
      }

      constexpr float kUnshifted[2] = {power_of_2(-kGradientShift<T>), power_of_2(-kGradientShift<T>)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) sum_rounded[i] += __shfl_xor_sync(kAllLanes, sum_rounded[i], d), sum_exact[i] += __shfl_xor_sync(kAllLanes, sum_exact[i], d);
        const int row = own_row(i);
        if constexpr (LANDMARK) {
          if (this_lane() % 4 == 0 && row >= 0) {
            float* const to = p.partial_sums + 3 * (the_list().partial + row);
            to[0] = sum_rounded[i], to[1] = sum_exact[i], to[2] = 1.0f;
          }
        } else {  // what dS, as rounded, sums to beyond its due is taken back
          const std::int64_t at = the_list().statistics + max(row, 0);
          const float given = row >= 0 && p.dlse && lse[i] != kInfinity ? p.dlse[at] : 0.0f, excess = sum_rounded[i] - given;
          if (this_lane() % 4 == 0 && row >= 0) p.delta[at] = delta[i] + sum_exact[i] - given;
#pragma unroll
          for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; ++j) dq[d][j] -= excess * kappa[d][j];
        }
      }
      const auto row_of_warp = [&](int i) { return load_shared_int(window.of(the_list().row) + 4 * (16 * this_warp() + i)); };
      if constexpr (LANDMARK) {
        const auto row_in = [&](int which) { return [&, which](int i) { return row_of_warp(i) < 0 ? nullptr : p.partial + (2 * (the_list().partial + row_of_warp(i)) + which) * x.D; }; };
        store_partial_rows<C>(dq, kUnshifted, x.D, this_lane(), row_in(0));
        store_partial_rows<C>(kappa, kUnshifted, x.D, this_lane(), row_in(1));
      } else {
        const auto rows = shared.sets[set().at()].q.in(window).from_row(16 * this_warp());
        store_rows_by_warp(rows, dq, kUnshifted, x.D, this_lane(), the_list().dq, p.dq.row, row_of_warp);
      }
      set().done().arrive();
    }
  }
#else
  __trap();
#endif
}

}  // namespace

bool fits_row_specialists(const Problem& x, RowRole role) {
  return has_warpgroups(x.dtype, x.D) && x.D > kDP / 2 && (role == RowRole::attention ? x.s == 1 : x.M > 48);
}

cudaError_t launch_row_specialists(const RowGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_row_specialists(x, p.role)) return cudaErrorInvalidValue;
  const bool landmark = p.role == RowRole::landmark;
  const std::int64_t pieces = std::int64_t(x.B) * x.H * (landmark ? p.splits * ceil_div(x.M, kGroups * kPassRows) : max_tiles(x, p.groups.tile_rows));
  return dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2)
      return launch_specialists(landmark ? row_specialists_kernel<T, true> : row_specialists_kernel<T, false>, kThreads, sizeof(Shared<T>), pieces, stream, p);
    else return cudaErrorInvalidValue;
  });
}

}  // namespace mita
