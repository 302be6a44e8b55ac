// Kernels with one mistake each, which the emulator or a sanitizer must find.
#pragma once

#include "emulator.h"

namespace {

enum Mistake {
  kNone,
  kMissingBarrier,
  kBarrierNotReached,
  kTwoBarriers,
  kLaneMissing,
  kLaneOutsideMask,
  kSharedOverrun,
  kDynamicSharedOverrun,
  kLocalOverrun,
  kMisaligned,
  kSharedUnwritten,
};

// Every thread's neighbour's index to out [threads], through shared memory. Through pointers, so
// that an overrun is AddressSanitizer's to find.
void neighbours(int mistake, int* out) {
  __shared__ int indices[64];
  MATFORMER_DYNAMIC_SHARED(int, dynamic);
  const int i = int(threadIdx.x), next = (i + 1) % int(blockDim.x);
  int* volatile shared = indices;
  int local[2] = {next, i};
  int* volatile own = local;
  if (mistake != kLaneMissing || i != 5)
    __shfl_down_sync(mistake == kLaneOutsideMask ? 0xffffu : ~0u, int64_t(i), 1);
  if (mistake == kBarrierNotReached && i == 5) return;
  if (mistake == kTwoBarriers && i == 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (mistake != kSharedUnwritten || i != 5) shared[mistake == kSharedOverrun ? i + 1 : i] = i;
  dynamic[mistake == kDynamicSharedOverrun ? i + 1 : i] = i;
  if (mistake != kMissingBarrier) __syncthreads();
  if (mistake == kMisaligned) out = reinterpret_cast<int*>(reinterpret_cast<char*>(out) + 1);
  out[i] = shared[own[mistake == kLocalOverrun ? 2 : 0]];
}

int bad_kernel(int mistake, int* out) {
  MATFORMER_LAUNCH(neighbours, 2, 64, 64 * sizeof(int), nullptr, mistake, out);
  return cudaGetLastError();
}

}  // namespace
