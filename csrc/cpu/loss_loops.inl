// LossLoops; part of loops.inl.

// A row is taken in blocks that fit the nearest cache: each value comes from memory once, and a long
// row loses no more digits than a short one (sums over blocks are in double).
constexpr int64_t kBlock = 2048;

template <class T>
inline float block_top(const T* z, int64_t n) {
  float best = -__builtin_inff();
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) {
    const float value = load(z[j]);
    best = value > best ? value : best;
  }
  return best;
}

template <class Term>
inline double block_sum(int64_t n, Term term) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += term(j);
  return sum;
}

template <class T>
RowStatistics statistics(const T* z, int64_t n, float temperature, const T* teacher,
                         const float* shares) {
  const float scale = 1 / temperature;
  const bool is_warm = temperature != 1;
  float top = -__builtin_inff();
  double sum = 0, sum_tau = 0, difference = 0;
  int64_t best_block = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const T* part = z + start;
    const int64_t size = start + kBlock < n ? kBlock : n - start;
    const float new_top = block_top(part, size);
    if (new_top > top) {
      sum *= exponential(top - new_top);
      sum_tau *= exponential((top - new_top) * scale);
      top = new_top;
      best_block = start;
    }
    const float base = top == -__builtin_inff() ? 0.f : top;  // nothing but -inf so far, or NaN
    sum += block_sum(size, [=](int64_t j) { return exponential(load(part[j]) - base); });
    if (is_warm)
      sum_tau +=
          block_sum(size, [=](int64_t j) { return exponential((load(part[j]) - base) * scale); });
    if (shares)
      difference += block_sum(size, [=](int64_t j) {
        const float share = shares[start + j];  // 0 where the teacher is -inf
        return share == 0.f ? 0.f : share * (load(teacher[start + j]) - load(part[j]));
      });
  }
  int64_t best = best_block;
  while (best < n && load(z[best]) != top) ++best;
  return {top, float(sum), is_warm ? float(sum_tau) : float(sum), float(difference) * scale,
          best < n ? best : 0};
}

template <class T>
void softmax(const T* z, int64_t n, float temperature, float shift, float* out) {
  const float scale = 1 / temperature;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = exponential(load(z[j]) * scale - shift);
}

template <class T>
void exponentials(const T* z, int64_t n, float top, float temperature, float* out) {
  const float scale = 1 / temperature;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = exponential((load(z[j]) - top) * scale);
}

template <class T>
void gradient(T* z, int64_t n, float lse, float strength) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(z + j, strength * exponential(load(z[j]) - lse));
}

template <class T>
void student_gradient(T* z, int64_t n, float lse, float strength, float lse_tau, float pull,
                      float temperature, const float* teacher) {
  // p - teacher is exactly 0 where the two are equal; a product of each would not be.
  if (temperature == 1) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float p = exponential(load(z[j]) - lse);
      store(z + j, strength * p + pull * (p - teacher[j]));
    }
    return;
  }
  const float scale = 1 / temperature;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float value = load(z[j]);
    store(z + j, strength * exponential(value - lse) +
                     pull * (exponential(value * scale - lse_tau) - teacher[j]));
  }
}

template <class T>
void set(T* z, int64_t column, float value) {
  store(z + column, value);
}

template <class T>
float at(const T* z, int64_t column) {
  return load(z[column]);
}

template <class T>
constexpr LossLoops<T> kLossLoops = {statistics<T>,       softmax<T>,  exponentials<T>, gradient<T>,
                                     student_gradient<T>, set<T>, at<T>};
