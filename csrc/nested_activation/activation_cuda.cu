// The nested activation on CUDA, all segments in one launch. Arithmetic is fp32.
//
// forward    a thread a few neighbouring neurons, whatever their rows: one long vector
// backward   a block a part of a row (or several rows of a narrow segment); the blocks of all
//            segments in one grid, which find their segment in a table
#include "activation_cuda.h"

#include <initializer_list>
#include <type_traits>

#include "../cuda/launch.cuh"

namespace matformer {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSegments = 64;  // of one launch: the table travels as an argument

struct Segment {
  int64_t first_block;  // of those that this segment has
  int64_t first_row, rows, width, offset;
};

struct Segments {
  int count;
  Segment of[kMaxSegments];
};

__device__ float normal_density(float x) { return 0.39894228040143268f * expf(-0.5f * x * x); }
__device__ float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678118654752f * x); }
__device__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// act of one neuron with K pre-activations.
template <int K>
__device__ float activate(const float* h) {
  if constexpr (K == 2) {
    return h[0] * sigmoid(h[0]) * h[1];
  } else {
    return h[0] * normal_cdf(h[0]);
  }
}

template <int K>
__device__ void activate_backward(const float* h, float d_act, float* d_h) {
  if constexpr (K == 2) {
    const float s = sigmoid(h[0]), silu = h[0] * s;
    d_h[0] = d_act * h[1] * (s + silu * (1 - s));
    d_h[1] = d_act * silu;
  } else {
    d_h[0] = d_act * (normal_cdf(h[0]) + h[0] * normal_density(h[0]));
  }
}

// N neurons; h, d_act, act and d_h point at the first of them. Without d_act, act alone is made. A
// single neuron's K values may lie at any address: h may be a view.
template <class T, int K, int N>
__device__ void handle(const T* h, const T* d_act, T* act, T* d_h) {
  using Inputs = Vector<T, K * N, N>;
  const auto in = *reinterpret_cast<const Inputs*>(h);
  Vector<T, N> made;
  Inputs d_made;
  Vector<T, N> d_in;
  if (d_act) d_in = *reinterpret_cast<const Vector<T, N>*>(d_act);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float values[K], d_values[K];
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = to_float(in.values[K * n + k]);
    made.values[n] = from_float<T>(activate<K>(values));
    if (!d_act) continue;
    activate_backward<K>(values, to_float(d_in.values[n]), d_values);
#pragma unroll
    for (int k = 0; k < K; ++k) d_made.values[K * n + k] = from_float<T>(d_values[k]);
  }
  if (act) *reinterpret_cast<Vector<T, N>*>(act) = made;
  if (d_act) *reinterpret_cast<Inputs*>(d_h) = d_made;
}

template <class T, int K, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* h, int64_t neurons, T* act) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t j = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; j < neurons; j += stride)
    handle<T, K, N>(h + K * j, nullptr, act + j, nullptr);
}

// Threads that work side by side on a row: as many as it has pieces, up to the block.
__host__ __device__ inline int64_t threads_per_row(int64_t width, int n) {
  const int64_t pieces = (width + n - 1) / n;
  int64_t threads = kWarp;
  while (threads < kThreads && threads < pieces) threads *= 2;
  return threads;
}

template <class T, int K, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* h, const T* d_act, Segments segments, int64_t widest, T* act,
                    T* d_h) {
  int i = segments.count - 1;
  while (i > 0 && blockIdx.x < segments.of[i].first_block) --i;
  const Segment& s = segments.of[i];
  const int64_t side = threads_per_row(s.width, N), rows_per_block = kThreads / side;
  const int64_t row = (blockIdx.x - s.first_block) * rows_per_block + threadIdx.x / side;
  if (row >= s.rows) return;
  const int64_t from = s.offset + row * s.width, to = (s.first_row + row) * widest;
  for (int64_t j = threadIdx.x % side * N; j < s.width; j += side * N)
    handle<T, K, N>(h + K * (from + j), d_act ? d_act + from + j : nullptr,
                    act ? act + to + j : nullptr, d_h ? d_h + K * (to + j) : nullptr);
}

template <class T, int K, int N>
int launch_backward(const T* h, const T* d_act, const int64_t* rows, const int64_t* widths,
                    int64_t count, int64_t widest, T* act, T* d_h, void* stream) {
  Segment next{};
  for (int64_t i = 0; i < count;) {
    Segments segments{};
    next.first_block = 0;
    for (; i < count && segments.count < kMaxSegments; ++i) {
      next.rows = rows[i];
      next.width = widths[i];
      if (rows[i] > 0 && widths[i] > 0) segments.of[segments.count++] = next;
      const int64_t rows_per_block = kThreads / threads_per_row(widths[i], N);
      if (widths[i] > 0) next.first_block += (rows[i] + rows_per_block - 1) / rows_per_block;
      next.first_row += rows[i];
      next.offset += rows[i] * widths[i];
    }
    if (segments.count == 0) continue;
    if (next.first_block > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid{unsigned(next.first_block)};
    MATFORMER_LAUNCH((backward_kernel<T, K, N>), grid, kThreads, 0, stream, h, d_act, segments,
                     widest, act, d_h);
  }
  return cudaGetLastError();
}

// Whether every row of every operand can be taken 16 bytes at a time.
template <class T>
bool all_aligned(std::initializer_list<const void*> operands, const int64_t* widths,
                 int64_t count, int64_t widest) {
  bool aligned = widest * sizeof(T) % 16 == 0;
  for (const void* data : operands) aligned &= reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t i = 0; i < count; ++i) aligned &= widths[i] * sizeof(T) % 16 == 0;
  return aligned;
}

// Calls body(T{}, std::integral_constant<int, K>) for the dtype and k; false where there is none.
template <class Body>
bool with_kind(int dtype, int64_t k, Body body) {
  if (k != 1 && k != 2) return false;
  return with_dtype(dtype, [&](auto type) {
    if (k == 2)
      body(type, std::integral_constant<int, 2>{});
    else
      body(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace
}  // namespace matformer

using namespace matformer;

int matformer_nested_activation(const void* h, int dtype, int64_t neurons, int64_t k, void* act,
                                void* stream) {
  if (neurons == 0) return cudaSuccess;
  const bool known = with_kind(dtype, k, [&](auto type, auto constant) {
    using T = decltype(type);
    constexpr int kK = decltype(constant)::value, kN = 16 / sizeof(T);
    const T* from = static_cast<const T*>(h);
    T* to = static_cast<T*>(act);
    const bool aligned = all_aligned<T>({h, act}, &neurons, 1, neurons);
    const int64_t pieces = aligned ? neurons / kN : neurons;
    const int64_t blocks = (pieces + kThreads - 1) / kThreads;
    const dim3 grid{unsigned(blocks < INT32_MAX ? blocks : INT32_MAX)};
    if (aligned)
      MATFORMER_LAUNCH((forward_kernel<T, kK, kN>), grid, kThreads, 0, stream, from, neurons, to);
    else
      MATFORMER_LAUNCH((forward_kernel<T, kK, 1>), grid, kThreads, 0, stream, from, neurons, to);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

int matformer_nested_activation_backward(const void* h, const void* d_act, int dtype, int64_t k,
                                         const int64_t* rows, const int64_t* widths,
                                         int64_t segments, int64_t widest, void* act, void* d_h,
                                         void* stream) {
  int error = cudaSuccess;
  const bool known = with_kind(dtype, k, [&](auto type, auto constant) {
    using T = decltype(type);
    constexpr int kK = decltype(constant)::value, kN = 16 / sizeof(T);
    const auto launch = all_aligned<T>({h, d_act, act, d_h}, widths, segments, widest)
                            ? launch_backward<T, kK, kN>
                            : launch_backward<T, kK, 1>;
    error = launch(static_cast<const T*>(h), static_cast<const T*>(d_act), rows, widths, segments,
                   widest, static_cast<T*>(act), static_cast<T*>(d_h), stream);
  });
  return known ? error : int(cudaErrorInvalidValue);
}
