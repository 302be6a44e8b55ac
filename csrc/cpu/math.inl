// What the loops share: storage types and elementary functions, written so that a compiler makes
// vectors of them. Part of loops_<set>.cpp, inside namespace MATFORMER_SET; see loops.inl.

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float load(float value) { return value; }
inline float load(bfloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

inline void store(float* to, float value) { *to = value; }
inline void store(bfloat16* to, float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  to->bits = uint16_t((value == value ? rounded : 0x7fc00000u) >> 16);
}

// exp(x) to about 2 units in the last place; 0 below the smallest normal number, infinity above
// 88.3, NaN of NaN.
// x = n log 2 + r, and a polynomial of r.
inline float exponential(float x) {
  constexpr float kLog2e = 1.44269504089f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
  const float clamped = x > 89.f ? 89.f : (x < -87.f ? -87.f : x);
  const float shifted = clamped * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const float power = bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
  const float result = p * power;
  return x < -87.f ? 0.f : result;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// The normal distribution's cumulative function, to about 1e-7 (Abramowitz and Stegun 7.1.26 of
// erfc, with x / sqrt(2) folded in). `density` is exp(-x^2 / 2), which callers have use for too.
inline float normal_cdf(float x, float density) {
  const float size = x < 0.f ? -x : x;
  const float t = 1.f / (1.f + 0.2316418882f * size);
  float p = 0.5f * 1.061405429f;
  p = p * t - 0.5f * 1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t - 0.5f * 0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  const float tail = p * t * density;
  return x < 0.f ? tail : 1.f - tail;
}
