// The loops over rows on a CPU, one set for each instruction set.
//
// Plain loops that the compiler turns into vectors: loops.inl is compiled once for each instruction
// set, and the best one that the processor has is chosen when the program runs. So one binary
// serves every machine, unlike with -march=native.
#pragma once

#include <cstdint>

namespace matformer {

struct bfloat16 {
  uint16_t bits;
};

struct RowStatistics {
  float top;         // largest logit; -inf of none. NaN is passed over: the sums show it
  float sum;         // of exp(z - top)
  float sum_tau;     // of exp((z - top) / tau)
  float difference;  // of shares * (teacher - z) / tau; 0 without shares
  int64_t best;      // first place of top; 0 where it is nowhere
};

// Of one row of n logits.
template <class T>
struct LossLoops {
  // shares and teacher may both be null.
  RowStatistics (*statistics)(const T* z, int64_t n, float temperature, const T* teacher,
                              const float* shares);
  // out = exp(z / tau - shift), fp32.
  void (*softmax)(const T* z, int64_t n, float temperature, float shift, float* out);
  // out = exp((z - top) / tau), fp32.
  void (*exponentials)(const T* z, int64_t n, float top, float temperature, float* out);
  // z = strength * exp(z - lse), or at a student's row that and
  //     + pull * (exp(z / tau - lse_tau) - teacher), teacher being softmax(z_teacher / tau).
  void (*gradient)(T* z, int64_t n, float lse, float strength);
  void (*student_gradient)(T* z, int64_t n, float lse, float strength, float lse_tau, float pull,
                           float temperature, const float* teacher);
  void (*set)(T* z, int64_t column, float value);
  float (*at)(const T* z, int64_t column);
};

// Of n neighbouring neurons; those of SwiGLU have pairs (gate, up) in h and d_h.
template <class T>
struct ActivationLoops {
  void (*swiglu)(const T* h, int64_t n, T* act);
  void (*gelu)(const T* h, int64_t n, T* act);
  // d_h, and act where it is not null.
  void (*swiglu_backward)(const T* h, const T* d_act, int64_t n, T* act, T* d_h);
  void (*gelu_backward)(const T* h, const T* d_act, int64_t n, T* act, T* d_h);
};

// Defined by loops_<set>.cpp.
#define MATFORMER_DECLARE_LOOPS(SET)                      \
  namespace SET {                                         \
  extern const LossLoops<float> loss_of_float;            \
  extern const LossLoops<bfloat16> loss_of_bfloat16;      \
  extern const ActivationLoops<float> activation_of_float; \
  extern const ActivationLoops<bfloat16> activation_of_bfloat16; \
  }
MATFORMER_DECLARE_LOOPS(baseline)
#if defined(__x86_64__)
MATFORMER_DECLARE_LOOPS(avx2)
MATFORMER_DECLARE_LOOPS(avx512)
#endif
#undef MATFORMER_DECLARE_LOOPS

}  // namespace matformer
