// Runs launchers of csrc/ under the emulator, for tests/unit/csrc/emulated.py.
//
//   run_kernels ORDER < calls > answers
//
// A call is the launcher's name and a line feed, then its arguments in their order: a number as a
// double, an array as two int64, its bytes and how far it lies from an address that 16 divides,
// and its content; -1 bytes are a null pointer. The answer is the error as an int64, then the
// content of every array. Each array is a heap block of its own, for AddressSanitizer to guard.
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../../csrc/multi_granularity_loss/chunk_cuda.h"
#include "../../../csrc/nested_activation/activation_cuda.h"
#include "bad_kernels.h"
#include "emulator.h"

namespace {

template <class T>
T read() {
  T out;
  std::cin.read(reinterpret_cast<char*>(&out), sizeof out);
  return out;
}

struct Array {
  int64_t bytes, shift;
  std::unique_ptr<char[]> memory;

  char* data() const { return memory ? memory.get() + shift : nullptr; }
};

struct Call {
  std::vector<Array> arrays;

  template <class T>
  T argument() {
    if constexpr (!std::is_pointer_v<T>) {
      return static_cast<T>(read<double>());
    } else {
      Array array{read<int64_t>(), read<int64_t>(), nullptr};
      if (array.bytes >= 0) {
        array.memory.reset(new char[array.shift + array.bytes]);
        std::cin.read(array.data(), array.bytes);
      }
      arrays.push_back(std::move(array));
      return reinterpret_cast<T>(arrays.back().data());
    }
  }
};

template <class... Arguments>
std::function<void()> answering(int (*launcher)(Arguments...)) {
  return [launcher] {
    Call call;
    std::tuple<Arguments...> arguments{call.argument<Arguments>()...};  // braces: in their order
    const int64_t error = std::apply(launcher, arguments);
    std::cout.write(reinterpret_cast<const char*>(&error), sizeof error);
    for (const Array& array : call.arrays)
      if (array.bytes > 0) std::cout.write(array.data(), array.bytes);
    std::cout.flush();
  };
}

// values [n] -> themselves, rounded to bf16 and to fp16.
int round_floats(const float* values, int64_t n, float* as_bfloat16, float* as_half) {
  for (int64_t i = 0; i < n; ++i) {
    as_bfloat16[i] = __bfloat162float(__float2bfloat16(values[i]));
    as_half[i] = __half2float(__float2half(values[i]));
  }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  emulator::order = unsigned(std::atoi(arguments[1]));
  const std::map<std::string, std::function<void()>> launchers{
      {"chunk_statistics", answering(matformer_chunk_statistics)},
      {"chunk_gradient", answering(matformer_chunk_gradient)},
      {"nested_activation", answering(matformer_nested_activation)},
      {"nested_activation_backward", answering(matformer_nested_activation_backward)},
      {"bad_kernel", answering(bad_kernel)},
      {"round_floats", answering(round_floats)},
  };
  for (std::string name; std::getline(std::cin, name);) launchers.at(name)();
}
