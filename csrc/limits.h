// What the package takes; the tests and build_info read the same numbers. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace mita {

constexpr std::int64_t kMaxLandmarks = 1024, kMaxTopk = 2048, kMaxRoutes = 8;
// What the CUDA kernels are compiled for; the CPU takes any head dimension.
constexpr std::int64_t kMaxCudaHeadDim = 256, kCudaHeadDimStep = 8;

}  // namespace mita
