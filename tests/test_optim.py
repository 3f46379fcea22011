"""Optimization: Newton-Schulz, Muon over ranks, AdamW, schedules, averages, the loop, the clock."""

import math
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHALLOW, Lines, even_floors

import train_gpt
from train_gpt import (
    BANKS,
    GPT,
    Evaluator,
    FlatParameters,
    Interrupts,
    Optimizer,
    Runtime,
    Trainer,
    UserError,
    WeightAverage,
    newton_schulz,
    open_data,
    parameter_table,
    plan_step,
)

# ----------------------------------------------------------------------------------- Newton-Schulz


QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (2, 24, 24), (1, 1, 7)])
def test_newton_schulz_keeps_directions_and_levels_singular_values(shape, dtype):
    """Singular values from 1 down to 0.02 of the norm end in [0.65, 1.25]; U and V are kept."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    S = torch.linspace(1, 0.02, S.size(1), dtype=torch.float64).expand_as(S)
    g = 1e-3 * (U * S.unsqueeze(1)) @ Vh
    out = newton_schulz(g.float(), dtype).double()
    levels = torch.linalg.svdvals(out)
    assert levels.min() > 0.65
    assert levels.max() < 1.25
    core = U.mT @ out @ Vh.mT  # diagonal if the directions are kept
    off = core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_newton_schulz_applies_the_polynomial_to_each_singular_value():
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4, 12, 20, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    x = S / S.norm(dim=1, keepdim=True)
    a, b, c = QUINTIC
    for _ in range(3):
        x = a * x + b * x**3 + c * x**5
    expected = (U * x.unsqueeze(1)) @ Vh
    torch.testing.assert_close(newton_schulz(g, torch.float64, 3), expected, rtol=1e-6, atol=1e-6)
    tall = newton_schulz(g.mT, torch.float64, 3)
    torch.testing.assert_close(tall, expected.mT, rtol=1e-6, atol=1e-6)


def test_newton_schulz_of_zero_is_zero():
    assert newton_schulz(torch.zeros(2, 4, 6), torch.float32).count_nonzero() == 0


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_flat_buffer_holds_every_parameter_once(tiny, world_size):
    """Views do not overlap, values survive, and every bank splits into equal shards of rows."""
    torch.manual_seed(0)
    model = GPT(tiny())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = FlatParameters(model, world_size)
    owners = torch.zeros_like(flat.data)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == flat.data[flat.places[name]].data_ptr() or p.numel() == 0
        assert p.grad.data_ptr() == flat.grad[flat.places[name]].data_ptr() or p.numel() == 0
        owners[flat.places[name]] += 1
    assert owners.max() == 1
    assert owners.sum() == sum(p.numel() for p in model.parameters())
    for bank in BANKS:
        ranks = [Runtime(r, world_size, flat.data.device, torch.float32) for r in range(world_size)]
        shards = [flat.shard(flat.data, bank, rank) for rank in ranks]
        assert len({s.shape for s in shards}) == 1
        assert torch.equal(torch.cat(shards)[: len(before[bank])], before[bank])
    for name, t in flat.named(flat.data).items():
        assert torch.equal(t, before[name])


@pytest.mark.parametrize(
    "changes", [{}, {"num_passes": 1, "bigram_vocab_size": 0, "ve_layers": "none"}]
)
def test_adamw_moves_every_other_parameter_and_decays_no_scalar(tiny, runtime, changes):
    """With a gradient of 1 everywhere a first AdamW step is exactly lr, plus lr * wd * w."""
    hp = tiny(grad_clip_norm=1e30, adam_wd=0.5, tied_embed_lr=0.02, scalar_lr=0.01, **changes)
    model = GPT(hp)
    flat = FlatParameters(model)
    with torch.no_grad():
        flat.data.fill_(2.0)
        flat.grad.fill_(1.0)
    optimizer = Optimizer(flat, hp, runtime)
    optimizer.step(optimizer.reduce(), lr_scale=0.5, momentum=0.9)
    for name, p in model.named_parameters():
        group = parameter_table(hp)[name].group
        if group == "bank":
            continue
        lr = 0.5 * (0.02 if group == "table" else 0.01)
        decay = 0.0 if group == "scalar" else 0.5
        expected = torch.full_like(p, 2.0 * (1 - lr * decay) - lr)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6, msg=name)


def muon_reference(w, grads, lr: float, momentum: float, decay: float):
    """Muon's steps on one matrix in float64, one after the other."""
    w, buffer = w.double(), torch.zeros_like(w, dtype=torch.float64)
    a, b, c = QUINTIC
    for g in grads:
        buffer = momentum * buffer + g.double()
        update = g.double() + momentum * buffer  # Nesterov
        update = torch.stack([row / row.norm() for row in update])  # MuonEq-R
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        x = S / S.norm()
        for _ in range(5):
            x = a * x + b * x**3 + c * x**5
        shape_scale = max(1.0, w.size(0) / w.size(1)) ** 0.5
        update = (U * x) @ Vh
        shrinks = update * w > 0  # cautious weight decay
        w = w * (1 - lr * decay * shrinks) - lr * shape_scale * update
    return w


def random_gradients(flat: FlatParameters, seed: int) -> torch.Tensor:
    """The same for every layout: drawn parameter by parameter."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.zeros_like(flat.grad)
    for name in sorted(flat.shapes):
        view = grad[flat.places[name]]
        view.copy_(torch.randn(view.shape, generator=generator))
    return grad


def test_muon_is_the_textbook_one(tiny, runtime):
    hp = tiny(grad_clip_norm=1e30, matrix_lr=0.1, muon_wd=0.3)
    torch.manual_seed(0)
    model = GPT(hp)
    flat = FlatParameters(model)
    optimizer, start = Optimizer(flat, hp, runtime), flat.data.clone()
    grads = [random_gradients(flat, seed) for seed in (1, 2)]
    for grad in grads:
        flat.grad.copy_(grad)
        optimizer.step(optimizer.reduce(), lr_scale=0.5, momentum=0.9)
    for bank in BANKS:
        for row in (0, -1):
            own = [flat.named(g)[bank][row] for g in grads]
            expected = muon_reference(flat.named(start)[bank][row], own, 0.05, 0.9, 0.5 * 0.3)
            result = flat.named(flat.data)[bank][row].double()
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_is_clipped_by_its_global_norm(tiny, runtime):
    """`reduce` returns the norm; AdamW and Muon see gradients of norm grad_clip_norm at most."""
    hp = tiny(grad_clip_norm=0.3)
    flat = FlatParameters(GPT(hp))
    for size, expected in ((1.0, 0.3), (1e-4, None)):
        optimizer = Optimizer(flat, hp, runtime)
        grad = size * random_gradients(flat, 0)
        flat.grad.copy_(grad)
        norm = optimizer.reduce()
        assert norm.item() == pytest.approx(grad.double().norm().item(), rel=1e-5)
        optimizer.step(norm, 0.0, 0.0)
        clipped = torch.stack([optimizer.momentum.norm(), optimizer.rest.norm()]).norm().item()
        assert clipped == pytest.approx(expected or grad.norm().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------ ranks


def steps_on_a_rank(runtime: Runtime, hp) -> tuple[list, np.ndarray, np.ndarray]:
    """Three steps whose gradients are cut into unequal parts, one a rank."""
    torch.manual_seed(0)
    model = GPT(hp)
    flat = FlatParameters(model, runtime.world_size)
    optimizer, norms = Optimizer(flat, hp, runtime), []
    parts = torch.arange(1.0, runtime.world_size + 1)
    for number in range(3):
        whole = random_gradients(flat, number)
        flat.grad.copy_(whole * parts[runtime.rank] / parts.sum())
        norm = optimizer.reduce()
        norms.append(norm.item())
        norms += [s.item() for squares in optimizer.matrix_squares().values() for s in squares]
        optimizer.step(norm, 1.0, 0.9)
        flat.grad.zero_()
    padding = torch.ones_like(flat.data)
    for place in flat.places.values():
        padding[place] = 0
    named = flat.named(flat.data)
    weights = torch.cat([named[name].flatten() for name in sorted(named)])
    return norms, weights.numpy().copy(), (flat.data * padding).numpy().copy()


def test_sharded_muon_is_the_unsharded_one(tiny, on_ranks, runtime):
    """On 2 and 3 ranks, which do not divide the banks' 11 and 22 rows alike."""
    hp = tiny()
    norms, alone, _ = steps_on_a_rank(runtime, hp)
    for world_size in (2, 3):
        results = on_ranks(world_size, steps_on_a_rank, hp)
        for other_norms, weights, padding in results:
            assert other_norms == pytest.approx(norms, rel=1e-5)
            assert np.array_equal(weights, results[0][1]), "ranks hold the same weights"
            np.testing.assert_allclose(weights, alone, rtol=0, atol=2e-5)
            assert not padding.any()


# ---------------------------------------------------------------------------------- plan of a step


def plans(hp, steps: int = 2000):
    return [plan_step(hp, s, s / steps) for s in range(steps)]


def test_the_plan_of_the_default_run(tiny):
    """Growth at 62.6% and 81.3%, lr falling over the last 55%, QAT below 0.15, SWA below 0.2."""
    plan = plans(tiny())
    assert [p.num_passes for p in plan] == [1] * 1252 + [2] * 374 + [3] * 374
    assert all(p.lr_scale == 1 for p in plan[:900])
    falls = np.array([p.lr_scale for p in plan[900:]])
    np.testing.assert_allclose(falls, np.linspace(1, 0, 1101)[:-1], atol=1e-9)
    assert [p.qat for p in plan] == [False] * 1836 + [True] * 164
    assert [p.swa for p in plan] == [p.lr_scale < 0.2 for p in plan]
    long = plans(tiny(), 6330)
    assert long[0].momentum == pytest.approx(0.92)
    assert long[750].momentum == pytest.approx((0.92 + 0.99) / 2, abs=1e-4)
    assert all(p.momentum == pytest.approx(0.99, abs=1e-4) for p in long[1501:])


@pytest.mark.parametrize("steps", [20, 500, 2000, 6330, 50_000])
def test_the_momentum_remembers_a_fraction_of_the_run(tiny, steps):
    """1.58% of it: 0.99 after the warm-up of 6,330 steps, never more and never below 0.85."""
    last = plans(tiny(), steps)[-1].momentum
    assert last == pytest.approx(min(0.99, max(0.85, 1 - 1 / (0.0158 * steps))), abs=1e-4)


def test_the_plan_follows_its_settings(tiny):
    by_progress = tiny(passes_schedule="0.0:2,0.5:1")
    grown = [plan_step(by_progress, 10**6, p).num_passes for p in (0.0, 0.49, 0.5, 1.0)]
    assert grown == [2, 2, 1, 1]
    assert not any(p.qat for p in plans(tiny(late_qat_threshold=0.0)))
    constant = plans(tiny(warmdown_frac=1e-9, muon_momentum_warmup_frac=1e-9), 8000)
    assert all(p.lr_scale == 1 for p in constant)
    assert all(p.momentum == pytest.approx(0.99) for p in constant[1:])
    linear = plans(tiny(warmdown_frac=1.0))
    assert linear[500].lr_scale == pytest.approx(0.75)
    assert plan_step(tiny(num_passes=2), 0, 0.0).num_passes == 2


# ---------------------------------------------------------------------------------------- averages


def averaged(hp, steps: int, weights) -> WeightAverage:
    """An average that has followed weights(step) for a run of uniform steps."""
    buffer = torch.zeros(1)
    average = WeightAverage(hp, buffer)
    for step in range(steps):
        buffer.fill_(weights(step))
        average.update(step / steps, plan_step(hp, step, step / steps).swa)
    return average


def test_ema_of_6330_steps_decays_by_0_997(tiny):
    """After a jump from 0 to 1 that was n steps ago, 1 - 0.997^n of it has arrived."""
    hp = tiny(weight_average="ema")
    for n in (10, 333, 1000):
        result = averaged(hp, 6330, lambda step, n=n: float(step >= 6330 - n)).result()
        assert result.item() == pytest.approx(1 - 0.997**n, abs=2e-3)


def test_ema_depends_on_the_time_and_not_on_the_number_of_steps(tiny):
    hp = tiny(weight_average="ema", ema_frac=0.2)
    results = [
        averaged(hp, steps, lambda s, n=steps: s / n).result().item() for steps in (2000, 4000)
    ]
    assert results[0] == pytest.approx(results[1], abs=2e-3)
    lag = 0.2 - math.exp(-5) / (1 - math.exp(-5))  # of the part of the run that has passed
    assert results[1] == pytest.approx(1 - lag, abs=3e-3)


def test_a_run_that_is_cut_short_exports_nothing_of_its_start(tiny):
    """After 1% of a run the weights of the start would be most of a plain EMA."""
    buffer = torch.full((1,), 1000.0)
    average = WeightAverage(tiny(weight_average="ema"), buffer)
    for progress in (0.0, 0.005, 0.01):
        buffer.fill_(1.0)
        average.update(progress, swa=False)
        assert average.result().item() == 1


def test_swa_is_the_mean_of_samples_50_steps_apart(tiny):
    """Only those of the last part of the run, where the lr scale is below 0.2."""
    hp = tiny(weight_average="swa")
    average = averaged(hp, 6330, float)
    begin = next(s for s in range(6330) if plan_step(hp, s, s / 6330).swa)
    samples = range(begin, 6330, 51)
    gap = math.ceil(0.0079 * 6330 - 1e-9)
    assert gap == 51
    assert average.samples == len(samples)
    assert average.result().item() == pytest.approx(np.mean(samples), rel=1e-5)


def test_every_kind_of_average_reaches_the_exported_weights(tiny):
    results = {
        kind: averaged(tiny(weight_average=kind), 633, float).result().item()
        for kind in ("none", "ema", "swa", "ema_swa")
    }
    assert results["none"] == 632
    assert len(set(results.values())) == 4
    assert results["ema_swa"] < min(results["ema"], results["swa"]) < 632
    short = replace(tiny(weight_average="swa"), swa_lr_scale=0.0)
    assert averaged(short, 10, float).result().item() == 9, "without a sample: the weights"


# ------------------------------------------------------------------------------------ training loop


class Observed(Trainer):
    """A trainer that keeps what each step was given, and the weights after it."""

    def accumulate(self, batch, passes, floor=None, cuts=1):
        self.inputs.append((passes, cuts, floor is not None))
        return super().accumulate(batch, passes, floor, cuts)

    def take_step(self, progress):
        self.progress.append(progress)
        result = super().take_step(progress)
        self.weights.append(self.flat.data.double().clone())
        return result


class Idle(Observed):
    """It computes nothing; before_step() is called instead."""

    def before_step(self):
        pass

    def accumulate(self, batch, passes, floor=None, cuts=1):
        self.inputs.append((passes, cuts, floor is not None))
        self.before_step()
        return torch.ones(3 + 3 * passes)


def make_trainer(kind: type, hp, runtime: Runtime) -> Observed:
    hp, data = open_data(hp, runtime)
    torch.manual_seed(hp.seed)
    made = kind(GPT(hp), data, runtime, Lines(), Interrupts())
    made.progress, made.inputs, made.weights = [], [], []
    return made


@pytest.fixture
def trainer(tiny, runtime):
    """trainer(kind, name=value, ...) -> a trainer of a shallow model on the corpus."""

    def make(kind: type = Observed, **changes) -> Observed:
        hp = tiny(**(SHALLOW | {"train_log_every": 4} | changes))
        return make_trainer(kind, hp, runtime)

    return make


def evaluator_of(one: Trainer) -> Evaluator:
    data = one.data._replace(val_tokens=one.data.val_tokens[:100])
    return Evaluator(one.hp, data, one.runtime, one.log)


def finish(one: Trainer, folder=None) -> bool:
    return one.train(evaluator_of(one), folder)


def test_each_step_follows_the_plan(trainer):
    """Passes, cuts and QAT as planned, and the log says what ran."""
    one = trainer(iterations=20, weight_average="none")
    assert finish(one) is False
    plan = [plan_step(one.hp, s, s / 20) for s in range(20)]
    assert one.inputs == [(p.num_passes, p.cuts, p.qat) for p in plan]
    assert {p.qat for p in plan} == {False, True}
    counts = [len(one.log.of(name)) for name in ("progressive_passes", "late_qat", "stop")]
    assert counts == [3, 1, 1]
    assert [line["tokens"] for line in one.log.of("seq_len")] == [4, 8, 32]
    logged = [pairs for pairs in one.log.of("") if "train_loss" in pairs]
    assert [pairs["step"] for pairs in logged] == [f"{s}/20" for s in (1, 4, 8, 10, 12, 16, 20)]
    scales = [pairs["residual_scale"] for pairs in one.log.of("passes")]
    assert scales[-1] == one.model.residual_scale.tolist()


def test_the_squares_are_those_of_the_last_steps(trainer):
    """They are known before QAT begins, so that a resumed run rounds alike."""
    one = trainer(iterations=10, swa_lr_scale=0.5, late_qat_threshold=0.4)
    assert not any(squares.any() for squares in one.squares.values())
    finish(one)
    grads = one.flat.named(one.flat.grad)
    for bank, squares in one.squares.items():
        expected = grads[bank].square().mean((1, 2), keepdim=True)
        torch.testing.assert_close(squares, expected)
        assert squares.any()


def test_qat_reaches_the_model(trainer):
    """A step under QAT differs from the same step without it."""
    plain, quantized = trainer(), trainer()
    batch, floors = plain.data.loader.batch(0), even_floors(plain.hp, 2800)
    with torch.no_grad():
        for t in (plain, quantized):
            t.flat.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    plain.accumulate(batch, 2, None)
    quantized.accumulate(batch, 2, floors)
    assert (plain.flat.grad - quantized.flat.grad).norm() > 1e-4 * plain.flat.grad.norm()


def test_gradients_are_of_the_mean_loss_and_proxy_however_the_batch_is_cut(trainer, random_model):
    """Micro-batches of 1, 3 and 8 sequences; the sums for the log are those of the batch."""
    results, model = [], random_model(trainer().hp)
    with torch.no_grad():
        model.mlp_scale[1:3] *= 10  # an expanding core
    for micro_batch_tokens in (32, 96, 256):
        one = trainer(micro_batch_tokens=micro_batch_tokens, jacobian_proxy_weight=3.0)
        one.model.load_state_dict(model.state_dict())
        batch = one.data.loader.batch(0)
        results.append((one.accumulate(batch, 3, None), one.model))
    losses, stability = model(batch[:, :-1], batch[:, 1:], 3)
    proxy = stability.jacobian_proxy.mean()
    assert proxy > 0.01, "the proxy is part of this"
    (losses.mean() + 3.0 * proxy).backward()
    for sums, other in results:
        for name, p in other.named_parameters():
            expected = model.get_parameter(name).grad
            assert (p.grad - expected).norm() < 1e-4 * expected.norm() + 1e-7, name
        assert sums[0].item() == pytest.approx(losses.sum().item(), rel=1e-5)
        assert sums[2].item() == pytest.approx(8 * proxy.item(), rel=1e-4)
        ratios = sums[3:].view(3, 3) / 8
        torch.testing.assert_close(ratios, torch.stack(stability[1:]), rtol=1e-4, atol=1e-5)


def test_a_cut_window_is_a_batch_of_short_sequences(trainer, random_model):
    """Gradients and sums are those of each quarter by itself; a quarter sees nothing before it."""
    one = trainer(jacobian_proxy_weight=3.0)
    model = random_model(one.hp)
    one.model.load_state_dict(model.state_dict())
    batch, total, proxy = one.data.loader.batch(0), 0.0, 0.0
    sums = one.accumulate(batch, 2, cuts=4)
    for start in range(0, 32, 8):
        window = batch[:, start : start + 9]
        losses, stability = model(window[:, :-1], window[:, 1:], 2)
        total, proxy = total + losses.sum(), proxy + stability.jacobian_proxy.sum() / 4
    (total / batch[:, 1:].numel() + 3.0 * proxy / len(batch)).backward()
    for name, p in one.model.named_parameters():
        expected = model.get_parameter(name).grad
        assert (p.grad - expected).norm() < 1e-4 * expected.norm() + 1e-7, name
    assert sums[0].item() == pytest.approx(total.item(), rel=1e-5)
    assert sums[2].item() == pytest.approx(proxy.item(), rel=1e-4)


def expected_average(kind: str, hp, weights: list) -> torch.Tensor:
    """The average of the weights after each step, in float64, by its definition."""
    n = len(weights)
    total, averages, decay = 0.0, [], math.exp(-1 / len(weights) / hp.ema_frac)
    for step, w in enumerate(weights):
        total = decay * total + (1 - decay) * w if step else 0 * w
        ema = total / (1 - decay**step) if step else w
        averages.append(ema if kind == "ema_swa" else w)
    if kind in ("none", "ema"):
        return weights[-1] if kind == "none" else ema
    last, samples = -1.0, []
    for step in range(n):
        late = plan_step(hp, step, step / n).lr_scale < hp.swa_lr_scale
        if late and step / n - last >= hp.swa_frac:
            last = step / n
            samples.append(averages[step])
    assert len(samples) > 1
    return torch.stack(samples).mean(0)


@pytest.mark.parametrize("kind", ["none", "ema", "swa", "ema_swa"])
def test_the_average_is_what_training_leaves_to_export(trainer, kind):
    one = trainer(iterations=12, weight_average=kind, ema_frac=0.2, swa_frac=0.09, swa_lr_scale=0.9)
    finish(one)
    one.average_weights()
    result, expected = one.flat.data.double(), expected_average(kind, one.hp, one.weights)
    assert (result - expected).norm() < 1e-5 * expected.norm()
    if kind != "none":
        assert (result - one.weights[-1]).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("schedule", ["0.0:1,0.626:2,0.813:3", "0.0:3,0.97:1", "0.0:1,0.9995:2"])
def test_the_warm_up_runs_every_graph_of_a_run(trainer, schedule):
    """No step of a run of any length is of a kind that the warm-up did not run."""
    one = trainer(Idle, passes_schedule=schedule, warmup_steps=1)
    one.warm_up(evaluator_of(one))
    plans = [plan_step(one.hp, s, s / n) for n in (7, 60, 1000, 6330) for s in range(n)]
    assert {(plan.num_passes, plan.cuts, plan.qat) for plan in plans} == set(one.inputs)


def test_validation_and_warm_up_change_nothing(trainer):
    """The weights are bit-identical, and validations are scored."""
    plain, other = trainer(iterations=8), trainer(iterations=8, val_loss_every=3, warmup_steps=5)
    finish(plain)
    state, weights, shown = torch.get_rng_state(), other.flat.data.clone(), []
    other.log.progress = shown.append
    other.warm_up(evaluator_of(other))
    assert shown == [f"warm-up: step {i} of 6" for i in range(1, 7)], "one for each kind of step"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other.flat.data, weights)
    assert other.flat.grad.count_nonzero() == 0
    finish(other)
    assert torch.equal(plain.flat.data, other.flat.data)
    assert [pairs["step"] for pairs in other.log.of("validation")] == [3, 6]


def little_memory(model: GPT, holds: int) -> list[int]:
    """Lets `model` run out of memory for more sequences than it holds; the sizes that it saw."""
    inner, seen = model.forward, []

    def forward(ids, *rest, **more):
        seen.append(len(ids))
        if len(ids) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(ids, *rest, **more)

    model.forward = forward
    return seen


def test_what_does_not_fit_the_memory_is_halved_and_changes_nothing(trainer):
    """Gradients are those of the whole batch; the next step begins with what fitted."""
    plain, small = (trainer(micro_batch_tokens=256) for _ in range(2))
    seen, batch = little_memory(small.model, 3), plain.data.loader.batch(0)
    sums = [one.accumulate(batch, 2, None) for one in (plain, small)]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(plain.flat.grad, small.flat.grad, rtol=1e-4, atol=1e-7)
    assert seen[:2] == [8, 4]
    assert max(seen[2:]) <= 2
    small.accumulate(batch, 2, None)
    assert max(seen[2:]) <= 2
    [first, second] = small.log.of("out_of_memory")
    assert (first["sequences_at_once"], second["sequences_at_once"]) == (4, 2)
    little_memory(small.model, 0)
    with pytest.raises(UserError, match="one sequence"):
        small.accumulate(batch, 2, None)


def test_an_evaluation_that_does_not_fit_the_memory_scores_the_same(trainer):
    one = trainer(eval_batch_seqs=16, micro_batch_tokens=256, ttt_lr=0.05)
    evaluator, scores = Evaluator(one.hp, one.data, one.runtime, one.log), []
    for holds in (16, 5):
        start = one.flat.data.clone()
        little_memory(one.model, holds)
        scores.append(evaluator.run_ttt(one.model, one.flat, 2, math.inf))
        one.flat.data.copy_(start)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    assert one.log.of("out_of_memory")


@pytest.mark.parametrize("step", [5, 8])
def test_a_gradient_that_is_not_finite_stops_the_run_with_its_step(trainer, step):
    """The last step's, too."""
    one = trainer(Idle, iterations=8)

    def poison() -> None:
        if len(one.inputs) == step:
            one.flat.grad[7] = math.nan

    one.before_step = poison
    with pytest.raises(FloatingPointError, match=rf"step {step}: .*lower"):
        finish(one)


def test_a_run_that_has_diverged_writes_no_checkpoint(trainer, monkeypatch, tmp_path):
    """Its norm is known a step later, and a run that is resumed would only fail again."""
    one, saved = trainer(Idle, iterations=8, checkpoint_seconds=0.001), []
    monkeypatch.setattr(train_gpt, "save_checkpoint", lambda *_: saved.append(one.step))

    def poison() -> None:
        time.sleep(0.002)
        if len(one.inputs) == 5:
            one.flat.grad[7] = math.nan

    one.before_step = poison
    with pytest.raises(FloatingPointError, match="step 5: "):
        finish(one, tmp_path)
    assert saved == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("schedule", "asked", "passes", "warning"),
    [
        ("0:1,0.8:2,0.999:3", None, 2, None),
        ("0:1,0.8:2,0.999:3", 1, 1, None),
        ("0:1,0.8:2,0.999:3", 3, 3, "with 3 passes, and only the last 30 of 150 steps had 2"),
        ("0:1,0.993:2", None, 2, "only the last 1 of 150 steps had 2"),
        ("0:3", None, 3, None),
    ],
)
def test_a_model_is_scored_with_the_passes_that_training_reached(
    trainer, schedule, asked, passes, warning
):
    one = trainer(Idle, iterations=150, passes_schedule=schedule, eval_passes=asked)
    finish(one)
    assert one.average_weights() == passes
    texts = [pairs["text"] for pairs in one.log.of("warning")]
    assert len(texts) == (warning is not None)
    assert not warning or warning in texts[0]


# -------------------------------------------------------------------------------------------- clock


@pytest.fixture
def hand(monkeypatch):
    """The time of time.perf_counter, in a list of one, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: now[0])
    return now


def takes(one: Idle, hand: list, *seconds: float) -> None:
    """Lets each step take so long: the given times in turn, over and over."""

    def before_step() -> None:
        hand[0] += seconds[(len(one.inputs) - 1) % len(seconds)]

    one.before_step = before_step


CAPPED = {"iterations": None, "max_wallclock_seconds": 1.0}


@pytest.mark.parametrize("seconds", [(0.03,), (0.12,), (0.35,), (0.01, 0.01, 0.09)])
def test_training_ends_with_the_last_step_that_fits_the_wall_clock(trainer, hand, seconds):
    """None ends after the cap, were it as slow as the slowest; the progress is the time's."""
    one = trainer(Idle, **CAPPED)
    takes(one, hand, *seconds)
    finish(one)
    assert 1.0 - 2.1 * max(seconds) < hand[0] - 100 <= 1.0
    assert one.progress == sorted(one.progress)
    begun = np.cumsum([0.0, *np.resize(seconds, len(one.progress) - 1)])
    assert one.progress[2:] == pytest.approx(
        begun[2:].tolist(), abs=max(seconds) - min(seconds) + 1e-6
    )


def test_by_steps_the_progress_is_that_of_the_steps(trainer):
    one = trainer(Idle, iterations=10, max_wallclock_seconds=1e6)
    finish(one)
    assert one.progress == pytest.approx([s / 10 for s in range(10)], abs=1e-4)


def test_validation_is_not_charged_to_the_clock(trainer, hand, monkeypatch):
    one = trainer(Idle, val_loss_every=3, **CAPPED)
    takes(one, hand, 0.05)

    def fifty_seconds(*_, **__) -> None:
        hand[0] += 50

    monkeypatch.setattr(Evaluator, "run", fifty_seconds)
    finish(one)
    assert len(one.progress) >= 18
    [stop] = one.log.of("stop")
    assert int(stop["train_time"].removesuffix("ms")) <= 1000


@pytest.mark.parametrize("every", [0.22, 0.7])
def test_checkpoints_count_and_none_is_written_near_the_end(
    trainer, hand, monkeypatch, tmp_path, every
):
    one, saved = trainer(Idle, checkpoint_seconds=every, **CAPPED), []
    takes(one, hand, 0.05)

    def slowly(*_) -> bool:
        saved.append(hand[0] - 100)
        hand[0] += 0.1
        return True

    monkeypatch.setattr(train_gpt, "save_checkpoint", slowly)
    finish(one, tmp_path)
    assert saved
    assert saved[-1] < 1 - 0.1 + 0.051
    assert hand[0] - 100 <= 1.0
    assert one.progress == sorted(one.progress)


def test_a_resumed_clock_goes_on_and_at_the_cap_there_is_no_step(trainer, hand):
    for elapsed, steps in ((0.6, range(6, 9)), (1.0, range(1)), (1.3, range(1))):
        one = trainer(Idle, **CAPPED)
        one.step, one.elapsed = 20, elapsed
        takes(one, hand, 0.05)
        finish(one)
        assert len(one.progress) in steps
        assert all(progress >= elapsed for progress in one.progress[2:])


def test_a_signal_in_the_last_step_is_noticed(trainer):
    one = trainer(Idle, iterations=3)

    def interrupt() -> None:
        if len(one.inputs) == 3:
            one.stop.handle(signal.SIGTERM, None)

    one.before_step, one.stop.advice = interrupt, "it ends"
    assert finish(one) is True
    assert one.log.of("stop")[0]["interrupted"] == 1


def follow_the_clock(runtime: Runtime, hp) -> list[float]:
    one = make_trainer(Idle, hp, runtime)
    one.before_step = lambda: time.sleep(0.01 + 0.005 * runtime.rank)
    finish(one)
    return one.progress


def test_every_rank_follows_the_clock_of_the_first(tiny, on_ranks):
    hp = tiny(iterations=None, max_wallclock_seconds=0.6, **SHALLOW)
    seen = on_ranks(2, follow_the_clock, hp)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 5
    assert seen[0] == sorted(seen[0])
