// Backward pass of cells: ../../cell_backward.py in C++, where the steps are explained, with less to read and
// write: the sums over a state of an input are those of `fan_in`, and the gradient of an output that two
// cells read in the same way is written once.
#include "cell.h"

namespace pdarts {

namespace {

class Backward : public CellPass {
 public:
  Backward(const CellTask& cell, const Variant& variant)
      : CellPass(cell, variant),
        coef_(static_cast<size_t>(cell.calls->alphas * 3 * cell.channels), 0.0f) {}

  // `behind` is the next cell if it shares an input with this one; `shares` if this one does with that in
  // front of it.
  void run_cell(Backward* behind, bool shares) {
    for (int64_t node = 0; node < calls_.steps; ++node)
      grads_.push_back(node_of(cell_.grad, node));
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
      const Branch b = preprocessing(which, total);
      if (which == 0 && shares) first_ = b;
      else preprocess(which, b, which == 1 ? behind : nullptr);
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

  // Gradient of a state from all edges that leave it; `total` [2, C] is for sums of it and of it times the
  // state, or null.
  void gather(int64_t source, const Rows* incoming, Rows out, double* total) {
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
    t.sums = total;
    if (incoming) {
      t.incoming = incoming->data;
      t.incoming_stride = incoming->stride;
    }
    run(kFanIn, t);
  }

  // What is in front of an input, with dy. The state is stored normalised, so dy is in terms of BN(y). `total`
  // as `gather` gives it.
  Branch preprocessing(int64_t which, const double* total) {
    Branch b = input_branch(which);
    b.grad = cell_.state_grads[which];
    b.grad_stride = channels_;
    std::vector<float>& coef = input_coef_[which];
    coef.assign(static_cast<size_t>(3 * channels_), 0.0f);
    const double* factor = norm_row(input_row(which));
    const double count =
        static_cast<double>(cell_.images * cell_.state_height[which] * cell_.state_width[which]);
    for (int64_t c = 0; c < channels_; ++c) {
      coef[c] = static_cast<float>(factor[c]);
      if (!cell_.training) continue;
      coef[channels_ + c] = static_cast<float>(-factor[c] * (total[channels_ + c] / count));
      coef[2 * channels_ + c] = static_cast<float>(-factor[c] * (total[c] / count));
    }
    b.coef = b.scale = coef.data();
    return b;
  }

  // Gradient of an input, from its state's and from that of the cell behind, if it shares the input.
  void preprocess(int64_t which, const Branch& b, const Backward* behind) {
    branches_ = {b};
    if (behind) branches_.push_back(behind->first_);
    Task t = task();
    read_input(t, which);
    t.out = cell_.grad_inputs[which];
    t.out_stride = t.x_stride;
    if (cell_.adds[which] && !behind) {
      t.incoming = t.out;
      t.incoming_stride = t.out_stride;
    }
    run(kFanIn, t);
  }

  std::vector<float> coef_;
  std::vector<float> input_coef_[2];
  Branch first_{};  // what is in front of input 0, for the cell in front
  std::vector<Rows> grads_;
};

}  // namespace

void cells_backward(const CellTask* cells, int64_t count, const Variant& variant) {
  std::unique_ptr<Backward> behind;
  for (int64_t i = count - 1; i >= 0; --i) {
    auto cell = std::make_unique<Backward>(cells[i], variant);
    const bool with_behind = behind && share_input(cells[i], cells[i + 1]);
    cell->run_cell(with_behind ? behind.get() : nullptr, i > 0 && share_input(cells[i - 1], cells[i]));
    behind = std::move(cell);
  }
}

}  // namespace pdarts
