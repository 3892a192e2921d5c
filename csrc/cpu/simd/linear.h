// act(x W^T + b) on a weight packed into panels of kPanel outputs: element k * kPanel + j of panel p is
// weight[p * kPanel + j][k]. Included like vec.h.
//
// Few rows are limited by the bytes of the weight, many by multiply-adds, and in between both take as long: so while
// the rows of one panel are computed, the next panel is fetched (into L1; into L2 alone is no faster). A tile of
// kTileRows rows by kTilePanels panels is held in registers over a block of k. Each output is the sum over blocks of a
// sum over ascending k, so that a row's result does not depend on the rows computed with it.
// Zen 3, 2 cores, 14 rows of 384 -> 1152, weight not in any cache: 80 us, against 76 with the weight in L3.

constexpr int kPanelVectors = kPanel * 4 / EE_VECTOR_BYTES;
// Accumulators fill the registers but for the vectors of the weight and one broadcast element.
constexpr int kTilePanels = EE_REGISTERS == 32 && kPanelVectors == 1 ? 2 : 1;
constexpr int kTileRows = (EE_REGISTERS - 3) / (kTilePanels * kPanelVectors) < 12
                              ? (EE_REGISTERS - 3) / (kTilePanels * kPanelVectors)
                              : 12;
// k of one block: its 24 KB of a panel stay in L1 from one tile of rows to the next.
constexpr int64_t kBlock = 384;

// What to fetch meanwhile: `lines` cache lines for every 8 steps of k.
struct Fetch {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;
};

template <int M, int Q>
static void linear_tile(const float* x, int64_t x_stride, int64_t count, const float* panel, int64_t panel_stride,
                        float* out, int64_t out_stride, bool add, Fetch& fetch) {
  constexpr int W = Lanes<float>::W, V = kPanelVectors;
  vec_t<float> acc[M][Q * V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < Q * V; ++v) acc[m][v] = vec_t<float>{};
  }
  const float* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) rows[m] = x + m * x_stride;
  const char* at = fetch.at;
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    vec_t<float> w[Q * V];
#pragma GCC unroll 8
    for (int v = 0; v < Q * V; ++v) w[v] = load(panel + v / V * panel_stride + k * kPanel + v % V * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float scalar = rows[m][k];
#pragma GCC unroll 8
      for (int v = 0; v < Q * V; ++v) acc[m][v] += w[v] * scalar;
    }
  };
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    if (at < fetch.end) {
      for (int64_t l = 0; l < fetch.lines; ++l) __builtin_prefetch(at + l * 64, 0, 3);
      at += fetch.lines * 64;
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) step(k + i);
  }
  for (; k < count; ++k) step(k);
  fetch.at = at;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < Q * V; ++v) {
      float* to = out + m * out_stride + v * W;
      store(to, add ? load(to) + acc[m][v] : acc[m][v]);
    }
  }
}

template <int Q, int M = kTileRows>
static void linear_rows(int64_t rows, const float* x, int64_t x_stride, int64_t count, const float* panel,
                        int64_t panel_stride, float* out, int64_t out_stride, bool add, Fetch& fetch) {
  if constexpr (M > 1) {
    if (rows < M) {
      return linear_rows<Q, M - 1>(rows, x, x_stride, count, panel, panel_stride, out, out_stride, add, fetch);
    }
  }
  linear_tile<M, Q>(x, x_stride, count, panel, panel_stride, out, out_stride, add, fetch);
}

// Bias and activation of `rows` rows of a tile that is `columns` wide; `tile` is where the sums stand.
static void finish_tile(const LinearArgs& args, int64_t rows, const float* tile, int64_t tile_stride, int64_t n,
                        int64_t o, int64_t columns) {
  constexpr int W = Lanes<float>::W;
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = tile + m * tile_stride;
    float* to = args.out + (n + m) * args.outputs + o;
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      vec_t<float> y = load(from + c);
      if (args.bias != nullptr) y += load(args.bias + o + c);
      store(to + c, args.gelu ? vgelu(y) : y);
    }
    if (c < columns) {
      vec_t<float> y = load_part(from + c, columns - c);
      if (args.bias != nullptr) y += load_part(args.bias + o + c, columns - c);
      store_part(to + c, args.gelu ? vgelu(y) : y, columns - c);
    }
  }
}

template <int Q>
static void linear_panels(const LinearArgs& args, int64_t n0, int64_t n1, int64_t panel, const char* next,
                          int64_t next_bytes) {
  const int64_t rows = n1 - n0, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t panel_stride = args.inputs * kPanel;
  const int64_t o = panel * kPanel;
  const int64_t left = args.outputs - o;
  const int64_t columns = left < Q * kPanel ? left : Q * kPanel;
  const bool whole = columns == Q * kPanel;
  const float* weight = args.weight + panel * panel_stride;
  // Tiles of equal height: a last one of one or two rows would wait for its own latency.
  const int64_t height = rows / tiles, taller = rows % tiles;
  const int64_t chunks = tiles * ((args.inputs + 7) / 8);
  Fetch fetch;
  fetch.at = next;
  fetch.end = next + next_bytes;
  fetch.lines = (next_bytes / 64 + chunks - 1) / chunks;
  float edge[kTileRows * Q * kPanel];
  for (int64_t k = 0; k < args.inputs; k += kBlock) {
    const int64_t count = args.inputs - k < kBlock ? args.inputs - k : kBlock;
    int64_t n = n0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t tall = height + (t < taller ? 1 : 0);
      const float* x = args.x + n * args.x_stride + k;
      if (whole) {
        float* out = args.out + n * args.outputs + o;
        linear_rows<Q>(tall, x, args.x_stride, count, weight + k * kPanel, panel_stride, out, args.outputs, k > 0,
                       fetch);
        if (k + kBlock >= args.inputs) finish_tile(args, tall, out, args.outputs, n, o, columns);
      } else {  // outputs past the last one have nowhere to stand: each tile takes all blocks of k at once
        if (k > 0) return;
        for (int64_t b = 0; b < args.inputs; b += kBlock) {
          const int64_t part = args.inputs - b < kBlock ? args.inputs - b : kBlock;
          linear_rows<Q>(tall, x + b, args.x_stride, part, weight + b * kPanel, panel_stride, edge, Q * kPanel, b > 0,
                         fetch);
        }
        finish_tile(args, tall, edge, Q * kPanel, n, o, columns);
      }
      n += tall;
    }
  }
}

static void linear_task(const LinearArgs& args, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const char* next,
                        int64_t next_bytes) {
  const int64_t bytes = args.inputs * kPanel * 4;
  for (int64_t p = p0; p < p1;) {
    const int64_t q = kTilePanels == 2 && p + 2 <= p1 ? 2 : 1;
    const int64_t after = p + q;
    const int64_t ahead = p1 - after < kTilePanels ? p1 - after : kTilePanels;
    const char* coming = after < p1 ? reinterpret_cast<const char*>(args.weight) + after * bytes : next;
    const int64_t coming_bytes = after < p1 ? ahead * bytes : next_bytes;
    if (q == kTilePanels) {
      linear_panels<kTilePanels>(args, n0, n1, p, coming, coming_bytes);
    } else {
      linear_panels<1>(args, n0, n1, p, coming, coming_bytes);
    }
    p = after;
  }
}
