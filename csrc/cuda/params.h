// What the host tells the kernels: plain structs, a shape after every pointer. No torch, no CUDA.
// Letters as in the paper and the docs: B batch, H query heads, Hkv key/value heads, N queries, L keys, M landmarks,
// K keys per expert, s experts per query, D head dimension. BH = B*H counts the (batch, query head) pairs.
#pragma once
#include <cstdint>

namespace mita {

enum class Dtype { bf16, fp16, fp32 };

// A [B, heads, rows, D] tensor with any strides (in elements) and a contiguous last dimension; every row starts on 16 bytes,
// less than 4 GB behind the one before. Packed sequences have batch = 0; Sequences::starts then says where each one begins.
struct Rows {
  void* data;                  // read-only wherever it is an input
  std::int64_t batch, head, row;
};

// Which rows belong to which batch element. `lengths` and `starts` are null where all have `max_length` rows. Whatever they hold,
// `span` stays within the tensor.
struct Sequences {
  int max_length;
  const std::int32_t* lengths; // [B], right-padded batches
  const std::int32_t* starts;  // [B+1] prefix sums, packed batches (takes precedence)
  int rows;                    // of the packed tensor
};

struct Problem {
  Dtype dtype;
  int B, H, Hkv, M, K, s, D;
  Sequences queries, keys;     // N = queries.max_length, L = keys.max_length
  bool tf32 = false;           // may fp32 operands be rounded to TF32, except for scores that decide on a selection?
};

// Average pooling of the grid [gh, gw] of queries after `prefix` tokens into [mh, mw] windows; 1-D is gh = mh = 1.
struct Windows {
  int mh, mw, gh, gw, prefix;
};

struct PoolParams {
  Problem problem;
  Windows windows;
  Rows q;                      // [B, H, N, D]
  void* landmarks;             // [B, H, M, D], contiguous
};

struct PoolBackwardParams {
  Problem problem;
  Windows windows;
  Rows dlandmarks;             // [B, H, M, D]
  bool add;                    // to what dq holds
  bool early;                  // may it begin while launch_row_finish, last in the stream, still makes dlandmarks?
  Rows dq;                     // [B, H, N, D]
};

// Scores, compressed values and top-K keys of every landmark. Not the scores are stored, but what each group of consecutive keys leaves (kGroupKeys).
struct LandmarkParams {
  Problem problem;
  float scale;
  Rows landmarks, k, v;        // [B, H, M, D], [B, Hkv, L, D] twice
  int splits;                  // parts of the key range, each with its own partial softmax
  int group;                   // group_keys(L, K, D)
  bool halves;                 // stores_halves(problem)
  std::int64_t pitch;          // score_pitch(L, group)
  float* scores;               // [BH, M, pitch], unscaled, every bit of fp32; pairs where group > 1; until keys are chosen by them. Of
                               // halves a row begins with fp16 numbers instead, which are logits but for a sign of the scale: one may be more than another only if its score is
  float* partial_values;       // [BH, splits, M, D], not yet divided by the sums
  float* partial_state;        // [BH, splits, M, 2]: maximum, sum
  std::int32_t* indices;       // [B, H, M, K], ascending; -1 where a sequence has fewer keys
  void* compressed;            // [B, H, M, D], contiguous
  float* lse;                  // [B, H, M]
  bool early, early_choice;    // may the kernel of the scores start while the one before it runs? And that which chooses from rows of up to kWarpScores?
};

// Entries of a head that one block puts in order.
constexpr int kGroupChunk = 2048;

struct PoolRouteParams {
  Problem problem;
  Windows windows;
  Rows q;                      // [B, H, N, D]
  void* memory;                // pool_route_bytes: fp32 [BH, pieces of N + M, D], row piece + m is what that piece gives to window m; then landmarks again
  void* landmarks;             // [B, H, M, D], contiguous
  std::int32_t* experts;       // [B, H, N, 1]
  std::int32_t* counts;        // [BH, M, ceil(N / kGroupChunk)]: of the queries of each chunk, those of each expert
};

struct RouteParams {
  Problem problem;
  Rows q, landmarks;           // [B, H, N, D], [B, H, M, D]
  std::int32_t* experts;       // [B, H, N, s], best first
};

// Entries [first, first + entries) of one expert, the work of one block, and its place in the list. No entries: no work.
struct alignas(16) Work {
  std::int32_t expert, first, entries, place;
};

// Keys, and what queries leave for them as keys of their experts, come in blocks. The entries [first, last) of a head belong to a block; an entry is a
// row of the head's routed sums (UnitGradientParams), and which key of the block it belongs to.
constexpr int kKeyBlock = 64;
struct alignas(8) KeyRange {
  std::int32_t first, last;
};
struct alignas(8) KeyEntry {
  std::int32_t row, key;
};

// Queries grouped by expert. An entry is query * s + slot; entries of one expert keep their order. Lists of work have room for
// max_tiles(rows) of a head, and name expert after expert.
struct Groups {
  const std::int32_t* entries; // [BH, N*s], expert after expert; null where s = 0: the queries as they come
  const Work* tiles;           // [BH, max_tiles(tile_rows)]
  unsigned* taken;             // how much of a list has been taken by blocks that share it: 0 before a launch and, each block having found none left, after it; null where s = 0
  const Work* segments;        // [BH, max_tiles(segment_rows)]
  const std::int32_t* segment_starts;  // [BH, M+1], prefix sums of each expert's segments
  int tile_rows;               // queries of one forward or query-gradient block
  int segment_rows;            // queries that one block sums into a key gradient
  const KeyRange* key_ranges;  // [BH, ceil(L / kKeyBlock)], null where there are no routed sums
  const KeyEntry* key_entries; // [BH, max_tiles(segment_rows) * K], sorted by key
};

struct GroupParams {
  Problem problem;
  const std::int32_t* experts; // [B, H, N, s], clamped to [0, M). Null: only tiles are wanted, the rest is there
  int chunks;                  // ceil(N*s / kGroupChunk)
  std::int32_t* counts;        // [BH, M, chunks], of the entries of each chunk, then of those before them
  std::int32_t* entries;       // the writable side of Groups
  Work* tiles;
  unsigned* taken;
  Work* segments;
  std::int32_t* segment_starts;
  int tile_rows, segment_rows;
  bool counted;                // is the number of entries there?
  int pass_rows = 0;           // a fifth of tile_rows or more. Tiles of more passes of so many entries come first. None: tiles in the order of experts
};

struct PoolRouteGroupParams {
  GroupParams group;           // of the experts below
  Windows windows;
  Rows q;                      // [B, H, N, D]
  void* landmarks;             // [B, H, M, D], contiguous
  std::int32_t* experts;       // [B, H, N, 1]
};

// What a query attends to: the shared units (landmarks, compressed values) and the gathered keys and values of its experts.
struct Units {
  bool shared;                 // are the shared units among them?
  Rows landmarks, compressed;  // [B, H, M, D] twice
  Rows k, v;                   // [B, Hkv, L, D] twice
  const std::int32_t* indices; // [B, H, M, K]; anything outside [0, L) is an empty slot. Null: all keys
};

struct AttentionParams {
  Problem problem;
  float scale, landmark_scale;
  Rows q;                      // [B, H, N, D]
  Units units;
  Groups groups;
  float* partial_out;          // [BH, N*s, D], only where s > 1
  float* partial_lse;          // [BH, N*s], only where s > 1
  Rows out;                    // [B, H, N, D]
  float* lse;                  // [B, H, N], natural logarithm
  bool early;                  // may the kernel of small experts start while the one before it runs?
};

// The whole forward pass of short sequences, with one expert per query.
struct ShortParams {
  Problem problem;
  Windows windows;
  bool pool;                   // do the landmarks come from the queries? Then they are written, else read
  bool shared;                 // do the landmarks and the compressed values take part?
  float scale, landmark_scale;
  Rows q, k, v;                // [B, H, N, D], [B, Hkv, L, D] twice
  Rows landmarks, compressed;  // [B, H, M, D] twice
  float* landmark_lse;         // [B, H, M]
  std::int32_t* indices;       // [B, H, M, K], as in LandmarkParams
  std::int32_t* experts;       // [B, H, N]
  Rows out;                    // [B, H, N, D]
  float* lse;                  // [B, H, N], natural logarithm
  GroupParams groups;          // entries and segments, for the backward pass; none where entries are null
};

// Its whole backward pass, of those that are short enough: with H = Hkv, shared units, and few units.
struct ShortGradientParams {
  ShortParams forward;         // what it read and wrote, but for `out`
  Rows dout;                   // [B, H, N, D]
  const float* dlse;           // [B, H, N], contiguous, or null
  Rows dq, dk, dv;             // [B, H, N, D], [B, H, L, D] twice; no data: not wanted, as below
  Rows dlandmarks;             // [B, H, M, D]; where `pool` says so, dq takes them in instead
};

// The backward pass of attention by masks: with H = Hkv, shared units, and one expert per query.
struct MaskedGradientParams {
  Problem problem;
  float scale, landmark_scale;
  Rows q, dout;                // [B, H, N, D] twice
  Rows k, v;                   // [B, H, L, D] twice
  Rows landmarks, compressed;  // [B, H, M, D] twice
  const float* lse;            // [B, H, N]
  const float* dlse;           // [B, H, N], contiguous, or null
  float* delta;                // [B, H, N]: made with dq
  const std::int32_t* indices; // [B, H, M, K]
  const std::int32_t* experts; // [B, H, N]
  std::uint32_t* masks;        // [B, H, M, pitch]: what experts chose, made with dq
  int pitch;                   // masked_gradient_pitch
  Rows dq;                     // [B, H, N, D], without what queries receive as parts of pooled landmarks
  Rows dcompressed;            // [B, H, M, D], and what follows: for the gradients of keys
  const float *landmark_lse, *landmark_delta;  // [B, H, M] twice
  Rows dk, dv;                 // [B, H, L, D] twice
};

// delta[row] = sum_d dout * out - dlse, for the rows of `out` [B, H, rows, D]: exact but for the rounding of `out`.
struct DeltaParams {
  Dtype dtype;
  int B, H, D;
  Sequences sequences;
  Rows dout, out;
  const float* dlse;           // [B, H, rows], contiguous, or null
  float* delta;                // [B, H, rows]
};

// Gradients of the keys of experts, or of their values, a row for each of the K keys of every segment of queries: rounded to 16 bits, with a factor for every
// kFactorColumns of them by which they are multiplied. Or they are fp32, and there are no factors: those of fp32 elements, and of few queries.
constexpr int kFactorColumns = 128;
__host__ __device__ constexpr int routed_pitch(int D) { return (D + 31) / 32 * 32; }  // numbers of a row; in which order is the kernels' affair
struct RoutedRows {
  void* numbers;               // [BH, max_tiles(segment_rows), K, routed_pitch(D)]
  float* factors;              // [BH, max_tiles(segment_rows), K, ceil(D / kFactorColumns)], or null
};

// Gradients of the units (keys and values) of one softmax, summed over the rows that attended to them:
//   shared:   units = landmarks and compressed values, rows = all queries (in `splits` parts)
//   routed:   units = the K gathered keys of an expert, rows = one segment of its queries
//   compress: units = all keys and values, rows = the landmarks of the query heads that share them
enum class UnitRole { shared, routed, compress };

// The routed sums sorted by key.
struct KeyListParams {
  Problem problem;
  const std::int32_t* indices; // [B, H, M, K], ascending (as unsigned)
  Groups groups;               // without them
  std::int32_t* rows;          // [BH, max_tiles(segment_rows) * K], scratch
  KeyRange* ranges;            // the writable side of Groups
  KeyEntry* entries;
};

struct UnitGradientParams {
  Problem problem;
  UnitRole role;
  float scale;
  Rows unit_k, unit_v;         // landmarks and compressed, or k and v
  Rows row_q, row_dout;        // q and dout, or landmarks and dcompressed
  const float* lse;            // [B, H, rows]
  const float* delta;          // [B, H, rows]
  const float* normalizer;     // [B, H, rows], fp32 only: what the probabilities of a row are multiplied by
  int splits;                  // shared: parts of the query range
  int landmark_rows;           // compress: M, or 0 to only collect the routed gradients
  const std::int32_t* indices; // routed: [B, H, M, K]
  Groups groups;               // routed, compress
  float *partial_dk, *partial_dv;  // shared: [BH, splits, M, D]
  RoutedRows routed_dk, routed_dv; // written by routed, read by compress
  Rows dk, dv;                 // compress: [B, Hkv, L, D] twice
};

// Gradients of the rows (queries) of one softmax, without what queries receive as parts of pooled landmarks:
//   attention: rows = queries grouped by expert, units = [landmarks | gathered keys]
//   landmark:  rows = landmarks, units = all keys (in `splits` parts)
enum class RowRole { attention, landmark };
constexpr bool row_gradient_makes_delta(RowRole role, int s) { return role == RowRole::attention && s <= 1; }

struct RowGradientParams {
  Problem problem;
  RowRole role;
  float scale, landmark_scale;
  Rows q, dout;                // [B, H, rows, D] twice
  Rows out;                    // [B, H, rows, D], where delta is made of it
  const float* lse;            // [B, H, rows]
  const float* dlse;           // [B, H, rows], in delta too; null: zeros
  float* delta;                // [B, H, rows]: as from launch_delta, unless it is made here; left exact
  float* normalizer;           // [B, H, rows], fp32 only (else null): see UnitGradientParams
  Units units;                 // landmark: only k and v
  Groups groups;               // attention
  int splits;                  // landmark: parts of the key range
  int share;                   // or 0. A part for each block that had some of the keys instead, see KeyGradientParams
  float* partial;              // landmark: [BH, splits, M, 2, D], or [blocks + BH, M, 2, D], part `block + bh`; attention with s > 1: [BH, N*s, 2, D]
  float* partial_sums;         // the same rows: [..., 3]
  const float* base;           // landmark: [BH, base_parts, M, D] to add
  int base_parts;              // or 0
  Rows dq;                     // [B, H, rows, D]
};

// The last two of the softmax of the landmarks in one pass over the keys, for few of them. `landmarks` says where their partial sums go, and is finished by
// itself. Of the tiles of kKeyBlock keys of all heads, head after head, a block takes `landmarks.share`.
struct KeyGradientParams {
  UnitGradientParams keys;
  RowGradientParams landmarks;
  bool early;                  // may it start while the kernel before it runs?
};

// Attention's gradients of queries and units in one pass, for few units and one expert per query; without what queries receive as parts of
// pooled landmarks. The sums of the units are those of UnitGradientParams.
struct AttentionGradientParams {
  Problem problem;
  float scale, landmark_scale;
  Rows q, dout;                // [B, H, N, D] twice
  const float* lse;            // [B, H, N]
  const float* dlse;           // [B, H, N], contiguous, or null
  Units units;
  Groups groups;
  int splits;                  // parts of a head's segments
  float *shared_dk, *shared_dv;  // [BH, splits, M, D]
  RoutedRows routed_dk, routed_dv;  // or null
  Rows dq;                     // [B, H, N, D]
};

// Sums of partial gradients of keys and values in a fixed order, rounded; and delta[row] = sum_d dv * values, as rounded, as DeltaParams has it.
struct ReduceParams {
  Dtype dtype;
  int BH, parts, rows, D;
  struct {
    const float* partial;      // [BH, parts, rows, D]
    void* total;               // [BH, rows, D] in dtype, or null: not wanted, of keys
  } dk, dv;
  int H;
  Rows values;                 // [B, H, rows, D]
  float* delta;                // [BH, rows], or null
  bool early;                  // may it start while the kernel before it runs?
};

}  // namespace mita
