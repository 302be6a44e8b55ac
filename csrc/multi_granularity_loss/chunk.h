// One chunk of the multi-granularity loss: what both devices compute.
//
// Legend: G rows of one token (row 0 the teacher), c tokens, V columns of logits on this rank,
// T tensor-parallel ranks, tau temperature. Row r = i * c + token of logits [G, c, V] is row i of a
// token. matformer_dist/ops/head_chunk.py is the reference, and says the same in torch.
//
// Two passes over the logits with one small gather over the ranks between them:
//   statistics   a row's logits -> kNumbers floats, over this rank's share of the vocabulary
//   gradient     everybody's numbers -> a row's losses; its logits become their gradient
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MATFORMER_HOST_DEVICE __host__ __device__
#else
#define MATFORMER_HOST_DEVICE
#endif

namespace matformer {

// What one rank says of a row. Ids travel as two digits: a float does not hold every whole number
// above 2^24.
enum Number {
  kTop,         // largest logit
  kSum,         // of exp(z - top)
  kSumTau,      // of exp((z - top) / tau)
  kTarget,      // logit of the target, -inf where another rank owns it
  kDifference,  // of exp((z_teacher - top_teacher) / tau) * (z_teacher - z) / tau
  kBestHigh,    // id of the largest logit, the lowest one of equals
  kBestLow,
  kNumbers
};
constexpr int64_t kIdBase = 1 << 20;

// Results of a row, in the order of the results tensor [kResults, G, c].
enum Result { kLoss, kNll, kLse, kKl, kResults };

struct Chunk {
  int64_t groups, tokens, vocab;
  int64_t offset;        // global id of the first column
  int64_t ignore_index;  // a target that takes no part
  float temperature;
  bool distills;  // whether rows 1 and up of a token learn from row 0

  MATFORMER_HOST_DEVICE bool learns(int64_t row) const { return distills && row >= tokens; }
};

// The weights of a row's losses; kl counts where it is not 0.
struct Weights {
  const float *ce, *z, *kl;  // [G, c] each
};

// A row over the whole vocabulary.
struct RowNumbers {
  float lse, lse_tau, target;
  float top;      // of all ranks
  float sum_tau;  // relative to top
  int64_t best;   // global id of top
};

// Joins the ranks' numbers [T, rows, kNumbers] of one row.
MATFORMER_HOST_DEVICE inline RowNumbers join(const float* ranks, int64_t n_ranks, int64_t rows,
                                             int64_t row, float temperature) {
  RowNumbers out;
  out.top = -INFINITY;
  out.target = -INFINITY;
  out.best = 0;
  for (int64_t t = 0; t < n_ranks; ++t) {
    const float* numbers = ranks + (t * rows + row) * kNumbers;
    // The first rank of equals: ids grow with the rank. NaN wins, as in torch.
    if (t == 0 || numbers[kTop] > out.top || (numbers[kTop] != numbers[kTop] && out.top == out.top)) {
      out.top = numbers[kTop];
      out.best = int64_t(numbers[kBestHigh]) * kIdBase + int64_t(numbers[kBestLow]);
    }
    if (!(numbers[kTarget] <= out.target)) out.target = numbers[kTarget];
  }
  float sum = 0;
  out.sum_tau = 0;
  for (int64_t t = 0; t < n_ranks; ++t) {
    const float* numbers = ranks + (t * rows + row) * kNumbers;
    sum += numbers[kSum] * expf(numbers[kTop] - out.top);
    out.sum_tau += numbers[kSumTau] * expf((numbers[kTop] - out.top) / temperature);
  }
  out.lse = out.top + logf(sum);
  out.lse_tau = out.top / temperature + logf(out.sum_tau);
  return out;
}

// KL(teacher || row) at the temperature. Exactly 0 for a row equal to the teacher's: its
// differences are 0, and the two log-sums cancel.
MATFORMER_HOST_DEVICE inline float join_kl(const float* ranks, int64_t n_ranks, int64_t rows,
                                           int64_t row, int64_t teacher_row,
                                           const RowNumbers& student, const RowNumbers& teacher,
                                           float temperature) {
  float difference = 0;
  for (int64_t t = 0; t < n_ranks; ++t) {
    const float teacher_top = ranks[(t * rows + teacher_row) * kNumbers + kTop];
    difference += ranks[(t * rows + row) * kNumbers + kDifference] *
                  expf((teacher_top - teacher.top) / temperature);
  }
  return difference / teacher.sum_tau + (student.lse_tau - teacher.lse_tau);
}

// What turns a row's logits into their gradient:
//   strength * softmax(z) + pull * (softmax(z / tau) - softmax(z_teacher / tau)) - ce at the target
struct RowGradient {
  float lse, lse_tau;
  float strength;  // ce + 2 z-weight lse
  float pull;      // kl tau, 0 where the row has no teacher
  float ce;
  int64_t column;  // of the target, outside [0, V) where another rank owns it
};

struct RowOutcome {
  float results[kResults];
  int64_t best;
  RowGradient gradient;
};

// A row's losses and gradient from the joined numbers of it and of its teacher. A target that no
// rank owns makes both NaN.
MATFORMER_HOST_DEVICE inline RowOutcome conclude(const Chunk& chunk, const Weights& weights,
                                                 const float* ranks, int64_t n_ranks, int64_t row,
                                                 int64_t target, const RowNumbers& numbers,
                                                 const RowNumbers& teacher) {
  const int64_t rows = chunk.groups * chunk.tokens, token = row % chunk.tokens;
  const bool valid = target != chunk.ignore_index;
  const bool unowned = valid && numbers.target == -INFINITY;
  const float ce = weights.ce[row], z = weights.z[row], kl_weight = weights.kl[row];
  const float nll = !valid ? 0.f : unowned ? NAN : numbers.lse - numbers.target;
  float kl = 0;
  if (valid && kl_weight != 0 && chunk.learns(row))
    kl = join_kl(ranks, n_ranks, rows, row, token, numbers, teacher, chunk.temperature);
  RowOutcome out;
  const float tau2 = chunk.temperature * chunk.temperature;
  out.results[kLoss] =
      valid ? ce * nll + z * numbers.lse * numbers.lse + kl_weight * tau2 * kl : 0.f;
  out.results[kNll] = nll;
  out.results[kLse] = numbers.lse;
  out.results[kKl] = kl;
  out.best = numbers.best;
  out.gradient.lse = numbers.lse;
  out.gradient.lse_tau = numbers.lse_tau;
  out.gradient.ce = !valid ? 0.f : unowned ? NAN : ce;
  out.gradient.strength = out.gradient.ce + (valid ? 2 * z * numbers.lse : 0.f);
  out.gradient.pull = valid && chunk.learns(row) ? kl_weight * chunk.temperature : 0.f;
  out.gradient.column = target - chunk.offset;
  return out;
}

}  // namespace matformer
