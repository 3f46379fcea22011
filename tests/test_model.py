"""The model against a plain float64 loop, causality, and the kernels of attention and MLP."""

import math
from functools import partial

import pytest
import torch
from conftest import even_floors, plain_attention
from torch import library
from torch.nn.functional import leaky_relu, linear

import train_gpt
from train_gpt import (
    BANKS,
    GPT,
    FusedMLP,
    Heads,
    Hyperparameters,
    Layer,
    attend,
    bigram_rows,
    exclude_self,
    fuses_mlp,
    mlp,
    parameter_table,
    rotary_table,
)


def tokens(hp: Hyperparameters, batch: int = 2, seed: int = 1):
    """Random ids and targets (batch, T)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, hp.train_seq_len + 1)
    row = torch.randint(hp.vocab_size, shape, generator=generator, dtype=torch.int32)
    return row[:, :-1], row[:, 1:]


# ------------------------------------------------------------------- the reference: loops, float64


def normed(x):
    return x / math.sqrt(float((x * x).mean()) + 1e-6)


def turned(head, position, hp):
    """RoPE of one head vector at a position: pairs (i, i + n/2) of the first n dims."""
    n, T = hp.rope_dims, hp.train_seq_len
    base = 10_000 * max(1.0, T / 1024) ** (n / (n - 2))
    out = head.clone()
    for i in range(n // 2):
        angle = position * base ** (-2 * i / n)
        a, b = head[i], head[i + n // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + n // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference_embedding(p, hp, ids):
    T, rows = len(ids), hp.bigram_vocab_size
    x = []
    for t in range(T):
        e = p["tok_emb"][ids[t]]
        if rows:
            row = ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % (rows - 1) if t else rows - 1
            e = e + p["bigram_scale"] * (p["bigram_proj"] @ p["bigram_table"][row])
        x.append(normed(e))
    g = torch.sigmoid(p["smear_gate"])
    before = [torch.zeros_like(x[0]), *x[:-1]]
    return torch.stack([(1 - g) * x[t] + g * before[t] for t in range(T)])


def reference_attention(p, hp, i, x, ids):
    """x (T, D), already normed and scaled."""
    L, H, G = hp.num_layers, hp.num_heads, hp.num_kv_heads
    T, E = len(x), hp.model_dim // hp.num_heads
    q, k, v = (x @ p["qo_bank"][i].T, x @ p["kv_bank"][i].T, x @ p["kv_bank"][L + i].T)
    if i in hp.ve_layer_ids:
        weight = p["ve_scale"] * p["ve_layer_scale"][hp.ve_layer_ids.index(i)]
        v = v + weight * (p["ve_table"][ids] @ p["ve_proj"].T)
    xsa = i >= L - hp.xsa_last_n and not hp.core_start <= i < hp.core_end
    chunk = hp.attention_chunk if i % 2 == 0 and i < L - 1 else T
    y = torch.zeros(T, H * E, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)
        heads = slice(h * E, (h + 1) * E), slice(g * E, (g + 1) * E)
        for t in range(T):
            first = t - t % chunk
            query = p["q_gain"][i, h] * turned(normed(q[t, heads[0]]), t, hp)
            keys = [turned(normed(k[s, heads[1]]), s, hp) for s in range(first, t + 1)]
            weights = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(E), 0)
            out = weights @ v[first : t + 1, heads[1]]
            if xsa:
                own = v[t, heads[1]] / v[t, heads[1]].norm()
                out = out - (out @ own) * own
            y[t, heads[0]] = out
    return y @ p["qo_bank"][L + i].T


def reference_block(p, hp, i, x, x0, ids):
    s = 1 / math.sqrt(i + 1)
    x = p["resid_mix"][i, 0] * x + p["resid_mix"][i, 1] * x0
    normal = torch.stack([normed(row) * s for row in x])
    x = x + p["attn_scale"][i] * reference_attention(p, hp, i, normal, ids)
    normal = torch.stack([normed(row) * s for row in x])
    hidden = leaky_relu(normal @ p["mlp_up_bank"][i].T, 0.5) ** 2
    return x + p["mlp_scale"][i] * (hidden @ p["mlp_down_bank"][i].T)


def reference_losses(model, ids, targets):
    """The losses (T,) of a plain stack of the layers: no recurrence, no batch."""
    hp, ids = model.hp, ids.tolist()
    p = {name: t.detach().double() for name, t in model.named_parameters()}
    x0 = x = reference_embedding(p, hp, ids)
    outputs = []
    for i in range(hp.num_layers):
        if i >= hp.core_end and (j := i - hp.core_end) < hp.core_start:
            x = x + p["skip_weight"][j] * outputs[hp.core_start - 1 - j]
        x = reference_block(p, hp, i, x, x0, ids)
        outputs.append(x)
    logits = torch.stack([normed(row) for row in x]) @ p["tok_emb"].T
    logits = hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)
    return torch.stack(
        [torch.logsumexp(row, 0) - row[t] for row, t in zip(logits, targets.tolist(), strict=True)]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bigram_vocab_size": 0, "ve_layers": "none", "xsa_last_n": 0},
        {"core_start": 2, "core_end": 9, "xsa_last_n": 11, "num_kv_heads": 1, "ve_layers": "0,5"},
        {"core_start": 1, "core_end": 2, "num_layers": 3, "ve_layers": "1", "rope_dims": 8},
        {"attention_chunk": 3},
    ],
    ids=["default", "without extras", "wide core", "three layers", "chunks"],
)
def test_one_pass_is_the_plain_stack(tiny, random_model, changes):
    hp = tiny(train_seq_len=8, **changes)
    model = random_model(hp)
    ids, targets = tokens(hp)
    losses, _ = model(ids, targets, num_passes=1)
    for row in range(len(ids)):
        expected = reference_losses(model, ids[row], targets[row])
        assert expected.std() > 0.1, "the comparison means something"
        torch.testing.assert_close(losses[row].double(), expected, rtol=2e-5, atol=2e-5)


def test_rope_is_stretched_beyond_1024_tokens():
    """The base at 2,048 tokens is 22,082 for 16 dims (NTK scaling)."""
    cos, sin = rotary_table(Hyperparameters(train_seq_len=2048, rope_dims=16))
    slowest = torch.atan2(sin[1, 15], cos[1, 15]).item()
    assert slowest == pytest.approx(22_082 ** (-14 / 16), rel=1e-4)


# ------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("num_passes", [1, 3])
def test_a_loss_depends_on_no_later_token(tiny, random_model, num_passes):
    """Tokens from position p on are changed: every loss before p is bit-identical."""
    hp = tiny()
    model = random_model(hp)
    ids, targets = tokens(hp)
    with torch.no_grad():
        losses, _ = model(ids, targets, num_passes)
        for p in (1, 2, 15, 30, 31):
            changed, aims = ids.clone(), targets.clone()
            changed[:, p:] = (changed[:, p:] + 7) % hp.vocab_size
            aims[:, p - 1 : -1] = changed[:, p:]
            aims[:, -1] = (aims[:, -1] + 7) % hp.vocab_size
            other, _ = model(changed, aims, num_passes)
            assert torch.equal(other[:, : p - 1], losses[:, : p - 1])
            assert (other[:, p - 1 :] != losses[:, p - 1 :]).all(), "the change is seen"


def test_a_loss_is_a_normalized_probability(tiny, random_model):
    """Over all possible targets of a position the probabilities sum to 1."""
    hp = tiny(micro_batch_tokens=32 * 320)
    model = random_model(hp)
    ids, _ = tokens(hp, batch=1)
    every = torch.arange(hp.vocab_size, dtype=torch.int32)[:, None].expand(-1, hp.train_seq_len)
    with torch.no_grad():
        losses, _ = model(ids.expand(hp.vocab_size, -1), every, 2)
    torch.testing.assert_close(losses.neg().exp().sum(0), torch.ones(hp.train_seq_len))


def test_score_last_is_the_end_of_all_scores(tiny, random_model):
    hp = tiny()
    model = random_model(hp)
    ids, targets = tokens(hp)
    losses, _ = model(ids, targets, 2)
    last, _ = model(ids, targets, 2, score_last=5)
    assert last.shape == (2, 5)
    torch.testing.assert_close(last, losses[:, -5:], rtol=1e-6, atol=1e-6)


def test_the_start(tiny):
    """Every block begins as the identity and the prediction near uniform."""
    hp = tiny()
    torch.manual_seed(0)
    model = GPT(hp)
    L = hp.num_layers
    for matrix in (*model.qo_bank[:L], *model.kv_bank, *model.mlp_up_bank):
        small = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
        torch.testing.assert_close(small @ small.T, torch.eye(len(small)), rtol=0, atol=1e-5)
    assert model.qo_bank[L:].count_nonzero() == model.mlp_down_bank.count_nonzero() == 0
    losses, stability = model(*tokens(hp), 3)
    assert losses.mean().item() == pytest.approx(math.log(hp.vocab_size), abs=0.05)
    assert stability.update.count_nonzero() == 0


def test_parameters_are_counted_and_grouped():
    """26,698,335 of the flat predecessor, 2,560 of the feedback, less its third residual scale."""
    hp = Hyperparameters(
        vocab_size=1024, feedback_mode="diagonal", passes_schedule="0.0:1,0.6:2,0.8:3",
        num_heads=8, num_kv_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        named = dict(GPT(hp).named_parameters())
    table, sizes = parameter_table(hp), {name: p.numel() for name, p in named.items()}
    assert {name: row.shape for name, row in table.items()} == {
        n: p.shape for n, p in named.items()
    }
    assert sum(sizes.values()) == 26_698_335 + 2_560 - 1
    assert sum(n for name, n in sizes.items() if name.startswith("feedback_")) == 2_560
    of_group = lambda group: {name for name, row in table.items() if row.group == group}  # noqa: E731
    assert of_group("bank") == set(BANKS)
    assert of_group("table") == {"tok_emb", "bigram_table", "ve_table"}
    assert of_group("projection") == {"bigram_proj", "ve_proj"}


def test_bigram_rows_wrap_in_int32_as_on_every_device():
    """Rows stay inside the table for the largest tokens, whose products exceed 31 bits."""
    ids = torch.tensor([[65_535, 65_535, 0, 65_535, 1]], dtype=torch.int32)
    rows = bigram_rows(ids, 512)
    assert rows[0, 0] == 511
    assert ((rows[:, 1:] >= 0) & (rows[:, 1:] < 511)).all()
    for place, (a, b) in enumerate(zip([65_535, 0, 65_535, 1], ids[0].tolist(), strict=False), 1):
        wrapped = [(n + 2**31) % 2**32 - 2**31 for n in (36_313 * a, 27_191 * b)]
        assert rows[0, place] == (wrapped[0] ^ wrapped[1]) % 511


def test_xsa_leaves_nothing_along_the_own_value():
    y, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    out = exclude_self(y, v)
    own = v.repeat_interleave(2, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-5
    ratio = (y - out) / own
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("heads", "pairs"), [((2, 2), 0), ((4, 2), 2), ((3, 1), 3)])
def test_the_gradient_of_heads_is_their_slope(heads, pairs):
    """Against differences in float64, a gain of 0 included; bfloat16 against float64.

    Norms and sums are taken in float32: in bfloat16 the gradient would be wrong by 0.0037 or more.
    """
    torch.manual_seed(0)
    query, key = heads
    x, gain = torch.randn(64, 3, query + 2 * key, 6), torch.randn(query)
    gain[0] = 0.0
    angles, still = torch.rand(3, pairs, dtype=torch.float64), torch.zeros(3, 6 - 2 * pairs)
    unsigned, signed = (torch.cat([sign * angles, angles, still], 1) for sign in (1, -1))
    rope = (unsigned.cos(), signed.sin(), pairs)
    inputs = [t.double().requires_grad_() for t in (x[:2], gain)]
    assert torch.autograd.gradcheck(lambda *pair: Heads.apply(*pair, *rope), inputs)
    weights, results = [torch.randn_like(y).bfloat16() for y in Heads.apply(x, gain, *rope)], []
    for dtype in (torch.float64, torch.bfloat16):
        pair = [t.bfloat16().to(dtype).requires_grad_() for t in (x, gain)]
        total = sum((y * w).sum() for y, w in zip(Heads.apply(*pair, *rope), weights, strict=True))
        results.append(torch.autograd.grad(total, pair))
    for exact, rounded, bound in zip(*results, (0.0034, 0.01), strict=True):
        assert (exact - rounded).norm() < bound * exact.norm()


@pytest.mark.parametrize(
    ("heads", "chunk"), [((4, 4), None), ((4, 2), None), ((6, 1), 24), ((4, 2), 8), ((4, 2), 7)]
)
def test_attention_is_its_definition(heads, chunk):
    """Forward and all three gradients, float32 against float64."""
    torch.manual_seed(0)
    shapes = [(2, 24, n, 8) for n in (heads[0], heads[1], heads[1])]
    qkv, weight = [torch.randn(shape) for shape in shapes], torch.randn(shapes[0])
    results = []
    for function, dtype in ((attend, torch.float32), (plain_attention, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in qkv]
        y = function(*inputs, chunk)
        results.append([y, *torch.autograd.grad((y * weight.to(dtype)).sum(), inputs)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), plain, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- MLP


def plain_mlp(x, up, down):
    return linear(leaky_relu(linear(x, up), 0.5).square(), down)


def float64_product(a, b, s):
    """What `fused_product` computes, in float64: the sign is the last bit of its numbers, too."""
    u, one = a @ b.T, torch.tensor(1)
    if s is None:
        bits = leaky_relu(u, 0.5).square().view(torch.int64)
        return torch.where(u < 0, bits | one, bits & ~one).view(torch.float64)
    return u * torch.where((s.view(torch.int64) & one) == 1, -s.sqrt(), 2 * s.sqrt())


def test_the_gradient_of_the_fused_mlp_is_its_slope(monkeypatch):
    monkeypatch.setattr(train_gpt, "fused_product", float64_product, raising=False)
    torch.manual_seed(0)
    shapes = ((5, 4), (6, 4), (4, 6))  # x, up, down
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.testing.assert_close(FusedMLP.apply(*inputs), plain_mlp(*inputs))
    assert torch.autograd.gradcheck(FusedMLP.apply, inputs)


def test_the_model_takes_the_fused_mlp(monkeypatch):
    calls = []
    spy = lambda *args: calls.append(args) or float64_product(*args)  # noqa: E731
    monkeypatch.setattr(train_gpt, "fuses_mlp", lambda *args: True)
    monkeypatch.setattr(train_gpt, "fused_product", spy, raising=False)
    x, up, down = (torch.randn(shape).double() for shape in ((2, 5, 4), (6, 4), (4, 6)))
    layer = Layer(None, None, up, down, None, None, False, None)
    torch.testing.assert_close(mlp(x, layer), plain_mlp(x, up, down))
    assert len(calls) == 1


def test_the_mlp_is_fused_on_hopper_only(monkeypatch):
    """In bfloat16, for sizes that its tiles cover, and if there is a Triton."""
    gpu, capability = torch.device("cuda"), [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(train_gpt, "triton", train_gpt.triton or "a Triton")
    assert fuses_mlp(gpu, torch.bfloat16, (1536, 512))
    assert not fuses_mlp(torch.device("cpu"), torch.bfloat16, (1536, 512))
    assert not fuses_mlp(gpu, torch.float32, (1536, 512))
    for shape in ((1536 + 64, 512), (1536, 512 + 32)):
        assert not fuses_mlp(gpu, torch.bfloat16, shape)
    for capability[0] in (8, 10):
        assert not fuses_mlp(gpu, torch.bfloat16, (1536, 512))
    capability[0] = 9
    for place, name, value in ((torch.version, "hip", "6.4"), (train_gpt, "triton", None)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert not fuses_mlp(gpu, torch.bfloat16, (1536, 512))


@pytest.mark.skipif(train_gpt.triton is None, reason="needs Triton")
@pytest.mark.parametrize("backward", [False, True])
def test_the_fused_product_compiles_for_hopper(backward):
    """Without a GPU, too; with its copies and products, and small enough for two a processor."""
    compiler, kernel = train_gpt.triton.compiler, train_gpt.fused_product_kernel
    target = train_gpt.triton.backends.compiler.GPUTarget("cuda", 90, 32)
    constants = {"N": 1536, "K": 512, "BACKWARD": backward}
    kinds = dict.fromkeys(kernel.arg_names, "tensordesc<bf16[128, 64]>")
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    done = compiler.compile(compiler.ASTSource(kernel, kinds, places), target=target)
    assert all(word in done.asm["ptx"] for word in ("wgmma.mma_async", "cp.async.bulk.tensor"))
    assert 2 * (done.metadata.shared + 1024) <= 228 * 1024


needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and fuses_mlp(torch.device("cuda"), torch.bfloat16, (128, 64))),
    reason="needs an H100 or H200 and Triton",
)


@needs_hopper
@pytest.mark.parametrize("rows", [4096, 1000, 1])
def test_the_fused_product_is_its_definition(rows):
    """Against float64, fresh inputs each time; rows that fill no tile, and a transposed matrix."""
    seed = torch.seed()
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    a, b = make(rows, 192), make(192, 256).T
    s = train_gpt.fused_product(a, b, None)
    u = a.double() @ b.double().T
    exact = leaky_relu(u, 0.5).square()
    sure = u.abs() > 1e-3  # nearer to 0 the sum's own rounding decides the sign
    assert torch.equal(((s.view(torch.int16) & 1) == 1)[sure], (u < 0)[sure]), seed
    assert ((s - exact).abs() <= exact * 2**-7 + 1e-3).all(), seed
    slope = train_gpt.fused_product(a, b, s)
    expected = u * torch.where((s.view(torch.int16) & 1) == 1, -1, 2) * s.double().sqrt()
    assert ((slope - expected).abs() <= expected.abs() * 2**-7 + 1e-3).all(), seed
    a[0, 7] = math.nan
    assert train_gpt.fused_product(a, b, None)[0].isnan().all()
    library.opcheck(train_gpt.fused_product, (a, b, s), test_utils="test_faketensor")


@needs_hopper
def test_the_fused_mlp_is_as_exact_as_the_plain_one():
    """Forward and gradients against float64; compiled, with one graph for all sizes of a batch."""
    seed, graphs = torch.seed(), train_gpt.graphs_compiled()

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def fast(x, up, down):
        return mlp(x, Layer(None, None, up, down, None, None, False, None))

    for batch in (3, 5):
        shapes = ((batch, 200, 512), (1536, 512), (512, 1536))
        values = [torch.randn(shape, device="cuda") / shape[-1] ** 0.5 for shape in shapes]
        weight, results = torch.randn(shapes[0], device="cuda"), []
        exact = (plain_mlp, torch.float64), (plain_mlp, torch.bfloat16), (fast, torch.bfloat16)
        for function, dtype in exact:
            inputs = [v.bfloat16().to(dtype).requires_grad_() for v in values]
            train_gpt.any_size(inputs[0])
            y = function(*inputs)
            y.backward(weight.bfloat16().to(dtype))
            results.append([y, *(t.grad for t in inputs)])
        for reference, plain, fused in zip(*results, strict=True):
            errors = [((t - reference).norm() / reference.norm()).item() for t in (plain, fused)]
            assert errors[1] < min(1.25 * errors[0], 0.01), (seed, errors)
    assert train_gpt.graphs_compiled() == graphs + 1


# ----------------------------------------------------------------------------------- compilation


def test_compiled_functions_are_the_same_model(tiny, random_model):
    """Traced whole; same losses and gradients; one set of graphs for every size of a batch."""
    graphs = []

    def keep(graph, inputs):
        """A compiler that changes nothing."""
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    def kinds() -> list[int]:
        """Graphs with attention, of the head, of fake quantization, of the embedding."""
        words = ("scaled_dot_product", "cross_entropy", "round", "embedding")
        return [sum(word in names for names in graphs) for word in words]

    hp = tiny(num_layers=4, core_start=1, core_end=2, ve_layers="3", xsa_last_n=2)
    model, floors = random_model(hp), even_floors(hp, 512 * 8)
    stances = ({"stance": "force_eager"}, {"stance": "default", "force_backend": keep})
    for batch in (4, 3):
        results = []
        for stance in stances:
            model.zero_grad()
            with torch.compiler.set_stance(**stance):
                losses, _ = model(*tokens(hp, batch), 2, floors)
                losses.mean().backward()
            results.append([losses, *(p.grad for p in model.parameters())])
        for plain, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)
        assert kinds() == [3, 1, 2, 1], "stem, core and tail; rows of two lengths"
    with torch.no_grad():
        for last in (5, None):
            results = []
            for stance in stances:
                with torch.compiler.set_stance(**stance):
                    results.append(model(*tokens(hp), 2, score_last=last)[0])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    # Plain layers (the first in chunks, the core's not), one with chunks, XSA and a skip, one with
    # XSA and values.
    assert kinds() == [3 + 4, 2, 2, 2]
