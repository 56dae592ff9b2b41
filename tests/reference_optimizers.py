"""Optimizers as their papers write them, tensor by tensor in float64, and a problem to compare the fast ones on."""

import torch

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6}
DECAY = 0.1
STEPS = 20
SHAPES = [(33, 17), (5,), (4, 3, 2), (1, 1), (64,), (200, 40), (3,)]


def adamw(weights, gradients, decays, lr, betas, eps):
    """Loshchilov and Hutter 2017 (arXiv:1711.05101), algorithm 2."""
    return _adam_like(weights, gradients, decays, lr, betas, eps, ratio=lambda weight, update, decay: 1.0)


def lamb(weights, gradients, decays, lr, betas, eps):
    """You et al. 2019 (arXiv:1904.00962), algorithm 2 with phi(z) = z; no ratio where nothing decays, as in Apex."""

    def ratio(weight, update, decay):
        norms = weight.norm(), update.norm()
        return norms[0] / norms[1] if decay and all(norms) else 1.0

    return _adam_like(weights, gradients, decays, lr, betas, eps, ratio)


def _adam_like(weights, gradients, decays, lr, betas, eps, ratio):
    weights = [weight.double() for weight in weights]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step, at_step in enumerate(gradients, 1):
        for i, gradient in enumerate(at_step):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * gradient.double()
            second[i] = betas[1] * second[i] + (1 - betas[1]) * gradient.double() ** 2
            corrected = first[i] / (1 - betas[0] ** step), second[i] / (1 - betas[1] ** step)
            update = corrected[0] / (corrected[1].sqrt() + eps) + decays[i] * weights[i]
            weights[i] = weights[i] - lr * ratio(weights[i], update, decays[i]) * update
    return weights


def lion(weights, gradients, decays, lr, betas, eps):
    """Chen et al. 2023 (arXiv:2302.06675), algorithm 2."""
    weights = [weight.double() for weight in weights]
    moments = [torch.zeros_like(weight) for weight in weights]
    for at_step in gradients:
        for i, gradient in enumerate(at_step):
            direction = (betas[0] * moments[i] + (1 - betas[0]) * gradient.double()).sign()
            weights[i] = weights[i] - lr * (direction + decays[i] * weights[i])
            moments[i] = betas[1] * moments[i] + (1 - betas[1]) * gradient.double()
    return weights


def problem(seed=0, steps=STEPS, shapes=SHAPES):
    """Weights and gradients of very unequal sizes, also within a tensor, so that the norm of a part says little of the
    whole; one tensor of zeros; the decay of each (none for vectors)."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [10 ** (-2 * torch.rand((), generator=draw).item()) for _ in shapes]
    weights = [torch.randn(shape, generator=draw) * size for shape, size in zip(shapes, sizes, strict=True)]
    weights = [weight * torch.linspace(0.1, 2.0, weight.numel()).view(weight.shape) for weight in weights]
    weights[2].zero_()
    gradients = [
        [torch.randn(shape, generator=draw) * size for shape, size in zip(shapes, reversed(sizes), strict=True)]
        for _ in range(steps)
    ]
    return weights, gradients, [DECAY if len(shape) > 1 else 0.0 for shape in shapes]


def groups_of(parameters, decays):
    """Parameter groups as `models.decay_groups` makes them."""
    return [
        {"params": [p for p, own in zip(parameters, decays, strict=True) if own == decay], "weight_decay": decay}
        for decay in sorted(set(decays), reverse=True)
    ]


def train(make, weights, gradients, decays, device="cpu"):
    """Weights after the optimizer that `make` makes of parameter groups has taken a step for each set of gradients."""
    parameters = [torch.nn.Parameter(weight.clone().to(device)) for weight in weights]
    optimizer = make(groups_of(parameters, decays))
    for at_step in gradients:
        for parameter, gradient in zip(parameters, at_step, strict=True):
            parameter.grad = gradient.clone().to(device)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    """Equal up to fp32's rounding over the steps."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.double().cpu(), rtol=rtol, atol=atol)
