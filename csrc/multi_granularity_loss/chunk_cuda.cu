// The two passes over a chunk on CUDA. Arithmetic is fp32 whatever the logits are stored in.
//
// statistics   a block a row, online softmax. A student's block reads its teacher's row too; blocks
//              of one token are neighbours, so the second and later readings come from L2.
// gradient     a block a token: in every place students first, the teacher's row last, because they
//              read it. A gradient narrower than the logits is packed into the front of its row.
// Both move each logit once from and to memory. No atomics: results do not depend on the schedule.
#include "chunk_cuda.h"

#include <type_traits>

#include "chunk.h"
#include "../cuda/launch.cuh"

namespace matformer {
namespace {

constexpr int kStatisticsThreads = 512;
constexpr int kGradientThreads = 512;

// What a sum of exponentials relative to `top` becomes relative to a larger one.
__device__ float rescaled(float sum, float top, float new_top, float inverse_tau) {
  return top == new_top ? sum : sum * expf((top - new_top) * inverse_tau);
}

// One thread's, then one block's numbers of a row.
struct RowSums {
  float top;
  float sum;          // of exp(z - top)
  float sum_tau;      // of exp((z - top) / tau)
  int64_t best;       // first column of top
  float teacher_top;  // of the teacher's row
  float difference;   // of exp((z_teacher - teacher_top) / tau) (z_teacher - z)

  __device__ static RowSums of_nothing() {
    return {-INFINITY, 0, 0, INT64_MAX, -INFINITY, 0};
  }
  __device__ void raise(float new_top, float inverse_tau) {
    sum = rescaled(sum, top, new_top, 1);
    sum_tau = rescaled(sum_tau, top, new_top, inverse_tau);
    top = new_top;
  }
  __device__ void raise_teacher(float new_top, float inverse_tau) {
    difference = rescaled(difference, teacher_top, new_top, inverse_tau);
    teacher_top = new_top;
  }
  __device__ void merge(RowSums other, float inverse_tau) {
    if (other.top > top || (other.top == top && other.best < best)) best = other.best;
    const float new_top = fmaxf(top, other.top);
    raise(new_top, inverse_tau);
    other.raise(new_top, inverse_tau);
    sum += other.sum;
    sum_tau += other.sum_tau;
    const float new_teacher_top = fmaxf(teacher_top, other.teacher_top);
    raise_teacher(new_teacher_top, inverse_tau);
    other.raise_teacher(new_teacher_top, inverse_tau);
    difference += other.difference;
  }
};

__device__ RowSums shuffle_down(const RowSums& sums, int distance) {
  const auto move = [distance](float value) {
    return __shfl_down_sync(0xffffffffu, value, distance);
  };
  RowSums out;
  out.top = move(sums.top);
  out.sum = move(sums.sum);
  out.sum_tau = move(sums.sum_tau);
  out.best = __shfl_down_sync(0xffffffffu, sums.best, distance);
  out.teacher_top = move(sums.teacher_top);
  out.difference = move(sums.difference);
  return out;
}

// A logit of -inf counts for nothing, also where no larger one has been seen.
template <class T, int N>
__device__ void add_row(RowSums& sums, const Vector<T, N>& part, int64_t column, float inverse_tau,
                        bool is_warm) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float value = to_float(part.values[k]);
    if (!(value > sums.top)) continue;
    sums.raise(value, inverse_tau);
    sums.best = column + k;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float value = to_float(part.values[k]);
    if (value == -INFINITY) continue;
    sums.sum += expf(value - sums.top);
    if (is_warm) sums.sum_tau += expf((value - sums.top) * inverse_tau);
  }
}

template <class T, int N>
__device__ void add_difference(RowSums& sums, const Vector<T, N>& teacher, const Vector<T, N>& z,
                               float inverse_tau) {
  float top = sums.teacher_top;
#pragma unroll
  for (int k = 0; k < N; ++k) top = fmaxf(top, to_float(teacher.values[k]));
  sums.raise_teacher(top, inverse_tau);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float value = to_float(teacher.values[k]);
    if (value == -INFINITY) continue;
    sums.difference += expf((value - top) * inverse_tau) * (value - to_float(z.values[k]));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(const T* logits, const int64_t* targets, Chunk chunk, bool find_best,
                      float* numbers) {
  const int64_t token = blockIdx.x / chunk.groups, i = blockIdx.x % chunk.groups;
  const int64_t row = i * chunk.tokens + token;
  const T* z = logits + row * chunk.vocab;
  const T* teacher = logits + token * chunk.vocab;
  const bool learns = chunk.learns(row);
  const float inverse_tau = 1 / chunk.temperature;
  // Nobody else reads sums at tau.
  const bool is_warm = chunk.distills && chunk.temperature != 1;

  RowSums sums = RowSums::of_nothing();
  for (int64_t j = int64_t(threadIdx.x) * N; j < chunk.vocab; j += int64_t(blockDim.x) * N) {
    const auto z_part = *reinterpret_cast<const Vector<T, N>*>(z + j);
    add_row(sums, z_part, j, inverse_tau, is_warm);
    if (!learns) continue;
    const auto teacher_part = *reinterpret_cast<const Vector<T, N>*>(teacher + j);
    add_difference(sums, teacher_part, z_part, inverse_tau);
  }

  __shared__ RowSums of_warps[kStatisticsThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sums.merge(shuffle_down(sums, distance), inverse_tau);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp)
    sums.merge(of_warps[warp], inverse_tau);

  float* out = numbers + row * kNumbers;
  const int64_t column = targets[row] - chunk.offset;
  const int64_t best = (sums.best < chunk.vocab ? sums.best : 0) + chunk.offset;
  out[kTop] = sums.top;
  out[kSum] = sums.sum;
  out[kSumTau] = is_warm ? sums.sum_tau : sums.sum;
  out[kTarget] = column >= 0 && column < chunk.vocab ? to_float(z[column]) : -INFINITY;
  out[kDifference] = sums.difference * inverse_tau;
  out[kBestHigh] = find_best ? float(best / kIdBase) : 0.f;
  out[kBestLow] = find_best ? float(best % kIdBase) : 0.f;
}

// softmax(z / tau) of one logit. One function, and one rounding: a student equal to its teacher gets
// the same bits, so that their difference is exactly 0.
__device__ float warm_softmax(float value, float inverse_tau, float lse_tau) {
  return expf(fmaf(value, inverse_tau, -lse_tau));
}

// The gradient of N logits from column j on, which are `part`.
template <class Gradient, class T, int N>
__device__ Vector<Gradient, N> gradient_of(const Vector<T, N>& part, int64_t j,
                                           const RowGradient& row, float inverse_tau, bool is_warm,
                                           const float* teacher) {
  Vector<Gradient, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float value = to_float(part.values[k]);
    const float p = expf(value - row.lse);
    float d = row.strength * p;
    if (row.pull != 0) {
      const float warm = is_warm ? warm_softmax(value, inverse_tau, row.lse_tau) : p;
      d += row.pull * (warm - teacher[k]);  // exactly 0 where the two are equal
    }
    if (j + k == row.column) d -= row.ce;
    out.values[k] = from_float<Gradient>(d);
  }
  return out;
}

// Writes the results of a token's rows, and what their gradients need to shared memory.
__device__ void conclude_token(const Chunk& chunk, const Weights& weights, const int64_t* targets,
                               const float* ranks, int64_t n_ranks, int64_t token, float* results,
                               int64_t* best, RowGradient* gradients) {
  const int64_t rows = chunk.groups * chunk.tokens;
  const RowNumbers teacher = join(ranks, n_ranks, rows, token, chunk.temperature);
  for (int64_t i = threadIdx.x; i < chunk.groups; i += blockDim.x) {
    const int64_t row = i * chunk.tokens + token;
    const RowNumbers numbers = join(ranks, n_ranks, rows, row, chunk.temperature);
    const RowOutcome out =
        conclude(chunk, weights, ranks, n_ranks, row, targets[row], numbers, teacher);
    gradients[i] = out.gradient;
    for (int k = 0; k < kResults; ++k) results[k * rows + row] = out.results[k];
    best[row] = out.best;
  }
}

// A tile is what a block's threads handle at once, N columns each. Where the gradient is half as
// wide as the logits, tile t of it lies in the front of its row, on logits of tile t / 2. Those are
// read when the block meets before tiles 2, 4, 8, ...; in tile 0 it meets between reading and writing,
// which serves tile 1 too.
template <class T, class Gradient, int N>
__global__ void __launch_bounds__(kGradientThreads)
    gradient_kernel(T* logits, const int64_t* targets, const float* ranks, int64_t n_ranks,
                    Weights weights, Chunk chunk, bool write_gradient, float* results,
                    int64_t* best) {
  constexpr bool kPacks = sizeof(Gradient) < sizeof(T);
  MATFORMER_DYNAMIC_SHARED(RowGradient, gradients);
  const int64_t token = blockIdx.x;
  conclude_token(chunk, weights, targets, ranks, n_ranks, token, results, best, gradients);
  if (!write_gradient) return;
  __syncthreads();

  const float inverse_tau = 1 / chunk.temperature;
  const bool is_warm = chunk.temperature != 1;
  const int64_t per_tile = int64_t(blockDim.x) * N;
  for (int64_t tile = 0; tile * per_tile < chunk.vocab; ++tile) {
    if (kPacks && tile > 1 && (tile & (tile - 1)) == 0) __syncthreads();
    const int64_t j = tile * per_tile + int64_t(threadIdx.x) * N;
    const bool is_inside = j < chunk.vocab;
    float teacher[N] = {};
    if (is_inside && chunk.distills) {
      const auto part = *reinterpret_cast<const Vector<T, N>*>(logits + token * chunk.vocab + j);
#pragma unroll
      for (int k = 0; k < N; ++k)
        teacher[k] = warm_softmax(to_float(part.values[k]), inverse_tau, gradients[0].lse_tau);
    }
    for (int64_t i = chunk.groups - 1; i >= 0; --i) {
      T* z = logits + (i * chunk.tokens + token) * chunk.vocab;
      Vector<Gradient, N> d;
      if (is_inside)
        d = gradient_of<Gradient>(*reinterpret_cast<const Vector<T, N>*>(z + j), j, gradients[i],
                                  inverse_tau, is_warm, teacher);
      if (kPacks && tile == 0) __syncthreads();
      if (is_inside)
        *reinterpret_cast<Vector<Gradient, N>*>(reinterpret_cast<Gradient*>(z) + j) = d;
    }
  }
}

template <class T, class Gradient>
void launch_gradient(T* logits, const int64_t* targets, const float* ranks, int64_t n_ranks,
                     const Weights& weights, const Chunk& chunk, bool write_gradient,
                     float* results, int64_t* best, void* stream) {
  const dim3 grid{unsigned(chunk.tokens)};
  const size_t shared_bytes = chunk.groups * sizeof(RowGradient);
  if (has_aligned_rows<T>(logits, chunk.vocab)) {
    constexpr int kN = 16 / sizeof(T);
    MATFORMER_LAUNCH((gradient_kernel<T, Gradient, kN>), grid, kGradientThreads, shared_bytes,
                     stream, logits, targets, ranks, n_ranks, weights, chunk, write_gradient,
                     results, best);
  } else {
    MATFORMER_LAUNCH((gradient_kernel<T, Gradient, 1>), grid, kGradientThreads, shared_bytes,
                     stream, logits, targets, ranks, n_ranks, weights, chunk, write_gradient,
                     results, best);
  }
}

}  // namespace
}  // namespace matformer

using namespace matformer;

int matformer_chunk_statistics(const void* logits, int dtype, const int64_t* targets,
                               int64_t groups, int64_t tokens, int64_t vocab, int64_t offset,
                               float temperature, bool distills, bool find_best, float* numbers,
                               void* stream) {
  if (groups * tokens == 0) return cudaSuccess;
  if (groups * tokens > INT32_MAX) return cudaErrorInvalidConfiguration;
  const Chunk chunk{groups, tokens, vocab, offset, 0, temperature, distills};
  const dim3 grid{unsigned(groups * tokens)};
  const bool known = with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(logits);
    if (has_aligned_rows<T>(logits, vocab)) {
      constexpr int kN = 16 / sizeof(T);
      MATFORMER_LAUNCH((statistics_kernel<T, kN>), grid, kStatisticsThreads, 0, stream, data,
                       targets, chunk, find_best, numbers);
    } else {
      MATFORMER_LAUNCH((statistics_kernel<T, 1>), grid, kStatisticsThreads, 0, stream, data,
                       targets, chunk, find_best, numbers);
    }
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

int matformer_chunk_gradient(void* logits, int dtype, const int64_t* targets, const float* ranks,
                             int64_t n_ranks, const float* ce, const float* z, const float* kl,
                             int64_t groups, int64_t tokens, int64_t vocab, int64_t offset,
                             int64_t ignore_index, float temperature, bool distills,
                             int gradient_dtype, float* results, int64_t* best, void* stream) {
  if (groups * tokens == 0) return cudaSuccess;
  if (tokens > INT32_MAX) return cudaErrorInvalidConfiguration;
  const Chunk chunk{groups, tokens, vocab, offset, ignore_index, temperature, distills};
  const Weights weights{ce, z, kl};
  const bool write_gradient = gradient_dtype != kNoGradient;
  bool pairs = false;  // whether there is a kernel for the two dtypes
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    with_dtype(write_gradient ? gradient_dtype : dtype, [&](auto gradient_type) {
      using Gradient = decltype(gradient_type);
      if constexpr (sizeof(Gradient) < sizeof(T) || std::is_same_v<T, Gradient>) {
        pairs = true;
        launch_gradient<T, Gradient>(static_cast<T*>(logits), targets, ranks, n_ranks, weights,
                                     chunk, write_gradient, results, best, stream);
      }
    });
  });
  return pairs ? cudaGetLastError() : cudaErrorInvalidValue;
}
