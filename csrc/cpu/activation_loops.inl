// ActivationLoops; part of loops.inl.

template <class T>
void swiglu(const T* h, int64_t n, T* act) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float gate = load(h[2 * j]), up = load(h[2 * j + 1]);
    store(act + j, gate * sigmoid(gate) * up);
  }
}

template <class T>
void gelu(const T* h, int64_t n, T* act) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float x = load(h[j]);
    store(act + j, x * normal_cdf(x, exponential(-0.5f * x * x)));
  }
}

template <class T>
void swiglu_backward_loop(const T* h, const T* d_act, int64_t n, T* act, T* d_h) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float gate = load(h[2 * j]), up = load(h[2 * j + 1]), d = load(d_act[j]);
    const float s = sigmoid(gate), silu = gate * s;
    store(act + j, silu * up);
    store(d_h + 2 * j, d * up * (s + silu * (1.f - s)));
    store(d_h + 2 * j + 1, d * silu);
  }
}

template <class T>
void gelu_backward_loop(const T* h, const T* d_act, int64_t n, T* act, T* d_h) {
  constexpr float kDensityOf0 = 0.39894228040f;  // 1 / sqrt(2 pi)
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float x = load(h[j]), density = exponential(-0.5f * x * x);
    const float cdf = normal_cdf(x, density);
    store(act + j, x * cdf);
    store(d_h + j, load(d_act[j]) * (cdf + x * kDensityOf0 * density));
  }
}

// Where act is not wanted it goes to scratch, rather than out of a second loop, in which a compiler
// may join products and sums in another way.
constexpr int64_t kScratch = 512;

template <class T>
void swiglu_backward(const T* h, const T* d_act, int64_t n, T* act, T* d_h) {
  if (act) return swiglu_backward_loop(h, d_act, n, act, d_h);
  T scratch[kScratch];
  for (int64_t j = 0; j < n; j += kScratch) {
    const int64_t size = n - j < kScratch ? n - j : kScratch;
    swiglu_backward_loop(h + 2 * j, d_act + j, size, scratch, d_h + 2 * j);
  }
}

template <class T>
void gelu_backward(const T* h, const T* d_act, int64_t n, T* act, T* d_h) {
  if (act) return gelu_backward_loop(h, d_act, n, act, d_h);
  T scratch[kScratch];
  for (int64_t j = 0; j < n; j += kScratch) {
    const int64_t size = n - j < kScratch ? n - j : kScratch;
    gelu_backward_loop(h + j, d_act + j, size, scratch, d_h + j);
  }
}

template <class T>
constexpr ActivationLoops<T> kActivationLoops = {swiglu<T>, gelu<T>, swiglu_backward<T>,
                                                 gelu_backward<T>};
