// As much of CUDA as the kernels under csrc/ use, on a CPU, so that their sources can be compiled
// with sanitizers and run without a GPU. csrc/cuda/launch.cuh takes it for CUDA's own headers.
//
// Blocks run one after another, in emulator_block.h.
#pragma once

#include <math.h>

#include <climits>
#include <utility>

#include "emulator_block.h"
#include "emulator_floats.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("emulated_shared")))
#define __syncthreads() ::emulator::barrier(__LINE__)
#define threadIdx (::dim3(::emulator::current_index(), 0, 0))
#define MATFORMER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (void(stream), ::emulator::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); }))
#define MATFORMER_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::emulator::dynamic_shared.get())

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx;

namespace emulator {

constexpr size_t kSharedBytes = 48 << 10;  // what a launch may ask for without further ado
inline int last_error = cudaSuccess;

inline void launch(dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  const bool flat = grid.y * grid.z * block.y * block.z == 1;
  if (!flat || block.x % kWarp != 0) die("a launch that the emulator does not know");
  if (grid.x == 0 || grid.x > INT_MAX || block.x == 0 || block.x > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (shared_bytes > kSharedBytes) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  gridDim = grid;
  blockDim = block;
  body = kernel;
  if (threads.size() != block.x) make_threads(block.x);
  for (unsigned i : in_order(grid.x, 0)) {
    blockIdx.x = block_index = i;
    renew_shared(shared_bytes);
    run_block();
  }
}

}  // namespace emulator

inline int cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  emulator::Thread& thread = *emulator::current;
  static_assert(sizeof value <= sizeof thread.value);
  std::memcpy(thread.value, &value, sizeof value);
  thread.mask = mask;
  thread.distance = distance;
  thread.state = emulator::kAtShuffle;
  emulator::leave_thread();
  std::memcpy(&value, thread.received, sizeof value);
  return value;
}
