"""Batch normalisation over less than the batch, and over more: virtual devices, and all processes.

The former is the cure for one process training a queue method.
With ordinary batch norm a query and its key share one set of statistics, which gives the match away (He et al. 2020,
section 3.3). Training on several devices with shuffled keys prevents that; so does normalising consecutive chunks of
one batch separately, with the keys in another order than the queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d inside `module` by a `SplitBatchNorm`; returns the module.

    Parameters and buffers are taken over, not copied, and keep their names in the state dict.
    """
    return _replaced(module, lambda norm: SplitBatchNorm(norm, splits))


class SplitBatchNorm(nn.Module):
    """Training: normalise `splits` consecutive chunks of the batch by themselves; evaluation: ordinary batch norm.

    Input (N, C) or (N, C, H, W); chunks are those of `torch.tensor_split`. The running statistics become the average
    over the chunks of what each alone would have made of them. ValueError when a batch has fewer rows than splits.
    """

    def __init__(self, source: nn.BatchNorm1d | nn.BatchNorm2d, splits: int):
        super().__init__()
        self.splits = splits
        _take_over(self, source)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _with_running_statistics(self, x)
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


class SyncBatchNorm(nn.Module):
    """Training: normalise by the statistics of all processes' batches; evaluation: ordinary batch norm.

    Input (N, C) or (N, C, H, W), N the same everywhere. For devices on which PyTorch's own class does not work.
    `mean_over_ranks` averages a tensor over the `ranks` processes and its gradient on the way back.
    """

    def __init__(
        self, source: nn.BatchNorm1d | nn.BatchNorm2d, mean_over_ranks: Callable[[Tensor], Tensor], ranks: int
    ):
        super().__init__()
        self.mean_over_ranks, self.ranks = mean_over_ranks, ranks
        _take_over(self, source)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _with_running_statistics(self, x)
        over = [dim for dim in range(x.ndim) if dim != 1]
        mean = self.mean_over_ranks(x.float().mean(over, keepdim=True))
        centred = x.float() - mean
        var = self.mean_over_ranks(centred.square().mean(over, keepdim=True))
        weight, bias = (p.view_as(mean) for p in (self.weight, self.bias))
        count = self.ranks * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return torch.addcmul(bias, centred, (var + self.eps).rsqrt() * weight).to(x.dtype)


def sync_batch_norm(module: nn.Module, mean_over_ranks: Callable[[Tensor], Tensor], ranks: int) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d inside `module` by a `SyncBatchNorm`, as `split_batch_norm` does."""
    return _replaced(module, lambda norm: SyncBatchNorm(norm, mean_over_ranks, ranks))


def _replaced(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return make(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, make))
    return module


def _take_over(norm: nn.Module, source: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """The parameters and buffers of `source`; one without weights gets the neutral ones, which are not stored."""
    norm.eps, norm.momentum = source.eps, source.momentum
    if source.affine:
        norm.weight, norm.bias = source.weight, source.bias
    else:
        norm.register_buffer("weight", torch.ones_like(source.running_mean), persistent=False)
        norm.register_buffer("bias", torch.zeros_like(source.running_mean), persistent=False)
    for name, buffer in source.named_buffers():
        norm.register_buffer(name, buffer)
    norm.train(source.training)


def _with_running_statistics(norm: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


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
