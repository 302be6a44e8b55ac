// Which set of loops runs on this processor: the widest it has, or what the variable of torch's own
// kernels says, ATEN_CPU_CAPABILITY=default (no more than every processor has), avx2 or avx512.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "loops.h"

namespace matformer {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    if (asked == nullptr) asked = "";
    if (std::strcmp(asked, "default") == 0) return InstructionSet::kBaseline;
#if defined(__x86_64__)
    if (std::strcmp(asked, "avx2") != 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return InstructionSet::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return InstructionSet::kAvx2;
#endif
    return InstructionSet::kBaseline;
  }();
  return best;
}

#if defined(__x86_64__)
#define MATFORMER_PICK(loops)                              \
  switch (instruction_set()) {                             \
    case InstructionSet::kAvx512:                          \
      return avx512::loops;                                \
    case InstructionSet::kAvx2:                            \
      return avx2::loops;                                  \
    default:                                               \
      return baseline::loops;                              \
  }
#else
#define MATFORMER_PICK(loops) return baseline::loops;
#endif

template <class T>
const LossLoops<T>& loss_loops() {
  if constexpr (std::is_same_v<T, float>) {
    MATFORMER_PICK(loss_of_float)
  } else {
    MATFORMER_PICK(loss_of_bfloat16)
  }
}

template <class T>
const ActivationLoops<T>& activation_loops() {
  if constexpr (std::is_same_v<T, float>) {
    MATFORMER_PICK(activation_of_float)
  } else {
    MATFORMER_PICK(activation_of_bfloat16)
  }
}

#undef MATFORMER_PICK

}  // namespace matformer
