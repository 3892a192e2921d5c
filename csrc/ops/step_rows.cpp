// Front end of step_rows_: who leaves between two layers of a decode step, and what the next layer owes the others.
#include <limits>
#include <optional>

#include "apart.h"
#include "backends.h"
#include "tensor.h"
#ifdef CONSISTENTEE_WITH_CUDA
#include "cuda_backend.h"
#endif

namespace consistentee {

namespace {

// Checks the tensors of one call one by one, and remembers where they stand.
class Arguments {
 public:
  explicit Arguments(const Tensor& order) : order_(order) {
    check_dim("order", order, 1);
    rows_ = order.size(0);
  }
  int64_t rows() const { return rows_; }

  template <class T>
  const T* in(const char* name, const Tensor& tensor, ScalarType type) {
    look(name, tensor, type, false);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T>
  T* out(const char* name, const Tensor& tensor, ScalarType type) {
    look(name, tensor, type, true);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  // One entry for every row; buffers made for more rows serve, too.
  template <class T>
  const T* by_row(const char* name, const Tensor& tensor, ScalarType type) {
    enough(name, tensor, 1);
    return in<T>(name, tensor, type);
  }
  template <class T>
  T* out_by_row(const char* name, const Tensor& tensor, ScalarType type) {
    enough(name, tensor, 1);
    return out<T>(name, tensor, type);
  }
  void enough(const char* name, const Tensor& tensor, int64_t dim) const {
    check_dim(name, tensor, dim);
    EE_CHECK(tensor.size(0) >= rows_, name, " must have a row for each of the ", rows_, " of order, got shape ",
             shape_of(tensor));
  }
  void look(const char* name, const Tensor& tensor, ScalarType type, bool written) {
    check_dtype(name, tensor, type);
    check_contiguous(name, tensor);
    check_same_device(name, tensor, "order", order_);
    regions_.push_back(region(name, tensor, written));
  }
  void finish() const { check_apart(regions_); }

 private:
  const Tensor& order_;
  int64_t rows_ = 0;
  std::vector<Region> regions_;
};

int32_t within(const char* name, int64_t value, int64_t least, int64_t most) {
  EE_CHECK(value >= least && value <= most, name, " must lie in [", least, ", ", most, "], got ", value);
  return static_cast<int32_t>(value);
}

}  // namespace

template <class Backend>
void step_rows_(const std::optional<Tensor>& partial, const std::optional<Tensor>& b2, const Tensor& order,
                const Tensor& counts, int64_t layer, int64_t kind, const Tensor& threshold_logit, const Tensor& script,
                const Tensor& min_depth, const Tensor& max_depth, const Tensor& exit_layers, const Tensor& exit_probs,
                const Tensor& out_order, const Tensor& out_counts, int64_t next_layer, const Tensor& positions,
                const Tensor& block_table, int64_t block_size, const Tensor& watermarks, const Tensor& owed_slots,
                const Tensor& owed_positions, const std::optional<Tensor>& settled) {
  StepRowsArgs args;
  Arguments given(order);
  args.cap_rows = given.rows();
  EE_CHECK(kind == kStay || kind == kDecide || kind == kLeave,
           "kind must be 0 (everybody goes on), 1 (an exit decides) or 2 (everybody leaves), got ", kind);
  args.kind = static_cast<int32_t>(kind);

  args.order = given.in<int32_t>("order", order, ScalarType::Int);
  check_shape("counts", counts, {2});
  args.counts = given.in<int32_t>("counts", counts, ScalarType::Int);
  check_shape("out_counts", out_counts, {2});
  args.out_order = given.out_by_row<int32_t>("out_order", out_order, ScalarType::Int);
  args.out_counts = given.out<int32_t>("out_counts", out_counts, ScalarType::Int);
  args.threshold_logit = given.by_row<float>("threshold_logit", threshold_logit, ScalarType::Float);
  args.script = given.by_row<int32_t>("script", script, ScalarType::Int);
  args.min_depth = given.by_row<int32_t>("min_depth", min_depth, ScalarType::Int);
  args.max_depth = given.by_row<int32_t>("max_depth", max_depth, ScalarType::Int);
  args.exit_layers = given.out_by_row<int32_t>("exit_layers", exit_layers, ScalarType::Int);
  args.exit_probs = given.out_by_row<float>("exit_probs", exit_probs, ScalarType::Float);
  args.positions = given.by_row<int32_t>("positions", positions, ScalarType::Int);

  given.enough("block_table", block_table, 2);
  args.block_table = given.in<int32_t>("block_table", block_table, ScalarType::Int);
  args.blocks = block_table.size(1);
  EE_CHECK(args.blocks >= 1 || args.cap_rows == 0, "block_table must have a block for each row, got shape ",
           shape_of(block_table));
  args.block_size = within("block_size", block_size, 1, std::numeric_limits<int32_t>::max());
  given.enough("watermarks", watermarks, 2);
  args.watermarks = given.out<int32_t>("watermarks", watermarks, ScalarType::Int);
  args.layers = watermarks.size(1);
  args.layer = within("layer", layer, kind == kStay ? 0 : 1, args.layers);
  args.next_layer = within("next_layer", next_layer, 0, args.layers);
  check_dim("owed_slots", owed_slots, 1);
  args.owed_slots = given.out<int32_t>("owed_slots", owed_slots, ScalarType::Int);
  args.cap_owed = owed_slots.size(0);
  check_shape("owed_positions", owed_positions, {args.cap_owed});
  args.owed_positions = given.out<int32_t>("owed_positions", owed_positions, ScalarType::Int);
  EE_CHECK(args.cap_owed <= std::numeric_limits<int32_t>::max(), "owed_slots must have at most ",
           std::numeric_limits<int32_t>::max(), " entries, got ", args.cap_owed);
  if (settled.has_value()) {
    check_shape("settled", *settled, {1});
    args.settled = given.out<int64_t>("settled", *settled, ScalarType::Long);
  }

  if (kind == kDecide) {
    EE_CHECK(partial.has_value() && b2.has_value(), "partial and b2 are missing: an exit decides here (kind 1)");
    given.enough("partial", *partial, 2);
    args.partial = given.in<float>("partial", *partial, ScalarType::Float);
    args.splits = partial->size(1);
    check_shape("b2", *b2, {1});
    args.b2_dtype = float_dtype("b2", *b2);
    given.look("b2", *b2, b2->scalar_type(), false);
    args.b2 = bytes_of(*b2);
  }
  given.finish();
  Backend(order).step_rows(args);
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { m.impl("step_rows_", TORCH_BOX((&step_rows_<Cpu>))); }
#ifdef CONSISTENTEE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(consistentee, CUDA, m) { m.impl("step_rows_", TORCH_BOX((&step_rows_<Cuda>))); }
#endif

}  // namespace consistentee
