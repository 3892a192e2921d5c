// Vectors of one instruction set through the compiler's vector extension: EE_VECTOR_BYTES wide, any CPU.
// No include guard and no standard header: kernels.inc includes it inside the namespace of each instruction set, so
// that no function compiled for AVX-512 can be merged with one that an older CPU calls.

#define EE_INLINE static inline __attribute__((always_inline))

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vec __attribute__((vector_size(EE_VECTOR_BYTES)));
  typedef int32_t ivec __attribute__((vector_size(EE_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(EE_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int W = EE_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef double vec __attribute__((vector_size(EE_VECTOR_BYTES)));
  typedef int64_t ivec __attribute__((vector_size(EE_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(EE_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int W = EE_VECTOR_BYTES / 8;
};
template <class T>
using vec_t = typename Lanes<T>::vec;

template <class T>
EE_INLINE vec_t<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::unaligned*>(p);
}
template <class T>
EE_INLINE void store(T* p, vec_t<T> v) {
  *reinterpret_cast<typename Lanes<T>::unaligned*>(p) = v;
}
// The first n lanes, zeros behind them; never reads past p + n.
template <class T>
EE_INLINE vec_t<T> load_part(const T* p, int64_t n) {
  vec_t<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
EE_INLINE void store_part(T* p, vec_t<T> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
template <class T>
EE_INLINE vec_t<T> splat(T x) {
  return vec_t<T>{} + x;
}
template <class T>
EE_INLINE vec_t<T> vmax(vec_t<T> a, vec_t<T> b) {
  return a > b ? a : b;
}

// Lane order of the two halves of a butterfly over blocks of S lanes: even blocks of a and b, or odd blocks.
constexpr int pick_even(int lane, int s, int w) { return (lane / s) % 2 == 0 ? lane : lane - s + w; }
constexpr int pick_odd(int lane, int s, int w) { return (lane / s) % 2 == 0 ? lane + s : lane + w; }

template <int... I>
struct Seq {};
template <int N, int... I>
struct MakeSeq : MakeSeq<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSeq<0, I...> {
  typedef Seq<I...> type;
};

#if defined(__clang__)
#define EE_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EE_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename Lanes<T>::ivec{__VA_ARGS__})
#endif

template <class T, int S, int... I>
EE_INLINE void butterfly(vec_t<T>& a, vec_t<T>& b, Seq<I...>) {
  constexpr int W = Lanes<T>::W;
  const vec_t<T> even = EE_SHUFFLE(T, a, b, pick_even(I, S, W)...);
  const vec_t<T> odd = EE_SHUFFLE(T, a, b, pick_odd(I, S, W)...);
  a = even;
  b = odd;
}

// W x W transpose in log2(W) rounds of butterflies (Eklundh 1972).
template <class T, int S = 1>
EE_INLINE void transpose(vec_t<T>* v) {
  constexpr int W = Lanes<T>::W;
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & S) == 0) butterfly<T, S>(v[i], v[i + S], typename MakeSeq<W>::type());
    }
    transpose<T, S * 2>(v);
  }
}

// Lane i of the result is the sum over v[i]'s lanes, each in the same order whatever i is; v is overwritten.
template <class T, int S = 1>
EE_INLINE vec_t<T> row_sums(vec_t<T>* v) {
  constexpr int W = Lanes<T>::W;
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W / (2 * S); ++i) {
      butterfly<T, S>(v[2 * i], v[2 * i + 1], typename MakeSeq<W>::type());
      v[i] = v[2 * i] + v[2 * i + 1];
    }
    return row_sums<T, S * 2>(v);
  } else {
    return v[0];
  }
}

template <class T>
EE_INLINE T sum_lanes(vec_t<T> v) {
  constexpr int W = Lanes<T>::W;
  T part[W];
  store(part, v);
#pragma GCC unroll 4
  for (int s = W / 2; s >= 1; s /= 2) {
    for (int i = 0; i < s; ++i) part[i] += part[i + s];
  }
  return part[0];
}
template <class T>
EE_INLINE T max_lanes(vec_t<T> v) {
  T best = v[0];
  for (int i = 1; i < Lanes<T>::W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, by the minimax polynomial of Cephes expf; relative error below 2e-7 on
// [-87, 88], clamped outside. NaN passes through (the clamps compare false).
EE_INLINE vec_t<float> vexp(vec_t<float> x) {
  typedef Lanes<float>::ivec ivec;
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const vec_t<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vec_t<float> shifted = x * 1.44269504f + magic;
  const vec_t<float> n = shifted - magic;
  vec_t<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec_t<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ivec exponent = ((ivec)shifted - (ivec)magic) << 23;
  return (vec_t<float>)((ivec)p + exponent);
}
EE_INLINE vec_t<double> vexp(vec_t<double> x) {
  for (int i = 0; i < Lanes<double>::W; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Cephes tanhf: polynomial near 0 (where 1 - 2 / (e^2x + 1) would cancel), exponential form beyond 0.625.
EE_INLINE vec_t<float> vtanh(vec_t<float> x) {
  const vec_t<float> magnitude = x < 0.0f ? -x : x;
  const vec_t<float> z = x * x;
  vec_t<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vec_t<float> near = p * z * x + x;
  const vec_t<float> tail = 1.0f - 2.0f / (vexp(magnitude + magnitude) + 1.0f);
  const vec_t<float> far = x < 0.0f ? -tail : tail;
  return magnitude < 0.625f ? near : far;
}
EE_INLINE vec_t<double> vtanh(vec_t<double> x) {
  for (int i = 0; i < Lanes<double>::W; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// gelu(x) = x / 2 * (1 + erf(x / sqrt 2)), the erf form that BERT uses. erf by Abramowitz and Stegun 7.1.26,
// absolute error below 2e-7.
EE_INLINE vec_t<float> vgelu(vec_t<float> x) {
  const vec_t<float> u = (x < 0.0f ? -x : x) * 0.70710678f;
  const vec_t<float> t = 1.0f / (u * 0.3275911f + 1.0f);
  vec_t<float> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec_t<float> tail = p * t * vexp(-u * u);  // erfc(|x| / sqrt 2)
  return x * 0.5f * (x < 0.0f ? tail : 2.0f - tail);
}
EE_INLINE vec_t<double> vgelu(vec_t<double> x) {
  for (int i = 0; i < Lanes<double>::W; ++i) x[i] = x[i] * 0.5 * (1.0 + __builtin_erf(x[i] * 0.70710678118654752440));
  return x;
}
