"""The recurrence: its equations, growth without a jump, and that all of it learns."""

import copy
import math

import pytest
import torch
from conftest import SHALLOW

from train_gpt import (
    BANKS,
    GPT,
    FlatParameters,
    Optimizer,
    WeightAverage,
    error_feedback,
    parameter_table,
    recurrence,
)


class Repeated(torch.nn.Module):
    """The recurrence with the parameters that a model of these settings has for it."""

    def __init__(self, hp):
        super().__init__()
        for name, row in parameter_table(hp).items():
            if name.startswith(("residual_scale", "feedback_")):
                self.register_parameter(name, torch.nn.Parameter(torch.empty(row.shape)))
                with torch.no_grad():
                    row.start(self.get_parameter(name))

    def forward(self, h, core, num_passes):
        scales, *feedback = self.parameters()
        return recurrence(h, core, num_passes, scales, tuple(feedback))


def linear_core(D: int, gain: float, seed: int = 0):
    """z -> z + gain * Q z with a rotation Q: its update is `gain` times as long as z."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
    return lambda z: z + gain * (z @ Q.to(z.dtype).T)


def reference(module: Repeated, h, core, num_passes: int):
    """The README's equations for one sequence h (T, D) in float64: h_K, J, and the c_k."""
    p = {name: t.detach().double() for name, t in module.named_parameters()}
    J, corrections = 0.0, []
    for k in range(num_passes):
        c = torch.zeros_like(h)
        a = 1.0
        if k > 0:
            a = float(p["residual_scale"][k - 1])
            if "feedback_U" in p:
                U, V, d = p["feedback_U"], p["feedback_V"], p["feedback_d"]
                c = torch.stack([d * (U @ (V.T @ row)) for row in h])
        z = h + c
        h_next = h + a * (core(z) - z)
        ratio = float((h_next - h).norm()) / (float(h.norm()) + 1e-6)
        J += max(0.0, ratio - 1) ** 2
        corrections.append(c)
        h = h_next
    return h, J, corrections


@pytest.mark.parametrize("mode", ["none", "diagonal"])
def test_the_equations(tiny, mode):
    """Hidden states, proxy and ratios of a batch against a loop over its sequences."""
    torch.manual_seed(0)
    module = Repeated(tiny(feedback_mode=mode))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    assert len(list(module.parameters())) == (4 if mode == "diagonal" else 1)
    h, core = torch.randn(3, 5, 32), linear_core(32, 1.7)
    h[1] *= 100  # the proxy is of each sequence: a large one does not hide the others
    out, stability = module(h, core, 3)
    expected = [reference(module, row.double(), core, 3) for row in h]
    for row in range(3):
        difference = (out[row].double() - expected[row][0]).norm() / expected[row][0].norm()
        assert difference < 1e-5
        assert stability.jacobian_proxy[row].item() == pytest.approx(expected[row][1], rel=1e-4)
    for k in range(3):
        h_k = h if k == 0 else module(h, core, k)[0]
        c = torch.stack([e[2][k] for e in expected])
        size = h_k.flatten(1).norm(dim=1)
        ratio = (c.flatten(1).norm(dim=1) / size).mean().item()
        assert stability.feedback[k].item() == pytest.approx(ratio, rel=1e-4)
        h_next = module(h, core, k + 1)[0]
        growth = (h_next.flatten(1).norm(dim=1) / size).mean().item()
        assert stability.growth[k].item() == pytest.approx(growth, rel=1e-4)
        update = ((h_next - h_k).flatten(1).norm(dim=1) / size).mean().item()
        assert stability.update[k].item() == pytest.approx(update, rel=1e-4)


def test_the_correction_of_one_position(tiny):
    h, U, V, d = (torch.randn(shape) for shape in ((1, 1, 6), (6, 2), (6, 2), (6,)))
    expected = [
        float(d[i]) * sum(U[i, r] * sum(V[j, r] * h[0, 0, j] for j in range(6)) for r in range(2))
        for i in range(6)
    ]
    c, z = error_feedback(h, U, V, d)
    torch.testing.assert_close(c[0, 0], torch.stack(expected))
    assert torch.equal(z, h + c)


@pytest.mark.parametrize(("gain", "expected"), [(0.2, 0.0), (0.99, 0.0), (1.5, 0.25), (3.0, 4.0)])
def test_the_proxy_of_contractive_and_expanding_cores(tiny, gain, expected):
    """The first pass is unscaled: its update is `gain` times h; later ones are half of that."""
    module = Repeated(tiny())
    h = torch.randn(2, 5, 32)
    later = 2 * max(0.0, gain / 2 - 1) ** 2  # U is 0 at the start: no correction yet
    proxy = module(h, linear_core(32, gain), 3)[1].jacobian_proxy
    torch.testing.assert_close(proxy, torch.full((2,), expected + later), rtol=1e-4, atol=1e-6)
    assert (proxy == 0).all() or gain > 1


def test_the_proxy_has_the_gradient_of_its_definition(tiny):
    """With respect to the state and to all parameters, against differences of the loop's J."""
    torch.manual_seed(0)
    module, core = Repeated(tiny()), linear_core(32, 1.7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    h = torch.randn(1, 5, 32, requires_grad=True)
    places = [h, *module.parameters()]
    module(h, core, 3)[1].jacobian_proxy.sum().backward()
    directions = [torch.randn_like(p) for p in places]
    slope = sum((p.grad * v).sum().item() for p, v in zip(places, directions, strict=True))
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(module).double()
        with torch.no_grad():
            for p, v in zip(moved.parameters(), directions[1:], strict=True):
                p.add_(v, alpha=sign * 1e-5)
        state = h[0].detach().double() + sign * 1e-5 * directions[0][0]
        values.append(reference(moved, state, core, 3)[1])
    assert abs(slope) > 0.1
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


def test_the_proxy_has_a_finite_gradient_where_nothing_moves(tiny):
    """A core that is the identity, and a state of zeros."""
    module = Repeated(tiny())
    for h in (torch.randn(1, 4, 32, requires_grad=True), torch.zeros(1, 4, 32, requires_grad=True)):
        module(h, lambda z: z * 1.0, 3)[1].jacobian_proxy.sum().backward()
        assert torch.isfinite(h.grad).all()


# ----------------------------------------------------------------------------------------- growth


def test_growth_leaves_the_first_pass_unchanged(tiny, random_model, monkeypatch):
    """What the first passes see and give is bit-identical for 1, 2 and 3 passes; c_0 is 0."""
    model = random_model(tiny())
    ids = torch.randint(model.hp.vocab_size, (2, 33), dtype=torch.int32)
    seen = {}
    for num_passes in (1, 2, 3):
        calls = seen[num_passes] = []

        def record(h, core, *rest, calls=calls):
            def spied(z):
                calls.append((z, core(z)))
                return calls[-1][1]

            calls.append(h)
            return recurrence(h, spied, *rest)

        monkeypatch.setattr("train_gpt.recurrence", record)
        with torch.no_grad():
            _, stability = model(ids[:, :-1], ids[:, 1:], num_passes)
        assert stability.feedback[0] == 0
        assert (stability.feedback[1:] > 0).all(), "the correction is active after pass 0"
    h_0, first_call = seen[1]
    assert torch.equal(h_0, first_call[0]), "pass 0 has no correction"
    for longer, shorter in ((2, 1), (3, 2)):
        assert len(seen[longer]) == longer + 1
        for (a, b), (x, y) in zip(seen[longer][1:], seen[shorter][1:], strict=False):
            assert torch.equal(a, x)
            assert torch.equal(b, y)


def test_one_pass_is_the_core_unscaled(tiny):
    """Whatever scale, U, V and d are."""
    module = Repeated(tiny())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)
    h, core = torch.randn(2, 5, 32), linear_core(32, 0.7)
    assert torch.equal(module(h, core, 1)[0], core(h))


def test_passes_beyond_those_of_training_use_the_last_scale(tiny):
    module = Repeated(tiny())
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    h, core = torch.randn(2, 5, 32), linear_core(32, 0.1)
    fifth = module(h, core, 5)[0]
    state = module(h, core, 4)[0]
    scales, *feedback = module.parameters()
    _, z = error_feedback(state, *feedback)
    torch.testing.assert_close(fifth, state + scales[-1] * (core(z) - z))


def test_a_model_that_never_repeats_has_nothing_to_repeat_with(tiny):
    module = Repeated(tiny(num_passes=1))
    assert sum(p.numel() for p in module.parameters()) == 0


# --------------------------------------------------------------------------------------- learning


class Run:
    """Optimizer steps of a fresh model at a fixed number of passes, as the trainer takes them."""

    def __init__(self, hp, runtime):
        torch.manual_seed(hp.seed)
        self.hp, self.model = hp, GPT(hp)
        self.flat = FlatParameters(self.model)
        self.optimizer = Optimizer(self.flat, hp, runtime)
        self.average = WeightAverage(hp, self.flat.data)
        self.named = dict(self.model.named_parameters())

    def step(self, number: int, num_passes: int):
        generator = torch.Generator().manual_seed(number)
        shape = (8, self.hp.train_seq_len + 1)
        rows = torch.randint(self.hp.vocab_size, shape, generator=generator, dtype=torch.int32)
        losses, stability = self.model(rows[:, :-1], rows[:, 1:], num_passes)
        weight = self.hp.jacobian_proxy_weight
        (losses.mean() + weight * stability.jacobian_proxy.mean()).backward()
        grads = {name: p.grad.clone() for name, p in self.named.items()}
        self.optimizer.step(self.optimizer.reduce(), 1.0, 0.95)
        self.average.update(number / 100, swa=False)
        self.flat.grad.zero_()
        return grads, stability


def parts(name: str, t: torch.Tensor):
    """What could be dead on its own: of a stack the row of each layer or pass."""
    stacked = name in (
        *BANKS,
        "resid_mix", "attn_scale", "mlp_scale", "q_gain", "skip_weight", "ve_layer_scale",
        "residual_scale",
    )  # fmt: skip
    return enumerate(t) if stacked else [(0, t)]


@pytest.mark.parametrize("changes", [{}, SHALLOW], ids=["default", "shallow"])
def test_everything_learns(tiny, runtime, changes):
    """Each layer's part of each parameter gets a gradient within three steps of the start."""
    run = Run(tiny(**changes), runtime)
    dead = {(name, i) for name, p in run.named.items() for i, _ in parts(name, p)}
    for number in range(3):
        grads, stability = run.step(number, num_passes=3)
        for name, grad in grads.items():
            dead -= {(name, i) for i, part in parts(name, grad) if part.abs().max() > 1e-12}
    assert dead == set()
    assert stability.feedback[0] == 0
    for number in range(3, 10):
        _, stability = run.step(number, num_passes=3)
    assert (stability.feedback[1:] > 1e-4).all(), "the feedback answers after ten steps"


def test_what_is_idle_stays_as_it_is(tiny, runtime):
    """Scales of passes that have not begun: bit-identical after steps with fewer passes."""
    run = Run(tiny(**SHALLOW), runtime)
    idle = {n: p for n, p in run.named.items() if n.startswith(("residual_scale", "feedback_"))}
    start = {name: p.detach().clone() for name, p in idle.items()}
    for number in range(4):
        run.step(number, num_passes=1)
    for name, p in idle.items():
        assert torch.equal(p, start[name]), name
    for number in range(4, 8):
        run.step(number, num_passes=2)
    scales = idle["residual_scale"]
    assert (scales[0] != start["residual_scale"][0]).item()
    assert torch.equal(scales[1], start["residual_scale"][1])
    averaged = run.flat.named(run.average.result())
    assert averaged["residual_scale"][1].item() == pytest.approx(0.5, abs=1e-6)


def test_exactly_one_factor_starts_at_zero(tiny):
    _, U, V, d = Repeated(tiny()).parameters()
    assert U.count_nonzero() == 0
    assert V.count_nonzero() == V.numel()
    assert d.count_nonzero() == d.numel()
