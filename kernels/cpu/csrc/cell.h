// What the forward and the backward pass of a whole cell have in common: ../../cell_pass.py in C++.
//
// Python calls once a pass. Between two primitives lies a little algebra in double on vectors of C;
// with a call from Python for each it took a third of the time of the last stage.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "abi.h"

namespace pdarts {

constexpr double kEpsilon = 1e-5;

// A tensor of storage with the number of elements from one pixel to the next.
struct Rows {
  void* data;
  int64_t stride;
};

class CellPass {
 public:
  CellPass(const CellTask& cell, const Variant& variant)
      : cell_(cell), calls_(*cell.calls), variant_(variant), channels_(cell.channels) {}

 protected:
  int64_t element() const { return cell_.bf16 ? 2 : 4; }

  int64_t pixels() const { return cell_.images * cell_.height * cell_.width; }

  void* offset(const void* base, int64_t elements) const {
    return static_cast<char*>(const_cast<void*>(base)) + elements * element();
  }

  void* stored(int64_t place) const { return offset(cell_.y, place * pixels() * channels_); }

  Rows state(int64_t source) const {
    if (source < 2) return {cell_.states[source], channels_};
    return node_of(cell_.nodes, source - 2);
  }

  // A node in `nodes` or `grad`.
  Rows node_of(const void* all, int64_t node) const {
    if (cell_.apart) return {offset(all, node * pixels() * channels_), channels_};
    return {offset(all, node * channels_), calls_.steps * channels_};
  }

  // A task whose input and output have the size of the nodes.
  Task task() const {
    Task t{};
    t.images = cell_.images;
    t.in_height = t.out_height = cell_.height;
    t.in_width = t.out_width = cell_.width;
    t.in_channels = t.channels = channels_;
    t.in_parts = 1;
    t.real_channels = cell_.real_channels;
    t.bf16 = cell_.bf16;
    t.threads = cell_.threads;
    const int64_t groups = 1024 / channels_ > 8 ? 1024 / channels_ : 8;
    t.groups = groups < cell_.images ? groups : cell_.images;
    t.dropout_rate = cell_.dropout_rate;
    t.dropout_state = cell_.dropout_state;
    return t;
  }

  // Makes a state the input of a task.
  void read_state(Task& t, int64_t source) const {
    const Rows x = state(source);
    t.x = x.data;
    t.x_stride = x.stride;
    if (source < 2) {
      t.in_height = cell_.state_height[source];
      t.in_width = cell_.state_width[source];
    }
  }

  // Makes an input of the cell that of a task which writes or reads its state.
  void read_input(Task& t, int64_t which) const {
    t.x = cell_.inputs[which];
    t.in_channels = cell_.in_channels[which];
    t.in_parts = cell_.in_parts[which];
    t.x_stride = t.in_channels / t.in_parts;
    t.in_height = cell_.in_height[which];
    t.in_width = cell_.in_width[which];
    t.out_height = cell_.state_height[which];
    t.out_width = cell_.state_width[which];
  }

  void run(PrimitiveIndex primitive, Task& t) {
    t.num_branches = static_cast<int64_t>(branches_.size());
    t.branches = branches_.data();
    variant_.primitives[primitive](t);
  }

  // The 1x1 convolution in front of input `which`, or what stands there instead.
  Branch input_branch(int64_t which) {
    branches(calls_.inputs[which]);
    branches_[0].y = cell_.states[which];
    return branches_[0];
  }

  // Fills branches_ with all of a call that does not depend on the primitive.
  void branches(const Call& call) {
    branches_.assign(static_cast<size_t>(call.count), Branch{});
    for (int64_t i = 0; i < call.count; ++i) {
      const Item& item = call.items[i];
      Branch& b = branches_[static_cast<size_t>(i)];
      b.kind = item.kind;
      b.kernel = item.kernel;
      b.dilation = item.dilation;
      b.stride = item.stride;
      b.padding = item.padding;
      b.stream = cell_.training ? item.stream : -1;
      if (item.depthwise >= 0) b.depthwise = cell_.weights[item.depthwise_weight];
      if (item.pointwise >= 0) b.pointwise = cell_.weights[item.pointwise_weight];
      if (item.kind == kFactorized) b.pointwise_odd = cell_.weights[item.pointwise_weight + 1];
      if (cell_.grad_weights && item.depthwise >= 0)
        b.grad_depthwise = cell_.grad_weights + item.depthwise;
      if (cell_.grad_weights && item.pointwise >= 0)
        b.grad_pointwise = cell_.grad_weights + item.pointwise;
      if (item.place >= 0) b.y = stored(item.place);
      if (item.kind == kSkip || (is_pool(item.kind) && item.place < 0)) {
        const Rows x = state(item.source);
        b.input = x.data;
        b.input_stride = x.stride;
        b.input_height = item.source < 2 ? cell_.state_height[item.source] : cell_.height;
        b.input_width = item.source < 2 ? cell_.state_width[item.source] : cell_.width;
        if (cell_.masks && item.mask >= 0) b.mask = cell_.masks + item.mask * pixels() * channels_;
        if (cell_.kept && item.kept >= 0) b.kept = cell_.kept + item.kept * pixels() * channels_ / 8;
      } else if (item.input_place >= 0) {
        b.input = stored(item.input_place);
        b.input_stride = channels_;
      }
    }
  }

  // What is multiplied by an item's output: its alpha, and the factor of a mask.
  double weight(const Item& item) const { return cell_.alphas[item.alpha] * mask_factor(item); }

  double mask_factor(const Item& item) const {
    return cell_.masks && item.mask >= 0 ? cell_.mask_factors[item.mask] : 1.0;
  }

  // Room for `count` vectors of C numbers, zero.
  double* sums(int64_t count) {
    sums_.assign(static_cast<size_t>(count * channels_), 0.0);
    return sums_.data();
  }

  float* scales(int64_t count) {
    scales_.assign(static_cast<size_t>(count * channels_), 0.0f);
    return scales_.data();
  }

  float* shifts(int64_t count) {
    shifts_.assign(static_cast<size_t>(count * channels_), 0.0f);
    return shifts_.data();
  }

  double* norm_row(int64_t row) const { return cell_.norms + row * 2 * channels_; }

  const double* norm(const Item& item) const {
    return norm_row(cell_.training ? item.slot : item.norm);
  }

  const double* input_norm(const Item& item) const {
    return norm_row(cell_.training ? item.input : item.input_norm);
  }

  int64_t input_row(int64_t which) const {
    return (cell_.training ? calls_.slots : calls_.norms - 2) + which;
  }

  // Scale and shift of what every second half reads, into branches_.
  void half_norms(const Call& call) {
    float* scale = scales(call.count);
    float* shift = shifts(call.count);
    for (int64_t i = 0; i < call.count; ++i, scale += channels_, shift += channels_)
      set_norm(branches_[static_cast<size_t>(i)], input_norm(call.items[i]), scale, shift);
  }

  void set_norm(Branch& b, const double* norm, float* scale, float* shift) const {
    for (int64_t c = 0; c < channels_; ++c) {
      scale[c] = static_cast<float>(norm[c]);
      shift[c] = static_cast<float>(norm[channels_ + c]);
    }
    b.scale = scale;
    b.shift = shift;
  }

  const CellTask& cell_;
  const CellCalls& calls_;
  const Variant& variant_;
  const int64_t channels_;
  std::vector<Branch> branches_;
  std::vector<double> sums_;
  std::vector<float> scales_, shifts_;
};

// Whether an output is read by 1x1 convolutions to as many channels in front of both cells that it enters,
// `cell` and the one behind it. It is then read once, and its gradient written once, for both.
bool share_input(const CellTask& cell, const CellTask& behind);

// Passes of cells that follow one another, the backward one from the last on.
void cells_forward(const CellTask* cells, int64_t count, const Variant& variant);
void cells_backward(const CellTask* cells, int64_t count, const Variant& variant);

}  // namespace pdarts
