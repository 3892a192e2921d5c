// What a decoding step does between its products, fp32. Included like vec.h.

static void rms_norm_rows(const RmsNormArgs& args, int64_t n0, int64_t n1) {
  constexpr int W = Lanes<float>::W;
  const int64_t hidden = args.hidden, whole = hidden / W * W;
  for (int64_t n = n0; n < n1; ++n) {
    float* x = args.x + n * hidden;
    if (args.add != nullptr) add_into(x, args.add + n * hidden, hidden);
    if (args.out == nullptr) continue;
    float* out = args.out + n * hidden;
    vec_t<float> squares = {};
    for (int64_t c = 0; c < whole; c += W) squares += load(x + c) * load(x + c);
    if (whole < hidden) {
      const vec_t<float> tail = load_part(x + whole, hidden - whole);
      squares += tail * tail;
    }
    const double mean = static_cast<double>(sum_lanes<float>(squares)) / static_cast<double>(hidden);
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(mean + args.eps));
    for (int64_t c = 0; c < whole; c += W) store(out + c, load(x + c) * scale * load(args.weight + c));
    for (int64_t c = whole; c < hidden; ++c) out[c] = x[c] * scale * args.weight[c];
  }
}

// silu(gate) * up, silu(x) = x / (1 + exp(-x)).
static void swiglu_row(const float* gate, const float* up, int64_t width, float* out) {
  constexpr int W = Lanes<float>::W;
  int64_t c = 0;
  for (; c + W <= width; c += W) {
    const vec_t<float> g = load(gate + c);
    store(out + c, g / (vexp(-g) + 1.0f) * load(up + c));
  }
  if (c < width) {
    const vec_t<float> g = load_part(gate + c, width - c);
    store_part(out + c, g / (vexp(-g) + 1.0f) * load_part(up + c, width - c), width - c);
  }
}

EE_INLINE float dot(const float* a, const float* b, int64_t d) {
  constexpr int W = Lanes<float>::W;
  vec_t<float> sum = {};
  int64_t c = 0;
  for (; c + W <= d; c += W) sum += load(a + c) * load(b + c);
  if (c < d) sum += load_part(a + c, d - c) * load_part(b + c, d - c);
  return sum_lanes<float>(sum);
}

EE_INLINE void add_scaled(float* to, const float* from, float scale, int64_t d) {
  constexpr int W = Lanes<float>::W;
  int64_t c = 0;
  for (; c + W <= d; c += W) store(to + c, load(to + c) + load(from + c) * scale);
  for (; c < d; ++c) to[c] += from[c] * scale;
}

// Keys and values are read once for all query heads that share them. Scores of all positions stand in scratch: every
// softmax then sees its maximum before its sum.
static void decode_attention_head(const DecodeAttentionArgs& args, int64_t row, int64_t kv_head, float* scratch) {
  constexpr int W = Lanes<float>::W;
  const int64_t d = args.head_dim, shared = args.heads / args.kv_heads, length = args.lengths[row];
  const int64_t stride = args.kv_heads * d, first = kv_head * shared;
  const float* query = args.query + row * args.query_stride + first * d;
  float* out = args.out + (row * args.heads + first) * d;
  const int32_t* blocks = args.blocks[row];
  const int64_t step = (length + W - 1) / W * W;
  for (int64_t start = 0; start < length; start += args.block_size) {
    const float* keys = args.keys + blocks[start / args.block_size] * args.block_size * stride + kv_head * d;
    const int64_t end = start + args.block_size < length ? start + args.block_size : length;
    for (int64_t p = start; p < end; ++p) {
      for (int64_t q = 0; q < shared; ++q) {
        scratch[q * step + p] = dot(query + q * d, keys + (p - start) * stride, d) * args.scale;
      }
    }
  }
  for (int64_t q = 0; q < shared; ++q) {
    float* scores = scratch + q * step;
    for (int64_t p = length; p < step; ++p) scores[p] = -__builtin_inff();
    vec_t<float> best = load(scores);
    for (int64_t p = W; p < step; p += W) best = vmax<float>(best, load(scores + p));
    const float top = max_lanes<float>(best);
    vec_t<float> sum = {};
    for (int64_t p = 0; p < step; p += W) {
      const vec_t<float> e = vexp(load(scores + p) - top);
      store(scores + p, e);
      sum += e;
    }
    const float scale = 1.0f / sum_lanes<float>(sum);  // of the fill, vexp leaves 2e-38
    for (int64_t p = 0; p < length; ++p) scores[p] *= scale;
    for (int64_t c = 0; c < d; ++c) out[q * d + c] = 0.0f;
  }
  for (int64_t start = 0; start < length; start += args.block_size) {
    const float* values = args.values + blocks[start / args.block_size] * args.block_size * stride + kv_head * d;
    const int64_t end = start + args.block_size < length ? start + args.block_size : length;
    for (int64_t p = start; p < end; ++p) {
      for (int64_t q = 0; q < shared; ++q) {
        add_scaled(out + q * d, values + (p - start) * stride, scratch[q * step + p], d);
      }
    }
  }
}
