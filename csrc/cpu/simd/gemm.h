// The one register-blocked product both halves of attention use. Included like vec.h.

// c[x][lanes] (+)= sum over r of a[x * sx + r * sr] * b[r][lanes], for X rows and QV vectors of lanes. a is read one
// element at a time and broadcast, so it needs neither packing into vectors nor a width that divides W.
template <class T, int X, int QV>
EE_INLINE void panel(const T* a, int64_t sx, int64_t sr, int64_t count, const T* b, T* c, bool add) {
  constexpr int W = Lanes<T>::W;
  vec_t<T> acc[X][QV];
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
    for (int q = 0; q < QV; ++q) acc[x][q] = add ? load(c + (x * QV + q) * W) : vec_t<T>{};
  }
  for (int64_t r = 0; r < count; ++r) {
    vec_t<T> lanes[QV];
#pragma GCC unroll 2
    for (int q = 0; q < QV; ++q) lanes[q] = load(b + (r * QV + q) * W);
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      const T scalar = a[x * sx + r * sr];
#pragma GCC unroll 2
      for (int q = 0; q < QV; ++q) acc[x][q] += lanes[q] * scalar;
    }
  }
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
    for (int q = 0; q < QV; ++q) store(c + (x * QV + q) * W, acc[x][q]);
  }
}

// The panel over any number of rows x. Eight accumulators at least hide the latency of a fused multiply-add (4 cycles
// on two ports); more than the registers hold would spill.
template <class T, int QV>
static void product(const T* a, int64_t sx, int64_t sr, int64_t rows, int64_t count, const T* b, T* c, bool add) {
  constexpr int W = Lanes<T>::W;
  constexpr int X = EE_REGISTERS == 32 ? 8 : (QV == 2 ? 4 : 8);
  int64_t x = 0;
  for (; x + X <= rows; x += X) panel<T, X, QV>(a + x * sx, sx, sr, count, b, c + x * QV * W, add);
  if constexpr (X == 8) {
    if (x + 4 <= rows) {
      panel<T, 4, QV>(a + x * sx, sx, sr, count, b, c + x * QV * W, add);
      x += 4;
    }
  }
  if (x + 2 <= rows) {
    panel<T, 2, QV>(a + x * sx, sx, sr, count, b, c + x * QV * W, add);
    x += 2;
  }
  if (x < rows) panel<T, 1, QV>(a + x * sx, sx, sr, count, b, c + x * QV * W, add);
}
