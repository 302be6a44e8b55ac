// Checks that every operator makes of its operands: one clear error before any kernel starts.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

namespace matformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Whether `tensor` is contiguous, of that dtype and those sizes, and where `like` is.
inline void check_operand(const Tensor& tensor, const char* name, ScalarType dtype,
                          std::initializer_list<int64_t> sizes, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", name_of(tensor.scalar_type()),
                  "; it must be ", name_of(dtype));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, " lies on another device than the first operand");
  STD_TORCH_CHECK(tensor.dim() == int64_t(sizes.size()), name, " has ", tensor.dim(),
                  " dimensions; it must have ", sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(i) == size, name, " has size ", tensor.size(i), " in dimension ", i,
                    "; it must be ", size);
    ++i;
  }
}

template <class T>
inline const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace matformer
