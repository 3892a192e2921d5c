// exit_policy: two small linear layers on first tokens. Included like vec.h.
//
// Every (row, output) dot product is accumulated in the same order whatever the block it falls into, so a row's logit
// does not depend on the other rows of the batch. For one row the pooler is limited by reading its weights once
// (590 KB at H = 384, fp32); for many rows by the multiply-adds.

// NB x OB = W dot products at once, summed across lanes together: lane i * OB + j is x[i] . weight[j].
template <class T, int NB, int OB>
EE_INLINE vec_t<T> dots(const T* const* x, const T* const* weight, int64_t hidden) {
  constexpr int W = Lanes<T>::W;
  vec_t<T> acc[NB * OB] = {};
  int64_t c = 0;
  for (; c + W <= hidden; c += W) {
    vec_t<T> rows[NB];
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i) rows[i] = load(x[i] + c);
#pragma GCC unroll 16
    for (int j = 0; j < OB; ++j) {
      const vec_t<T> column = load(weight[j] + c);
#pragma GCC unroll 4
      for (int i = 0; i < NB; ++i) acc[i * OB + j] += rows[i] * column;
    }
  }
  if (c < hidden) {
    for (int j = 0; j < OB; ++j) {
      const vec_t<T> column = load_part(weight[j] + c, hidden - c);
      for (int i = 0; i < NB; ++i) acc[i * OB + j] += load_part(x[i] + c, hidden - c) * column;
    }
  }
  return row_sums<T>(acc);
}

// out[n][o - o0] = x[n] . weight[o] + bias[o] for `rows` rows and outputs [o0, o1). `tmp` holds W + 1 rows.
template <class T>
static void linear(const T* x, int64_t rows, int64_t hidden, const char* weight, const char* bias, DType dtype,
                   int64_t o0, int64_t o1, T* out, T* tmp) {
  constexpr int W = Lanes<T>::W;
  constexpr int NB = W / 4;  // rows of a full block, against 4 outputs
  const int64_t width = o1 - o0;
  T sums[W];
  T* biases = tmp + W * hidden;
  for (int64_t o = o0; o < o1; o += W) {
    const T* w[W];
    const int64_t outputs = o + W <= o1 ? W : o1 - o;
    for (int j = 0; j < W; ++j) {  // past the end the last row is used again, and its sums dropped
      w[j] = j < outputs ? view_as(weight, (o + j) * hidden, hidden, dtype, tmp + j * hidden) : w[outputs - 1];
    }
    read_as(biases, bias, o, outputs, dtype);
    int64_t n = 0;
    for (; NB > 1 && n + NB <= rows; n += NB) {
      const T* block[NB > 1 ? NB : 1];
      for (int i = 0; i < NB; ++i) block[i] = x + (n + i) * hidden;
      for (int64_t j0 = 0; j0 < outputs; j0 += 4) {
        store(sums, dots<T, NB, 4>(block, w + j0, hidden));
        for (int i = 0; i < NB; ++i) {
          for (int64_t j = j0; j < j0 + 4 && j < outputs; ++j) {
            out[(n + i) * width + o - o0 + j] = sums[i * 4 + j - j0] + biases[j];
          }
        }
      }
    }
    for (; n < rows; ++n) {
      const T* one = x + n * hidden;
      store(sums, dots<T, 1, W>(&one, w, hidden));
      for (int64_t j = 0; j < outputs; ++j) out[n * width + o - o0 + j] = sums[j] + biases[j];
    }
  }
}

EE_INLINE int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Scratch of both stages: converted rows (16-bit dtypes), the layer's output, W converted weight rows and biases.
template <class T>
static int64_t linear_scratch(int64_t rows, int64_t hidden, int64_t width) {
  constexpr int64_t W = Lanes<T>::W;
  const int64_t tmp_row = hidden > W ? hidden : W;
  return static_cast<int64_t>(sizeof(T)) * (rows * hidden + rows * width + W * hidden + tmp_row + 64);
}

template <class T>
static void pooler_rows(const ExitPolicyArgs& args, int64_t n0, int64_t n1, int64_t o0, int64_t o1, T* scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t rows = n1 - n0, hidden = args.hidden, width = o1 - o0;
  T* out = scratch + rows * hidden;
  const T* x = view_as(args.first, n0 * hidden, rows * hidden, args.dtype, scratch);
  linear(x, rows, hidden, args.pooler_weight, args.pooler_bias, args.dtype, o0, o1, out, out + rows * width);
  int64_t i = 0;
  for (; i + W <= rows * width; i += W) store(out + i, vtanh(load(out + i)));
  if (i < rows * width) store_part(out + i, vtanh(load_part(out + i, rows * width - i)), rows * width - i);
  for (int64_t n = 0; n < rows; ++n) {
    write_as(args.state, (n0 + n) * hidden + o0, out + n * width, width, args.dtype);
  }
}

template <class T>
static void policy_rows(const ExitPolicyArgs& args, int64_t n0, int64_t n1, T* scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t rows = n1 - n0, hidden = args.hidden, width = args.width;
  T* out = scratch + rows * hidden;
  T* tmp = out + rows * width;
  // What the policy sees is the state as returned: rounded to its dtype.
  const char* state = args.pooler_weight != nullptr ? args.state : args.first;
  const T* x = view_as(state, n0 * hidden, rows * hidden, args.dtype, scratch);
  linear(x, rows, hidden, args.w1, args.b1, args.policy_dtype, 0, width, out, tmp);
  const T* w2 = view_as(args.w2, 0, width, args.policy_dtype, tmp);
  T b2;
  read_as(&b2, args.b2, 0, 1, args.policy_dtype);
  const int64_t whole = width / W * W;
  for (int64_t n = 0; n < rows; ++n) {
    const T* row = out + n * width;
    vec_t<T> acc = {};
    for (int64_t p = 0; p < whole; p += W) acc += vgelu(load(row + p)) * load(w2 + p);
    if (whole < width) acc += vgelu(load_part(row + whole, width - whole)) * load_part(w2 + whole, width - whole);
    reinterpret_cast<T*>(args.logit)[n0 + n] = sum_lanes<T>(acc) + b2;
  }
}

static int64_t pooler_scratch(const ExitPolicyArgs& args, int64_t rows) {
  return args.dtype == DType::f64 ? linear_scratch<double>(rows, args.hidden, args.hidden)
                                  : linear_scratch<float>(rows, args.hidden, args.hidden);
}
static void pooler_tile(const ExitPolicyArgs& args, int64_t n0, int64_t n1, int64_t o0, int64_t o1, void* scratch) {
  if (args.dtype == DType::f64) {
    pooler_rows(args, n0, n1, o0, o1, static_cast<double*>(scratch));
  } else {
    pooler_rows(args, n0, n1, o0, o1, static_cast<float*>(scratch));
  }
}
static int64_t policy_scratch(const ExitPolicyArgs& args, int64_t rows) {
  const int64_t width = args.width > args.hidden ? args.width : args.hidden;  // tmp also holds w2
  return args.dtype == DType::f64 ? linear_scratch<double>(rows, args.hidden, width)
                                  : linear_scratch<float>(rows, args.hidden, width);
}
static void policy_tile(const ExitPolicyArgs& args, int64_t n0, int64_t n1, void* scratch) {
  if (args.dtype == DType::f64) {
    policy_rows(args, n0, n1, static_cast<double*>(scratch));
  } else {
    policy_rows(args, n0, n1, static_cast<float*>(scratch));
  }
}
