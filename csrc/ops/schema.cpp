// Every op of the library. Implementations are registered beside their front ends; shapes for tracing
// (fakes) and the plain torch twins are in kernels/*.py.
#include "tensor.h"

STABLE_TORCH_LIBRARY(consistentee, m) {
  m.def("prefix_sum(Tensor lengths) -> Tensor");
  m.def("compact_rows(Tensor hidden_states, Tensor cu_seqlens, Tensor keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("compact_lead(Tensor hidden_states, Tensor cu_seqlens, Tensor keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) out, Tensor src, Tensor index) -> ()");
  m.def(
      "survivors_(Tensor keep, Tensor cu_seqlens, Tensor counts, Tensor[] state, Tensor(a!) out_cu_seqlens, "
      "Tensor(b!) token_dest, Tensor(c!) out_counts, Tensor(d!)[] out_state) -> ()");
  m.def(
      "step_rows_(Tensor? partial, Tensor? b2, Tensor order, Tensor counts, int layer, int kind, "
      "Tensor threshold_logit, Tensor script, Tensor min_depth, Tensor max_depth, Tensor(a!) exit_layers, "
      "Tensor(b!) exit_probs, Tensor(c!) out_order, Tensor(d!) out_counts, int next_layer, Tensor positions, "
      "Tensor block_table, int block_size, Tensor(e!) watermarks, Tensor(f!) owed_slots, Tensor(g!) owed_positions, "
      "Tensor(h!)? settled=None) -> ()");
  m.def("pack_lead(Tensor padded, Tensor lengths, int? total_tokens=None) -> Tensor");
  m.def("unpack_lead(Tensor packed, Tensor cu_seqlens, int max_seqlen) -> Tensor");
  m.def(
      "lead_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor? rows, int num_heads, "
      "float scale, int part, Tensor? position_bias, int? num_queries=None) -> Tensor");
  m.def(
      "exit_policy(Tensor first, Tensor? pooler_weight, Tensor? pooler_bias, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2) -> (Tensor state, Tensor logit)");
  m.def(
      "embed_layer_norm(Tensor input_ids, Tensor? token_type_ids, Tensor positions, Tensor word, Tensor? token_type, "
      "Tensor position, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int outputs, bool gelu) -> Tensor");
  m.def(
      "finish_layer(Tensor qkv, Tensor cu_seqlens, Tensor? rows, Tensor residual, int num_heads, float scale, int part, "
      "Tensor? position_bias, Tensor attention_weight, Tensor attention_bias, Tensor attention_norm_weight, "
      "Tensor attention_norm_bias, float attention_eps, Tensor intermediate_weight, Tensor intermediate_bias, "
      "Tensor output_weight, Tensor output_bias, Tensor output_norm_weight, Tensor output_norm_bias, "
      "float output_eps) -> Tensor");
  m.def(
      "encoder_plan(Tensor word, Tensor? token_type, Tensor position, Tensor norm_weight, Tensor norm_bias, "
      "float norm_eps, int first_position, int num_heads, float scale, Tensor? position_bias, Tensor[] layers, "
      "float[] eps, int[] exit_layers, Tensor[] exits, bool pooled, int classes) -> int");
  m.def(
      "run_encoder(Tensor input_ids, Tensor? token_type_ids, int[] lengths, int plan, int classes, "
      "Tensor? threshold_logit, Tensor? script, Tensor? min_depth, Tensor? max_depth, Tensor leave_rates, int deepest, "
      "float second_pass_tokens) -> (Tensor logits, Tensor exit_layers, Tensor exit_probs)");
  m.def(
      "decoder_plan(Tensor embedding, Tensor cos, Tensor sin, Tensor final_weight, float final_eps, int num_heads, "
      "int kv_heads, float scale, Tensor[] layers, float[] eps, int[] exit_layers, Tensor[] policies) -> int");
  m.def(
      "decode_step(Tensor token_ids, Tensor positions, Tensor block_table, Tensor(a!) watermarks, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor(d!) states, int block_size, int plan, Tensor threshold_logit, Tensor script, "
      "Tensor min_depth, Tensor max_depth) -> (Tensor normed, Tensor exit_layers, Tensor exit_probs, Tensor settled)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor");
}
