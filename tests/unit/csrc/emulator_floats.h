// CUDA's narrow floats on a CPU. Rounding is to nearest, ties to even; all NaNs become one.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace emulator {

constexpr uint16_t kNaN = 0x7fff;

inline uint32_t bits_of(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

inline float float_of(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// The upper bits, `dropped` lower ones rounded away.
inline uint32_t rounded(uint32_t bits, int dropped) {
  const uint32_t below_half = (1u << (dropped - 1)) - 1;
  return (bits + below_half + (bits >> dropped & 1)) >> dropped;
}

}  // namespace emulator

inline float __bfloat162float(__nv_bfloat16 value) {
  return emulator::float_of(uint32_t(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float value) {
  if (isnan(value)) return {emulator::kNaN};
  return {uint16_t(emulator::rounded(emulator::bits_of(value), 16))};
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
  float size = ldexpf(float(fraction | 0x400), exponent - 25);
  if (exponent == 0) size = ldexpf(float(fraction), -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return value.bits >> 15 ? -size : size;
}

inline __half __float2half(float value) {
  if (isnan(value)) return {emulator::kNaN};
  const float size = fabsf(value);
  uint32_t bits = emulator::rounded(emulator::bits_of(size) - (112u << 23), 13);  // another bias
  if (size < ldexpf(1, -14)) bits = uint32_t(rintf(ldexpf(size, 24)));  // units of 2^-24
  if (size >= 65520) bits = 0x7c00;                                     // rounds to infinity
  return {uint16_t(bits | (signbit(value) ? 0x8000 : 0))};
}
