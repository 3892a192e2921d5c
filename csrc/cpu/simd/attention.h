// lead_attention for one (sequence, head). Included like vec.h.
//
// Many queries: the vector lanes are queries. Q is transposed once, scores and output are then products whose left
// side (keys, values) is broadcast element by element, softmax needs no reduction across lanes, and any head size
// works. Keys come in blocks with a running maximum (Milakov and Gimelshein 2018), so that the scores of a block stay
// in L1 whatever the length. Few queries (first tokens only): one query at a time, lanes along the head.
//
// Keys are taken in the order positions 1, 2, ..., n - 1, 0, which is how the lead layout stores them.

constexpr int kKeyBlock = 64;
constexpr int64_t kFewQueries = 3;

template <class T>
struct HeadScratch {
  T *key, *value, *query, *query_t, *out_t, *scores, *row;
};

template <class T>
static int64_t carve(const AttentionArgs& args, const AttentionPlan& plan, T* base, HeadScratch<T>* s) {
  constexpr int64_t W = Lanes<T>::W, L = 2 * W;
  const int64_t d = (args.head_dim + W - 1) / W * W;
  const int64_t n = (plan.max_length + W - 1) / W * W;
  const int64_t block = n > kKeyBlock * L ? n : kKeyBlock * L;
  T* p = base;
  const auto take = [&](int64_t count) {
    T* start = p;
    p += (count + 15) / 16 * 16;
    return start;
  };
  HeadScratch<T> made = {take(n * d), take(n * d), take(L * d), take(L * d), take(L * d), take(block), take(d)};
  if (s != nullptr) *s = made;
  return (p - base) * static_cast<int64_t>(sizeof(T));
}

// Where the rows of one sequence stand, in q/k/v and in the output.
struct SequenceView {
  int64_t first, others, length;    // row of position 0, row of position 1, number of tokens
  int64_t out_first, out_others;    // output rows of position 0 and 1
  int64_t query_begin, query_end;   // positions served
};

EE_INLINE SequenceView view_sequence(const AttentionArgs& args, int64_t served) {
  const int64_t b = args.rows != nullptr ? args.rows[served] : served;
  const int64_t before = args.offsets != nullptr ? args.offsets[served] : args.cu_seqlens[b] - b;
  SequenceView s;
  s.first = b;
  s.others = args.batch + args.cu_seqlens[b] - b;
  s.length = args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  s.out_first = served;
  s.out_others = before + (args.part == kAll ? args.n_rows : 0);
  s.query_begin = args.part == kOthers ? 1 : 0;
  s.query_end = args.part == kFirst ? 1 : s.length;
  return s;
}

// Keys or values of one head, positions 1 .. n - 1 then 0, as contiguous rows of d.
template <class T>
static void pack_head(T* out, const char* base, int64_t stride, int64_t column, const SequenceView& s, int64_t d,
                      DType dtype) {
  if (is_native<T>(dtype)) {
    constexpr int W = Lanes<T>::W;
    const T* p = reinterpret_cast<const T*>(base) + column;
    for (int64_t i = 0; i < s.length; ++i) {
      const T* row = p + (i + 1 < s.length ? s.others + i : s.first) * stride;
      int64_t c = 0;
      for (; c + W <= d; c += W) store(out + i * d + c, load(row + c));
      for (; c < d; ++c) out[i * d + c] = row[c];
    }
    return;
  }
  for (int64_t i = 0; i < s.length; ++i) {
    const int64_t row = i + 1 < s.length ? s.others + i : s.first;
    read_as(out + i * d, base, row * stride + column, d, dtype);
  }
}

// query_t[c][lane] = scale * query of position `begin + lane`, zero past the last query.
template <class T, int QV>
static void transpose_queries(const AttentionArgs& args, const SequenceView& s, int64_t column, int64_t begin,
                              int64_t count, const HeadScratch<T>& scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t d = args.head_dim;
  const T scale = static_cast<T>(args.scale);
  const T* rows[QV * W];
  for (int64_t l = 0; l < count; ++l) {
    const int64_t position = begin + l;
    const int64_t row = position == 0 ? s.first : s.others + position - 1;
    rows[l] = view_as(args.query, row * args.query_stride + column, d, args.dtype, scratch.query + l * d);
  }
  for (int q = 0; q < QV; ++q) {
    for (int64_t c = 0; c < d; c += W) {
      vec_t<T> v[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        const int64_t lane = q * W + l;
        v[l] = vec_t<T>{};
        if (lane < count) v[l] = (c + W <= d ? load(rows[lane] + c) : load_part(rows[lane] + c, d - c)) * scale;
      }
      transpose<T>(v);
      const int64_t stop = c + W <= d ? W : d - c;
      for (int64_t j = 0; j < stop; ++j) store(scratch.query_t + ((c + j) * QV + q) * W, v[j]);
    }
  }
}

template <class T, int QV>
static void write_queries(const AttentionArgs& args, const SequenceView& s, int64_t column, int64_t begin,
                          int64_t count, const vec_t<T>* inverse, const HeadScratch<T>& scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t d = args.head_dim, hidden = args.num_heads * d;
  const bool native = is_native<T>(args.dtype);
  for (int q = 0; q < QV; ++q) {
    for (int64_t c = 0; c < d; c += W) {
      vec_t<T> v[W];
      const int64_t columns = c + W <= d ? W : d - c;
      for (int64_t j = 0; j < W; ++j) {
        v[j] = j < columns ? load(scratch.out_t + ((c + j) * QV + q) * W) * inverse[q] : vec_t<T>{};
      }
      transpose<T>(v);
      for (int l = 0; l < W; ++l) {
        const int64_t position = begin + q * W + l;
        if (position >= begin + count) break;
        const int64_t row = position == 0 ? s.out_first : s.out_others + position - 1;
        const int64_t offset = row * hidden + column + c;
        if (native && columns == W) {
          store(reinterpret_cast<T*>(args.out) + offset, v[l]);
        } else {
          store(scratch.row, v[l]);
          write_as(args.out, offset, scratch.row, columns, args.dtype);
        }
      }
    }
  }
}

template <class T, int QV>
static void query_block(const AttentionArgs& args, const AttentionPlan& plan, const SequenceView& s, int64_t head,
                        int64_t begin, int64_t count, const HeadScratch<T>& scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t d = args.head_dim, n = s.length;
  const T* bias = nullptr;
  if (plan.reversed_bias != nullptr) {
    bias = reinterpret_cast<const T*>(plan.reversed_bias) + head * plan.bias_stride + args.bias_span - 1 + begin;
  }
  transpose_queries<T, QV>(args, s, head * d, begin, count, scratch);
  vec_t<T> top[QV], sum[QV];
  for (int64_t k0 = 0; k0 < n; k0 += kKeyBlock) {
    const int64_t keys = n - k0 < kKeyBlock ? n - k0 : kKeyBlock;
    T* scores = scratch.scores;
    product<T, QV>(scratch.key + k0 * d, d, 1, keys, d, scratch.query_t, scores, false);
    if (bias != nullptr) {
      for (int64_t k = 0; k < keys; ++k) {
        const int64_t position = k0 + k + 1 < n ? k0 + k + 1 : 0;
        for (int q = 0; q < QV; ++q) {
          T* cell = scores + (k * QV + q) * W;
          store(cell, load(cell) + load(bias - position + q * W));
        }
      }
    }
    for (int q = 0; q < QV; ++q) {
      vec_t<T> best = load(scores + q * W);
      for (int64_t k = 1; k < keys; ++k) best = vmax<T>(best, load(scores + (k * QV + q) * W));
      if (k0 > 0) {
        best = vmax<T>(best, top[q]);
        const vec_t<T> shrink = vexp(top[q] - best);
        sum[q] *= shrink;
        for (int64_t c = 0; c < d; ++c) {
          T* cell = scratch.out_t + (c * QV + q) * W;
          store(cell, load(cell) * shrink);
        }
      } else {
        sum[q] = vec_t<T>{};
      }
      top[q] = best;
      for (int64_t k = 0; k < keys; ++k) {
        T* cell = scores + (k * QV + q) * W;
        const vec_t<T> weight = vexp(load(cell) - best);
        store(cell, weight);
        sum[q] += weight;
      }
    }
    product<T, QV>(scratch.value + k0 * d, 1, d, d, keys, scores, scratch.out_t, k0 > 0);
  }
  for (int q = 0; q < QV; ++q) sum[q] = T(1) / sum[q];
  write_queries<T, QV>(args, s, head * d, begin, count, sum, scratch);
}

// A head's keys or values in the order above: `stride` apart from `others` on, position 0 last.
template <class T>
struct HeadRows {
  const T *others, *first;
  int64_t stride, count;  // count: positions 1 .. n - 1
  const T* operator[](int64_t i) const { return i < count ? others + i * stride : first; }
};

template <class T>
static void single_query(const AttentionArgs& args, const AttentionPlan& plan, const SequenceView& s, int64_t head,
                         int64_t position, const HeadRows<T>& key, const HeadRows<T>& value,
                         const HeadScratch<T>& scratch) {
  constexpr int W = Lanes<T>::W;
  const int64_t d = args.head_dim, n = s.length;
  const int64_t query_row = position == 0 ? s.first : s.others + position - 1;
  const T* query = view_as(args.query, query_row * args.query_stride + head * d, d, args.dtype, scratch.query);
  T* scores = scratch.scores;
  const T scale = static_cast<T>(args.scale);
  const int64_t whole = d / W * W;
  vec_t<T> best = {};
  for (int64_t k0 = 0; k0 < n; k0 += W) {
    vec_t<T> acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      acc[i] = vec_t<T>{};
      if (k0 + i < n) {
        const T* row = key[k0 + i];
        for (int64_t c = 0; c < whole; c += W) acc[i] += load(query + c) * load(row + c);
        if (whole < d) acc[i] += load_part(query + whole, d - whole) * load_part(row + whole, d - whole);
      }
    }
    vec_t<T> dots = row_sums<T>(acc) * scale;
    if (plan.reversed_bias != nullptr) {
      // Index (j - i) + M - 1, mirrored; keys ascend from position k0 + 1, position 0 comes last.
      const T* bias = reinterpret_cast<const T*>(plan.reversed_bias) + head * plan.bias_stride;
      for (int i = 0; i < W && k0 + i < n; ++i) {
        const int64_t j = k0 + i + 1 < n ? k0 + i + 1 : 0;
        dots[i] += bias[args.bias_span - 1 + position - j];
      }
    }
    for (int i = n - k0 < W ? static_cast<int>(n - k0) : W; i < W; ++i) dots[i] = T(-1e30);
    best = k0 == 0 ? dots : vmax<T>(best, dots);
    store(scores + k0, dots);
  }
  const vec_t<T> top = splat(max_lanes<T>(best));
  vec_t<T> sums = {};
  for (int64_t k = 0; k < n; k += W) {
    const vec_t<T> weight = vexp(load(scores + k) - top);
    store(scores + k, weight);
    sums += weight;
  }
  const T inverse = T(1) / sum_lanes<T>(sums);
  T* out = scratch.out_t;
  for (int64_t c = 0; c < d; c += W) {
    vec_t<T> acc[4] = {};
    const int64_t columns = c + W <= d ? W : d - c;
    int64_t k = 0;
    if (columns == W) {
      for (; k + 4 <= value.count; k += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[i] += load(value.others + (k + i) * value.stride + c) * scores[k + i];
      }
      for (; k < n; ++k) acc[0] += load(value[k] + c) * scores[k];
    } else {
      for (; k < n; ++k) acc[k % 4] += load_part(value[k] + c, columns) * scores[k];
    }
    store(out + c, ((acc[0] + acc[1]) + (acc[2] + acc[3])) * inverse);
  }
  const int64_t row = position == 0 ? s.out_first : s.out_others + position - 1;
  write_as(args.out, (row * args.num_heads + head) * d, out, d, args.dtype);
}

template <class T>
static void attend(const AttentionArgs& args, const AttentionPlan& plan, int64_t unit_begin, int64_t unit_end,
                   void* memory) {
  HeadScratch<T> scratch;
  carve<T>(args, plan, static_cast<T*>(memory), &scratch);
  constexpr int64_t W = Lanes<T>::W;
  const int64_t d = args.head_dim;
  const bool native = is_native<T>(args.dtype);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t head = unit % args.num_heads, column = head * d;
    const SequenceView s = view_sequence(args, unit / args.num_heads);
    const int64_t queries = s.query_end - s.query_begin;
    if (queries <= 0) continue;
    const bool few = queries <= kFewQueries;
    if (!few || !native) {
      pack_head(scratch.key, args.key, args.key_stride, column, s, d, args.dtype);
      pack_head(scratch.value, args.value, args.value_stride, column, s, d, args.dtype);
    }
    if (few) {
      const auto rows = [&](const char* base, int64_t stride, const T* packed) {
        if (!native) return HeadRows<T>{packed, packed + (s.length - 1) * d, d, s.length - 1};
        const T* p = reinterpret_cast<const T*>(base) + column;
        return HeadRows<T>{p + s.others * stride, p + s.first * stride, stride, s.length - 1};
      };
      const HeadRows<T> key = rows(args.key, args.key_stride, scratch.key);
      const HeadRows<T> value = rows(args.value, args.value_stride, scratch.value);
      for (int64_t p = s.query_begin; p < s.query_end; ++p) {
        single_query<T>(args, plan, s, head, p, key, value, scratch);
      }
      continue;
    }
    // Two vectors of queries at a time share the loads of keys and values; fp64 is there to be right, one will do.
    constexpr int64_t kVectors = sizeof(T) == 4 ? 2 : 1;
    for (int64_t p = s.query_begin; p < s.query_end;) {
      const int64_t left = s.query_end - p;
      const int64_t count = left < kVectors * W ? left : kVectors * W;
      if (count > W) {
        query_block<T, kVectors>(args, plan, s, head, p, count, scratch);
      } else {
        query_block<T, 1>(args, plan, s, head, p, count, scratch);
      }
      p += count;
    }
  }
}

static int64_t attention_scratch(const AttentionArgs& args, const AttentionPlan& plan) {
  return args.dtype == DType::f64 ? carve<double>(args, plan, nullptr, nullptr)
                                  : carve<float>(args, plan, nullptr, nullptr);
}
static void attention_units(const AttentionArgs& args, const AttentionPlan& plan, int64_t unit_begin, int64_t unit_end,
                            void* scratch) {
  if (args.dtype == DType::f64) {
    attend<double>(args, plan, unit_begin, unit_end, scratch);
  } else {
    attend<float>(args, plan, unit_begin, unit_end, scratch);
  }
}
