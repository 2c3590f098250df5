// Enough of CUDA to run the kernels of csrc/ on a CPU, so that a machine without a GPU can compare
// what they compute. g++ compiles the .cu file itself with this header put in front.
//
// The 32 lanes of a warp are fibers. At a shuffle each waits until all have come; a lane that ends
// while others wait is an error here, as it is on a GPU. Warps and blocks run one after another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), gridDim(0, 0, 0);

// Aligned as on a GPU, so that g++ may use instructions that fault on another address.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T)) {
    std::fprintf(stderr, "a load from an address that is not aligned\n");
    std::abort();
  }
  return *at;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

namespace cpu {

constexpr int LANES = 32;
struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool ended;
};
inline Lane lanes[LANES];
inline ucontext_t scheduler;
inline int running;
inline uint32_t slots[LANES];
inline std::function<void()> body;

inline void wait() { swapcontext(&lanes[running].context, &scheduler); }

inline void run_lane() {
  body();
  lanes[running].ended = true;
  wait();
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = nullptr;
    lane.ended = false;
    makecontext(&lane.context, run_lane, 0);
  }
  for (int ended = 0; ended < LANES;) {
    ended = 0;
    for (running = 0; running < LANES; ++running) {
      threadIdx.x = first_thread + running;
      swapcontext(&scheduler, &lanes[running].context);
      ended += lanes[running].ended;
    }
    if (ended && ended < LANES) {
      std::fprintf(stderr, "%d lanes ended while others wait at a shuffle\n", ended);
      std::abort();
    }
  }
}

inline void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  body = kernel;
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (unsigned t = 0; t < threads; t += LANES) run_warp(t);
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  std::memcpy(&slots[running], &value, 4);
  wait();
  std::memcpy(&value, &slots[source], 4);
  wait();
  return value;
}

}  // namespace cpu

template <typename T>
T __shfl_sync(unsigned, T value, unsigned source) {
  return cpu::exchange(value, source % cpu::LANES);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int apart) {
  return cpu::exchange(value, cpu::running ^ apart);
}

#define LAUNCH(kernel, grid, stream, ...) \
  cpu::launch(grid, THREADS, [&] { (kernel)(__VA_ARGS__); })
