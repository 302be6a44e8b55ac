// What the CPU operators share: the storage type of an operand.
#pragma once

#include "../checks.h"
#include "dispatch.h"

namespace matformer {

// Calls body(T{}) with the storage type of `tensor`.
template <class Body>
void with_storage_type(const Tensor& tensor, const char* name, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, " is ", name_of(tensor.scalar_type()),
                      "; on a CPU it must be float32 or bfloat16");
  }
}

}  // namespace matformer
