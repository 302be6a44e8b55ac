// Schemas of the operators. What they compute stands in the folder of each; the plain torch
// implementation of each, with the same arguments, in matformer_dist/ops/, and what they mean to
// torch.compile in matformer_dist/ops/native.py.
//
// The stable ABI of torch 2.11 is used throughout: one build serves that and later versions.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"

STABLE_TORCH_LIBRARY(matformer_dist, m) {
  m.def(
      "chunk_statistics(Tensor logits, Tensor targets, int offset, float temperature, "
      "bool distills, bool find_best) -> Tensor");
  m.def(
      "chunk_gradient_(Tensor(a!) logits, Tensor targets, Tensor ranks, Tensor ce, Tensor z, "
      "Tensor kl, int offset, int ignore_index, float temperature, bool distills, "
      "ScalarType? gradient) -> (Tensor, Tensor)");
  m.def("nested_activation(Tensor h) -> Tensor");
  m.def(
      "nested_activation_backward(Tensor h, Tensor? d_act, int[] rows, int[] widths, "
      "bool wants_act) -> (Tensor, Tensor)");
  m.def("interface() -> int");
  m.def("instruction_set() -> str");
  m.def("cuda_architectures() -> str");
}

#define MATFORMER_TEXT_(...) #__VA_ARGS__
#define MATFORMER_TEXT(...) MATFORMER_TEXT_(__VA_ARGS__)

namespace {

// To be raised, here and in ops/native.py, with every change of a schema or of what it means: a
// library that was left from an earlier build is then told apart.
int64_t interface() { return 2; }

// What the CUDA operators were compiled for, with commas between; nothing in a CPU build.
std::string cuda_architectures() {
#ifdef MATFORMER_CUDA_ARCHITECTURES
  return MATFORMER_TEXT(MATFORMER_CUDA_ARCHITECTURES);
#else
  return "";
#endif
}

std::string instruction_set() {
  using matformer::InstructionSet;
  switch (matformer::instruction_set()) {
    case InstructionSet::kAvx512:
      return "AVX-512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matformer_dist, CompositeExplicitAutograd, m) {
  m.impl("interface", TORCH_BOX(&interface));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
