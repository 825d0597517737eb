"""A search cell as a function of autograd: ``cell_operator`` where nothing is traced."""

from __future__ import annotations

import torch

from .cell_operator import backward_pass, forward_pass, gradients, keep


class EagerCell(torch.autograd.Function):
    """``cell_forward`` and its gradients outside of traces.

    An operator that takes lists of tensors costs a few hundred microseconds of Python a call.
    """

    @staticmethod
    def forward(ctx, s0, s1, alphas, running, rate, state, key, backend, training, dtype, *weights):
        """Output and batch statistics of ``cell_forward``; weights come last, as tensors must."""
        settings = (running, rate, state, key, backend, training, dtype)
        inputs = (s0, s1, alphas, list(weights), *settings)
        outputs = forward_pass(*inputs)
        keep(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[8])
        return outputs[0], outputs[8]

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients; the operator refuses to be differentiated where that is asked for."""
        run = torch.ops.pdarts_fast.cell_backward if torch.is_grad_enabled() else backward_pass
        wants = ctx.needs_input_grad
        before, grads = gradients(ctx, run, grad, wants[:3], wants[10:])
        return (*before, *[None] * 7, *grads)
