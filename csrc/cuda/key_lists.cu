// What queries left for the keys of their experts, sorted by key: the rows of routed sums (UnitGradientParams) that belong to the keys of a block, key
// after key, and of one key landmark after landmark, slot after slot, segment after segment. The gradients of keys are summed in that order.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kStartThreads = 256, kWarps = 4, kOf = 2, kExperts = 32 * kOf;  // experts at once of a lane, and of a warp

// key_starts[list] = the first slot of an expert's ascending indices that lies in the keys of a list or behind them.
__global__ void __launch_bounds__(kStartThreads) key_starts_kernel(const KeyListParams p) {
  const Problem& x = p.problem;
  // A block has as many experts as it has threads for their slots, or one.
  const int experts = max(1, blockDim.x / (x.K + 1)), own = experts > 1 ? threadIdx.x / (x.K + 1) : 0, slot0 = threadIdx.x - own * (x.K + 1);
  const std::int64_t row = std::int64_t(blockIdx.x) * experts + own;
  if (own >= experts || row >= std::int64_t(x.B) * x.H * x.M) return;
  const int bh = static_cast<int>(row / x.M), m = static_cast<int>(row % x.M), length = span(x.keys, bh / x.H).length, lists = ceil_div(x.keys.max_length, p.keys);
  const std::int32_t* indices = p.indices + row * x.K;
  std::int32_t* starts = p.key_starts + std::int64_t(bh) * (lists + 1) * x.M + m;
  const auto present = [&](int slot) { return static_cast<unsigned>(indices[slot]) < static_cast<unsigned>(length); };
  for (int slot = slot0; slot <= x.K; slot += blockDim.x) {
    if (slot > 0 && !present(slot - 1)) continue;
    const int first = slot > 0 ? indices[slot - 1] / p.keys + 1 : 0, last = slot < x.K && present(slot) ? indices[slot] / p.keys : lists;
    for (int list = first; list <= last; ++list) starts[std::int64_t(list) * x.M] = slot;
  }
}

// One warp lists the sums of `p.keys` keys: it counts those of every key, then it puts them in their places.
__global__ void __launch_bounds__(32 * kWarps) key_lists_kernel(const KeyListParams p) {
  struct Expert {
    std::int32_t offset, slot, segment, segments;  // sums before its own ones, of these experts; its first slot of these keys; its segments
  };
  __shared__ Expert all_experts[kWarps][kExperts];
  extern __shared__ std::int32_t all_cursors[];  // [kWarps][p.keys]
  const Problem& x = p.problem;
  const int lane = threadIdx.x % 32, lists = ceil_div(x.keys.max_length, p.keys);
  const std::int64_t item = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= std::int64_t(x.B) * x.H * lists) return;
  const int bh = static_cast<int>(item / lists), list = static_cast<int>(item % lists);
  Expert* const experts = all_experts[threadIdx.x / 32];
  std::int32_t* const cursors = all_cursors + threadIdx.x / 32 * p.keys;
  const std::int32_t* segment_starts = p.groups.segment_starts + std::int64_t(bh) * (x.M + 1);
  const std::int32_t* key_starts = p.key_starts + (std::int64_t(bh) * (lists + 1) + list) * x.M;
  const std::int32_t* indices = p.indices + std::int64_t(bh) * x.M * x.K;

  const auto sum = [](int x) { return __reduce_add_sync(kAllLanes, x); };
  const auto sum_before = [lane](int x) {  // of earlier lanes
    int through = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, through, d);
      if (lane >= d) through += other;
    }
    return through - x;
  };
  // f(key, row), 32 sums at a time; key: of these keys, or negative.
  const auto each = [&](auto&& f) {
    int before = 0;  // sums for the keys before these
    for (int first = 0; first < x.M; first += kExperts) {
      Expert own[kOf];
      int count[kOf], total = 0;
#pragma unroll
      for (int j = 0; j < kOf; ++j) {
        const int m = first + 32 * j + lane;
        own[j] = {}, count[j] = 0;
        if (m < x.M) {  // an expert without queries has left no sums
          own[j].segment = segment_starts[m], own[j].segments = segment_starts[m + 1] - own[j].segment;
          own[j].slot = min(max(key_starts[m], 0), x.K);  // of indices that do not ascend nothing is known
          count[j] = (min(max(key_starts[x.M + m], own[j].slot), x.K) - own[j].slot) * own[j].segments;
        }
      }
#pragma unroll
      for (int j = 0; j < kOf; ++j) {
        before += sum(own[j].slot * own[j].segments);
        own[j].offset = total + sum_before(count[j]);
        total += sum(count[j]);
        experts[32 * j + lane] = own[j];
      }
      __syncwarp();
      for (int some = 0; some < total; some += 32) {
        int key = -1, row = 0;
        if (const int i = some + lane; i < total) {
          int e = 0;  // the last expert that does not begin behind this sum
#pragma unroll
          for (int step = kExperts / 2; step > 0; step /= 2)
            if (experts[e + step].offset <= i) e += step;
          const Expert& expert = experts[e];
          const int from = i - expert.offset, slot = expert.slot + (expert.segments == 1 ? from : from / expert.segments);
          key = indices[(first + e) * x.K + slot] - list * p.keys;
          if (key >= p.keys) key = -1;
          row = (expert.segment + (expert.segments == 1 ? 0 : from % expert.segments)) * x.K + slot;
        }
        f(key, row);
      }
      __syncwarp();
    }
    return before;
  };
  // Those of the same key, in their order; the first lane of each counts them.
  const auto place = [&](int key) {
    const unsigned same = __match_any_sync(kAllLanes, key);
    const int cursor = key >= 0 ? cursors[key] : 0;
    __syncwarp();
    if (key >= 0 && lane == __ffs(same) - 1) cursors[key] += __popc(same);
    __syncwarp();
    return cursor + __popc(same & ((1u << lane) - 1));
  };

  for (int key = lane; key < p.keys; key += 32) cursors[key] = 0;
  __syncwarp();
  const int before = each([&](int key, int) { place(key); });
  int end = before;  // where the sums of every key begin, and where all end
  for (int key = lane; key < p.keys; key += 32) {
    const int count = cursors[key];
    cursors[key] = end + sum_before(count);
    end += sum(count);
  }
  __syncwarp();
  const int most = max_tiles(x, p.groups.segment_rows) * x.K, blocks = ceil_div(x.keys.max_length, kKeyBlock);
  for (int i = lane; i < p.keys / kKeyBlock; i += 32)
    if (const int block = list * (p.keys / kKeyBlock) + i; block < blocks) {
      const int last = i + 1 < p.keys / kKeyBlock ? cursors[(i + 1) * kKeyBlock] : end;
      p.ranges[std::int64_t(bh) * blocks + block] = {cursors[i * kKeyBlock], min(last, most)};
    }
  if (end == before) return;
  __syncwarp();
  KeyEntry* const entries = p.entries + std::int64_t(bh) * most;
  each([&](int key, int row) {
    const int to = place(key);
    if (key >= 0 && to < most) entries[to] = {row, key % kKeyBlock};
  });
}

}  // namespace

cudaError_t launch_key_lists(const KeyListParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  const std::int64_t heads = std::int64_t(x.B) * x.H, items = heads * ceil_div(x.keys.max_length, p.keys);
  const int experts = std::max(1, kStartThreads / (x.K + 1));
  if (cudaError_t status = launch(key_starts_kernel, static_cast<unsigned>((heads * x.M + experts - 1) / experts), kStartThreads, 0, stream, p)) return status;
  return launch(key_lists_kernel, static_cast<unsigned>((items + kWarps - 1) / kWarps), 32 * kWarps, kWarps * p.keys * sizeof(std::int32_t), stream, p);
}

}  // namespace mita
