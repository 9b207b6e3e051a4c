// Every CUDA launcher on small ragged shapes against plain double loops, without torch: quick natively, small enough for
// compute-sanitizer. Each stage is given what the stage before it really computed, so that a check tells which one is wrong.
//
//   nvcc -std=c++17 -O2 -lineinfo -gencode arch=compute_90a,code=sm_90a -I csrc tests/kernels/test_kernels.cu csrc/cuda/*.cu
//        -o build/test_kernels && build/test_kernels && compute-sanitizer build/test_kernels
//
// Arguments are parts of names, to run alone, or with a minus, to leave out: `test_kernels group=1`, `test_kernels -topk`.
//
// All device memory starts as 0xFF bytes (NaN, or index -1), also between the rows of the inputs and behind short sequences.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch.h"

using namespace mita;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

void cuda_check(cudaError_t status, const char* what, int line) {
  if (status == cudaSuccess) return;
  std::printf("FAIL line %d: %s: %s\n", line, what, cudaGetErrorString(status));
  std::exit(2);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)
// A launch, and the end of its kernels: the next line reads what they wrote.

// What a kernel finds in shared memory that it has not written is not a number.
__global__ void poison_kernel(int words) {
  extern __shared__ unsigned memory[];
  for (int i = threadIdx.x; i < words; i += blockDim.x) const_cast<volatile unsigned&>(memory[i]) = ~0u;
}
cudaError_t poison_shared_memory() {
  int bytes, processors;
  for (cudaError_t status : {cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0),
                             cudaFuncSetAttribute(poison_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)})
    if (status) return status;
  poison_kernel<<<2 * processors, 256, bytes>>>(bytes / 4);
  return cudaGetLastError();
}
#define RUN(launch) \
  (cuda_check(poison_shared_memory(), "poison", __LINE__), cuda_check(launch, #launch, __LINE__), cuda_check(cudaDeviceSynchronize(), #launch, __LINE__))

int parts_of(int size, int part) { return (size + part - 1) / part; }

// ---- memory --------------------------------------------------------------------------------------------------------

template <class T> struct Buffer {
  T* data = nullptr;
  std::size_t count;
  explicit Buffer(std::size_t n) : count(n) {
    CUDA(cudaMalloc(&data, std::max<std::size_t>(1, n * sizeof(T))));
    CUDA(cudaMemset(data, 0xFF, std::max<std::size_t>(1, n * sizeof(T))));
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    CUDA(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { CUDA(cudaFree(data)); }
  std::vector<T> get() const {
    std::vector<T> host(count);
    CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
};

std::size_t bytes_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

template <class T> void encode_as(double x, unsigned char* to) {
  const T value = static_cast<T>(static_cast<float>(x));
  std::memcpy(to, &value, sizeof(T));
}
template <class T> double decode_as(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return static_cast<float>(value);
}
void encode(Dtype dtype, double x, unsigned char* to) {
  dtype == Dtype::bf16 ? encode_as<__nv_bfloat16>(x, to) : dtype == Dtype::fp16 ? encode_as<__half>(x, to) : encode_as<float>(x, to);
}
double decode(Dtype dtype, const unsigned char* from) {
  return dtype == Dtype::bf16 ? decode_as<__nv_bfloat16>(from) : dtype == Dtype::fp16 ? decode_as<__half>(from) : decode_as<float>(from);
}

// A [B, heads, rows, D] tensor of doubles.
struct Host {
  int B, heads, rows, D;
  std::vector<double> x;
  Host(int B, int heads, int rows, int D) : B(B), heads(heads), rows(rows), D(D), x(std::size_t(B) * heads * rows * D, 0.0) {}
  Host(int B, int heads, int rows, int D, std::vector<double> values) : B(B), heads(heads), rows(rows), D(D), x(std::move(values)) {}
  double* row(int b, int h, int r) { return x.data() + ((std::size_t(b) * heads + h) * rows + r) * D; }
  const double* row(int b, int h, int r) const { return const_cast<Host*>(this)->row(b, h, r); }
};

// An output tensor in the dtype of the problem, contiguous.
// One side's sequences: all full, right-padded batches, or packed one after the other.
enum class Batch { full, padded, packed };

struct Lengths {
  Batch batch;
  int longest;
  std::vector<std::int32_t> each, starts;
  Buffer<std::int32_t> each_device, starts_device;
  Lengths(Batch batch, int longest, std::vector<std::int32_t> lengths)
      : batch(batch), longest(longest), each(std::move(lengths)), starts(prefix_sums(each)), each_device(out_of_range()), starts_device(starts) {
    const std::int32_t before = -3, behind = starts.back() + 1000;  // must mean the ends of the tensor
    CUDA(cudaMemcpy(starts_device.data, &before, sizeof before, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(starts_device.data + starts.size() - 1, &behind, sizeof behind, cudaMemcpyHostToDevice));
  }
  Sequences view() const {
    return {longest, batch == Batch::padded ? each_device.data : nullptr, batch == Batch::packed ? starts_device.data : nullptr, starts.back()};
  }
  // The lengths, but for whole and empty sequences numbers that must mean the same.
  std::vector<std::int32_t> out_of_range() const {
    auto lengths = each;
    for (auto& length : lengths) length = length == longest ? longest + 1000 : length == 0 ? -1000 : length;
    return lengths;
  }
  static std::vector<std::int32_t> prefix_sums(const std::vector<std::int32_t>& lengths) {
    std::vector<std::int32_t> sums(1, 0);
    for (const auto length : lengths) sums.push_back(sums.back() + length);
    return sums;
  }
};

// A kernel's output, [B, heads, rows, D], or [all rows, heads, D] where its sequences are packed.
struct Output {
  Dtype dtype;
  int B, heads, rows, D;
  const Lengths* packed;
  Buffer<unsigned char> memory;
  Output(Dtype dtype, int B, int heads, int rows, int D, const Lengths* lengths = nullptr)
      : dtype(dtype), B(B), heads(heads), rows(rows), D(D), packed(lengths && lengths->batch == Batch::packed ? lengths : nullptr),
        memory(std::size_t(packed ? packed->starts.back() : B * rows) * heads * D * bytes_of(dtype)) {}
  Host get() const {
    const auto bytes = memory.get();
    const Rows at = view();
    Host host(B, heads, rows, D);
    for (int b = 0; b < B; ++b)
      for (int h = 0; h < heads; ++h)
        for (int r = 0; r < (packed ? packed->each[b] : rows); ++r)
          for (int d = 0; d < D; ++d)
            host.row(b, h, r)[d] = decode(dtype, &bytes[(at.batch * b + at.head * h + at.row * ((packed ? packed->starts[b] : 0) + r) + d) * bytes_of(dtype)]);
    return host;
  }
  Rows view() const {
    if (packed) return {memory.data, 0, D, std::int64_t(heads) * D};
    return {memory.data, std::int64_t(heads) * rows * D, std::int64_t(rows) * D, D};
  }
};

// An input tensor laid out [B, rows, heads, D + 8] (packed: [all rows, heads, D + 8]), as a slice of a fused projection.
struct Input {
  Host host;  // rounded to the dtype; zeros behind short sequences, where the device has NaN
  Buffer<unsigned char> memory;
  Rows rows;
  static constexpr int kGap = 8;
  Input(Dtype dtype, Host values, const Lengths& lengths)
      : host(std::move(values)), memory(std::size_t(lengths.batch == Batch::packed ? lengths.starts.back() : host.B * host.rows) *
                                        host.heads * (host.D + kGap) * bytes_of(dtype)) {
    const std::int64_t head = host.D + kGap, row = host.heads * head, batch = lengths.batch == Batch::packed ? 0 : host.rows * row;
    std::vector<unsigned char> bytes(memory.count, 0xFF);
    for (int b = 0; b < host.B; ++b)
      for (int h = 0; h < host.heads; ++h)
        for (int r = 0; r < host.rows; ++r) {
          const std::int64_t first = batch * b + row * ((lengths.batch == Batch::packed ? lengths.starts[b] : 0) + r) + head * h;
          for (int d = 0; d < host.D; ++d) {
            double& x = host.row(b, h, r)[d];
            if (r >= lengths.each[b]) {
              x = 0;
              continue;
            }
            encode(dtype, x, &bytes[(first + d) * bytes_of(dtype)]);
            x = decode(dtype, &bytes[(first + d) * bytes_of(dtype)]);
          }
        }
    CUDA(cudaMemcpy(memory.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    rows = {memory.data, batch, head, row};
  }
};

// ---- checks --------------------------------------------------------------------------------------------------------

int failures = 0, checks = 0;
std::string context;
std::vector<std::string> wanted;

// Is this what the arguments ask for? Parts of names, or with a minus parts of those to leave out.
bool asked_for(const std::string& name) {
  bool any = false, found = false;
  for (const auto& part : wanted) {
    if (part[0] == '-' && name.find(part.substr(1)) != std::string::npos) return false;
    any |= part[0] != '-', found |= part[0] != '-' && name.find(part) != std::string::npos;
  }
  return found || !any;
}
bool begin(const std::string& name) {
  context = name;
  return asked_for(name);
}

void expect(bool right, const std::string& what) {
  ++checks;
  failures += !right;
  std::printf("%s %s: %s\n", right ? "PASS" : "FAIL", context.c_str(), what.c_str());
}

// Relative error of the whole and of the worst element (against the largest one); NaN fails, infinities must agree.
void expect_close(const std::string& what, const std::vector<double>& got, const std::vector<double>& want, double tolerance) {
  double difference = 0, size = 0, worst = 0, largest = 0;
  bool agree = got.size() == want.size();
  for (std::size_t i = 0; agree && i < got.size(); ++i) {
    if (std::isinf(want[i])) {
      agree = got[i] == want[i];
      continue;
    }
    const double off = std::fabs(got[i] - want[i]);
    agree = off < kInf;
    difference += off * off, size += want[i] * want[i];
    worst = std::max(worst, off), largest = std::max(largest, std::fabs(want[i]));
  }
  const double relative = size > 0 ? std::sqrt(difference / size) : std::sqrt(difference), maximum = largest > 0 ? worst / largest : worst;
  char numbers[96];
  std::snprintf(numbers, sizeof numbers, " (relative %.1e, worst %.1e, allowed %.0e)%s", relative, maximum, tolerance, agree ? "" : " NaN or infinite");
  expect(agree && relative <= tolerance && maximum <= 4 * tolerance, what + numbers);
}

std::vector<double> widen(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// [n, parts, size] -> [n, size].
std::vector<double> sum_parts(const Buffer<float>& x, std::size_t parts, std::size_t size) {
  std::vector<double> sums(x.count / parts);
  const auto all = x.get();
  for (std::size_t i = 0; i < all.size(); ++i) sums[i / (parts * size) * size + i % size] += all[i];
  return sums;
}

// ---- the problems --------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  Dtype dtype;
  int B, H, Hkv, N, L, M, K, s, D;
  bool shared = true;
  Batch batch = Batch::full;
  bool integers = false;      // small integers: every score is exact, ties abound, selections have one right answer
  Windows windows = {0, 0, 0, 0, 0};  // zeros: one dimension
  double noise = 1;                   // of the keys around 1: nearly equal keys leave of dq what other sums round away
  bool tf32 = false;
};

const Case kCases[] = {
    {"plain", Dtype::bf16, 2, 2, 2, 150, 150, 20, 24, 1, 64},
    {"fp16_wide_heads", Dtype::fp16, 1, 2, 2, 133, 133, 17, 40, 1, 128},
    {"fp32", Dtype::fp32, 1, 2, 2, 101, 101, 9, 16, 1, 64},
    {"fp32_wide_heads", Dtype::fp32, 1, 1, 1, 70, 75, 18, 33, 1, 96},
    {"grouped_query_heads", Dtype::bf16, 2, 6, 2, 90, 90, 16, 16, 1, 40},
    {"cross_attention", Dtype::bf16, 1, 2, 1, 50, 210, 12, 48, 1, 64},
    {"grid_with_prefix", Dtype::bf16, 1, 3, 3, 101, 101, 12, 20, 1, 64, true, Batch::full, false, {3, 4, 10, 10, 1}},
    {"nine_chunks", Dtype::bf16, 1, 2, 2, 77, 77, 10, 12, 1, 72},
    {"fp32_narrow_heads", Dtype::fp32, 1, 2, 1, 45, 60, 8, 12, 1, 24},
    {"compress_only", Dtype::bf16, 1, 2, 2, 100, 80, 16, 8, 0, 64},
    {"two_routes", Dtype::bf16, 2, 2, 1, 120, 110, 14, 20, 2, 64},
    {"two_routes_fp32", Dtype::fp32, 1, 2, 2, 60, 60, 7, 9, 2, 32},
    {"route_only", Dtype::fp16, 1, 2, 2, 90, 90, 11, 30, 1, 64, false},
    {"topk_equals_keys", Dtype::bf16, 1, 2, 2, 64, 37, 8, 37, 1, 64},
    {"topk_exceeds_keys_by_length", Dtype::bf16, 3, 2, 1, 80, 60, 9, 50, 1, 64, true, Batch::padded},
    {"more_landmarks_than_queries", Dtype::bf16, 1, 2, 2, 13, 40, 130, 8, 1, 64},
    {"one_query_one_key", Dtype::bf16, 2, 1, 1, 1, 1, 1, 1, 1, 8},
    {"one_landmark", Dtype::fp16, 1, 2, 2, 200, 200, 1, 70, 1, 64},
    {"ties", Dtype::bf16, 1, 2, 2, 140, 140, 16, 24, 2, 16, true, Batch::full, true},
    {"ties_fp32", Dtype::fp32, 1, 1, 1, 90, 300, 12, 100, 1, 16, true, Batch::full, true},
    {"padded", Dtype::bf16, 3, 2, 2, 150, 130, 20, 24, 1, 64, true, Batch::padded},
    {"packed", Dtype::bf16, 3, 4, 2, 150, 130, 20, 24, 1, 64, true, Batch::packed},
    {"packed_two_routes_fp32", Dtype::fp32, 3, 2, 1, 70, 80, 6, 10, 2, 32, true, Batch::packed},
    {"long_sequence", Dtype::bf16, 1, 1, 1, 2500, 3000, 65, 64, 1, 64},
    {"few_queries_of_an_expert", Dtype::fp16, 1, 4, 2, 1025, 700, 60, 64, 1, 64},
    {"half_heads_two_at_a_time", Dtype::bf16, 1, 2, 2, 1291, 200, 30, 20, 1, 64, true, Batch::full, false, {5, 6, 30, 43, 1}},
    {"half_heads_of_16_warps", Dtype::bf16, 2, 67, 67, 1180, 60, 12, 8, 1, 16, true, Batch::full, false, {3, 4, 28, 42, 4}},
    {"many_queries_of_an_expert", Dtype::fp16, 2, 2, 1, 700, 90, 3, 40, 1, 40, true, Batch::padded},
    {"many_tokens", Dtype::bf16, 2, 8, 2, 4500, 100, 20, 8, 1, 64},
    {"many_tokens_fp16", Dtype::fp16, 1, 16, 16, 4710, 64, 71, 8, 1, 40, true, Batch::full, false, {1, 71, 1, 4600, 3}},
    // more blocks of specialists than multiprocessors
    {"many_heads", Dtype::bf16, 15, 10, 5, 90, 110, 16, 20, 1, 64, true, Batch::padded},
    {"many_heads_few_landmarks", Dtype::fp16, 15, 10, 10, 100, 60, 2, 24, 1, 64, true, Batch::packed},
    // whole warpgroups in every stage
    {"many_queries", Dtype::bf16, 1, 2, 1, 1500, 300, 5, 100, 1, 128},
    {"many_queries_fp16", Dtype::fp16, 1, 1, 1, 700, 200, 3, 70, 1, 64},
    {"many_landmarks", Dtype::fp16, 1, 2, 1, 300, 400, 100, 64, 1, 128},
    {"many_queries_two_routes", Dtype::bf16, 3, 2, 1, 500, 150, 6, 60, 2, 72, true, Batch::padded},
    {"many_units", Dtype::bf16, 3, 4, 2, 500, 300, 130, 140, 1, 128, true, Batch::packed},
    {"many_units_two_routes", Dtype::fp16, 3, 2, 2, 300, 200, 70, 100, 2, 72, true, Batch::padded},
    {"many_units_compress_only", Dtype::bf16, 1, 4, 2, 200, 300, 200, 8, 0, 104},
    {"many_units_route_only", Dtype::fp16, 2, 2, 1, 700, 150, 3, 150, 1, 128, false},
    {"many_queries_compress_only", Dtype::bf16, 1, 2, 2, 200, 100, 64, 8, 0, 128},
    // two warps for the same rows
    {"wider_heads", Dtype::bf16, 2, 2, 1, 150, 150, 20, 24, 1, 136},
    {"wider_heads_fp16", Dtype::fp16, 1, 2, 2, 133, 140, 17, 40, 1, 200},
    {"wider_heads_fp32", Dtype::fp32, 1, 2, 1, 70, 75, 18, 33, 1, 256},
    {"wider_heads_fp32_padded", Dtype::fp32, 3, 2, 2, 90, 60, 9, 16, 1, 136, true, Batch::padded},
    {"wider_heads_two_routes", Dtype::bf16, 3, 2, 1, 120, 110, 14, 20, 2, 256, true, Batch::packed},
    {"wider_heads_two_routes_fp32", Dtype::fp32, 1, 1, 1, 60, 60, 7, 9, 2, 200},
    {"wider_heads_compress_only", Dtype::bf16, 1, 2, 2, 100, 80, 64, 8, 0, 256},
    {"wider_heads_route_only", Dtype::fp16, 1, 2, 2, 90, 90, 11, 30, 1, 192, false},
    {"wider_heads_many_queries", Dtype::bf16, 1, 2, 1, 900, 300, 5, 100, 1, 256},
    {"wider_heads_many_queries_fp32", Dtype::fp32, 1, 1, 1, 300, 150, 3, 70, 1, 256},
    {"wider_heads_many_landmarks", Dtype::fp16, 1, 2, 1, 200, 300, 130, 40, 1, 256},
    {"wider_heads_many_keys", Dtype::bf16, 2, 2, 1, 40, 4200, 70, 33, 1, 256, true, Batch::full},
    {"wider_heads_many_keys_fp32", Dtype::fp32, 1, 1, 1, 40, 4800, 33, 15, 1, 136},
    {"wider_heads_passing_units", Dtype::fp16, 1, 1, 1, 100, 500, 5, 300, 1, 144},
    {"wider_heads_one_of_each", Dtype::fp32, 2, 2, 2, 1, 1, 1, 1, 1, 256},
    {"wider_heads_ties", Dtype::bf16, 1, 1, 1, 90, 140, 16, 24, 2, 160, true, Batch::full, true},
    // experts in the registers of a warp
    {"many_small_experts", Dtype::fp16, 2, 2, 1, 700, 300, 30, 49, 1, 64, true, Batch::padded},
    {"small_experts_many_landmarks", Dtype::bf16, 1, 2, 2, 300, 200, 200, 20, 2, 48},
    {"small_experts_most_landmarks", Dtype::fp16, 1, 2, 1, 400, 150, 192, 64, 1, 64},
    {"small_experts_in_one_tile", Dtype::fp16, 2, 2, 1, 600, 300, 60, 60, 1, 64},
    {"small_experts_in_a_small_tile", Dtype::bf16, 1, 4, 2, 700, 350, 49, 49, 2, 40},
    {"small_experts_most_queries", Dtype::bf16, 1, 2, 1, 1100, 200, 6, 25, 1, 64},
    {"small_experts_most_queries_padded", Dtype::fp16, 3, 2, 2, 540, 150, 6, 60, 1, 56, true, Batch::padded},
    {"small_experts_without_shared", Dtype::bf16, 1, 2, 2, 500, 200, 9, 64, 1, 64, false},
    {"small_experts_many_landmarks_more_keys", Dtype::bf16, 2, 2, 1, 500, 300, 100, 50, 1, 56, true, Batch::padded},
    {"few_landmarks_larger_experts", Dtype::bf16, 2, 2, 2, 200, 333, 20, 100, 1, 96, true, Batch::packed},
    {"few_landmarks_many_experts_of_a_key", Dtype::fp16, 1, 2, 2, 300, 64, 40, 60, 1, 80},
    {"small_experts_of_two_tiles", Dtype::bf16, 2, 4, 2, 500, 400, 40, 100, 1, 64, true, Batch::padded},
    {"small_experts_of_many_tiles", Dtype::fp16, 1, 2, 1, 600, 500, 70, 300, 1, 56, true, Batch::full},
    {"small_experts_of_two_tiles_and_routes", Dtype::bf16, 1, 2, 2, 300, 300, 140, 128, 2, 80, true, Batch::packed},
    {"small_experts_of_three_tiles_without_shared", Dtype::fp16, 2, 2, 2, 200, 200, 33, 130, 1, 128, false},
    {"small_experts_72_columns", Dtype::bf16, 2, 4, 2, 450, 300, 9, 25, 1, 72, true, Batch::padded},
    {"small_experts_80_columns_many_landmarks", Dtype::fp16, 1, 2, 2, 500, 200, 100, 20, 2, 80},
    {"small_experts_88_columns", Dtype::bf16, 2, 2, 1, 500, 350, 49, 49, 1, 88, true, Batch::padded},
    {"small_experts_96_columns_in_one_tile", Dtype::fp16, 1, 2, 1, 600, 300, 60, 60, 2, 96},
    {"small_experts_96_columns_many_landmarks", Dtype::bf16, 1, 2, 2, 300, 200, 130, 40, 1, 96},
    {"small_experts_104_columns", Dtype::fp16, 2, 4, 2, 400, 300, 9, 32, 2, 104},
    {"small_experts_120_columns_many_landmarks", Dtype::bf16, 1, 2, 2, 500, 200, 100, 20, 1, 120},
    {"small_experts_128_columns", Dtype::bf16, 2, 2, 1, 500, 350, 49, 49, 1, 128, true, Batch::padded},
    {"small_experts_128_columns_in_one_tile", Dtype::fp16, 1, 2, 1, 600, 300, 60, 60, 1, 128},
    {"small_experts_128_columns_most_landmarks", Dtype::fp16, 1, 2, 1, 300, 150, 144, 64, 2, 128},
    {"small_experts_128_columns_without_shared", Dtype::bf16, 1, 2, 2, 300, 200, 9, 64, 1, 128, false},
    // whole heads in shared memory
    {"short_images", Dtype::bf16, 3, 2, 2, 197, 197, 25, 25, 1, 64, true, Batch::full, false, {5, 5, 14, 14, 1}},
    {"short_padded", Dtype::fp16, 3, 4, 2, 256, 256, 12, 60, 1, 48, true, Batch::padded},
    {"short_many_landmarks", Dtype::bf16, 3, 2, 1, 90, 60, 70, 40, 1, 64, true, Batch::packed},
    {"short_landmarks_of_few_queries", Dtype::bf16, 2, 2, 1, 3, 40, 200, 5, 1, 64, true, Batch::full},
    {"short_ties", Dtype::bf16, 2, 1, 1, 130, 250, 12, 33, 1, 64, true, Batch::full, true},
    {"short_most", Dtype::fp16, 2, 2, 2, 208, 208, 32, 32, 1, 64, true, Batch::full, false, {4, 8, 14, 14, 2}, 0.05},
    {"short_few_queries", Dtype::bf16, 3, 2, 2, 30, 200, 12, 20, 1, 40, true, Batch::packed},
    {"short_few_keys", Dtype::bf16, 3, 2, 2, 190, 30, 32, 32, 1, 64, true, Batch::padded},
    {"short_given_landmarks", Dtype::fp16, 2, 2, 2, 150, 140, 20, 30, 1, 16, true, Batch::full, true},
    {"short_all_keys", Dtype::bf16, 2, 1, 1, 40, 70, 3, 70, 1, 64, false},
    // whose blocks are alone on a multiprocessor
    {"short_alone_images", Dtype::bf16, 3, 2, 1, 257, 257, 25, 25, 1, 64, true, Batch::full, false, {5, 5, 16, 16, 1}},
    {"short_alone_padded", Dtype::fp16, 3, 2, 2, 330, 448, 9, 32, 1, 48, true, Batch::padded},
    {"short_alone_most", Dtype::bf16, 2, 2, 2, 448, 448, 10, 20, 1, 64, true, Batch::full, false, {2, 5, 16, 28, 0}},
    {"short_alone_ties", Dtype::fp16, 1, 2, 2, 300, 448, 12, 30, 1, 64, true, Batch::full, true},
    {"short_alone_many_units", Dtype::bf16, 17, 2, 1, 320, 300, 50, 49, 1, 64, true, Batch::packed},
    {"short_alone_many_landmarks", Dtype::fp16, 17, 2, 2, 150, 140, 130, 20, 1, 64, true, Batch::full},
    {"short_alone_all_keys", Dtype::bf16, 17, 2, 2, 60, 310, 33, 310, 1, 64, true, Batch::padded},
    {"short_alone_without_shared", Dtype::bf16, 1, 2, 2, 400, 360, 20, 32, 1, 64, false},
    // whose backward pass has no room for all rows at a time
    {"short_long_images", Dtype::bf16, 3, 2, 2, 257, 257, 25, 25, 1, 64, true, Batch::full, false, {5, 5, 16, 16, 1}},
    {"short_long_packed", Dtype::fp16, 4, 2, 2, 288, 288, 32, 32, 1, 64, true, Batch::packed},
    {"short_long_padded", Dtype::bf16, 3, 2, 2, 281, 250, 17, 32, 1, 40, true, Batch::padded},
    {"short_long_few_queries", Dtype::fp16, 2, 2, 2, 30, 300, 8, 32, 1, 64, true, Batch::full},
    {"short_long_few_keys", Dtype::bf16, 2, 2, 2, 300, 20, 9, 8, 1, 64, true, Batch::full, false, {3, 3, 17, 17, 5}},
    {"short_long_ties", Dtype::bf16, 2, 1, 1, 240, 270, 12, 30, 1, 64, true, Batch::full, true},
    // their gradients by masks: many units, and few rows
    {"short_masked_images", Dtype::bf16, 3, 2, 2, 197, 197, 49, 49, 1, 64, true, Batch::full, false, {7, 7, 14, 14, 1}},
    {"short_masked_most", Dtype::fp16, 3, 2, 2, 256, 256, 64, 64, 1, 64, true, Batch::packed},
    {"short_masked_padded", Dtype::bf16, 3, 2, 2, 200, 250, 40, 100, 1, 40, true, Batch::padded},
    {"short_masked_ties", Dtype::bf16, 2, 1, 1, 240, 230, 33, 60, 1, 64, true, Batch::full, true},
    {"short_masked_few_landmarks", Dtype::fp16, 2, 2, 2, 150, 140, 20, 140, 1, 16, true, Batch::full, true},
    {"short_masked_few_queries", Dtype::fp16, 2, 2, 2, 30, 250, 64, 16, 1, 64, true, Batch::full},
    {"short_masked_few_keys", Dtype::bf16, 2, 2, 2, 250, 20, 49, 20, 1, 64, true, Batch::padded},
    {"short_masked_without_shared", Dtype::bf16, 2, 2, 1, 200, 180, 40, 60, 1, 56, false, Batch::packed},
    {"short_masked_wide", Dtype::fp16, 17, 2, 1, 320, 320, 12, 70, 1, 64, true, Batch::padded},
    {"short_masked_long_images", Dtype::bf16, 3, 2, 2, 257, 257, 49, 49, 1, 64, true, Batch::full, false, {7, 7, 16, 16, 1}},
    {"short_masked_long_most", Dtype::fp16, 4, 2, 2, 272, 272, 64, 64, 1, 64, true, Batch::packed},
    {"short_masked_long_padded", Dtype::bf16, 3, 2, 2, 271, 250, 40, 100, 1, 48, true, Batch::padded},
    {"short_masked_long_few_landmarks", Dtype::bf16, 2, 2, 2, 270, 265, 20, 100, 1, 64, true, Batch::full, false, {4, 5, 16, 16, 14}},
    {"short_masked_long_ties", Dtype::bf16, 2, 1, 1, 240, 265, 33, 60, 1, 64, true, Batch::full, true},
    // and of longer heads, or more landmarks, in several kernels
    {"masked_images", Dtype::bf16, 2, 2, 2, 325, 325, 81, 60, 1, 64, true, Batch::full, false, {9, 9, 18, 18, 1}},
    {"masked_packed", Dtype::fp16, 3, 2, 2, 300, 290, 70, 100, 1, 64, true, Batch::packed},
    {"masked_padded", Dtype::bf16, 3, 2, 2, 200, 350, 65, 40, 1, 40, true, Batch::padded},
    {"masked_ties", Dtype::bf16, 2, 1, 1, 240, 230, 100, 60, 1, 64, true, Batch::full, true},
    {"masked_most_landmarks", Dtype::fp16, 1, 2, 2, 300, 280, 256, 90, 1, 64, true, Batch::full},
    {"masked_few_landmarks", Dtype::bf16, 2, 2, 2, 290, 310, 40, 150, 1, 56, true, Batch::packed},
    {"masked_few_queries", Dtype::fp16, 2, 2, 2, 30, 250, 70, 16, 1, 16, true, Batch::full},
    {"masked_few_keys", Dtype::bf16, 2, 2, 2, 250, 20, 80, 20, 1, 64, true, Batch::padded},
    {"masked_long", Dtype::bf16, 1, 1, 1, 1700, 1500, 100, 300, 1, 64, true, Batch::full},
    // more units than shared memory holds
    {"passing_units", Dtype::bf16, 1, 1, 1, 1500, 600, 5, 300, 1, 128},
    {"passing_units_narrow", Dtype::bf16, 1, 1, 1, 900, 700, 3, 400, 2, 64},
    {"passing_units_by_warps", Dtype::bf16, 1, 1, 1, 300, 500, 20, 350, 1, 64},
    {"passing_units_fp32", Dtype::fp32, 1, 1, 1, 200, 300, 6, 200, 1, 64},
    // many pieces of work for one block
    {"many_pieces", Dtype::bf16, 2, 4, 2, 700, 150, 300, 70, 1, 64, true, Batch::padded},
    {"many_pieces_wide_heads", Dtype::fp16, 2, 4, 4, 700, 150, 200, 70, 1, 128},
    {"many_landmarks_of_passing_units", Dtype::bf16, 1, 2, 2, 400, 150, 600, 20, 1, 64},
    {"many_passes", Dtype::bf16, 2, 64, 8, 700, 40, 2, 20, 1, 64},
    // several chunks of queries
    {"many_chunks", Dtype::bf16, 3, 2, 1, 4500, 60, 37, 20, 1, 64, true, Batch::padded},
    {"many_chunks_wide_heads", Dtype::fp16, 2, 1, 1, 4200, 60, 70, 16, 1, 128, true, Batch::packed},
    {"many_chunks_grid", Dtype::bf16, 1, 2, 2, 4161, 60, 20, 16, 1, 40, true, Batch::full, false, {4, 5, 65, 64, 1}},
    // long parts of keys
    {"many_keys", Dtype::bf16, 3, 2, 1, 40, 4500, 60, 40, 1, 64, true, Batch::padded},
    {"many_keys_more_landmarks", Dtype::fp16, 1, 2, 2, 40, 4500, 130, 40, 1, 56},
    {"many_keys_all_scores", Dtype::fp16, 1, 1, 1, 40, 5000, 70, 128, 1, 64},
    {"many_keys_all_scores_wide_heads", Dtype::bf16, 2, 1, 1, 40, 3000, 20, 64, 1, 128, true, Batch::padded},
    {"most_keys", Dtype::bf16, 2, 2, 1, 20, 16500, 60, 20, 1, 64, true, Batch::packed},
    {"most_keys_wide_heads", Dtype::fp16, 1, 1, 1, 20, 16400, 50, 20, 1, 128},
    {"many_keys_wide_heads", Dtype::bf16, 2, 2, 1, 40, 4200, 150, 33, 1, 128, true, Batch::packed},
    {"nearly_equal_keys", Dtype::bf16, 1, 2, 2, 150, 150, 20, 24, 1, 64, true, Batch::full, false, {}, 0.1},
    {"nearly_equal_keys_many_queries", Dtype::bf16, 1, 1, 1, 700, 300, 5, 64, 1, 128, true, Batch::full, false, {}, 0.1},
    {"nearly_equal_keys_two_routes", Dtype::fp16, 1, 1, 1, 200, 300, 7, 40, 2, 64, true, Batch::full, false, {}, 0.1},
    {"nearly_equal_keys_fp32", Dtype::fp32, 1, 1, 1, 80, 90, 5, 40, 1, 64, true, Batch::full, false, {}, 0.1},
    {"tf32", Dtype::fp32, 2, 2, 1, 101, 120, 20, 24, 1, 64, true, Batch::full, false, {}, 1, true},
    {"tf32_narrow_heads", Dtype::fp32, 1, 2, 2, 45, 60, 8, 12, 1, 24, true, Batch::full, false, {}, 1, true},
    {"tf32_wide_heads", Dtype::fp32, 1, 1, 1, 70, 75, 18, 33, 1, 104, true, Batch::full, false, {}, 1, true},
    {"tf32_wider_heads", Dtype::fp32, 1, 2, 1, 70, 75, 18, 33, 1, 200, true, Batch::full, false, {}, 1, true},
    {"tf32_two_routes", Dtype::fp32, 3, 2, 1, 70, 80, 6, 10, 2, 128, true, Batch::packed, false, {}, 1, true},
    {"tf32_many_queries", Dtype::fp32, 1, 1, 1, 400, 150, 3, 70, 1, 256, true, Batch::full, false, {}, 1, true},
    {"tf32_many_keys", Dtype::fp32, 1, 1, 1, 40, 4800, 70, 15, 1, 64, true, Batch::full, false, {}, 1, true},
    {"nearly_equal_keys_wider_heads", Dtype::bf16, 1, 1, 1, 150, 150, 9, 40, 1, 256, true, Batch::full, false, {}, 0.1},
};

// ---- the definition, in double -------------------------------------------------------------------------------------

double dot(const double* a, const double* b, int D) { return std::inner_product(a, a + D, b, 0.0); }
void add(double* to, double factor, const double* x, int D) {
  for (int d = 0; d < D; ++d) to[d] += factor * x[d];
}

// Calls f(m, token) for every token of every pooling window.
void for_each_pooled(const Windows& w, const std::function<void(int, int)>& f) {
  const auto first = [](int i, int size, int tokens) { return i * tokens / size; };
  for (int m = 0; m < w.mh * w.mw; ++m)
    for (int y = first(m / w.mw, w.mh, w.gh); y * w.mh < (m / w.mw + 1) * w.gh; ++y)
      for (int x = first(m % w.mw, w.mw, w.gw); x * w.mw < (m % w.mw + 1) * w.gw; ++x) f(m, w.prefix + y * w.gw + x);
}

// The units (logit scale, key, value) that one row attends to, and what the softmax over them gives: out and lse, or the
// gradients added to dq and, through `grads`, to each unit's key and value.
struct Unit {
  double scale;
  const double *k, *v;
  double *dk, *dv;  // null in the forward
};

double attend(const double* q, const std::vector<Unit>& units, int D, double* out) {
  double maximum = -kInf, sum = 0;
  for (const Unit& u : units) maximum = std::max(maximum, u.scale * dot(q, u.k, D));
  if (units.empty()) return -kInf;
  for (const Unit& u : units) {
    const double p = std::exp(u.scale * dot(q, u.k, D) - maximum);
    sum += p;
    add(out, p, u.v, D);
  }
  for (int d = 0; d < D; ++d) out[d] /= sum;
  return maximum + std::log(sum);
}

// Returns delta = dout . out - dlse.
double attend_backward(const double* q, const std::vector<Unit>& units, int D, const double* dout, double dlse, double* dq) {
  std::vector<double> out(D, 0.0);
  const double lse = attend(q, units, D, out.data()), delta = (units.empty() ? 0 : dot(dout, out.data(), D)) - dlse;
  for (const Unit& u : units) {
    const double p = std::exp(u.scale * dot(q, u.k, D) - lse), ds = p * (dot(dout, u.v, D) - delta);
    add(dq, u.scale * ds, u.k, D);
    add(u.dk, u.scale * ds, q, D);
    add(u.dv, p, dout, D);
  }
  return delta;
}

// Larger score, then lower index; NaN last.
std::vector<int> best(const std::vector<double>& scores, int k) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto rank = [&](int i) { return std::isnan(scores[i]) ? -kInf : scores[i]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::isnan(scores[a]) != std::isnan(scores[b]) ? std::isnan(scores[b]) : rank(a) > rank(b);
  });
  order.resize(std::min<std::size_t>(k, order.size()));
  return order;
}

// ---- one problem through all stages --------------------------------------------------------------------------------

constexpr int kSplits = 3;        // some of them empty on small problems
constexpr int kSegmentRows = 32;  // small, so that experts have several segments

template <class T> std::string bytes(const Buffer<T>& x) {
  const auto host = x.get();
  return std::string(reinterpret_cast<const char*>(host.data()), host.size() * sizeof(T));
}

struct Grouping {
  int tile_rows, chunks, most_tiles, most_segments;  // of a head
  Buffer<std::int32_t> counts, entries, segment_starts;
  Buffer<Work> tiles, segments;
  Buffer<unsigned> taken;
  Grouping(const Problem& x, int tile_rows)
      : tile_rows(tile_rows), chunks(std::max(1, parts_of(x.queries.max_length * x.s, kGroupChunk))), most_tiles(max_tiles(x, tile_rows)),
        most_segments(max_tiles(x, kSegmentRows)), counts(std::size_t(x.B) * x.H * x.M * chunks), entries(std::size_t(x.B) * x.H * x.queries.max_length * x.s),
        segment_starts(x.B * x.H * (x.M + 1)), tiles(std::size_t(x.B) * x.H * most_tiles), segments(std::size_t(x.B) * x.H * most_segments), taken(1) {}
  GroupParams params(const Problem& x, const std::int32_t* experts) const {
    return {x, experts, chunks, counts.data, entries.data, tiles.data, taken.data, segments.data, segment_starts.data, tile_rows, kSegmentRows, false};
  }
  Groups view() const { return {entries.data, tiles.data, taken.data, segments.data, segment_starts.data, tile_rows, kSegmentRows, nullptr, nullptr}; }
  std::string kept() const { return bytes(entries) + bytes(segment_starts) + bytes(segments); }
};

struct KeyLists {
  int most, blocks;  // of a head
  Buffer<std::int32_t> rows;
  Buffer<KeyRange> ranges;
  Buffer<KeyEntry> entries;
  KeyLists(const Problem& x, int most_segments)
      : most(most_segments * x.K), blocks(parts_of(x.keys.max_length, kKeyBlock)), rows(std::size_t(x.B) * x.H * most),
        ranges(std::size_t(x.B) * x.H * blocks),
        entries(std::size_t(x.B) * x.H * most) {}
};

struct RoutedSums {
  struct Sums {
    Buffer<unsigned char> numbers;
    Buffer<float> factors;
    Sums(std::size_t rows, int D, Dtype dtype) : numbers(rows * routed_pitch(D) * bytes_of(dtype)), factors(dtype == Dtype::fp32 ? 0 : rows * parts_of(D, kFactorColumns)) {}
    RoutedRows view() const { return {numbers.data, factors.count ? factors.data : nullptr}; }
  } dk, dv;
  RoutedSums(int BH, const Grouping& grouping, int K, int D, Dtype dtype) : RoutedSums(std::size_t(BH) * grouping.most_segments * K, D, dtype) {}

 private:
  RoutedSums(std::size_t rows, int D, Dtype dtype) : dk(rows, D, dtype), dv(rows, D, dtype) {}
};

std::vector<std::int32_t> lengths_of(Batch batch, int B, int longest, bool longest_first) {
  std::vector<std::int32_t> lengths(B, longest);
  if (batch == Batch::full) return lengths;
  lengths[longest_first ? 1 : 0] = longest / 2 + 1;
  lengths[2] = 0;
  return lengths;
}

double tolerance_of(Dtype dtype, bool tf32) { return dtype == Dtype::bf16 ? 5e-3 : dtype == Dtype::fp16 || tf32 ? 8e-4 : 1e-5; }

void run(const Case& c) {
  if (!begin(c.name)) return;
  const Dtype dtype = c.dtype;
  const int B = c.B, H = c.H, Hkv = c.Hkv, N = c.N, L = c.L, M = c.M, K = std::min(c.K, L), s = c.s, D = c.D, BH = B * H;
  const float scale = 1 / std::sqrt(float(D)), landmark_scale = 0.5f * scale;
  const double rounding = tolerance_of(dtype, false), tolerance = tolerance_of(dtype, c.tf32), gradient_tolerance = 2 * tolerance;
  const double statistics_tolerance = c.tf32 ? tolerance : 1e-5;

  const Lengths queries(c.batch, N, lengths_of(c.batch, B, N, true)), keys(c.batch, L, lengths_of(c.batch, B, L, false));
  const Lengths all_landmarks(Batch::full, M, std::vector<std::int32_t>(B, M));
  std::mt19937_64 generator(std::hash<std::string>{}(c.name));
  const auto random = [&](int heads, int rows, int columns) {
    Host host(B, heads, rows, columns);
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<int> integer(-1, 1);
    for (double& x : host.x) x = c.integers ? integer(generator) : normal(generator);
    return host;
  };
  const auto random_floats = [&](int rows) {
    const Host host = random(H, rows, 1);
    return std::vector<float>(host.x.begin(), host.x.end());
  };
  const Input q(dtype, random(H, N, D), queries), dout(dtype, random(H, N, D), queries);
  Host key_values = random(Hkv, L, D);
  if (c.noise != 1)
    for (double& x : key_values.x) x = 1 + c.noise * x;
  const Input k(dtype, key_values, keys), v(dtype, random(Hkv, L, D), keys);
  const Problem problem{dtype, B, H, Hkv, M, K, s, D, queries.view(), keys.view(), c.tf32};
  const Windows windows = c.windows.mh ? c.windows : Windows{1, M, 1, N, 0};
  const auto windows_of_batch = [&](int b) {
    Windows w = windows;
    if (!c.windows.mh) w.gw = queries.each[b];
    return w;
  };
  const auto each_head = [&](const auto& f) {
    for (int b = 0; b < B; ++b)
      for (int h = 0; h < H; ++h) f(b, h, b * H + h, h / (H / Hkv));
  };
  // Only the rows that there are: what is behind a short sequence may be anything.
  const auto valid = [&](Host host, const Lengths& lengths) {
    for (int b = 0; b < B; ++b)
      for (int h = 0; h < host.heads; ++h)
        for (int r = lengths.each[b]; r < host.rows; ++r) std::fill_n(host.row(b, h, r), host.D, 0.0);
    return host.x;
  };

  // pooling
  const Output pooled(dtype, B, H, M, D);
  RUN(launch_pool({problem, windows, q.rows, pooled.memory.data}, 0));
  Host want_pooled(B, H, M, D);
  each_head([&](int b, int h, int, int) {
    const Windows w = windows_of_batch(b);
    if (w.gw == 0) return;
    std::vector<int> tokens(M, 0);
    for_each_pooled(w, [&](int m, int) { ++tokens[m]; });
    for_each_pooled(w, [&](int m, int n) { add(want_pooled.row(b, h, m), 1.0 / tokens[m], q.host.row(b, h, n), D); });
  });
  expect_close("pool", pooled.get().x, want_pooled.x, rounding);

  // Integer problems get integer landmarks, so that all their scores are exact.
  const Input given(dtype, random(H, M, D), all_landmarks);
  const Host z = c.integers ? given.host : pooled.get();
  const Rows z_rows = c.integers ? given.rows : pooled.view();

  // landmark scores, compressed values, lse
  const int group = group_keys(L, K, D), pitch = static_cast<int>(score_pitch(L, group));
  Buffer<float> scores(std::size_t(BH) * M * pitch), partial_values(std::size_t(BH) * kSplits * M * D), partial_state(std::size_t(BH) * kSplits * M * 2);
  Buffer<std::int32_t> indices(std::size_t(BH) * M * K);
  Buffer<float> landmark_lse(std::size_t(BH) * M);
  const Output compressed(dtype, B, H, M, D);
  const bool halves = stores_halves(problem);
  const LandmarkParams landmark{problem, scale, z_rows, k.rows, v.rows, kSplits, group, halves, pitch, scores.data, partial_values.data, partial_state.data,
                                indices.data, compressed.memory.data, landmark_lse.data};
  RUN(launch_landmark_scores(landmark, 0));
  const auto got_scores = scores.get();
  const auto stored_score = [&](std::size_t row, int key) -> double {
    if (!halves) return got_scores[row * pitch + key / group * (group > 1 ? 2 : 1)];
    __half logit;
    std::memcpy(&logit, reinterpret_cast<const __half*>(&got_scores[row * pitch]) + key, sizeof logit);
    return static_cast<float>(logit) / std::fabs(scale);
  };
  if (!combines_with_topk(landmark)) RUN(launch_landmark_combine(landmark, 0));
  RUN(launch_landmark_topk(landmark, 0));
  std::vector<double> want_scores, seen_scores;
  Host want_compressed(B, H, M, D);
  std::vector<double> want_landmark_lse(std::size_t(BH) * M);
  const auto landmark_units = [&](int b, int g, Host* dk, Host* dv) {
    std::vector<Unit> units;
    for (int j = 0; j < keys.each[b]; ++j)
      units.push_back({scale, k.host.row(b, g, j), v.host.row(b, g, j), dk ? dk->row(b, g, j) : nullptr, dv ? dv->row(b, g, j) : nullptr});
    return units;
  };
  each_head([&](int b, int h, int bh, int g) {
    const auto units = landmark_units(b, g, nullptr, nullptr);
    for (int m = 0; m < M; ++m) {
      for (int j = 0; j < keys.each[b]; ++j) {  // a group leaves one score, the largest
        const double score = dot(z.row(b, h, m), k.host.row(b, g, j), D);
        if (j % group == 0) want_scores.push_back(score), seen_scores.push_back(stored_score(std::size_t(bh) * M + m, j));
        want_scores.back() = std::max(want_scores.back(), score);
      }
      want_landmark_lse[std::size_t(bh) * M + m] = attend(z.row(b, h, m), units, D, want_compressed.row(b, h, m));
    }
  });
  if (halves) expect_close("landmark scores, in fp16", seen_scores, want_scores, 6e-4);
  else expect_close("landmark scores, full fp32", seen_scores, want_scores, c.integers ? 0 : 2e-6);
  expect_close("compressed values", compressed.get().x, want_compressed.x, tolerance);
  expect_close("landmark lse", widen(landmark_lse.get()), want_landmark_lse, 1e-5);

  // top-K: exactly, by the scores that are there in full, or where scores are exact; else up to their rounding
  const auto chosen_keys = indices.get();
  const bool stored_whole = group == 1 && !halves, exactly = c.integers || stored_whole;
  bool right_keys = true;
  each_head([&](int b, int h, int bh, int g) {
    for (int m = 0; m < M; ++m) {
      std::vector<double> row;
      for (int j = 0; j < keys.each[b]; ++j)
        row.push_back(stored_whole ? stored_score(std::size_t(bh) * M + m, j) : dot(z.row(b, h, m), k.host.row(b, g, j), D));
      auto order = best(row, K);
      const double least = order.empty() ? 0 : row[order.back()];
      std::sort(order.begin(), order.end());
      order.resize(K, -1);
      const auto got = chosen_keys.begin() + (std::size_t(bh) * M + m) * K;
      for (int i = 0; i < K; ++i) {
        right_keys &= (got[i] < 0) == (order[i] < 0) && got[i] < keys.each[b] && (i == 0 || got[i] < 0 || got[i - 1] < got[i]);
        right_keys &= right_keys && (exactly ? got[i] == order[i] : got[i] < 0 || row[got[i]] >= least - 1e-5 * (1 + std::fabs(least)));
      }
    }
  });
  expect(right_keys, exactly ? "top-K indices, exactly" : "top-K indices, up to fp32 rounding");

  // routing
  Buffer<std::int32_t> experts(std::size_t(BH) * N * s);
  if (s) {
    RUN(launch_route({problem, q.rows, z_rows, experts.data}, 0));
    const auto routed = experts.get();
    bool right = true;
    each_head([&](int b, int h, int bh, int) {
      for (int n = 0; n < queries.each[b]; ++n) {
        std::vector<double> logits(M);
        double size = 0;
        for (int m = 0; m < M; ++m) {
          logits[m] = dot(q.host.row(b, h, n), z.row(b, h, m), D);
          size = std::max(size, std::fabs(logits[m]));
        }
        const auto order = best(logits, s);
        std::vector<int> got(&routed[(std::size_t(bh) * N + n) * s], &routed[(std::size_t(bh) * N + n) * s] + s);
        for (int i = 0; i < s; ++i) {
          right &= got[i] >= 0 && got[i] < M && std::count(got.begin(), got.end(), got[i]) == 1;
          right &= right && (c.integers ? got[i] == order[i] : logits[order[i]] - logits[got[i]] <= 1e-5 * (1 + size));
        }
      }
    });
    expect(right, c.integers ? "experts, exactly" : "experts, up to fp32 rounding");
  }
  const auto routed = experts.get();
  if (!c.integers && fits_pool_route(problem, windows)) {
    const Output landmarks(dtype, B, H, M, D);
    Buffer<std::int32_t> its_experts(routed.size());
    const int chunks = parts_of(N, kGroupChunk);
    Buffer<std::int32_t> counts(std::size_t(BH) * M * chunks);
    Buffer<float> memory(pool_route_bytes(problem) / sizeof(float));
    RUN(launch_pool_route({problem, windows, q.rows, memory.data, landmarks.memory.data, its_experts.data, counts.data}, 0));
    expect(landmarks.memory.get() == pooled.memory.get(), "one pass: landmarks, bit for bit");
    expect(its_experts.get() == routed, "one pass: experts");
    std::vector<std::int32_t> right(counts.count);
    for (int bh = 0; bh < BH; ++bh)
      for (int n = 0; n < N; ++n) ++right[(std::size_t(bh) * M + routed[std::size_t(bh) * N + n]) * chunks + n / kGroupChunk];
    expect(counts.get() == right, "one pass: queries of every expert in every chunk");
  }

  // grouping of the queries by expert: one list of tiles for the forward, one for the backward
  const int per_expert = std::max(1, N * s / M);
  const Grouping grouping(problem, attention_tile_rows(problem, per_expert)), backward_grouping(problem, row_gradient_tile_rows(problem, per_expert));
  for (const Grouping* g : {&grouping, &backward_grouping}) {
    if (s == 0) break;
    RUN(launch_group(g->params(problem, experts.data), 0));
    const auto entries = g->entries.get(), segment_starts = g->segment_starts.get();
    const auto tiles = g->tiles.get(), segments = g->segments.get();
    bool right = true;
    each_head([&](int b, int, int bh, int) {
      const auto is_work = [](const Work& work, int place, int m, int first, int count) {
        return work.entries == count && (count == 0 || (work.expert == m && work.first == first && work.place == place));
      };
      int entry = 0, tile = 0, segment = 0;
      for (int m = 0; m < M; ++m) {
        right &= segment_starts[std::size_t(bh) * (M + 1) + m] == segment;
        const int before = entry;
        for (int i = 0; i < queries.each[b] * s; ++i)
          if (routed[std::size_t(bh) * N * s + i] == m) right &= entries[std::size_t(bh) * N * s + entry++] == i;
        for (int first = before; first < entry; first += g->tile_rows)
          right &= is_work(tiles[std::size_t(bh) * g->most_tiles + tile], tile, m, first, std::min(g->tile_rows, entry - first)), ++tile;
        for (int first = before; first < entry; first += kSegmentRows)
          right &= is_work(segments[std::size_t(bh) * g->most_segments + segment], segment, m, first, std::min(kSegmentRows, entry - first)), ++segment;
      }
      right &= segment_starts[std::size_t(bh) * (M + 1) + M] == segment && tile <= g->most_tiles && segment <= g->most_segments;
      for (; tile < g->most_tiles; ++tile) right &= is_work(tiles[std::size_t(bh) * g->most_tiles + tile], 0, 0, 0, 0);
      for (; segment < g->most_segments; ++segment) right &= is_work(segments[std::size_t(bh) * g->most_segments + segment], 0, 0, 0, 0);
    });
    expect(right, "queries grouped by expert, in order, tiles of " + std::to_string(g->tile_rows));
    if (!c.integers && fits_pool_route_group(problem, windows) && asked_for(context + " pool_route_group")) {
      const Output landmarks(dtype, B, H, M, D);
      Buffer<std::int32_t> its_experts(routed.size());
      const Grouping its(problem, g->tile_rows);
      RUN(launch_pool_route_group({its.params(problem, its_experts.data), windows, q.rows, landmarks.memory.data, its_experts.data}, 0));
      expect(landmarks.memory.get() == pooled.memory.get(), "one pass with groups: landmarks, bit for bit");
      expect(its_experts.get() == routed, "one pass with groups: experts");
      expect(its.kept() == g->kept() && bytes(its.tiles) + bytes(its.taken) == bytes(g->tiles) + bytes(g->taken), "one pass with groups: groups");
    }
    GroupParams by_passes = g->params(problem, experts.data);
    by_passes.pass_rows = parts_of(g->tile_rows, kMaxSmallTile) * kSmallPassRows;
    RUN(launch_group(by_passes, 0));
    const auto sorted = g->tiles.get();
    for (int bh = 0; bh < BH; ++bh) {
      const auto of_head = tiles.begin() + std::size_t(bh) * g->most_tiles, its = sorted.begin() + std::size_t(bh) * g->most_tiles;
      std::vector<Work> want(of_head, of_head + g->most_tiles);
      std::stable_sort(want.begin(), want.end(), [&](const Work& a, const Work& b) { return parts_of(a.entries, by_passes.pass_rows) > parts_of(b.entries, by_passes.pass_rows); });
      for (int i = 0; i < g->most_tiles; ++i) want[i].place = want[i].entries ? i : 0;
      right &= std::memcmp(want.data(), &*its, want.size() * sizeof(Work)) == 0;
    }
    expect(right, "tiles of most passes first");
    if (g == &grouping) continue;
    CUDA(cudaMemset(g->tiles.data, 0xFF, g->tiles.count * sizeof(Work)));
    RUN(launch_group(g->params(problem, nullptr), 0));
    const auto again = g->tiles.get();
    expect(std::equal(tiles.begin(), tiles.end(), again.begin(), [](const Work& a, const Work& b) { return std::memcmp(&a, &b, sizeof(Work)) == 0; }), "tiles of known groups");
  }

  // what queries will leave for the keys of their experts, sorted by key
  const KeyLists lists(problem, backward_grouping.most_segments);
  Groups with_keys = backward_grouping.view();
  if (s) {
    with_keys.key_ranges = lists.ranges.data, with_keys.key_entries = lists.entries.data;
    RUN(launch_key_lists({problem, indices.data, backward_grouping.view(), lists.rows.data, lists.ranges.data, lists.entries.data}, 0));
    const auto segment_starts = backward_grouping.segment_starts.get();
    const auto ranges = lists.ranges.get();
    const auto entries = lists.entries.get();
    bool right = true;
    each_head([&](int, int, int bh, int) {
      std::vector<std::vector<int>> rows(L);
      for (int m = 0; m < M; ++m)
        for (int slot = 0; slot < K; ++slot)
          if (const int key = chosen_keys[(std::size_t(bh) * M + m) * K + slot]; key >= 0)
            for (int segment = segment_starts[std::size_t(bh) * (M + 1) + m]; segment < segment_starts[std::size_t(bh) * (M + 1) + m + 1]; ++segment) rows[key].push_back(segment * K + slot);
      int at = 0;
      for (int block = 0; block < lists.blocks; ++block) {
        const KeyRange range = ranges[std::size_t(bh) * lists.blocks + block];
        right &= range.first == at;
        for (int key = 0; key < kKeyBlock && block * kKeyBlock + key < L; ++key)
          for (const int row : rows[block * kKeyBlock + key]) {
            const KeyEntry& entry = entries[std::size_t(bh) * lists.most + std::min(at++, lists.most - 1)];
            right &= entry.key == key && entry.row == row;
          }
        right &= range.last == at;
      }
    });
    expect(right, "routed sums sorted by key, in order");
  }

  // attention
  const Output out(dtype, B, H, N, D, &queries);
  Buffer<float> lse(std::size_t(BH) * N), partial_out(s > 1 ? std::size_t(BH) * N * s * D : 0), partial_lse(s > 1 ? std::size_t(BH) * N * s : 0);
  const Units attended{c.shared, z_rows, compressed.view(), k.rows, v.rows, indices.data};
  RUN(launch_expert_attention({problem, scale, landmark_scale, q.rows, attended, grouping.view(), partial_out.data, partial_lse.data, out.view(),
                               lse.data}, 0));
  const Host values = compressed.get();
  Host want_out(B, H, N, D), want_lse(B, H, N, 1);
  struct Gradients {
    Host shared_k, shared_v, routed_k, routed_v;
  };
  const auto query_units = [&](int b, int h, int n, Gradients* to) {
    const int g = h / (H / Hkv), bh = b * H + h;
    std::vector<Unit> units;
    if (c.shared)
      for (int m = 0; m < M; ++m)
        units.push_back({landmark_scale, z.row(b, h, m), values.row(b, h, m), to ? to->shared_k.row(b, h, m) : nullptr, to ? to->shared_v.row(b, h, m) : nullptr});
    for (int i = 0; i < s; ++i) {
      const int e = routed[(std::size_t(bh) * N + n) * s + i];
      for (int slot = 0; slot < K; ++slot)
        if (const int j = chosen_keys[(std::size_t(bh) * M + e) * K + slot]; j >= 0)
          units.push_back({scale, k.host.row(b, g, j), v.host.row(b, g, j), to ? to->routed_k.row(b, g, j) : nullptr, to ? to->routed_v.row(b, g, j) : nullptr});
    }
    return units;
  };
  each_head([&](int b, int h, int, int) {
    for (int n = 0; n < queries.each[b]; ++n)
      *want_lse.row(b, h, n) = attend(q.host.row(b, h, n), query_units(b, h, n, nullptr), D, want_out.row(b, h, n));
  });
  expect_close("out", valid(out.get(), queries), want_out.x, tolerance);
  const Host got_lse(B, H, N, 1, widen(lse.get()));
  expect_close("lse", valid(got_lse, queries), want_lse.x, statistics_tolerance);

  // all of that in one kernel
  if (fits_short_attention(problem, c.shared)) {
    const Output landmarks(dtype, B, H, M, D), values(dtype, B, H, M, D), short_out(dtype, B, H, N, D, &queries);
    Buffer<std::int32_t> keys_too(indices.count), experts_too(experts.count);
    Buffer<float> landmark_lse_too(landmark_lse.count), lse_too(lse.count);
    const Grouping groups_too(problem, grouping.tile_rows);
    RUN(launch_short_attention({problem, windows, !c.integers, c.shared, scale, landmark_scale, q.rows, k.rows, v.rows, c.integers ? given.rows : landmarks.view(),
                                values.view(), landmark_lse_too.data, keys_too.data, experts_too.data, short_out.view(), lse_too.data,
                                groups_too.params(problem, nullptr)}, 0));
    if (!c.integers) expect(landmarks.memory.get() == pooled.memory.get(), "one kernel: landmarks, bit for bit");
    expect(keys_too.get() == chosen_keys, "one kernel: indices, exactly");
    expect(experts_too.get() == routed, "one kernel: experts, exactly");
    expect(groups_too.kept() == grouping.kept(), "one kernel: queries grouped by expert");
    expect_close("one kernel: compressed values", values.get().x, want_compressed.x, tolerance);
    expect_close("one kernel: landmark lse", widen(landmark_lse_too.get()), want_landmark_lse, 1e-5);
    expect_close("one kernel: out", valid(short_out.get(), queries), want_out.x, tolerance);
    expect_close("one kernel: lse", valid(Host(B, H, N, 1, widen(lse_too.get())), queries), want_lse.x, 1e-5);
  }

  // ---- backward
  const Buffer<float> dlse(random_floats(N)), dlandmark_lse(random_floats(M));
  Buffer<float> delta(std::size_t(BH) * N);
  const Host got_out(B, H, N, D, valid(out.get(), queries));
  RUN(launch_delta({dtype, B, H, D, queries.view(), dout.rows, out.view(), dlse.data, delta.data}, 0));
  Host want_delta(B, H, N, 1);
  const auto dlse_host = dlse.get();
  each_head([&](int b, int h, int bh, int) {
    for (int n = 0; n < queries.each[b]; ++n)
      *want_delta.row(b, h, n) = dot(dout.host.row(b, h, n), got_out.row(b, h, n), D) - dlse_host[std::size_t(bh) * N + n];
  });
  expect_close("delta", valid(Host(B, H, N, 1, widen(delta.get())), queries), want_delta.x, 1e-5);

  Gradients want{Host(B, H, M, D), Host(B, H, M, D), Host(B, Hkv, L, D), Host(B, Hkv, L, D)};
  Host want_dq(B, H, N, D);
  each_head([&](int b, int h, int bh, int) {
    for (int n = 0; n < queries.each[b]; ++n)
      *want_delta.row(b, h, n) = attend_backward(q.host.row(b, h, n), query_units(b, h, n, &want), D, dout.host.row(b, h, n), dlse_host[std::size_t(bh) * N + n],
                                                 want_dq.row(b, h, n));
  });

  // all of the backward pass in one kernel
  if (fits_short_gradient(problem, c.shared, scale, landmark_scale)) {
    Gradients whole = want;
    Host whole_dq = want_dq;
    each_head([&](int b, int h, int, int g) {
      for (int m = 0; m < M; ++m)
        attend_backward(z.row(b, h, m), landmark_units(b, g, &whole.routed_k, &whole.routed_v), D, want.shared_v.row(b, h, m), 0, whole.shared_k.row(b, h, m));
      const Windows w = windows_of_batch(b);
      if (c.integers || w.gw == 0) return;
      std::vector<int> tokens(M, 0);
      for_each_pooled(w, [&](int m, int) { ++tokens[m]; });
      for_each_pooled(w, [&](int m, int n) { add(whole_dq.row(b, h, n), 1.0 / tokens[m], whole.shared_k.row(b, h, m), D); });
    });
    const Output dq(dtype, B, H, N, D, &queries), dk(dtype, B, Hkv, L, D, &keys), dv(dtype, B, Hkv, L, D, &keys), dlandmarks(dtype, B, H, M, D);
    RUN(launch_short_gradient({{problem, windows, !c.integers, c.shared, scale, landmark_scale, q.rows, k.rows, v.rows, z_rows, compressed.view(), landmark_lse.data,
                                indices.data, experts.data, {}, lse.data}, dout.rows, dlse.data, dq.view(), dk.view(), dv.view(), dlandmarks.view()}, 0));
    expect_close("one kernel: dq", valid(dq.get(), queries), whole_dq.x, gradient_tolerance);
    expect_close("one kernel: dk", valid(dk.get(), keys), whole.routed_k.x, gradient_tolerance);
    expect_close("one kernel: dv", valid(dv.get(), keys), whole.routed_v.x, gradient_tolerance);
    if (c.integers) expect_close("one kernel: dlandmarks", dlandmarks.get().x, whole.shared_k.x, gradient_tolerance);
  }

  // queries and units in one pass
  if (fits_specialist_gradient(problem, c.shared, scale, landmark_scale)) {
    const std::size_t shared_rows = std::size_t(BH) * kSplits * M * D;
    Buffer<float> shared_dk(shared_rows), shared_dv(shared_rows);
    const RoutedSums routed_sums(BH, backward_grouping, K, D, dtype);
    const Output dq(dtype, B, H, N, D, &queries), dk(dtype, B, Hkv, L, D, &keys), dv(dtype, B, Hkv, L, D, &keys);
    RUN(launch_specialist_gradient({problem, scale, landmark_scale, q.rows, dout.rows, lse.data, dlse.data, attended, backward_grouping.view(), kSplits, shared_dk.data,
                                    shared_dv.data, routed_sums.dk.view(), routed_sums.dv.view(), dq.view()}, 0));
    UnitGradientParams units{};
    units.problem = problem, units.role = UnitRole::compress, units.scale = scale, units.unit_k = k.rows, units.unit_v = v.rows;
    units.groups = with_keys, units.routed_dk = routed_sums.dk.view(), units.routed_dv = routed_sums.dv.view();
    units.dk = dk.view(), units.dv = dv.view();
    RUN(launch_unit_gradient(units, 0));
    expect_close("one pass: dq", valid(dq.get(), queries), want_dq.x, gradient_tolerance);
    expect_close("one pass: landmarks as shared keys", sum_parts(shared_dk, kSplits, M * D), want.shared_k.x, gradient_tolerance);
    expect_close("one pass: compressed values", sum_parts(shared_dv, kSplits, M * D), want.shared_v.x, gradient_tolerance);
    expect_close("one pass: dk of experts", valid(dk.get(), keys), want.routed_k.x, gradient_tolerance);
    expect_close("one pass: dv of experts", valid(dv.get(), keys), want.routed_v.x, gradient_tolerance);
  }

  // gradient of the queries, which makes delta exact (and, in fp32, the rows sum to one)
  const Output dq(dtype, B, H, N, D, &queries);
  Buffer<float> normalizer(std::size_t(BH) * N), landmark_normalizer(std::size_t(BH) * M);
  const auto only_fp32 = [&](const Buffer<float>& x) { return dtype == Dtype::fp32 ? x.data : nullptr; };
  {
    const std::size_t entries = s > 1 ? std::size_t(BH) * N * s : 0;
    Buffer<float> partial(2 * entries * D), partial_sums(3 * entries);
    RowGradientParams p{};
    p.problem = problem, p.role = RowRole::attention, p.scale = scale, p.landmark_scale = landmark_scale, p.units = attended;
    p.q = q.rows, p.dout = dout.rows, p.out = out.view(), p.lse = lse.data, p.dlse = dlse.data, p.delta = delta.data, p.normalizer = only_fp32(normalizer);
    p.groups = backward_grouping.view(), p.partial = partial.data, p.partial_sums = partial_sums.data, p.dq = dq.view();
    RUN(launch_row_gradient(p, 0));
    expect_close("dq", valid(dq.get(), queries), want_dq.x, gradient_tolerance);
    expect_close("delta, exact", valid(Host(B, H, N, 1, widen(delta.get())), queries), want_delta.x, statistics_tolerance);
  }

  // gradients of the shared units, summed over the parts of the query range
  const std::size_t per_landmark = std::size_t(BH) * M * D;
  Buffer<float> shared_dk(kSplits * per_landmark), shared_dv(kSplits * per_landmark);
  const Output dlandmarks_shared(dtype, B, H, M, D), dcompressed(dtype, B, H, M, D), dlandmarks(dtype, B, H, M, D);
  Buffer<float> landmark_delta(std::size_t(BH) * M);
  if (c.shared) {
    UnitGradientParams p{};
    p.problem = problem, p.role = UnitRole::shared, p.scale = landmark_scale, p.splits = kSplits;
    p.unit_k = z_rows, p.unit_v = compressed.view(), p.row_q = q.rows, p.row_dout = dout.rows, p.lse = lse.data, p.delta = delta.data;
    p.normalizer = only_fp32(normalizer), p.partial_dk = shared_dk.data, p.partial_dv = shared_dv.data;
    RUN(launch_unit_gradient(p, 0));
    RUN(launch_reduce({dtype, BH, kSplits, M, D, {shared_dk.data, dlandmarks_shared.memory.data}, {shared_dv.data, dcompressed.memory.data}, H, compressed.view(), landmark_delta.data}, 0));
    expect_close("gradient of the landmarks as shared keys", dlandmarks_shared.get().x, want.shared_k.x, gradient_tolerance);
    expect_close("gradient of the compressed values", dcompressed.get().x, want.shared_v.x, gradient_tolerance);
  }

  // gradients of keys and values: routed pairs, and the dense softmax of the landmarks
  Host want_landmark_delta(B, H, M, 1), want_dz(B, H, M, D);
  if (c.shared) {
    const auto delta_of_sums = landmark_delta.get();
    RUN(launch_delta({dtype, B, H, D, all_landmarks.view(), dcompressed.view(), compressed.view(), dlandmark_lse.data, landmark_delta.data}, 0));
    const auto dlse_of_landmarks = dlandmark_lse.get();
    const Host dvalues = dcompressed.get();
    want_dz.x = sum_parts(shared_dk, kSplits, M * D);
    each_head([&](int b, int h, int bh, int g) {
      for (int m = 0; m < M; ++m) {
        const std::size_t row = std::size_t(bh) * M + m;
        *want_landmark_delta.row(b, h, m) = dot(dvalues.row(b, h, m), values.row(b, h, m), D) - dlse_of_landmarks[row];
      }
    });
    expect_close("delta of the landmarks", widen(landmark_delta.get()), want_landmark_delta.x, 1e-5);
    std::vector<double> without_lse = want_landmark_delta.x;
    for (std::size_t i = 0; i < without_lse.size(); ++i) without_lse[i] += dlse_of_landmarks[i];
    expect_close("delta of the landmarks, with the sums", widen(delta_of_sums), without_lse, 1e-5);
    each_head([&](int b, int h, int bh, int g) {
      for (int m = 0; m < M; ++m)
        *want_landmark_delta.row(b, h, m) = attend_backward(z.row(b, h, m), landmark_units(b, g, &want.routed_k, &want.routed_v), D, dvalues.row(b, h, m),
                                                            dlse_of_landmarks[std::size_t(bh) * M + m], want_dz.row(b, h, m));
    });

    // gradient of the landmarks as queries of the dense softmax
    Buffer<float> partial(2 * kSplits * per_landmark), partial_sums(3 * std::size_t(kSplits) * BH * M);
    RowGradientParams p{};
    p.problem = problem, p.role = RowRole::landmark, p.scale = scale, p.units.k = k.rows, p.units.v = v.rows;
    p.q = z_rows, p.dout = dcompressed.view(), p.lse = landmark_lse.data, p.dlse = dlandmark_lse.data, p.delta = landmark_delta.data;
    p.normalizer = only_fp32(landmark_normalizer);
    p.splits = kSplits, p.partial = partial.data, p.partial_sums = partial_sums.data, p.base = shared_dk.data, p.base_parts = kSplits, p.dq = dlandmarks.view();
    RUN(launch_row_gradient(p, 0));
    expect_close("dlandmarks", dlandmarks.get().x, want_dz.x, gradient_tolerance);
    expect_close("delta of the landmarks, exact", widen(landmark_delta.get()), want_landmark_delta.x, statistics_tolerance);
  }
  UnitGradientParams units{};
  units.problem = problem, units.scale = scale, units.unit_k = k.rows, units.unit_v = v.rows;
  units.indices = s ? indices.data : nullptr, units.groups = with_keys;
  const auto key_gradients = [&](const RoutedSums& routed_sums, const std::string& name) {
    const Output dk(dtype, B, Hkv, L, D, &keys), dv(dtype, B, Hkv, L, D, &keys);
    units.routed_dk = routed_sums.dk.view(), units.routed_dv = routed_sums.dv.view();
    if (s) {
      UnitGradientParams p = units;
      p.role = UnitRole::routed, p.row_q = q.rows, p.row_dout = dout.rows, p.lse = lse.data, p.delta = delta.data, p.normalizer = only_fp32(normalizer);
      RUN(launch_unit_gradient(p, 0));
    }
    units.role = UnitRole::compress, units.landmark_rows = c.shared ? M : 0, units.row_q = z_rows, units.row_dout = dcompressed.view();
    units.lse = landmark_lse.data, units.delta = landmark_delta.data, units.normalizer = only_fp32(landmark_normalizer), units.dk = dk.view(), units.dv = dv.view();
    RUN(launch_unit_gradient(units, 0));
    expect_close("dk" + name, valid(dk.get(), keys), want.routed_k.x, gradient_tolerance);
    expect_close("dv" + name, valid(dv.get(), keys), want.routed_v.x, gradient_tolerance);
  };
  if (s && dtype != Dtype::fp32) key_gradients(RoutedSums(BH, backward_grouping, K, D, Dtype::fp32), ", sums in fp32");
  const RoutedSums routed_sums(BH, backward_grouping, K, D, dtype);
  key_gradients(routed_sums, "");

  // those of queries and keys by masks
  if (c.shared && fits_masked_gradient(problem, scale, landmark_scale)) {
    const Output masked_dq(dtype, B, H, N, D, &queries), masked_dk(dtype, B, H, L, D, &keys), masked_dv(dtype, B, H, L, D, &keys);
    const int pitch = masked_gradient_pitch(problem);
    Buffer<std::uint32_t> masks(std::size_t(BH) * M * pitch);
    Buffer<float> its_delta(delta.count);
    const MaskedGradientParams p{problem, scale, landmark_scale, q.rows, dout.rows, k.rows, v.rows, z_rows, compressed.view(), lse.data, dlse.data, its_delta.data, indices.data,
                                 experts.data, masks.data, pitch, masked_dq.view(), dcompressed.view(), landmark_lse.data, landmark_delta.data, masked_dk.view(), masked_dv.view()};
    RUN(launch_masked_row_gradient(p, 0));
    RUN(launch_masked_key_gradient(p, 0));
    expect_close("by masks: dq", valid(masked_dq.get(), queries), want_dq.x, gradient_tolerance);
    expect_close("by masks: delta", valid(Host(B, H, N, 1, widen(its_delta.get())), queries), want_delta.x, statistics_tolerance);
    expect_close("by masks: dk", valid(masked_dk.get(), keys), want.routed_k.x, gradient_tolerance);
    expect_close("by masks: dv", valid(masked_dv.get(), keys), want.routed_v.x, gradient_tolerance);
  }

  // both gradients of that softmax in one pass over the keys
  if (c.shared && fits_key_specialists(problem)) {
    const Output both_dk(dtype, B, Hkv, L, D, &keys), both_dv(dtype, B, Hkv, L, D, &keys), both_dlandmarks(dtype, B, H, M, D);
    const int blocks = 7, parts = blocks + BH;
    Buffer<float> partial(2 * std::size_t(parts) * M * D), partial_sums(3 * std::size_t(parts) * M);
    RUN(launch_delta({dtype, B, H, D, all_landmarks.view(), dcompressed.view(), compressed.view(), dlandmark_lse.data, landmark_delta.data}, 0));
    KeyGradientParams p{units, {}};
    p.keys.dk = both_dk.view(), p.keys.dv = both_dv.view();
    p.landmarks.problem = problem, p.landmarks.role = RowRole::landmark, p.landmarks.lse = landmark_lse.data, p.landmarks.dlse = dlandmark_lse.data;
    p.landmarks.delta = landmark_delta.data, p.landmarks.share = parts_of(BH * parts_of(L, kKeyBlock), blocks), p.landmarks.partial = partial.data, p.landmarks.partial_sums = partial_sums.data;
    p.landmarks.base = shared_dk.data, p.landmarks.base_parts = kSplits, p.landmarks.dq = both_dlandmarks.view();
    RUN(launch_key_specialists(p, 0));
    RUN(launch_row_finish(p.landmarks, 0));
    expect_close("one pass: dk", valid(both_dk.get(), keys), want.routed_k.x, gradient_tolerance);
    expect_close("one pass: dv", valid(both_dv.get(), keys), want.routed_v.x, gradient_tolerance);
    expect_close("one pass: dlandmarks", both_dlandmarks.get().x, want_dz.x, gradient_tolerance);
  }

  // what the queries receive as parts of pooled landmarks, alone and added to dq
  if (!c.shared) return;
  for (const bool add : {false, true}) {
    const Output alone(dtype, B, H, N, D, &queries);
    const Output& target = add ? dq : alone;
    Host want_pooled_dq = add ? dq.get() : Host(B, H, N, D), from = dlandmarks.get();
    each_head([&](int b, int h, int, int) {
      const Windows w = windows_of_batch(b);
      if (w.gw == 0) return;
      std::vector<int> tokens(M, 0);
      for_each_pooled(w, [&](int m, int) { ++tokens[m]; });
      for_each_pooled(w, [&](int m, int n) { ::add(want_pooled_dq.row(b, h, n), 1.0 / tokens[m], from.row(b, h, m), D); });
    });
    RUN(launch_pool_backward({problem, windows, dlandmarks.view(), add, false, target.view()}, 0));
    expect_close(add ? "pool backward, added" : "pool backward", valid(target.get(), queries), valid(want_pooled_dq, queries), rounding);
  }
}

// ---- top-K on rows that no product would make ----------------------------------------------------------------------

// Scores of any kind: a landmark (1, 1, ...) and keys (score, 0, ...), one batch element for each of one or three rows. Of 16 bits, the three first columns of a
// key have the bits of its score.
void run_topk(const char* name, int L, int K, int group, const std::function<float(int row, int key)>& score, Dtype dtype = Dtype::fp32) {
  if (!begin(std::string("topk ") + name + " L=" + std::to_string(L) + " K=" + std::to_string(K) + " group=" + std::to_string(group) + (dtype == Dtype::fp32 ? "" : " bf16"))) return;
  const int D = dtype == Dtype::fp32 ? 8 : 64;  // 64: few keys do not make groups of them
  const int B = L > 5001 ? 1 : 3, splits = parts_of(L, 2048);  // long rows take the sanitizers minutes
  const std::size_t bytes = bytes_of(dtype);
  std::vector<unsigned char> host(std::size_t(B) * L * D * bytes, 0), ones(B * D * bytes);
  for (int i = 0; i < B * D; ++i) encode(dtype, 1, &ones[i * bytes]);
  for (int b = 0; b < B; ++b)
    for (int j = 0; j < L; ++j) {
      double rest = score(b, j);
      for (int d = 0; d < 3 && (d == 0 || (std::isfinite(rest) && rest != 0)); ++d) {
        unsigned char* const to = &host[((std::size_t(b) * L + j) * D + d) * bytes];
        encode(dtype, rest, to), rest -= decode(dtype, to);
      }
    }
  const Buffer<unsigned char> keys(host), landmark(ones);
  const std::int64_t pitch = score_pitch(L, group);
  Buffer<float> scores(B * pitch), values(B * splits * D), state(B * splits * 2), compressed(B * D), lse(B);
  Buffer<std::int32_t> indices(std::size_t(B) * K);
  const auto rows = [&](const Buffer<unsigned char>& x, int count) { return Rows{x.data, std::int64_t(count) * D, std::int64_t(count) * D, D}; };
  const Problem problem{dtype, B, 1, 1, 1, K, 1, D, {L, nullptr, nullptr}, {L, nullptr, nullptr}};
  const bool halves = group == 1 && stores_halves(problem);
  if (dtype != Dtype::fp32) expect(halves, "scores in fp16");
  const LandmarkParams p{problem, 1.0f, rows(landmark, 1), rows(keys, L), rows(keys, L), splits, group, halves, pitch,
                         scores.data, values.data, state.data, indices.data, compressed.data, lse.data};
  RUN(launch_landmark_scores(p, 0));
  if (!combines_with_topk(p)) RUN(launch_landmark_combine(p, 0));
  RUN(launch_landmark_topk(p, 0));
  std::vector<std::int32_t> want;
  for (int b = 0; b < B; ++b) {
    std::vector<double> row(L);
    for (int j = 0; j < L; ++j) row[j] = score(b, j);
    auto order = best(row, K);
    std::sort(order.begin(), order.end());
    want.insert(want.end(), order.begin(), order.end());
  }
  expect(indices.get() == want, "indices, exactly");
}

void run_topk_rows(int group) {
  const int sizes[][2] = {{40, 7}, {256, 256}, {257, 31}, {700, 20}, {1025, 64}, {1601, 49}, {2048, 2048}, {2049, 64}, {5001, 2048}, {16384, 64}, {16385, 33}, {33000, 100}, {65536, 128}, {20000, 700}, {40000, 2048}, {200001, 128}};
  for (const auto& size : sizes) {
    const int L = size[0], K = size[1];
    if (L <= kShortKeys && group > 1) continue;
    const auto noise = [](int m, int j) {
      std::uint32_t x = (j + 1) * 2654435761u ^ (m + 1) * 40503u;
      x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
      return static_cast<float>(static_cast<std::int32_t>(x)) * 0x1p-31f;
    };
    if (group == 1 && L > kShortKeys && L <= kWarpScores)
      for (const float factor : {1.0f, 0x1p-20f, 0x1p20f}) {  // what fp16 has, or has not, and what it makes equal
        const auto bits = [&](float (*of)(float)) { return [&noise, factor, of](int m, int j) { return of(noise(m, j)) * factor; }; };
        const auto run = [&](const char* name, const std::function<float(int, int)>& score) { run_topk((std::string(name) + " times " + std::to_string(factor)).c_str(), L, std::min(K, kFewTopk), group, score, Dtype::bf16); };
        run("noise", bits([](float x) { return x; }));
        run("near one", bits([](float x) { return 1.0f + std::floor(x * 4096) * 0x1p-20f; }));
        run("levels", [&](int m, int j) { return (std::floor(noise(m, j) * 64) * 0x1p-6f + j * 0x1p-23f) * factor; });  // fp16 has the levels, the later key is better
        run("three plateaus", [&](int m, int j) { return static_cast<float>((j + m) % 3) * factor; });
        run("alike far apart", [&](int m, int j) { return noise(m, j % (L / 16 + 1)) * factor; });
        run("NaN and infinities", [&](int m, int j) { return j % 5 == m ? NAN : j % 7 == 0 ? INFINITY : j % 11 == 0 ? -INFINITY : noise(m, j) * factor; });
      }
    run_topk("noise", L, K, group, noise);
    run_topk("all equal", L, K, group, [](int, int) { return 1.0f; });
    run_topk("three plateaus", L, K, group, [](int m, int j) { return static_cast<float>((j + m) % 3); });
    run_topk("alike neighbours", L, K, group, [&](int m, int j) { return noise(m, j / 3); });
    run_topk("alike far apart", L, K, group, [&](int m, int j) { return noise(m, j % (L / 16 + 1)); });
    run_topk("ascending", L, K, group, [](int, int j) { return static_cast<float>(j); });
    run_topk("descending", L, K, group, [](int, int j) { return -static_cast<float>(j); });
    run_topk("best at the end", L, K, group, [&](int m, int j) { return noise(m, j) + (j > L - K - 5 ? 10.0f : 0.0f); });
    run_topk("zeros of both signs", L, K, group, [](int m, int j) { return (j + m) % 2 ? 0.0f : -0.0f; });
    run_topk("NaN and infinities", L, K, group, [&](int m, int j) {
      return j % 5 == m ? NAN : j % 7 == 0 ? INFINITY : j % 11 == 0 ? -INFINITY : noise(m, j);
    });
    // Only the groups that the kernel samples are good, or only they are bad: its threshold is far off.
    const int stride = sample_stride(parts_of(L, group));
    const auto sampled = [&](int j) { return j / group == sampled_group(j / group / stride, stride); };
    run_topk("good where sampled", L, K, group, [&](int m, int j) { return noise(m, j) + (sampled(j) ? 10.0f : 0.0f); });
    run_topk("bad where sampled", L, K, group, [&](int m, int j) { return noise(m, j) - (sampled(j) ? 10.0f : 0.0f); });
    run_topk("nearly all NaN", L, K, group, [](int m, int j) { return j % 97 == m ? 1.0f : NAN; });
  }
}

}  // namespace

int main(int count, char** arguments) {
  wanted.assign(arguments + 1, arguments + count);
  for (const Case& c : kCases) run(c);
  run_topk_rows(1);
  run_topk_rows(kGroupKeys);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
