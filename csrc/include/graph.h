// CUDA graphs with conditional nodes, recorded from a stream. Plain C functions on opaque handles, called through ctypes
// (kernels/graphs.py): no tensor is involved, so the dispatcher would only add a device key that there is nothing to
// choose by, and torch's stable ABI has no word for a stream, a handle or a body.
//
// One stream serves any nesting depth. begin_if records a kernel that reads `value`, ends the capture of the graph it
// stands in, adds the conditional node behind that kernel and captures into its body; end_if goes back. A builder holds
// everything: two captures on two streams share nothing. One thread at a time may use a builder.
//
// Functions return null, or what went wrong (text owned by the builder, until its next call). Misuse leaves the
// capture as it was; a CUDA error leaves it to be aborted. While a graph is recorded, the stream's device must be
// current; where it is launched the device is named.
#pragma once
#include <cstdint>

#define EE_EXPORT extern "C" __attribute__((visibility("default")))

EE_EXPORT void* consistentee_graph_new();
EE_EXPORT void consistentee_graph_free(void* builder);  // aborts first

// `rehearse`: nothing is captured, every body simply runs; the order of calls is checked all the same.
EE_EXPORT const char* consistentee_graph_begin(void* builder, void* stream, int32_t rehearse);
EE_EXPORT const char* consistentee_graph_begin_if(void* builder, const int32_t* value);
EE_EXPORT const char* consistentee_graph_end_if(void* builder);
EE_EXPORT const char* consistentee_graph_begin_switch(void* builder, const int32_t* value, int32_t count);
EE_EXPORT const char* consistentee_graph_begin_case(void* builder, int32_t index);
EE_EXPORT const char* consistentee_graph_end_case(void* builder);
EE_EXPORT const char* consistentee_graph_end_switch(void* builder);
EE_EXPORT const char* consistentee_graph_end(void* builder);
// Ends whatever capture is in flight and frees what was built. Safe in every state.
EE_EXPORT void consistentee_graph_abort(void* builder);

// Nodes of the finished graph and of all its bodies; conditional nodes among them (known in a rehearsal too).
EE_EXPORT const char* consistentee_graph_counts(void* builder, int64_t* nodes, int64_t* conditionals);
EE_EXPORT const char* consistentee_graph_instantiate(void* builder, void** executable);

EE_EXPORT const char* consistentee_graph_launch(void* executable, void* stream, int32_t device);
// A batch: what the host gives is copied in, the graph runs, its results are copied out, `done` is recorded.
struct GraphBatch {
  void* executable;
  void* stream;
  void* given;  // on the device
  const void* host_given;
  const void* results;  // on the device
  void* host_results;
  void* done;  // cudaEvent_t
  int64_t given_bytes, results_bytes;
  int32_t device;
};
EE_EXPORT const char* consistentee_graph_launch_batch(const GraphBatch* batch);
EE_EXPORT const char* consistentee_graph_upload(void* executable, void* stream, int32_t device);
EE_EXPORT void consistentee_graph_destroy(void* executable);

// A new stream that does not wait for the default one. Nobody destroys it.
EE_EXPORT const char* consistentee_graph_new_stream(int32_t device, void** stream);

// 1 where conditional nodes work on `device`; else 0 and the reason.
EE_EXPORT int32_t consistentee_graph_supported(int32_t device, char* reason, int32_t size);
