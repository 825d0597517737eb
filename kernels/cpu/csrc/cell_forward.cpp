// Forward pass of a cell: ../../cell_forward.py in C++, where the steps are explained.
#include "cell.h"

namespace pdarts {

namespace {

class Forward : public CellPass {
 public:
  using CellPass::CellPass;

  void run_cell() {
    for (int64_t which = 0; which < 2; ++which) preprocess(which);
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

  void preprocess(int64_t which) {
    const Call& call = calls_.inputs[which];
    branches(call);
    branches_[0].y = cell_.states[which];
    write_sums(call);
    Task t = task();
    read_input(t, which);
    run(kFanOut, t);
    const int64_t row = input_row(which);
    if (cell_.training) remember(row, sums_.data());
    // What leaves the state normalises it, if anything does.
    std::vector<float>& affine = affine_[which];
    affine.assign(static_cast<size_t>(2 * channels_), 0.0f);
    set_norm(branches_[0], norm_row(row), affine.data(), affine.data() + channels_);
    if (calls_.leave[which].count) return;
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
};

}  // namespace

void cell_forward(const CellTask& cell, const Variant& variant) {
  Forward(cell, variant).run_cell();
}

}  // namespace pdarts
