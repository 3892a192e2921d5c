// LayerNorm of a sum of rows, in two passes over one row that stays in L1. Included like vec.h.

// out = (row - mean) / sqrt(var + eps) * weight + bias, var with divisor `hidden`; all as T.
template <class T>
EE_INLINE void normalise(T* row, const T* weight, const T* bias, int64_t hidden, double eps) {
  constexpr int W = Lanes<T>::W;
  vec_t<T> sums[2] = {};
  int64_t c = 0;
  T tail = 0;
  for (; c + 2 * W <= hidden; c += 2 * W) {
    sums[0] += load(row + c);
    sums[1] += load(row + c + W);
  }
  const int64_t whole = c;
  for (; c < hidden; ++c) tail += row[c];
  const T mean = (sum_lanes<T>(sums[0] + sums[1]) + tail) / static_cast<T>(hidden);
  vec_t<T> squares[2] = {};
  tail = 0;
  for (c = 0; c < whole; c += 2 * W) {
    const vec_t<T> a = load(row + c) - mean, b = load(row + c + W) - mean;
    squares[0] += a * a;
    squares[1] += b * b;
  }
  for (; c < hidden; ++c) tail += (row[c] - mean) * (row[c] - mean);
  const T variance = (sum_lanes<T>(squares[0] + squares[1]) + tail) / static_cast<T>(hidden);
  const T rstd = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(variance) + eps));
  for (c = 0; c + W <= hidden; c += W) store(row + c, (load(row + c) - mean) * rstd * load(weight + c) + load(bias + c));
  for (; c < hidden; ++c) row[c] = (row[c] - mean) * rstd * weight[c] + bias[c];
}

template <class T>
EE_INLINE void add_into(T* row, const T* other, int64_t hidden) {
  constexpr int W = Lanes<T>::W;
  int64_t c = 0;
  for (; c + W <= hidden; c += W) store(row + c, load(row + c) + load(other + c));
  for (; c < hidden; ++c) row[c] += other[c];
}
template <class T>
EE_INLINE void add_to(T* row, const T* a, const T* b, int64_t hidden) {
  constexpr int W = Lanes<T>::W;
  int64_t c = 0;
  for (; c + W <= hidden; c += W) store(row + c, load(a + c) + load(b + c));
  for (; c < hidden; ++c) row[c] = a[c] + b[c];
}

// Scratch: the row being summed, two converted rows, converted weight and bias.
static int64_t norm_scratch(const NormArgs& args) { return 5 * 8 * (args.hidden + 8); }

template <class T>
struct NormScratch {
  T *row, *a, *b;
  const T *weight, *bias;
  NormScratch(const NormArgs& args, void* memory) {
    const int64_t step = args.hidden + 8;
    row = static_cast<T*>(memory);
    a = row + step;
    b = a + step;
    weight = view_as(args.weight, 0, args.hidden, args.dtype, b + step);
    bias = view_as(args.bias, 0, args.hidden, args.dtype, b + 2 * step);
  }
  // Where the sum is formed: in the output itself where that holds T.
  T* target(const NormArgs& args, int64_t n) const {
    return is_native<T>(args.dtype) ? reinterpret_cast<T*>(args.out) + n * args.hidden : row;
  }
  void finish(const NormArgs& args, int64_t n, T* sum) const {
    normalise(sum, weight, bias, args.hidden, args.eps);
    if (!is_native<T>(args.dtype)) write_as(args.out, n * args.hidden, sum, args.hidden, args.dtype);
  }
};

template <class T>
static void add_norm(const NormArgs& args, int64_t n0, int64_t n1, void* memory) {
  const NormScratch<T> s(args, memory);
  for (int64_t n = n0; n < n1; ++n) {
    T* sum = s.target(args, n);
    add_to(sum, view_as(args.x, n * args.x_stride, args.hidden, args.dtype, s.a),
           view_as(args.residual, n * args.residual_stride, args.hidden, args.dtype, s.b), args.hidden);
    s.finish(args, n, sum);
  }
}

// A row of a table is a few cache lines somewhere in memory, and the next one somewhere else: nothing but its number
// tells where.
EE_INLINE void fetch_row(const char* table, int64_t row, int64_t bytes) {
  const char* start = table + row * bytes;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(start + b);
}

template <class T>
static void embed_norm(const NormArgs& args, int64_t n0, int64_t n1, void* memory) {
  const NormScratch<T> s(args, memory);
  const int64_t hidden = args.hidden;
  const int64_t row_bytes = hidden * size_of(args.dtype);
  constexpr int64_t kAhead = 4;
  for (int64_t n = n0 - kAhead; n < n1; ++n) {
    if (n + kAhead < n1) {
      fetch_row(args.word, args.ids[n + kAhead], row_bytes);
      fetch_row(args.position, args.positions[n + kAhead], row_bytes);
    }
    if (n < n0) continue;
    T* sum = s.target(args, n);
    const T* word = view_as(args.word, args.ids[n] * hidden, hidden, args.dtype, s.a);
    const int64_t place = args.positions[n] * hidden;
    if (args.token_type != nullptr) {
      const int64_t type = args.types.data != nullptr ? args.types[n] : 0;
      add_to(sum, word, view_as(args.token_type, type * hidden, hidden, args.dtype, s.b), hidden);
      add_into(sum, view_as(args.position, place, hidden, args.dtype, s.a), hidden);
    } else {
      add_to(sum, word, view_as(args.position, place, hidden, args.dtype, s.b), hidden);
    }
    s.finish(args, n, sum);
  }
}

static void add_norm_rows(const NormArgs& args, int64_t n0, int64_t n1, void* scratch) {
  if (args.dtype == DType::f64) {
    add_norm<double>(args, n0, n1, scratch);
  } else {
    add_norm<float>(args, n0, n1, scratch);
  }
}
static void embed_norm_rows(const NormArgs& args, int64_t n0, int64_t n1, void* scratch) {
  if (args.dtype == DType::f64) {
    embed_norm<double>(args, n0, n1, scratch);
  } else {
    embed_norm<float>(args, n0, n1, scratch);
  }
}
