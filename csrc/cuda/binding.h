// What the CUDA operators share between torch and the launchers, which know nothing of torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"
#include "dtypes.h"

namespace matformer {

inline int dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " is ", name_of(dtype),
                      "; on CUDA it must be float32, bfloat16 or float16");
  }
}

// Calls launch(stream) on the device of `tensor`, and says what CUDA makes of it.
template <class Launch>
void launch_on_device_of(const Tensor& tensor, const char* kernel, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  const int error = launch(stream);
  STD_TORCH_CHECK(error == 0, "the CUDA kernel of ", kernel, " did not start: CUDA error ", error,
                  "; `matformer doctor` says which devices were built for");
}

}  // namespace matformer
