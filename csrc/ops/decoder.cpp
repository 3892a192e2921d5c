// One decoding step of a decoder with exits as one op, on the CPU: embeddings, layers with their paged keys and values,
// what visited layers owe, decisions, compaction. Everything but the head.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "../cpu/parallel.h"
#include "layer.h"
#include "plans.h"

namespace consistentee {

namespace {

constexpr size_t kLayerTensors = 6;  // of one layer in `layers`; kernels/decoder.py has the order

struct Layer {
  const float *input_norm = nullptr, *post_norm = nullptr;
  double input_eps = 0.0, post_eps = 0.0;
  LinearArgs qkv, project, widen, narrow;
  int64_t inner = 0;
  int64_t exit = -1;  // index of a policy, policies.size() at the last layer; -1: no exit
};

struct Plan {
  std::vector<Tensor> held;  // what the pointers below point into
  const float *embedding = nullptr, *cos = nullptr, *sin = nullptr, *final_norm = nullptr;
  double final_eps = 0.0;
  int64_t vocab = 0, hidden = 0, longest = 0, heads = 0, kv_heads = 0, head_dim = 0, wide = 0;
  float scale = 1.0f;
  std::vector<Layer> layers;
  std::vector<ExitPolicyArgs> policies;
};

Plans<Plan> plans;

}  // namespace

int64_t decoder_plan(const Tensor& embedding, const Tensor& cos, const Tensor& sin, const Tensor& final_weight,
                     double final_eps, int64_t num_heads, int64_t kv_heads, double scale, std::vector<Tensor> layers,
                     std::vector<double> eps, std::vector<int64_t> exit_layers, std::vector<Tensor> policies) {
  auto plan = std::make_shared<Plan>();
  check_dim("embedding", embedding, 2);
  check_dim("cos", cos, 2);
  const int64_t hidden = plan->hidden = embedding.size(1);
  plan->vocab = embedding.size(0);
  plan->longest = cos.size(0);
  const int64_t d = plan->head_dim = cos.size(1);
  EE_CHECK(num_heads >= 1 && kv_heads >= 1 && num_heads % kv_heads == 0, "kv_heads must divide num_heads, got ",
           kv_heads, " and ", num_heads);
  EE_CHECK(d % 2 == 0, "cos must have an even width, got ", d);
  EE_CHECK(num_heads * d % kPanel == 0, "num_heads times the width of cos must be a multiple of ", kPanel, ", got ",
           num_heads * d);
  plan->embedding = elements<const float>("embedding", embedding, {plan->vocab, hidden});
  plan->cos = elements<const float>("cos", cos, {plan->longest, d});
  plan->sin = elements<const float>("sin", sin, {plan->longest, d});
  plan->final_norm = vector_of("final_weight", final_weight, hidden);
  plan->final_eps = final_eps;
  plan->heads = num_heads;
  plan->kv_heads = kv_heads;
  plan->scale = static_cast<float>(scale);
  const size_t count = layers.size() / kLayerTensors;
  EE_CHECK(count > 0 && layers.size() == count * kLayerTensors && eps.size() == 2 * count, "layers must hold ",
           kLayerTensors, " tensors and eps 2 numbers for each layer, got ", layers.size(), " and ", eps.size());
  plan->layers.resize(count);
  for (size_t l = 0; l < count; ++l) {
    const Tensor* t = layers.data() + l * kLayerTensors;
    Layer& layer = plan->layers[l];
    layer.input_norm = vector_of("input_norm_weight", t[0], hidden);
    layer.input_eps = eps[2 * l];
    layer.qkv.weight = panels_of("qkv_weight", t[1], hidden, (num_heads + 2 * kv_heads) * d);
    layer.project.weight = panels_of("output_weight", t[2], num_heads * d, hidden);
    layer.post_norm = vector_of("post_norm_weight", t[3], hidden);
    layer.post_eps = eps[2 * l + 1];
    check_dim("down_weight", t[5], 3);
    layer.inner = t[5].size(1);
    layer.widen.weight = panels_of("gate_up_weight", t[4], hidden, 2 * layer.inner);
    layer.narrow.weight = panels_of("down_weight", t[5], layer.inner, hidden);
    layer.qkv.next = layer.project.weight;
    layer.project.next = layer.widen.weight;
    layer.widen.next = layer.narrow.weight;
    plan->wide = std::max(plan->wide, layer.inner);
  }
  for (size_t l = 0; l + 1 < count; ++l) plan->layers[l].narrow.next = plan->layers[l + 1].qkv.weight;
  EE_CHECK(!exit_layers.empty() && policies.size() == 4 * (exit_layers.size() - 1),
           "policies must hold 4 tensors for each of exit_layers but the last, got ", policies.size(), " for ",
           exit_layers.size());
  place_exits(plan->layers, exit_layers);
  plan->policies.resize(exit_layers.size() - 1);
  for (size_t e = 0; e < plan->policies.size(); ++e) read_policy(plan->policies[e], policies.data() + 4 * e, hidden);
  plan->held = {embedding, cos, sin, final_weight};
  for (Tensor& tensor : layers) plan->held.push_back(std::move(tensor));
  for (Tensor& tensor : policies) plan->held.push_back(std::move(tensor));
  return plans.put(std::move(plan));
}

namespace {

// Keys, values and exit states of all sequences.
struct Cache {
  float *keys = nullptr, *values = nullptr, *states = nullptr;
  int64_t slots = 0, block_size = 0;
};

// How rows may leave.
struct Rules {
  const float* threshold_logit = nullptr;
  const int32_t *script = nullptr, *min_depth = nullptr, *max_depth = nullptr;
};

struct Results {
  float* normed;
  int32_t* layers;
  float* probs;
};

// One step on its way down. x_ [rows, hidden]: the residual stream of the live rows; normed_ [live + owed, hidden].
class Step {
 public:
  Step(const Plan& plan, const Tensor& like, const Cache& cache, const Rules& rules, const Results& results,
       int64_t rows, const int64_t* ids, const int64_t* positions, const int32_t* blocks, int64_t max_blocks,
       int32_t* watermarks)
      : plan_(plan), backend_(like), cache_(cache), rules_(rules), results_(results), positions_(positions),
        watermarks_(watermarks), rows_(rows) {
    const int64_t layers = static_cast<int64_t>(plan.layers.size());
    for (int64_t r = 0; r < rows; ++r) {
      EE_CHECK(ids[r] >= 0 && ids[r] < plan.vocab, "token_ids must lie in [0, ", plan.vocab, "), got ", ids[r],
               " at index ", r);
      EE_CHECK(positions[r] >= 0 && positions[r] < plan.longest, "positions must lie in [0, ", plan.longest, "), got ",
               positions[r], " at index ", r);
      const int64_t needed = positions[r] / cache.block_size + 1;
      EE_CHECK(needed <= max_blocks, "block_table must have ", needed, " blocks for position ", positions[r],
               " of row ", r, ", got ", max_blocks);
      for (int64_t b = 0; b < needed; ++b) {
        const int64_t block = blocks[r * max_blocks + b];
        EE_CHECK(block >= 0 && (block + 1) * cache.block_size <= cache.slots, "block_table must hold blocks of the ",
                 cache.slots, " slots, got ", block, " at [", r, ", ", b, "]");
      }
      for (int64_t l = 0; l < layers; ++l) {
        const int32_t mark = watermarks[r * layers + l];
        EE_CHECK(mark >= 0 && mark <= positions[r], "watermarks must lie between 0 and the position, ", positions[r],
                 ", got ", mark, " at [", r, ", ", l, "]");
      }
      active_.push_back(r);
      tables_.push_back(blocks + r * max_blocks);
    }
    ids_ = ids;
    lengths_.resize(static_cast<size_t>(rows));
  }

  // Returns how many keys and values of one position in one layer were owed.
  int64_t run() {
    const int64_t h = plan_.hidden, layers = static_cast<int64_t>(plan_.layers.size());
    int64_t most = 0;
    for (int64_t l = 0; l < layers; ++l) {
      int64_t owed = 0;
      for (int64_t r = 0; r < rows_; ++r) owed += positions_[r] - watermarks_[r * layers + l];
      most = std::max(most, owed);
    }
    const int64_t all = rows_ + most, q = plan_.heads * plan_.head_dim, kv = plan_.kv_heads * plan_.head_dim;
    const int64_t floats = rows_ * (3 * h + q + q + 3 * plan_.wide + 1) + all * (h + 2 * kv + q) + 16 * 10;
    float* at = static_cast<float*>(thread_scratch(2, static_cast<size_t>(floats) * 4));
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += (count + 15) / 16 * 16;
      return taken;
    };
    x_ = take(rows_ * h), sum_ = take(rows_ * h), final_ = take(rows_ * h);
    attended_ = take(rows_ * q), query_ = take(rows_ * q);
    gate_up_ = take(rows_ * 2 * plan_.wide), inner_ = take(rows_ * plan_.wide), z_ = take(rows_);
    normed_ = take(all * h), qkv_ = take(all * (2 * kv + q));
    for (int64_t r = 0; r < rows_; ++r) std::copy_n(plan_.embedding + ids_[r] * h, h, x_ + r * h);
    const float* pending = nullptr;  // what is still to be added to x_
    int64_t settled = 0;
    for (int64_t number = 1; number <= layers && !active_.empty(); ++number) {
      settled += layer(number, pending);
      pending = sum_;
      const Layer& weights = plan_.layers[static_cast<size_t>(number - 1)];
      if (weights.exit < 0) continue;
      norm(x_, pending, plan_.final_norm, plan_.final_eps, final_, live());
      pending = nullptr;
      leave(number, weights.exit);
    }
    return settled;
  }

 private:
  int64_t live() const { return static_cast<int64_t>(active_.size()); }

  int64_t slot(int64_t row, int64_t position) const {
    const int64_t block = tables_[static_cast<size_t>(row)][position / cache_.block_size];
    return block * cache_.block_size + position % cache_.block_size;
  }

  void norm(float* x, const float* add, const float* weight, double eps, float* out, int64_t count) const {
    RmsNormArgs args;
    args.count = count;
    args.hidden = plan_.hidden;
    args.eps = eps;
    args.x = x;
    args.add = add;
    args.weight = weight;
    args.out = out;
    backend_.rms_norm(args);
  }

  // RoPE (Su et al. 2021) of `heads` heads in LLaMA's layout: halves, not pairs.
  void turn(float* x, int64_t heads, int64_t position) const {
    const int64_t d = plan_.head_dim, half = d / 2;
    const float *cos = plan_.cos + position * d, *sin = plan_.sin + position * d;
    for (int64_t h = 0; h < heads; ++h, x += d) {
      for (int64_t c = 0; c < half; ++c) {
        const float a = x[c], b = x[c + half];
        x[c] = a * cos[c] - b * sin[c];
        x[c + half] = b * cos[c + half] + a * sin[c + half];
      }
    }
  }

  // Live rows through one layer, up to its MLP, whose result stands in sum_. Returns how much was owed.
  int64_t layer(int64_t number, const float* pending) {
    const Layer& w = plan_.layers[static_cast<size_t>(number - 1)];
    const int64_t layers = static_cast<int64_t>(plan_.layers.size()), n = live();
    const int64_t h = plan_.hidden, d = plan_.head_dim, q = plan_.heads * d, kv = plan_.kv_heads * d;
    norm(x_, pending, w.input_norm, w.input_eps, normed_, n);
    owed_.clear();
    for (const int64_t row : active_) {
      for (int64_t p = watermarks_[row * layers + number - 1]; p < positions_[row]; ++p) {
        std::copy_n(cache_.states + slot(row, p) * h, h, normed_ + (n + static_cast<int64_t>(owed_.size())) * h);
        owed_.push_back({row, p});
      }
    }
    const int64_t owed = static_cast<int64_t>(owed_.size());
    float *keys = nullptr, *query = nullptr;
    int64_t key_stride = 0, query_stride = 0;
    if (owed == 0) {
      multiply(backend_, w.qkv, n, normed_, h, qkv_, q + 2 * kv);
      query = qkv_, query_stride = key_stride = q + 2 * kv, keys = qkv_ + q;
    } else {
      norm(normed_ + n * h, nullptr, w.input_norm, w.input_eps, normed_ + n * h, owed);
      LinearArgs only = w.qkv;
      only.next = w.qkv.weight + q * h;
      multiply(backend_, only, n, normed_, h, query_, q);
      only.weight = w.qkv.weight + q * h;  // panels of keys and values stand behind those of queries
      only.next = w.project.weight;
      multiply(backend_, only, n + owed, normed_, h, qkv_, 2 * kv);
      query = query_, query_stride = q, key_stride = 2 * kv, keys = qkv_;
    }
    float* layer_keys = cache_.keys + (number - 1) * cache_.slots * kv;
    float* layer_values = cache_.values + (number - 1) * cache_.slots * kv;
    for (int64_t i = 0; i < n + owed; ++i) {
      const int64_t row = i < n ? active_[static_cast<size_t>(i)] : owed_[static_cast<size_t>(i - n)].row;
      const int64_t position = i < n ? positions_[row] : owed_[static_cast<size_t>(i - n)].position;
      float* key = keys + i * key_stride;
      turn(key, plan_.kv_heads, position);
      const int64_t place = slot(row, position) * kv;
      std::copy_n(key, kv, layer_keys + place);
      std::copy_n(key + kv, kv, layer_values + place);
      if (i < n) {
        turn(query + i * query_stride, plan_.heads, position);
        watermarks_[row * layers + number - 1] = static_cast<int32_t>(position + 1);
        lengths_[static_cast<size_t>(i)] = position + 1;
      }
    }
    blocks_.clear();
    for (const int64_t row : active_) blocks_.push_back(tables_[static_cast<size_t>(row)]);
    DecodeAttentionArgs attention;
    attention.query = query;
    attention.query_stride = query_stride;
    attention.keys = layer_keys;
    attention.values = layer_values;
    attention.blocks = blocks_.data();
    attention.lengths = lengths_.data();
    attention.count = n;
    attention.heads = plan_.heads;
    attention.kv_heads = plan_.kv_heads;
    attention.head_dim = d;
    attention.block_size = cache_.block_size;
    attention.scale = plan_.scale;
    attention.out = attended_;
    backend_.decode_attention(attention);
    multiply(backend_, w.project, n, attended_, q, sum_, h);
    norm(x_, sum_, w.post_norm, w.post_eps, normed_, n);
    multiply(backend_, w.widen, n, normed_, h, gate_up_, 2 * w.inner);
    backend_.swiglu(gate_up_, n, w.inner, inner_);
    multiply(backend_, w.narrow, n, inner_, w.inner, sum_, h);
    return owed;
  }

  // Rows that leave behind layer `number` write their results and keep their state for the layers they skip; the others
  // move together.
  void leave(int64_t number, int64_t exit) {
    const int64_t h = plan_.hidden, n = live(), layers = static_cast<int64_t>(plan_.layers.size());
    const bool last = number == layers;
    if (!last) {
      ExitPolicyArgs policy = plan_.policies[static_cast<size_t>(exit)];
      policy.count = n;
      policy.first = reinterpret_cast<const char*>(final_);
      policy.logit = reinterpret_cast<char*>(z_);
      backend_.exit_policy(policy);
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = active_[static_cast<size_t>(i)];
      const int32_t script = rules_.script[row];
      bool leaves = last || (script > 0 ? script <= number : z_[i] > rules_.threshold_logit[row]);
      bool forced = last;
      if (!last && rules_.max_depth[row] <= number) leaves = forced = true;
      leaves = leaves && (last || rules_.min_depth[row] <= number);
      if (!leaves) {
        if (kept != i) std::copy_n(x_ + i * h, h, x_ + kept * h);
        active_[static_cast<size_t>(kept++)] = row;
        continue;
      }
      std::copy_n(final_ + i * h, h, results_.normed + row * h);
      results_.layers[row] = static_cast<int32_t>(number);
      results_.probs[row] = forced ? 1.0f : 1.0f / (1.0f + std::exp(-z_[i]));
      if (!last) std::copy_n(x_ + i * h, h, cache_.states + slot(row, positions_[row]) * h);
    }
    active_.resize(static_cast<size_t>(kept));
  }

  struct Owed {
    int64_t row, position;
  };

  const Plan& plan_;
  const Cpu backend_;
  const Cache cache_;
  const Rules rules_;
  const Results results_;
  const int64_t* positions_;
  const int64_t* ids_ = nullptr;
  int32_t* watermarks_;
  int64_t rows_;
  std::vector<int64_t> active_, lengths_;
  std::vector<const int32_t*> tables_, blocks_;
  std::vector<Owed> owed_;
  float *x_ = nullptr, *sum_ = nullptr, *final_ = nullptr, *attended_ = nullptr, *query_ = nullptr;
  float *gate_up_ = nullptr, *inner_ = nullptr, *z_ = nullptr, *normed_ = nullptr, *qkv_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step(const Tensor& token_ids, const Tensor& positions,
                                                       const Tensor& block_table, const Tensor& watermarks,
                                                       const Tensor& keys, const Tensor& values, const Tensor& states,
                                                       int64_t block_size, int64_t plan, const Tensor& threshold_logit,
                                                       const Tensor& script, const Tensor& min_depth,
                                                       const Tensor& max_depth) {
  const std::shared_ptr<const Plan> held = plans.get(plan, "decoder_plan");
  const Plan& p = *held;
  check_dim("token_ids", token_ids, 1);
  const int64_t rows = token_ids.size(0), layers = static_cast<int64_t>(p.layers.size());
  check_dim("states", states, 2);
  check_dim("block_table", block_table, 2);
  EE_CHECK(block_size >= 1, "block_size must be positive, got ", block_size);
  Cache cache;
  cache.slots = states.size(0);
  cache.block_size = block_size;
  cache.keys = elements<float>("keys", keys, {layers, cache.slots, p.kv_heads, p.head_dim});
  cache.values = elements<float>("values", values, {layers, cache.slots, p.kv_heads, p.head_dim});
  cache.states = elements<float>("states", states, {cache.slots, p.hidden});
  Rules rules;
  rules.threshold_logit = vector_of("threshold_logit", threshold_logit, rows);
  rules.script = elements<const int32_t>("script", script, {rows});
  rules.min_depth = elements<const int32_t>("min_depth", min_depth, {rows});
  rules.max_depth = elements<const int32_t>("max_depth", max_depth, {rows});
  const int64_t max_blocks = block_table.size(1);
  Tensor normed = empty(token_ids, {rows, p.hidden}, ScalarType::Float);
  Tensor exit_layers = empty(token_ids, {rows}, ScalarType::Int);
  Tensor probs = empty(token_ids, {rows}, ScalarType::Float);
  Tensor settled = empty(token_ids, {1}, ScalarType::Long);
  const Results results{reinterpret_cast<float*>(out_bytes(normed)), reinterpret_cast<int32_t*>(out_bytes(exit_layers)),
                        reinterpret_cast<float*>(out_bytes(probs))};
  Step step(p, token_ids, cache, rules, results, rows,
            elements<const int64_t>("token_ids", token_ids, {rows}),
            elements<const int64_t>("positions", positions, {rows}),
            elements<const int32_t>("block_table", block_table, {rows, max_blocks}), max_blocks,
            elements<int32_t>("watermarks", watermarks, {rows, layers}));
  *reinterpret_cast<int64_t*>(out_bytes(settled)) = step.run();
  return {std::move(normed), std::move(exit_layers), std::move(probs), std::move(settled)};
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) {
  m.impl("decoder_plan", TORCH_BOX((&decoder_plan)));
  m.impl("decode_step", TORCH_BOX((&decode_step)));
}

}  // namespace consistentee

extern "C" __attribute__((visibility("default"))) void consistentee_drop_decoder_plan(int64_t plan) {
  consistentee::plans.drop(plan);
}
