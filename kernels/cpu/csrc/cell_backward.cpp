// Backward pass of a cell: ../../cell_backward.py in C++, where the steps are explained.
#include "cell.h"

namespace pdarts {

namespace {

class Backward : public CellPass {
 public:
  Backward(const CellTask& cell, const Variant& variant)
      : CellPass(cell, variant),
        coef_(static_cast<size_t>(cell.calls->alphas * 3 * cell.channels), 0.0f) {}

  void run_cell() {
    for (int64_t node = 0; node < calls_.steps; ++node)
      grads_.push_back({offset(cell_.grad, node * channels_), calls_.steps * channels_});
    std::memset(cell_.grad_alphas, 0, static_cast<size_t>(calls_.alphas) * sizeof(double));
    for (int64_t node = calls_.steps - 1; node >= 0; --node) {
      enter(node);
      if (node == 0) continue;
      const Rows to{offset(cell_.node_grads, (node - 1) * pixels() * channels_), channels_};
      Rows& grad = grads_[static_cast<size_t>(node - 1)];
      gather(node + 1, &grad, to, nullptr);
      grad = to;
    }
    for (int64_t which = 0; which < 2; ++which) {
      if (!cell_.state_grads[which]) continue;
      double* total = sums(2);
      gather(which, nullptr, {cell_.state_grads[which], channels_}, total);
      preprocess(which, total);
    }
  }

 private:
  float* coef(const Item& item) { return coef_.data() + item.alpha * 3 * channels_; }

  // dy = coef[0] * grad + coef[1] * y + coef[2] of a BatchNorm; see ../../moments.py.
  void set_coef(float* coef, double factor, const double* scale, const double* shift,
                const double* sum_grad, const double* sum_product, double count) {
    for (int64_t c = 0; c < channels_; ++c) {
      const double first = factor * scale[c];
      double second = 0.0, third = 0.0;
      if (cell_.training) {
        const double s = -first * (sum_product[c] / count);
        second = s * scale[c];
        third = s * shift[c] - first * (sum_grad[c] / count);
      }
      coef[c] = static_cast<float>(first);
      coef[channels_ + c] = static_cast<float>(second);
      coef[2 * channels_ + c] = static_cast<float>(third);
    }
  }

  // Alpha gradients of a node's edges, and dy of everything that enters it.
  void enter(int64_t node) {
    const Call& call = calls_.enter[node];
    if (!call.count) return;
    branches(call);
    double* total = sums(1 + call.count);
    float* scale = scales(call.count);
    float* shift = shifts(call.count);
    for (int64_t i = 0; i < call.count; ++i) {
      Branch& b = branches_[static_cast<size_t>(i)];
      b.sums = total + (1 + i) * channels_;
      b.scale = scale + i * channels_;
      b.shift = shift + i * channels_;
      if (i < call.normed)
        set_norm(b, norm(call.items[i]), scale + i * channels_, shift + i * channels_);
    }
    Task t = task();
    t.x = grads_[static_cast<size_t>(node)].data;
    t.x_stride = grads_[static_cast<size_t>(node)].stride;
    t.sums = total;
    run(kReduce, t);
    for (int64_t i = 0; i < call.count; ++i) {
      const Item& item = call.items[i];
      const double* product = total + (1 + i) * channels_;
      double sum = 0.0;
      for (int64_t c = 0; c < channels_; ++c) sum += product[c];
      cell_.grad_alphas[item.alpha] = sum * mask_factor(item);
      const double alpha = weight(item);
      if (i < call.normed) {
        const double* n = norm(item);
        set_coef(coef(item), alpha, n, n + channels_, total, product,
                 static_cast<double>(pixels()));
      } else {
        for (int64_t c = 0; c < channels_; ++c) coef(item)[c] = static_cast<float>(alpha);
      }
    }
    second_halves(node);
  }

  // From dy of separable convolutions to that of their first halves.
  void second_halves(int64_t node) {
    const int64_t wanted = (cell_.state_grads[0] ? 1 : 0) + (cell_.state_grads[1] ? 2 : 0);
    const Call& call = calls_.enter_second[wanted * calls_.steps + node];
    if (!call.count) return;
    branches(call);
    half_norms(call);
    double* total = sums(2 * call.count);
    for (int64_t i = 0; i < call.count; ++i) {
      const Item& item = call.items[i];
      Branch& b = branches_[static_cast<size_t>(i)];
      b.grad = grads_[static_cast<size_t>(item.node)].data;
      b.grad_stride = grads_[static_cast<size_t>(item.node)].stride;
      b.grad_input = half_grad(item);
      b.coef = coef(item);
      b.sums = total + i * 2 * channels_;
    }
    Task t = task();
    run(kMidBackward, t);
    for (int64_t i = 0; i < call.count; ++i) {
      const double* sum = total + i * 2 * channels_;
      const double* n = input_norm(call.items[i]);
      set_coef(coef(call.items[i]), 1.0, n, n + channels_, sum, sum + channels_,
               static_cast<double>(pixels()));
    }
  }

  void* half_grad(const Item& item) {
    return offset(cell_.half_grads, item.half * pixels() * channels_);
  }

  // Gradient of a state from all edges that leave it; sums [2, C] of it and of it times the state, or null.
  void gather(int64_t source, const Rows* incoming, Rows out, double* sums) {
    const Call& call = calls_.gather[source];
    branches(call);
    for (int64_t i = 0; i < call.count; ++i) {
      const Item& item = call.items[i];
      Branch& b = branches_[static_cast<size_t>(i)];
      const Rows& grad = grads_[static_cast<size_t>(item.node)];
      b.grad = item.half >= 0 ? half_grad(item) : grad.data;
      b.grad_stride = item.half >= 0 ? channels_ : grad.stride;
      b.coef = b.scale = coef(item);
    }
    Task t = task();
    read_state(t, source);
    t.out = out.data;
    t.out_stride = out.stride;
    t.sums = sums;
    if (incoming) {
      t.incoming = incoming->data;
      t.incoming_stride = incoming->stride;
    }
    run(kFanIn, t);
  }

  // Gradient of a cell input from that of the state made of it. The state is stored normalised, so
  // dy is in terms of BN(y). `total` as `gather` gives it.
  void preprocess(int64_t which, const double* total) {
    const Call& call = calls_.inputs[which];
    branches(call);
    Branch& b = branches_[0];
    b.y = cell_.states[which];
    b.grad = cell_.state_grads[which];
    b.grad_stride = channels_;
    Task t = task();
    read_input(t, which);
    std::vector<float> coef(static_cast<size_t>(3 * channels_), 0.0f);
    const double* factor = norm_row(input_row(which));
    const double count = static_cast<double>(t.images * t.out_height * t.out_width);
    for (int64_t c = 0; c < channels_; ++c) {
      coef[c] = static_cast<float>(factor[c]);
      if (!cell_.training) continue;
      coef[channels_ + c] = static_cast<float>(-factor[c] * (total[channels_ + c] / count));
      coef[2 * channels_ + c] = static_cast<float>(-factor[c] * (total[c] / count));
    }
    b.coef = b.scale = coef.data();
    t.out = cell_.grad_inputs[which];
    t.out_stride = t.in_channels;
    if (cell_.adds[which]) {
      t.incoming = t.out;
      t.incoming_stride = t.out_stride;
    }
    run(kFanIn, t);
  }

  std::vector<float> coef_;
  std::vector<Rows> grads_;
};

}  // namespace

void cell_backward(const CellTask& cell, const Variant& variant) {
  Backward(cell, variant).run_cell();
}

}  // namespace pdarts
