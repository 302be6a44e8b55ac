// Launching a kernel, and the few device functions that kernels here share.
//
// Everything that is not plain C++ in a .cu file goes through this header, so that the emulator of
// the tests (tests/unit/csrc/emulator.h) can stand in for it and run the same sources on a CPU.
#pragma once

#ifdef MATFORMER_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MATFORMER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MATFORMER_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

#include <cstdint>

#include "dtypes.h"

namespace matformer {

constexpr int kWarp = 32;

// N neighbouring values, moved in accesses of up to 16 bytes; they lie at a multiple of the size of
// kTogether of them.
template <class T, int N, int kTogether = N>
struct alignas(sizeof(T) * kTogether < 16 ? sizeof(T) * kTogether : 16) Vector {
  T values[N];
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half(value);
}

// Calls body(T{}) with the storage type of a number in DType; false where there is none.
template <class Body>
inline bool with_dtype(int dtype, Body body) {
  switch (dtype) {
    case kFloat32:
      body(float{});
      return true;
    case kBFloat16:
      body(__nv_bfloat16{});
      return true;
    case kFloat16:
      body(__half{});
      return true;
    default:
      return false;
  }
}

// Whether rows of `length` values can be read 16 bytes at a time.
template <class T>
inline bool has_aligned_rows(const void* data, int64_t length) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

}  // namespace matformer
