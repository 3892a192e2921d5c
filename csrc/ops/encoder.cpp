// A whole pass of an encoder with exits as one op, on the CPU: embeddings, layers, decisions, compaction, classifiers.
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "../cpu/parallel.h"
#include "attention.h"
#include "layer.h"
#include "plans.h"

namespace consistentee {

namespace {

constexpr size_t kLayerTensors = 12;  // of one layer in `layers`; kernels/encoder.py has the order

struct Layer {
  LinearArgs qkv;
  Finish rest;
  int64_t exit = -1;  // index in Plan::exits
};

struct Exit {
  ExitPolicyArgs heads;  // without a policy at the last layer
  LinearArgs classifier;
};

struct Plan {
  std::vector<Tensor> held;  // what the pointers below point into
  NormArgs embedding;
  AttentionCall attention;
  int64_t hidden = 0, wide = 0, first_position = 0, classes = 0;
  std::vector<Layer> layers;
  std::vector<Exit> exits;
};

Plans<Plan> plans;

const char* table_of(const char* name, const Tensor& tensor, int64_t hidden, int64_t* size) {
  check_dim(name, tensor, 2);
  *size = tensor.size(0);
  return data_of(name, tensor, {*size, hidden});
}

// Reads one exit from `t`; returns how many tensors it took.
size_t read_exit(Exit& exit, const Tensor* t, int64_t hidden, int64_t classes, bool pooled, bool policy) {
  const Tensor* const begin = t;
  ExitPolicyArgs& heads = exit.heads;
  heads.hidden = hidden;
  if (pooled) {
    heads.pooler_weight = data_of("pooler_weight", t[0], {hidden, hidden});
    heads.pooler_bias = data_of("pooler_bias", t[1], {hidden});
    t += 2;
  }
  if (policy) {
    read_policy(heads, t, hidden);
    t += 4;
  }
  exit.classifier.weight = panels_of("classifier_weight", t[0], hidden, classes);
  exit.classifier.bias = vector_of("classifier_bias", t[1], classes);
  return static_cast<size_t>(t + 2 - begin);
}

}  // namespace

int64_t encoder_plan(const Tensor& word, const std::optional<Tensor>& token_type, const Tensor& position,
                     const Tensor& norm_weight, const Tensor& norm_bias, double norm_eps, int64_t first_position,
                     int64_t num_heads, double scale, const std::optional<Tensor>& position_bias,
                     std::vector<Tensor> layers, std::vector<double> eps, std::vector<int64_t> exit_layers,
                     std::vector<Tensor> exits, bool pooled, int64_t classes) {
  auto plan = std::make_shared<Plan>();
  check_dim("word", word, 2);
  const int64_t hidden = plan->hidden = word.size(1);
  const size_t count = layers.size() / kLayerTensors;
  EE_CHECK(count > 0 && layers.size() == count * kLayerTensors && eps.size() == 2 * count, "layers must hold ",
           kLayerTensors, " tensors and eps 2 numbers for each layer, got ", layers.size(), " and ", eps.size());
  const size_t wanted = exit_layers.size() * (pooled ? 8 : 6) - 4;
  EE_CHECK(!exit_layers.empty() && exits.size() == wanted, "exits must hold ", pooled ? 8 : 6,
           " tensors for each of exit_layers, the last one 4 less, got ", exits.size(), " for ", exit_layers.size());
  EE_CHECK(first_position >= 0 && classes >= 1, "first_position must not be negative and classes at least 1, got ",
           first_position, " and ", classes);

  NormArgs& embedding = plan->embedding;
  embedding.dtype = DType::f32;
  embedding.hidden = hidden;
  embedding.eps = norm_eps;
  embedding.word = table_of("word", word, hidden, &embedding.n_word);
  embedding.position = table_of("position", position, hidden, &embedding.n_position);
  if (token_type.has_value()) {
    embedding.token_type = table_of("token_type", *token_type, hidden, &embedding.n_token_type);
  }
  embedding.weight = data_of("norm_weight", norm_weight, {hidden});
  embedding.bias = data_of("norm_bias", norm_bias, {hidden});
  plan->held = {word, position, norm_weight, norm_bias};

  AttentionArgs& attention = plan->attention.args;
  attention.dtype = DType::f32;
  const Tensor no_rows = empty(word, {1}, ScalarType::Int);
  *reinterpret_cast<int32_t*>(out_bytes(no_rows)) = 0;
  plan_attention(Cpu(word), plan->attention, "word", word, hidden, no_rows, {}, num_heads, scale, kAll, position_bias,
                 {});
  plan->first_position = first_position;
  plan->classes = classes;
  plan->layers.resize(count);
  for (size_t l = 0; l < count; ++l) {
    const Tensor* t = layers.data() + l * kLayerTensors;
    Layer& layer = plan->layers[l];
    layer.qkv.weight = panels_of("qkv_weight", t[0], hidden, 3 * hidden);
    layer.qkv.bias = vector_of("qkv_bias", t[1], 3 * hidden);
    layer.rest = read_finish(
        hidden, {t[2], t[3], t[4], t[5], eps[2 * l], t[6], t[7], t[8], t[9], t[10], t[11], eps[2 * l + 1]});
    layer.qkv.next = layer.rest.project.weight;
    plan->wide = plan->wide < layer.rest.wide ? layer.rest.wide : plan->wide;
  }
  plan->exits.resize(exit_layers.size());
  place_exits(plan->layers, exit_layers);
  const Tensor* t = exits.data();
  for (size_t e = 0; e < exit_layers.size(); ++e) {
    t += read_exit(plan->exits[e], t, hidden, classes, pooled, e + 1 < exit_layers.size());
  }
  if (token_type.has_value()) plan->held.push_back(*token_type);
  if (position_bias.has_value()) plan->held.push_back(*position_bias);
  for (Tensor& tensor : layers) plan->held.push_back(std::move(tensor));
  for (Tensor& tensor : exits) plan->held.push_back(std::move(tensor));
  return plans.put(std::move(plan));
}

namespace {

// How rows may leave: null where a limit is not asked for.
struct Rules {
  const float* threshold_logit = nullptr;
  const int32_t* script = nullptr;
  const int32_t* min_depth = nullptr;
  const int32_t* max_depth = nullptr;
  const float* leave_rates = nullptr;
  int64_t deepest = 0;
  double second_pass_tokens = 0.0;
};

// Where rows that leave write.
struct Results {
  float* logits;
  int32_t* layers;
  float* probs;
};

// Memory that a thread keeps from call to call: fresh pages cost a tenth of a pass.
constexpr int64_t kKeptBytes = 64 << 20;
// Between two buffers, in floats: rows of the same number must not fall into the same lines of a cache.
constexpr int64_t kApart = 17 * 16;

// One batch on its way down: rows that are still active, in lead layout. Three [tokens, hidden] buffers take turns:
// a layer reads `hidden` and writes `out`; compaction writes `spare`.
class Pass {
 public:
  Pass(const Plan& plan, const Tensor& like, const Rules& rules, const Results& results,
       const std::vector<int64_t>& lengths)
      : plan_(plan), backend_(like), rules_(rules), results_(results), attention_(plan.attention.args) {
    rows_ = static_cast<int64_t>(lengths.size());
    active_.resize(lengths.size());
    keep_ = std::make_unique<bool[]>(lengths.size());
    offsets_.resize(lengths.size() + 1);
    cu_.resize(lengths.size() + 1);
    cu_after_.resize(lengths.size() + 1);
    kept_.resize(lengths.size());
    for (int64_t i = 0; i < rows_; ++i) {
      EE_CHECK(lengths[i] >= 1, "lengths must be at least 1, got ", lengths[i], " at index ", i);
      active_[i] = static_cast<int32_t>(i);
      tokens_ += lengths[i];
      EE_CHECK(tokens_ <= INT32_MAX, "lengths must sum to less than 2^31 tokens, they pass it at index ", i);
      cu_[i + 1] = static_cast<int32_t>(tokens_);
    }
  }

  int64_t tokens() const { return tokens_; }

  void run(const Tensor& like, const int64_t* ids, const int64_t* types) {
    const int64_t h = plan_.hidden, per_token = 7 * h + plan_.wide, per_row = 2 * h + plan_.classes + 1;
    const int64_t floats = tokens_ * per_token + rows_ * per_row + 10 * kApart;
    float* at = nullptr;
    if (floats * 4 <= kKeptBytes) {
      at = static_cast<float*>(thread_scratch(2, static_cast<size_t>(floats) * 4));
    } else {
      memory_ = empty(like, {floats}, ScalarType::Float);
      at = reinterpret_cast<float*>(out_bytes(*memory_));
    }
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += count + kApart;
      return taken;
    };
    hidden_ = take(tokens_ * h), out_ = take(tokens_ * h), spare_ = take(tokens_ * h);
    qkv_ = take(tokens_ * 3 * h), x_ = take(tokens_ * h), inner_ = take(tokens_ * plan_.wide);
    state_ = take(rows_ * h), picked_ = take(rows_ * h), classes_ = take(rows_ * plan_.classes), z_ = take(rows_);
    embed(ids, types);
    int64_t layer = 0;
    while (rows_ > 0) {
      const Layer& weights = plan_.layers[static_cast<size_t>(layer++)];
      if (layer == rules_.deepest) {
        first_tokens(weights);
        everybody_leaves(layer, plan_.exits[static_cast<size_t>(weights.exit)]);
        return;
      }
      const double rate = rules_.leave_rates[layer - 1];
      const Exit* exit = weights.exit < 0 || rate < 0.0 ? nullptr : &plan_.exits[static_cast<size_t>(weights.exit)];
      // Three quarters of the work of every leaving row's other tokens, against reading the weights twice.
      if (exit != nullptr && 0.75 * rate * static_cast<double>(tokens_ - rows_) > rules_.second_pass_tokens) {
        first_tokens_first(layer, weights, *exit);
      } else {
        whole_layer(layer, weights, exit);
      }
    }
  }

 private:
  // -- layers ---------------------------------------------------------------------------------------------------

  void embed(const int64_t* ids, const int64_t* types) {
    std::vector<int64_t> lead(static_cast<size_t>(tokens_ * 3));
    int64_t *to_ids = lead.data(), *to_types = to_ids + tokens_, *to_positions = to_types + tokens_;
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t from = cu_[i]; from < cu_[i + 1]; ++from) {
        const int64_t place = from - cu_[i], to = place == 0 ? i : rows_ + from - i - 1;
        to_ids[to] = ids[from];
        if (types != nullptr) to_types[to] = types[from];
        to_positions[to] = plan_.first_position + place;
      }
    }
    NormArgs args = plan_.embedding;
    args.count = tokens_;
    args.ids = {to_ids, tokens_, true};
    if (types != nullptr) args.types = {to_types, tokens_, true};
    args.positions = {to_positions, tokens_, true};
    args.out = reinterpret_cast<char*>(hidden_);
    backend_.embed_layer_norm(args);
  }

  const float* weight_behind(const Layer& layer) const {
    const Layer* next = &layer + 1;
    return next < plan_.layers.data() + plan_.layers.size() ? next->qkv.weight : nullptr;
  }

  void serve(Part part, int64_t queries) {
    attention_.part = part;
    attention_.batch = rows_;
    attention_.n_rows = rows_;
    attention_.rows = nullptr;
    attention_.offsets = nullptr;
    attention_.total = tokens_;
    attention_.cu_seqlens = cu_.data();
    attention_.n_queries = attention_.n_present = queries;
  }

  void read(const float* query, const float* key, const float* value, int64_t query_stride, int64_t key_stride) {
    attention_.query = reinterpret_cast<const char*>(query);
    attention_.key = reinterpret_cast<const char*>(key);
    attention_.value = reinterpret_cast<const char*>(value);
    attention_.query_stride = query_stride;
    attention_.key_stride = attention_.value_stride = key_stride;
  }

  void whole_layer(int64_t layer, const Layer& weights, const Exit* exit) {
    const int64_t h = plan_.hidden;
    multiply(backend_, weights.qkv, tokens_, hidden_, h, qkv_, 3 * h);
    read(qkv_, qkv_ + h, qkv_ + 2 * h, 3 * h, 3 * h);
    serve(kAll, tokens_);
    finish(backend_, weights.rest, attention_, hidden_, h, {out_, x_, inner_}, weight_behind(weights));
    std::swap(hidden_, out_);
    if (exit == nullptr) return;
    const int64_t staying = leave(layer, *exit, hidden_);
    if (staying == rows_ || staying == 0) {
      rows_ = staying;
      return;
    }
    compact(hidden_, out_);
    std::swap(hidden_, out_);
    survive(staying);
  }

  // Queries of tokens from..to of the lead layout; keys and values are those of all tokens.
  void queries(const Layer& weights, int64_t from, int64_t to) {
    const int64_t h = plan_.hidden;
    multiply(backend_, weights.qkv, to - from, hidden_ + from * h, h, qkv_ + from * h, h);
  }

  // Keys and values of all tokens, and the first tokens' way through the layer: their hidden states stand in out_.
  void first_tokens(const Layer& weights) {
    const int64_t h = plan_.hidden;
    if (h % kPanel == 0) {  // a product of its own: then only queries that are needed are computed
      float* keys = qkv_ + tokens_ * h;
      LinearArgs both = weights.qkv;
      both.weight += h * h;
      both.bias += h;
      both.next = weights.qkv.weight;
      multiply(backend_, both, tokens_, hidden_, h, keys, 2 * h);
      queries(weights, 0, rows_);
      read(qkv_, keys, keys + h, h, 2 * h);
    } else {
      multiply(backend_, weights.qkv, tokens_, hidden_, h, qkv_, 3 * h);
      read(qkv_, qkv_ + h, qkv_ + 2 * h, 3 * h, 3 * h);
    }
    serve(kFirst, rows_);
    finish(backend_, weights.rest, attention_, hidden_, h, {out_, x_, inner_}, nullptr);
  }

  void first_tokens_first(int64_t layer, const Layer& weights, const Exit& exit) {
    const int64_t h = plan_.hidden;
    first_tokens(weights);
    const int64_t staying = leave(layer, exit, out_);
    if (staying == 0) {
      rows_ = 0;
      return;
    }
    if (h % kPanel == 0 && tokens_ > rows_) queries(weights, rows_, tokens_);
    serve(kOthers, tokens_ - rows_);
    const float* residual = hidden_;
    if (staying < rows_) {
      compact(hidden_, spare_);
      residual = spare_;
      offsets_[0] = 0;
      for (int64_t i = 0; i < staying; ++i) {
        std::copy_n(out_ + kept_[i] * h, h, out_ + i * h);
        offsets_[i + 1] = offsets_[i] + cu_after_[i + 1] - cu_after_[i] - 1;
      }
      attention_.rows = kept_.data();
      attention_.n_rows = staying;
      attention_.offsets = offsets_.data();
      attention_.n_queries = attention_.n_present = offsets_[staying];
    }
    if (attention_.n_queries > 0) {
      const FinishBuffers buffers{out_ + staying * h, x_, inner_};
      finish(backend_, weights.rest, attention_, residual + staying * h, h, buffers, weight_behind(weights));
    }
    std::swap(hidden_, out_);
    if (staying < rows_) survive(staying);
  }

  // -- exits ----------------------------------------------------------------------------------------------------

  // What the exit's classifier reads of first tokens [rows, hidden], and, where there is a policy, its logits z.
  const float* read_exit(const Exit& exit, const float* first, bool policy) {
    ExitPolicyArgs heads = exit.heads;
    heads.count = rows_;
    heads.first = reinterpret_cast<const char*>(first);
    heads.state = heads.pooler_weight == nullptr ? nullptr : reinterpret_cast<char*>(state_);
    heads.logit = policy ? reinterpret_cast<char*>(z_) : nullptr;
    backend_.exit_policy(heads);
    return heads.pooler_weight == nullptr ? first : state_;
  }

  void everybody_leaves(int64_t layer, const Exit& exit) {
    const float* state = read_exit(exit, out_, false);
    for (int64_t i = 0; i < rows_; ++i) z_[i] = std::numeric_limits<float>::infinity();
    classify(layer, exit, state, rows_);
  }

  // Rows that leave behind `layer` write their results; returns how many stay, and keep_ says which.
  int64_t leave(int64_t layer, const Exit& exit, const float* first) {
    const float* state = read_exit(exit, first, true);
    int64_t leaving = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t row = active_[i];
      bool leaves = rules_.threshold_logit != nullptr ? z_[i] > rules_.threshold_logit[row]
                                                      : rules_.script != nullptr && rules_.script[row] <= layer;
      if (rules_.min_depth != nullptr) leaves = leaves && rules_.min_depth[row] <= layer;
      if (rules_.max_depth != nullptr && rules_.max_depth[row] <= layer) {
        leaves = true;
        z_[i] = std::numeric_limits<float>::infinity();
      }
      keep_[i] = !leaves;
      leaving += leaves ? 1 : 0;
    }
    if (leaving > 0) classify(layer, exit, state, leaving);
    return rows_ - leaving;
  }

  // Class logits of the `leaving` rows that keep_ does not hold; of all rows where as many leave.
  void classify(int64_t layer, const Exit& exit, const float* state, int64_t leaving) {
    const int64_t h = plan_.hidden;
    const bool all = leaving == rows_;
    int64_t n = 0;
    for (int64_t i = 0; i < rows_ && !all; ++i) {
      if (!keep_[i]) std::copy_n(state + i * h, h, picked_ + n++ * h);
    }
    multiply(backend_, exit.classifier, leaving, all ? state : picked_, h, classes_, plan_.classes);
    n = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      if (!all && keep_[i]) continue;
      const int64_t row = active_[i];
      std::copy_n(classes_ + n++ * plan_.classes, plan_.classes, results_.logits + row * plan_.classes);
      results_.layers[row] = static_cast<int32_t>(layer);
      results_.probs[row] = 1.0f / (1.0f + std::exp(-z_[i]));
    }
  }

  // -- compaction -----------------------------------------------------------------------------------------------

  // Tokens of the rows in keep_ from one buffer to the other; kept_ and cu_after_ are theirs.
  void compact(const float* from, float* to) {
    const int64_t bytes = plan_.hidden * 4;
    int32_t count = 0;
    CompactArgs args;
    args.in = {reinterpret_cast<const char*>(from), tokens_, bytes, bytes};
    args.cu_seqlens = cu_.data();
    args.keep = keep_.get();
    args.batch = rows_;
    args.layout = Layout::lead;
    args.out = reinterpret_cast<char*>(to);
    args.out_cu_seqlens = cu_after_.data();
    args.active_rows = kept_.data();
    args.n_active = &count;
    backend_.compact(args);
  }

  void survive(int64_t staying) {
    for (int64_t i = 0; i < staying; ++i) active_[i] = active_[kept_[i]];
    rows_ = staying;
    cu_.swap(cu_after_);
    tokens_ = cu_[staying];
  }

  const Plan& plan_;
  const Cpu backend_;
  const Rules rules_;
  const Results results_;
  AttentionArgs attention_;
  int64_t rows_ = 0, tokens_ = 0;
  std::vector<int32_t> active_;  // original row of each active row
  std::vector<int32_t> cu_, cu_after_, kept_, offsets_;
  std::unique_ptr<bool[]> keep_;
  std::optional<Tensor> memory_;  // of a batch that is too large for what a thread keeps
  float *hidden_ = nullptr, *out_ = nullptr, *spare_ = nullptr, *qkv_ = nullptr, *x_ = nullptr, *inner_ = nullptr;
  float *state_ = nullptr, *picked_ = nullptr, *classes_ = nullptr, *z_ = nullptr;
};

const int32_t* limits_of(const char* name, const std::optional<Tensor>& limit, int64_t rows) {
  return limit.has_value() ? elements<const int32_t>(name, *limit, {rows}) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> run_encoder(const Tensor& input_ids, const std::optional<Tensor>& token_type_ids,
                                               std::vector<int64_t> lengths, int64_t plan, int64_t classes,
                                               const std::optional<Tensor>& threshold_logit,
                                               const std::optional<Tensor>& script,
                                               const std::optional<Tensor>& min_depth,
                                               const std::optional<Tensor>& max_depth, const Tensor& leave_rates,
                                               int64_t deepest, double second_pass_tokens) {
  const std::shared_ptr<const Plan> held = plans.get(plan, "encoder_plan");
  const int64_t rows = static_cast<int64_t>(lengths.size()), layers = static_cast<int64_t>(held->layers.size());
  EE_CHECK(classes == held->classes, "classes must be the plan's, ", held->classes, ", got ", classes);
  EE_CHECK(deepest >= 1 && deepest <= layers && held->layers[static_cast<size_t>(deepest - 1)].exit >= 0,
           "deepest must be a layer with an exit, at most ", layers, ", got ", deepest);
  Rules rules;
  if (threshold_logit.has_value()) rules.threshold_logit = vector_of("threshold_logit", *threshold_logit, rows);
  rules.script = limits_of("script", script, rows);
  rules.min_depth = limits_of("min_depth", min_depth, rows);
  rules.max_depth = limits_of("max_depth", max_depth, rows);
  rules.leave_rates = vector_of("leave_rates", leave_rates, deepest);
  rules.deepest = deepest;
  rules.second_pass_tokens = second_pass_tokens;
  Tensor logits = empty(input_ids, {rows, classes}, ScalarType::Float);
  Tensor exit_layers = empty(input_ids, {rows}, ScalarType::Int);
  Tensor probs = empty(input_ids, {rows}, ScalarType::Float);
  const Results results{reinterpret_cast<float*>(out_bytes(logits)), reinterpret_cast<int32_t*>(out_bytes(exit_layers)),
                        reinterpret_cast<float*>(out_bytes(probs))};
  Pass pass(*held, input_ids, rules, results, lengths);
  const int64_t* ids = elements<const int64_t>("input_ids", input_ids, {pass.tokens()});
  const int64_t* types = nullptr;
  if (token_type_ids.has_value()) {
    EE_CHECK(held->embedding.token_type != nullptr, "token_type_ids must not be given: the plan has no token_type");
    types = elements<const int64_t>("token_type_ids", *token_type_ids, {pass.tokens()});
  }
  pass.run(input_ids, ids, types);
  return {std::move(logits), std::move(exit_layers), std::move(probs)};
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) {
  m.impl("encoder_plan", TORCH_BOX((&encoder_plan)));
  m.impl("run_encoder", TORCH_BOX((&run_encoder)));
}

}  // namespace consistentee

extern "C" __attribute__((visibility("default"))) void consistentee_drop_encoder_plan(int64_t plan) {
  consistentee::plans.drop(plan);
}
