// Forward pass of cells: ../../cell_forward.py in C++, where the steps are explained, with less to read and
// write: what leaves a state of an input normalises it, and a convolution in front of the next cell is
// computed with one of this cell that reads the same.
#include "cell.h"

namespace pdarts {

namespace {

class Forward : public CellPass {
 public:
  using CellPass::CellPass;

  // `behind` is the next cell if it shares an input with this one.
  void run_cell(Forward* behind) {
    if (!has_first_) preprocess(0, nullptr);
    preprocess(1, behind);
    for (int64_t source = 0; source < calls_.steps + 2; ++source) {
      if (source >= 2) mix(source - 2);
      if (source <= calls_.steps) leave(source);
    }
  }

 private:
  // Keeps mean and variance, and the normalisation that follows from them.
  void remember(int64_t row, const double* moments) {
    double* norm = norm_row(row);
    std::memcpy(cell_.stats + row * 2 * channels_, moments,
                static_cast<size_t>(2 * channels_) * sizeof(double));
    for (int64_t c = 0; c < channels_; ++c) {
      norm[c] = 1.0 / std::sqrt(moments[channels_ + c] + kEpsilon);
      norm[channels_ + c] = -norm[c] * moments[c];
    }
  }

  void remember_all(const Call& call) {
    if (!cell_.training) return;
    for (int64_t i = 0; i < call.count; ++i)
      remember(call.items[i].slot, sums_.data() + i * 2 * channels_);
  }

  void write_sums(const Call& call) {
    double* room = sums(2 * call.count);
    for (Branch& b : branches_) {
      b.sums = room;
      room += 2 * channels_;
    }
  }

  void preprocess(int64_t which, Forward* behind) {
    branches_ = {input_branch(which)};
    if (behind) branches_.push_back(behind->input_branch(0));
    double* found = sums(2 * static_cast<int64_t>(branches_.size()));
    for (size_t i = 0; i < branches_.size(); ++i) branches_[i].sums = found + i * 2 * channels_;
    Task t = task();
    read_input(t, which);
    run(kFanOut, t);
    if (behind) {
      behind->keep_norm(0, found + 2 * channels_);
      behind->has_first_ = true;
    }
    keep_norm(which, found);
  }

  // The normalisation of an input, from mean and variance of its convolution.
  void keep_norm(int64_t which, const double* moments) {
    const int64_t row = input_row(which);
    if (cell_.training) remember(row, moments);
    Branch b{};
    std::vector<float>& affine = affine_[which];
    affine.assign(static_cast<size_t>(2 * channels_), 0.0f);
    set_norm(b, norm_row(row), affine.data(), affine.data() + channels_);
    // What leaves the state normalises it, if anything does.
    if (calls_.leave[which].count) return;
    branches_ = {b};
    Task t = task();
    t.out_height = cell_.state_height[which];
    t.out_width = cell_.state_width[which];
    t.out = cell_.states[which];
    t.out_stride = channels_;
    run(kAffine, t);
  }

  // Everything on the edges that leave a state, up to the last BatchNorm.
  void leave(int64_t source) {
    const Call &first = calls_.leave[source], &second = calls_.second[source];
    if (first.count) {
      branches(first);
      write_sums(first);
      Task t = task();
      read_state(t, source);
      if (source < 2) {
        t.scale = affine_[source].data();
        t.shift = t.scale + channels_;
      }
      run(kFanOut, t);
      remember_all(first);
    }
    if (second.count) {
      branches(second);
      half_norms(second);
      write_sums(second);
      Task t = task();
      run(kMid, t);
      remember_all(second);
    }
  }

  void mix(int64_t node) {
    const Call& call = calls_.enter[node];
    branches(call);
    double* total = sums(1);
    float* scale = scales(call.count);
    for (int64_t i = 0; i < call.count; ++i, scale += channels_) {
      const Item& item = call.items[i];
      const double alpha = weight(item);
      branches_[static_cast<size_t>(i)].scale = scale;
      if (i >= call.normed) {
        for (int64_t c = 0; c < channels_; ++c) scale[c] = static_cast<float>(alpha);
        continue;
      }
      const double* n = norm(item);
      for (int64_t c = 0; c < channels_; ++c) {
        scale[c] = static_cast<float>(alpha * n[c]);
        total[c] += alpha * n[channels_ + c];
      }
    }
    float* shift = shifts(1);
    for (int64_t c = 0; c < channels_; ++c) shift[c] = static_cast<float>(total[c]);
    Task t = task();
    t.shift = shift;
    const Rows out = state(node + 2);
    t.out = out.data;
    t.out_stride = out.stride;
    run(kMix, t);
  }

  std::vector<float> affine_[2];  // scale and shift of both states
  bool has_first_ = false;        // the cell in front has computed input 0
};

}  // namespace

bool share_input(const CellTask& cell, const CellTask& behind) {
  const auto is_pointwise = [](const CellTask& of, int64_t which) {
    return of.calls->inputs[which].items[0].kind == kPointwise;
  };
  // Inputs of the first cell are one array, whose gradient has three parts.
  return cell.inputs[1] == behind.inputs[0] && cell.inputs[0] != cell.inputs[1] &&
         cell.channels == behind.channels && is_pointwise(cell, 1) && is_pointwise(behind, 0);
}

void cells_forward(const CellTask* cells, int64_t count, const Variant& variant) {
  auto cell = std::make_unique<Forward>(cells[0], variant);
  for (int64_t i = 0; i < count; ++i) {
    std::unique_ptr<Forward> behind;
    if (i + 1 < count) behind = std::make_unique<Forward>(cells[i + 1], variant);
    cell->run_cell(behind && share_input(cells[i], cells[i + 1]) ? behind.get() : nullptr);
    cell = std::move(behind);
  }
}

}  // namespace pdarts
