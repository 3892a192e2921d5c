// What an op hands to its kernels: raw pointers and sizes. No torch header, so that cpu/ and cuda/ compile without one.
//
// Lead layout: B sequences of lengths n_i >= 1, T tokens. Rows 0..B-1 are the sequences' first tokens; the other tokens
// of sequence i stand at rows B + (cu_seqlens[i] - i) up to B + (cu_seqlens[i + 1] - (i + 1)).
#pragma once
#include <cstdint>

namespace consistentee {

enum class DType : int32_t { f32, f64, f16, bf16 };

inline constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A block of rows, each contiguous in itself.
struct Rows {
  const char* data = nullptr;
  int64_t count = 0;
  int64_t bytes = 0;   // of one row
  int64_t stride = 0;  // from one row to the next, in bytes
};

// An index tensor, int32 or int64; null data where the caller gave none.
struct Index {
  const void* data = nullptr;
  int64_t count = 0;
  bool wide = false;  // int64
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

enum class Layout : int32_t { rows, lead };

struct CompactArgs {
  Rows in;
  const int32_t* cu_seqlens = nullptr;
  const bool* keep = nullptr;
  int64_t batch = 0;
  Layout layout = Layout::rows;
  char* out = nullptr;  // contiguous
  int32_t* out_cu_seqlens = nullptr;
  int32_t* active_rows = nullptr;
  int32_t* n_active = nullptr;
};

struct GatherArgs {
  Rows in;
  Index index;
  char* out = nullptr;  // contiguous
};

struct ScatterArgs {
  Rows in;
  Index index;
  char* out = nullptr;
  int64_t out_count = 0;
  int64_t out_stride = 0;
};

// Padded [B, S, row] (contiguous) <-> lead layout [T, row] (contiguous).
struct LeadArgs {
  const char* in = nullptr;
  char* out = nullptr;
  const int32_t* cu_seqlens = nullptr;
  int64_t batch = 0;
  int64_t max_seqlen = 0;
  int64_t row_bytes = 0;
  int64_t total = 0;
};

// One value of every row: a state array of survivors_. Items are 4 or 8 bytes wide and are moved, never looked at.
struct RowState {
  const char* in = nullptr;
  char* out = nullptr;
  int32_t bytes = 4;
};

constexpr int64_t kMaxStates = 32;  // travels to the kernel by value

// Rows layout with fixed capacities; counts = {live rows, live tokens} is a value on the device.
struct SurvivorsArgs {
  const uint8_t* keep = nullptr;
  const int32_t* cu_seqlens = nullptr;
  const int32_t* counts = nullptr;
  int64_t cap_rows = 0;
  int64_t cap_tokens = 0;
  int32_t* out_cu_seqlens = nullptr;
  int32_t* token_dest = nullptr;
  int32_t* out_counts = nullptr;
  int32_t n_states = 0;
  RowState states[kMaxStates];
};

enum StepKind : int32_t { kStay = 0, kDecide = 1, kLeave = 2 };

// Between two layers of a decode step. R = cap_rows; arrays by row id hold at least R entries. counts, and all else that
// is pointed at, are values on the device.
struct StepRowsArgs {
  const float* partial = nullptr;  // [R, splits] by row id; kDecide alone
  int64_t splits = 0;
  const char* b2 = nullptr;  // one value; kDecide alone
  DType b2_dtype = DType::f32;
  const int32_t* order = nullptr;   // [R] row ids
  const int32_t* counts = nullptr;  // live rows, and what is not looked at
  int64_t cap_rows = 0;
  int32_t layer = 0;
  int32_t kind = kStay;
  const float* threshold_logit = nullptr;  // limits by row id
  const int32_t* script = nullptr;
  const int32_t* min_depth = nullptr;
  const int32_t* max_depth = nullptr;
  int32_t* exit_layers = nullptr;  // by row id
  float* exit_probs = nullptr;
  int32_t* out_order = nullptr;
  int32_t* out_counts = nullptr;
  int32_t next_layer = 0;               // 0: none
  const int32_t* positions = nullptr;   // by row id
  const int32_t* block_table = nullptr;  // [R, blocks]
  int64_t blocks = 0;
  int32_t block_size = 1;
  int32_t* watermarks = nullptr;  // [R, layers]
  int64_t layers = 0;
  int32_t* owed_slots = nullptr;
  int32_t* owed_positions = nullptr;
  int64_t cap_owed = 0;
  int64_t* settled = nullptr;  // or null
};

enum Part : int32_t { kFirst = 0, kOthers = 1, kAll = 2 };

struct AttentionArgs {
  const char* query = nullptr;
  const char* key = nullptr;
  const char* value = nullptr;
  int64_t query_stride = 0, key_stride = 0, value_stride = 0;  // elements from row to row
  const int32_t* cu_seqlens = nullptr;
  const int32_t* rows = nullptr;  // null: every sequence, ascending
  int64_t batch = 0;
  int64_t n_rows = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t total = 0;
  double scale = 1.0;
  int32_t part = kAll;
  DType dtype = DType::f32;
  const char* bias = nullptr;  // [num_heads, 2 * bias_span - 1] or null
  int64_t bias_span = 0;
  DType bias_dtype = DType::f32;
  // Prefix sums over the served sequences of (length - 1); null where every sequence is served, in order.
  const int32_t* offsets = nullptr;
  char* out = nullptr;  // contiguous [n_queries, num_heads * head_dim]
  int64_t n_queries = 0;
  int64_t n_present = 0;  // CPU: queries that exist; rows of out past them are zeros (spare capacity)
};

struct ExitPolicyArgs {
  const char* first = nullptr;
  int64_t count = 0, hidden = 0, width = 0;  // n, H, P
  DType dtype = DType::f32;
  const char* pooler_weight = nullptr;  // null: no pooler
  const char* pooler_bias = nullptr;
  DType policy_dtype = DType::f32;  // of w1, b1, w2, b2
  const char* w1 = nullptr;
  const char* b1 = nullptr;
  const char* w2 = nullptr;
  const char* b2 = nullptr;
  char* state = nullptr;  // CPU: null where there is no pooler and nobody wants the copy
  char* logit = nullptr;  // float32; float64 where first is float64. CPU: null for the pooler alone
};

// Outputs of one panel of a packed weight, the same for every instruction set: 64 bytes, one cache line for each k.
inline constexpr int64_t kPanel = 16;

struct LinearArgs {
  int64_t count = 0, inputs = 0, outputs = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;  // elements from row to row
  const float* weight = nullptr;  // [ceil(outputs / kPanel), inputs, kPanel], zeros past the last output
  const float* bias = nullptr;    // or null
  const float* next = nullptr;    // weight of the product that follows, to be fetched ahead, or null
  bool gelu = false;
  float* out = nullptr;  // contiguous [count, outputs]
};

struct NormArgs {
  int64_t count = 0, hidden = 0;
  DType dtype = DType::f32;
  double eps = 0.0;
  const char* weight = nullptr;
  const char* bias = nullptr;
  char* out = nullptr;
  // add_layer_norm: x + residual, row strides in elements
  const char* x = nullptr;
  const char* residual = nullptr;
  int64_t x_stride = 0, residual_stride = 0;
  // embed_layer_norm: word[id] + token_type[tt] + position[pos]
  Index ids, types, positions;
  const char* word = nullptr;
  const char* token_type = nullptr;
  const char* position = nullptr;
  int64_t n_word = 0, n_token_type = 0, n_position = 0;
};

// RMSNorm of rows: x += add (where given, in place), out = x / sqrt(mean(x^2) + eps) * weight. fp32, contiguous.
struct RmsNormArgs {
  int64_t count = 0, hidden = 0;
  double eps = 0.0;
  float* x = nullptr;
  const float* add = nullptr;
  const float* weight = nullptr;
  float* out = nullptr;  // null: the sum alone
};

// One query of each row on its cached keys and values, fp32. A row's position p stands in slot
// block_table[row, p / block_size] * block_size + p % block_size.
struct DecodeAttentionArgs {
  const float* query = nullptr;  // [count, heads * head_dim], rows query_stride apart
  int64_t query_stride = 0;
  const float* keys = nullptr;    // [slots, kv_heads, head_dim]
  const float* values = nullptr;
  const int32_t* const* blocks = nullptr;  // of each row
  const int64_t* lengths = nullptr;        // positions of each row
  int64_t count = 0, heads = 0, kv_heads = 0, head_dim = 0, block_size = 0;
  float scale = 1.0f;
  float* out = nullptr;  // [count, heads * head_dim]
};

}  // namespace consistentee
