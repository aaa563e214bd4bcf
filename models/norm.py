"""Batch normalisation in virtual devices: the cure for one process training a queue method.

With ordinary batch norm a query and its key share one set of statistics, which gives the match away (He et al. 2020,
section 3.3). Training on several devices with shuffled keys prevents that; so does normalising consecutive chunks of
one batch separately, with the keys in another order than the queries.
"""

import torch
from torch import Tensor, nn


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d inside `module` by a `SplitBatchNorm`; returns the module.

    Parameters and buffers are taken over, not copied, and keep their names in the state dict.
    """
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return SplitBatchNorm(module, splits)
    for name, child in module.named_children():
        setattr(module, name, split_batch_norm(child, splits))
    return module


class SplitBatchNorm(nn.Module):
    """Training: normalise `splits` consecutive chunks of the batch by themselves; evaluation: ordinary batch norm.

    Input (N, C) or (N, C, H, W); chunks are those of `torch.tensor_split`. The running statistics become the average
    over the chunks of what each alone would have made of them. ValueError when a batch has fewer rows than splits.
    """

    def __init__(self, source: nn.BatchNorm1d | nn.BatchNorm2d, splits: int):
        super().__init__()
        self.splits, self.eps, self.momentum = splits, source.eps, source.momentum
        self.weight, self.bias = source.weight, source.bias
        for name, buffer in source.named_buffers():
            self.register_buffer(name, buffer)
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if len(x) < self.splits:
            raise ValueError(
                f"{len(x)} images are too few for {self.splits} chunks: lower --bn_splits or raise --batch_size."
            )
        mean, var = (running.repeat(self.splits, 1) for running in (self.running_mean, self.running_var))
        out = _ChunkedBatchNorm.apply(x, self.weight, self.bias, mean, var, self.momentum, self.eps)
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked += 1
        return out

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, splits={self.splits}"


class _ChunkedBatchNorm(torch.autograd.Function):
    """Batch norm of each chunk, written straight into one output; `mean` and `var` (splits, C) are updated in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, momentum, eps):
        splits = len(mean)
        out = torch.empty_like(x)
        saved_mean, saved_invstd = torch.empty_like(mean), torch.empty_like(mean)
        chunks = zip(x.tensor_split(splits), out.tensor_split(splits), mean, var, saved_mean, saved_invstd)
        for x_i, out_i, mean_i, var_i, saved_mean_i, saved_invstd_i in chunks:
            torch.ops.aten.native_batch_norm.out(
                x_i, weight, bias, mean_i, var_i, True, momentum, eps,
                out=out_i, save_mean=saved_mean_i, save_invstd=saved_invstd_i,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        splits = len(mean)
        for grad_i, x_i, out_i, mean_i, invstd_i in zip(
            grad.tensor_split(splits), x.tensor_split(splits), grad_x.tensor_split(splits), mean, invstd
        ):
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                grad_i, x_i, weight, None, None, mean_i, invstd_i, True, ctx.eps, [True, True, True]
            )
            out_i.copy_(dx)
            grad_weight += dweight
            grad_bias += dbias
        return grad_x, grad_weight, grad_bias, None, None, None, None
