// The builder behind graph.h. CUDA names that changed between toolkits stand in the first section; a toolkit without
// conditional nodes (before 12.4) compiles to a builder that can rehearse and says why it cannot capture.
#include "graph.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "device.cuh"
#include "fail.h"

#ifndef EE_CONDITIONAL_NODES
#define EE_CONDITIONAL_NODES (CUDART_VERSION >= 12040)
#endif

namespace consistentee {
namespace {

void check(cudaError_t error, const char* what) {
  if (const char* text = cuda::error_text(error)) fail<std::runtime_error>("CUDA: ", what, ": ", text);
}

// Makes `device` the current one, and gives the old one back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  // What `f` returns on that device, or why it could not be made the current one.
  template <class F>
  const char* run(F&& f) const {
    return cuda::error_text(error_ == cudaSuccess ? f() : error_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

enum class Condition { branch, choice };

// --- what depends on the toolkit -------------------------------------------------------------------------------------

#if EE_CONDITIONAL_NODES

__global__ void set_condition_kernel(cudaGraphConditionalHandle handle, const int32_t* value) {
  // A negative value is a large unsigned one: true for an IF, past the last case for a SWITCH.
  cudaGraphSetConditional(handle, static_cast<unsigned>(*value));
}

// Where the next captured operation would hang.
struct Tail {
  cudaGraph_t graph = nullptr;
  std::vector<cudaGraphNode_t> nodes;
  std::vector<cudaGraphEdgeData> edges;
};

Tail capture_tail(cudaStream_t stream) {
  Tail tail;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &tail.graph, &nodes, &edges, &count), "capture info");
#else
  check(cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, &tail.graph, &nodes, &edges, &count), "capture info");
#endif
  if (status != cudaStreamCaptureStatusActive) {
    fail<std::runtime_error>(status == cudaStreamCaptureStatusInvalidated
                                 ? "the capture was invalidated: something recorded in it is not allowed in a graph"
                                 : "the stream is no longer being captured: somebody else ended it");
  }
  // The arrays belong to the capture and end with it.
  tail.nodes.assign(nodes, nodes + count);
  if (edges != nullptr) {
    tail.edges.assign(edges, edges + count);
  } else {
    tail.edges.resize(count);  // zeros: full serialisation
  }
  return tail;
}

void capture_into(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* after) {
  check(cudaStreamBeginCaptureToGraph(stream, graph, after, nullptr, after != nullptr ? 1 : 0,
                                      cudaStreamCaptureModeRelaxed),
        "begin capture");
}

struct Conditional {
  cudaGraphNode_t node = nullptr;
  std::vector<cudaGraph_t> bodies;
};

// Ends the capture of `graph` on `stream` behind a kernel that reads the value, and hangs the node on that kernel.
Conditional add_conditional(cudaStream_t stream, cudaGraph_t graph, const int32_t* value, Condition kind,
                            unsigned size) {
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.type = cudaGraphCondTypeIf;
  if (kind == Condition::choice) {
#if CUDART_VERSION >= 12080
    params.conditional.type = cudaGraphCondTypeSwitch;
#else
    fail<std::runtime_error>("SWITCH nodes need CUDA 12.8, this extension was built with ", CUDART_VERSION / 1000, ".",
                             CUDART_VERSION % 1000 / 10);
#endif
  }
  params.conditional.size = size;
  if (capture_tail(stream).graph != graph) fail<std::runtime_error>("the stream is being captured into another graph");
  // A handle belongs to the graph that holds its node: for a nested node, the body around it.
  check(cudaGraphConditionalHandleCreate(&params.conditional.handle, graph, 0, cudaGraphCondAssignDefault),
        "create a conditional handle");
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = 1;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, set_condition_kernel, params.conditional.handle, value),
        "record the kernel that reads a condition");
  const Tail tail = capture_tail(stream);
  cudaGraph_t ended = nullptr;
  check(cudaStreamEndCapture(stream, &ended), "end the capture in front of a conditional node");
  Conditional made;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&made.node, graph, tail.nodes.data(), tail.edges.data(), tail.nodes.size(), &params),
        "add a conditional node");
#else
  check(cudaGraphAddNode_v2(&made.node, graph, tail.nodes.data(), tail.edges.data(), tail.nodes.size(), &params),
        "add a conditional node");
#endif
  made.bodies.assign(params.conditional.phGraph_out, params.conditional.phGraph_out + size);
  return made;
}

// The tail of a capture is exactly `node`.
bool stands_at(cudaStream_t stream, cudaGraphNode_t node) {
  const Tail tail = capture_tail(stream);
  return tail.nodes.size() == 1 && tail.nodes[0] == node;
}

#else

[[noreturn]] void too_old() {
  fail<std::runtime_error>("conditional graph nodes need CUDA 12.4, this extension was built with ",
                           CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10);
}
struct Conditional {
  cudaGraphNode_t node = nullptr;
  std::vector<cudaGraph_t> bodies;
};
void capture_into(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*) { too_old(); }
Conditional add_conditional(cudaStream_t, cudaGraph_t, const int32_t*, Condition, unsigned) { too_old(); }
bool stands_at(cudaStream_t, cudaGraphNode_t) { too_old(); }

#endif

// --- the builder -----------------------------------------------------------------------------------------------------

// Owned until given away.
struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using OwnGraph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

class Builder {
 public:
  ~Builder() { abort(); }

  void begin(cudaStream_t stream, bool rehearse) {
    if (open()) fail<std::runtime_error>("begin: this builder is already capturing; end or abort that first");
    abort();
    if (!rehearse) {
      if (stream == nullptr) {
        fail<std::runtime_error>("begin: the default stream cannot be captured; use a stream of your own");
      }
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      check(cudaStreamIsCapturing(stream, &status), "begin");
      if (status != cudaStreamCaptureStatusNone) {
        fail<std::runtime_error>("begin: the stream is already being captured by somebody else");
      }
      cudaGraph_t graph = nullptr;
      check(cudaGraphCreate(&graph, 0), "create a graph");
      graph_.reset(graph);
      try {
        capture_into(stream, graph, nullptr);
      } catch (...) {
        graph_.reset();
        throw;
      }
      graphs_.push_back(graph);
    }
    stream_ = stream;
    rehearse_ = rehearse;
    frames_.push_back({Kind::root, graph_.get(), nullptr, {}, {}});
  }

  void begin_if(const int32_t* value) {
    may_record("begin_if");
    Conditional made = conditional(value, Condition::branch, 1);
    Frame frame{Kind::branch, body(made, 0), made.node, {}, {}};
    enter(frame.graph, nullptr);
    frames_.push_back(std::move(frame));
  }

  void end_if() {
    expect(Kind::branch, "end_if", "begin_if");
    leave(frames_.back().node);
  }

  void begin_switch(const int32_t* value, int32_t count) {
    may_record("begin_switch");
    for (const Frame& frame : frames_) {
      // Its bodies would multiply with those of the one around it.
      if (frame.kind == Kind::choice) {
        fail<std::runtime_error>("begin_switch: a switch must not stand inside another switch");
      }
    }
    if (count < 1) fail<std::runtime_error>("begin_switch: a switch needs at least 1 case, got ", count);
    Conditional made = conditional(value, Condition::choice, static_cast<unsigned>(count));
    // Between cases the stream captures behind the node, so that nothing launched there by mistake really runs.
    const cudaGraph_t graph = frames_.back().graph;
    enter(graph, &made.node);
    made.bodies.resize(count);
    frames_.push_back({Kind::choice, graph, made.node, std::move(made.bodies), std::vector<bool>(count)});
  }

  void begin_case(int32_t index) {
    expect(Kind::choice, "begin_case", "begin_switch");
    Frame& choice = frames_.back();
    const int32_t count = static_cast<int32_t>(choice.bodies.size());
    if (index < 0 || index >= count) {
      fail<std::runtime_error>("begin_case: the case must lie in [0, ", count, "), got ", index);
    }
    if (choice.recorded[index]) fail<std::runtime_error>("begin_case: case ", index, " is already recorded");
    if (!rehearse_ && !stands_at(stream_, choice.node)) {
      fail<std::runtime_error>("begin_case: work was recorded between the cases of a switch; put it into a case, or ",
                               "before or after the switch");
    }
    finish_capture(choice.graph);
    choice.recorded[index] = true;
    Frame frame{Kind::chosen, choice.bodies[index], choice.node, {}, {}};
    enter(frame.graph, nullptr);
    frames_.push_back(std::move(frame));
  }

  void end_case() {
    expect(Kind::chosen, "end_case", "begin_case");
    leave(frames_.back().node);
  }

  void end_switch() {
    expect(Kind::choice, "end_switch", "begin_switch");
    frames_.pop_back();
  }

  void end() {
    expect(Kind::root, "end", "begin");
    finish_capture(frames_.back().graph);
    frames_.clear();
    finished_ = true;
  }

  void abort() noexcept {
    if (open() && rehearse_ && stream_ != nullptr) cudaGetLastError();
    if (open() && !rehearse_) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      if (cudaStreamIsCapturing(stream_, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone) {
        cudaGraph_t ended = nullptr;
        cudaStreamEndCapture(stream_, &ended);  // fails where the capture was invalidated, and ends it all the same
        taken_apart_ = taken_apart_ || status == cudaStreamCaptureStatusInvalidated;
      }
      cudaGetLastError();  // nobody's error any more
    }
    // Where a capture was invalidated, the driver takes apart what it was recording into, which may be a body inside
    // graph_: destroying that again has crashed. A small host object is lost instead.
    if (taken_apart_) static_cast<void>(graph_.release());
    taken_apart_ = false;
    graph_.reset();
    graphs_.clear();
    frames_.clear();
    broken_.clear();
    conditionals_ = 0;
    finished_ = false;
  }

  void counts(int64_t* nodes, int64_t* conditionals) const {
    if (!finished_) fail<std::runtime_error>("counts: nothing is recorded yet");
    *conditionals = conditionals_;
    *nodes = 0;
    for (cudaGraph_t graph : graphs_) *nodes += count_nodes(graph);
  }

  cudaGraphExec_t instantiate() const {
    if (!finished_) fail<std::runtime_error>("instantiate: no graph is recorded; capture one first");
    if (rehearse_) fail<std::runtime_error>("instantiate: a rehearsal records no graph; capture one first");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiateWithFlags(&executable, graph_.get(), 0), "instantiate");
    return executable;
  }

  // Runs `f` and keeps what it throws as text.
  template <class F>
  const char* guarded(F&& f) {
    try {
      f();
      return nullptr;
    } catch (const std::exception& error) {
      error_ = error.what();
      return error_.c_str();
    }
  }

 private:
  enum class Kind { root, branch, choice, chosen };
  struct Frame {
    Kind kind;
    cudaGraph_t graph;     // where work is recorded while this frame is the last
    cudaGraphNode_t node;  // the conditional node around it
    std::vector<cudaGraph_t> bodies;
    std::vector<bool> recorded;
  };

  bool open() const { return !frames_.empty(); }

  static const char* name_of(Kind kind) {
    switch (kind) {
      case Kind::branch: return "an IF body";
      case Kind::choice: return "a switch, outside its cases";
      case Kind::chosen: return "a case of a switch";
      default: return "the capture itself";
    }
  }

  void must_be_open(const char* call) const {
    if (!open()) fail<std::runtime_error>(call, ": nothing is being captured; begin a capture first");
    if (!broken_.empty()) fail<std::runtime_error>(call, ": this capture failed before (", broken_, "); abort it");
  }
  void may_record(const char* call) const {
    must_be_open(call);
    if (frames_.back().kind == Kind::choice) {
      fail<std::runtime_error>(call, ": inside a switch, work belongs into one of its cases");
    }
  }
  void expect(Kind kind, const char* call, const char* opener) const {
    must_be_open(call);
    if (frames_.back().kind != kind) {
      fail<std::runtime_error>(call, " without ", opener, ": what is open is ", name_of(frames_.back().kind));
    }
  }

  // From here on a failure has taken the capture apart: only abort helps.
  template <class F>
  auto breaking(F&& f) {
    try {
      return f();
    } catch (const std::exception& error) {
      broken_ = error.what();
      taken_apart_ = true;
      throw;
    }
  }

  Conditional conditional(const int32_t* value, Condition kind, unsigned size) {
    Conditional made;
    if (!rehearse_) {
      made = breaking([&] { return add_conditional(stream_, frames_.back().graph, value, kind, size); });
      graphs_.insert(graphs_.end(), made.bodies.begin(), made.bodies.end());
    }
    ++conditionals_;
    return made;
  }
  static cudaGraph_t body(const Conditional& made, size_t i) {
    return i < made.bodies.size() ? made.bodies[i] : nullptr;
  }

  void enter(cudaGraph_t graph, const cudaGraphNode_t* after) {
    if (!rehearse_) breaking([&] { capture_into(stream_, graph, after); });
  }
  void finish_capture(cudaGraph_t graph) {
    if (rehearse_) return;
    breaking([&] {
      cudaGraph_t ended = nullptr;
      check(cudaStreamEndCapture(stream_, &ended), "end capture");
      if (ended != graph) fail<std::runtime_error>("the stream was being captured into another graph");
    });
  }
  // Out of a body, back behind its node in the graph around it.
  void leave(cudaGraphNode_t node) {
    finish_capture(frames_.back().graph);
    frames_.pop_back();
    enter(frames_.back().graph, &node);
  }

  static int64_t count_nodes(cudaGraph_t graph) {
    size_t count = 0;
    check(cudaGraphGetNodes(graph, nullptr, &count), "count nodes");
    std::vector<cudaGraphNode_t> nodes(count);
    if (count > 0) check(cudaGraphGetNodes(graph, nodes.data(), &count), "count nodes");
    int64_t total = static_cast<int64_t>(count);
    for (cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type;
      check(cudaGraphNodeGetType(node, &type), "count nodes");
      if (type != cudaGraphNodeTypeGraph) continue;
      cudaGraph_t child = nullptr;
      check(cudaGraphChildGraphNodeGetGraph(node, &child), "count nodes");
      total += count_nodes(child);
    }
    return total;
  }

  cudaStream_t stream_ = nullptr;
  OwnGraph graph_;                    // owns every body
  std::vector<cudaGraph_t> graphs_;   // it and all bodies
  std::vector<Frame> frames_;         // from the capture inwards; empty: not capturing
  int64_t conditionals_ = 0;
  bool rehearse_ = false;
  bool finished_ = false;
  bool taken_apart_ = false;  // see abort
  std::string broken_;  // why only abort is left
  std::string error_;
};

Builder* of(void* builder) { return static_cast<Builder*>(builder); }

}  // namespace
}  // namespace consistentee

using consistentee::of;

void* consistentee_graph_new() { return new consistentee::Builder; }
void consistentee_graph_free(void* builder) { delete of(builder); }

const char* consistentee_graph_begin(void* builder, void* stream, int32_t rehearse) {
  return of(builder)->guarded([&] { of(builder)->begin(static_cast<cudaStream_t>(stream), rehearse != 0); });
}
const char* consistentee_graph_begin_if(void* builder, const int32_t* value) {
  return of(builder)->guarded([&] { of(builder)->begin_if(value); });
}
const char* consistentee_graph_end_if(void* builder) {
  return of(builder)->guarded([&] { of(builder)->end_if(); });
}
const char* consistentee_graph_begin_switch(void* builder, const int32_t* value, int32_t count) {
  return of(builder)->guarded([&] { of(builder)->begin_switch(value, count); });
}
const char* consistentee_graph_begin_case(void* builder, int32_t index) {
  return of(builder)->guarded([&] { of(builder)->begin_case(index); });
}
const char* consistentee_graph_end_case(void* builder) {
  return of(builder)->guarded([&] { of(builder)->end_case(); });
}
const char* consistentee_graph_end_switch(void* builder) {
  return of(builder)->guarded([&] { of(builder)->end_switch(); });
}
const char* consistentee_graph_end(void* builder) {
  return of(builder)->guarded([&] { of(builder)->end(); });
}
void consistentee_graph_abort(void* builder) { of(builder)->abort(); }

const char* consistentee_graph_counts(void* builder, int64_t* nodes, int64_t* conditionals) {
  return of(builder)->guarded([&] { of(builder)->counts(nodes, conditionals); });
}
const char* consistentee_graph_instantiate(void* builder, void** executable) {
  return of(builder)->guarded([&] { *executable = of(builder)->instantiate(); });
}

const char* consistentee_graph_launch(void* executable, void* stream, int32_t device) {
  return consistentee::OnDevice(device).run(
      [&] { return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable), static_cast<cudaStream_t>(stream)); });
}
const char* consistentee_graph_launch_batch(const GraphBatch* batch) {
  return consistentee::OnDevice(batch->device).run([&] {
    const auto stream = static_cast<cudaStream_t>(batch->stream);
    cudaError_t error =
        cudaMemcpyAsync(batch->given, batch->host_given, batch->given_bytes, cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaGraphLaunch(static_cast<cudaGraphExec_t>(batch->executable), stream);
    if (error == cudaSuccess) {
      error =
          cudaMemcpyAsync(batch->host_results, batch->results, batch->results_bytes, cudaMemcpyDeviceToHost, stream);
    }
    if (error == cudaSuccess) error = cudaEventRecord(static_cast<cudaEvent_t>(batch->done), stream);
    return error;
  });
}
const char* consistentee_graph_upload(void* executable, void* stream, int32_t device) {
  return consistentee::OnDevice(device).run(
      [&] { return cudaGraphUpload(static_cast<cudaGraphExec_t>(executable), static_cast<cudaStream_t>(stream)); });
}
const char* consistentee_graph_new_stream(int32_t device, void** stream) {
  return consistentee::OnDevice(device).run(
      [&] { return cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking); });
}
void consistentee_graph_destroy(void* executable) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable)); }

int32_t consistentee_graph_supported(int32_t device, char* reason, int32_t size) {
  if (!EE_CONDITIONAL_NODES) {
    std::snprintf(reason, size, "conditional graph nodes need CUDA 12.4, this extension was built with %d.%d",
                  CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return 0;
  }
  int driver = 0, major = 0, minor = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) {
    std::snprintf(reason, size, "there is no CUDA driver");
    return 0;
  }
  if (error == cudaSuccess && driver < 12040) {
    std::snprintf(reason, size, "conditional graph nodes need a driver for CUDA 12.4, this one serves up to %d.%d",
                  driver / 1000, driver % 1000 / 10);
    return 0;
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    std::snprintf(reason, size, "CUDA: %s", consistentee::cuda::error_text(error));
    return 0;
  }
  if (major < 8) {
    std::snprintf(reason, size, "the extension is built for compute capability 8.0 and up, this device has %d.%d", major,
                  minor);
    return 0;
  }
  return 1;
}
