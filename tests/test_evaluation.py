"""Evaluation: every token scored once, bits per byte of text, TTT only on what is scored."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHALLOW, Lines

import train_gpt
from train_gpt import (
    GPT,
    Data,
    Evaluator,
    FlatParameters,
    Hyperparameters,
    Runtime,
    TokenBytes,
    UserError,
    scoring_windows,
)

# ------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("seq_len", [8, 9, 32])
def test_every_target_is_scored_once_with_all_the_context_there_is(seq_len):
    """For odd lengths, strides and chunks; within a window of seq_len, never beyond the text."""
    for stride in {1, 3, seq_len // 2, seq_len - 1, seq_len}:
        for length in (seq_len, seq_len + 1, 3 * seq_len - 1, 5 * seq_len + 4, 101):
            for chunk in (1, 5, seq_len - 1, seq_len, seq_len + 3, 64, 1000):
                scored = []
                for first in range(0, length, chunk):
                    last = min(first + chunk, length)
                    windows = scoring_windows(first, last, seq_len, stride)
                    assert (windows[:, 1] < windows[:, 2]).all()
                    for start, low, high in windows.tolist():
                        assert 0 <= start <= low < high <= start + seq_len
                        assert start + seq_len <= length, "its tokens and targets exist"
                        assert high - low <= stride or start == 0
                        context = low - start + 1
                        assert start == 0 or context >= seq_len - stride + 1
                        scored += range(low, high)
                assert scored == list(range(length))


def test_without_overlap_windows_tile_the_text():
    assert scoring_windows(0, 70, 32, 32).tolist() == [[0, 0, 32], [32, 32, 64], [38, 64, 70]]
    assert scoring_windows(0, 70, 32, 16).tolist() == [
        [0, 0, 32], [16, 32, 48], [32, 48, 64], [38, 64, 70],
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ scores


@pytest.fixture(scope="module")
def table(corpus, runtime) -> TokenBytes:
    return TokenBytes(corpus.tokenizer, runtime.device)


@pytest.fixture
def evaluator(corpus, table, runtime):
    """evaluator(hp, tokens) -> an evaluator of the tokens, or of the whole text."""

    def make(hp: Hyperparameters, tokens: np.ndarray = corpus.val_tokens) -> Evaluator:
        return Evaluator(hp, Data(None, tokens, table, []), runtime, Lines())

    return make


def losses_of_own_windows(model: GPT, tokens: np.ndarray, stride: int) -> torch.Tensor:
    """Each target's loss from a window of its own, at the place that the stride gives it."""
    T, count = model.hp.train_seq_len, len(tokens) - 1
    t = np.arange(count)
    to = np.where(t < T, T, np.minimum(count, T + -(-(t + 1 - T) // stride) * stride))
    rows = tokens.astype(np.int32)[(to - T)[:, None] + np.arange(T + 1)]
    rows = torch.from_numpy(rows)
    losses, _ = model(rows[:, :-1], rows[:, 1:], 2)
    return losses[t, t - to + T]


@pytest.mark.parametrize(("stride", "batch"), [(8, 16), (32, 5), (7, 3)])
def test_sliding_scores_are_those_of_single_windows(
    corpus, evaluator, tiny, random_model, stride, batch
):
    hp = tiny(eval_stride=stride, eval_batch_seqs=batch, **SHALLOW)
    model, tokens = random_model(hp), corpus.val_tokens[:150]
    scorer = evaluator(hp, tokens)
    with torch.no_grad():
        expected = losses_of_own_windows(model, tokens, stride)
        losses = scorer.run("sliding", model, stride, 2)
        part = scorer.score(model, range(40, 77), stride, 2)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert part.shape == (37,)
    [pairs] = scorer.log.of("sliding")
    assert pairs["tokens"] == 149
    assert float(pairs["val_loss"]) == pytest.approx(expected.double().mean().item(), rel=1e-5)


def test_bits_per_byte_are_those_of_the_text(corpus, evaluator, tiny, random_model):
    """The sum of all losses over the length of all documents in UTF-8: no table involved."""
    model = random_model(tiny(**SHALLOW))
    scorer = evaluator(model.hp)
    losses = scorer.run("plain", model, 32, 1)
    [pairs] = scorer.log.of("plain")
    text_bytes = sum(len(document.encode()) for document in corpus.val_documents)
    bits = losses.double().sum().item() / math.log(2)
    assert pairs["bytes"] == text_bytes
    assert float(pairs["val_bpb"]) == pytest.approx(bits / text_bytes, abs=1e-7)
    assert len(losses) == pairs["tokens"] == len(corpus.val_tokens) - 1


@pytest.mark.parametrize("rows", [slice(1, None), [0, *range(18)]], ids=["missing", "twice"])
def test_scores_that_are_not_all_there_once_are_refused(
    evaluator, tiny, random_model, monkeypatch, rows
):
    model = random_model(tiny(**SHALLOW))
    scorer = evaluator(model.hp)
    faulty = lambda *args: scoring_windows(*args)[rows]  # noqa: E731
    monkeypatch.setattr("train_gpt.scoring_windows", faulty)
    with pytest.raises(RuntimeError, match="exactly once"):
        scorer.run("plain", model, 32, 1)


# ------------------------------------------------------------------------------ test-time training


def adapt(scorer: Evaluator, model: GPT, deadline: float = math.inf) -> torch.Tensor:
    return scorer.run_ttt(model, FlatParameters(model), 2, deadline)


STRONG = SHALLOW | {"ttt_lr": 0.05, "ttt_epochs": 2, "ttt_chunk_tokens": 100}


def test_ttt_scores_before_it_learns(corpus, evaluator, tiny, random_model):
    """Tokens from p on are changed: every loss before p is bit-identical, later ones differ."""
    hp = tiny(**STRONG)
    tokens = corpus.val_tokens[:330]
    losses = adapt(evaluator(hp, tokens), random_model(hp))
    for p in (1, 101, 110, 205):  # at the start, at a chunk's border, within a window of one
        changed = tokens.copy()
        changed[p:] = 4 + (changed[p:] + 5) % 300
        other = adapt(evaluator(hp, changed), random_model(hp))
        assert torch.equal(other[: p - 1], losses[: p - 1]), p
        assert (other[p - 1 :] != losses[p - 1 :]).float().mean() > 0.9


def test_what_ttt_learns_shows_in_the_chunks_after_it(corpus, evaluator, tiny, random_model):
    """One changed token of chunk 2 moves losses of later chunks that do not see it."""
    hp = tiny(**STRONG)
    tokens = corpus.val_tokens[:330]
    changed = tokens.copy()
    changed[120] = 4 + (changed[120] + 5) % 300
    pair = [adapt(evaluator(hp, t), random_model(hp)) for t in (tokens, changed)]
    differs = pair[0] != pair[1]
    assert not differs[:119].any()
    assert differs[119]
    assert not differs[119 + 33 : 200].any(), "beyond the window, before the update"
    assert differs[200:].float().mean() > 0.9, "after the update"


def test_ttt_learns(evaluator, tiny, random_model):
    """The same weights that do not learn score worse."""
    hp = tiny(ttt_lr=0.05, **SHALLOW)
    before = evaluator(hp).run("sliding", random_model(hp), hp.eval_stride, 2)
    after = adapt(evaluator(hp), random_model(hp))
    assert after.mean() < before.mean() - 0.1


@pytest.mark.parametrize("changes", [{"ttt_epochs": 0}, {"ttt_lr": 0.0}])
def test_ttt_that_learns_nothing_is_sliding(evaluator, tiny, random_model, changes):
    """Chunks that are a multiple of the stride: the same windows, the same losses."""
    hp = tiny(ttt_chunk_tokens=64, **SHALLOW, **changes)
    losses = adapt(evaluator(hp), random_model(hp))
    sliding = evaluator(hp).run("sliding", random_model(hp), hp.eval_stride, 2)
    torch.testing.assert_close(losses, sliding, rtol=1e-5, atol=1e-5)


def ttt_reference(model: GPT, hp: Hyperparameters, tokens: np.ndarray) -> list[torch.Tensor]:
    """The parameters after each chunk, by the recipe: SGD with momentum, cosine, clip, epochs."""
    T, targets = hp.train_seq_len, len(tokens) - 1
    ids = torch.from_numpy(tokens.astype(np.int32))
    parameters = [p for p in model.parameters() if p.numel()]
    velocity = [torch.zeros_like(p) for p in parameters]
    chunks = [range(at, min(at + hp.ttt_chunk_tokens, targets))
              for at in range(0, targets, hp.ttt_chunk_tokens)]  # fmt: skip
    states = []
    for number, chunk in enumerate(chunks[:-1]):
        lr = hp.ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
        rows = [ids[s : s + T + 1] for s in range(chunk.start, chunk.stop - T + 1, T)]
        for _ in range(hp.ttt_epochs):
            for at in range(0, len(rows), hp.ttt_batch_seqs):
                batch = torch.stack(rows[at : at + hp.ttt_batch_seqs])
                loss = model(batch[:, :-1], batch[:, 1:], 2)[0].mean()
                grads = torch.autograd.grad(loss, parameters)
                norm = torch.stack([g.norm() for g in grads]).norm()
                factor = min(1.0, 1.0 / (float(norm) + 1e-6))
                with torch.no_grad():
                    for p, v, g in zip(parameters, velocity, grads, strict=True):
                        v.mul_(0.9).add_(g, alpha=factor)
                        p.sub_(v, alpha=lr)
        states.append(torch.cat([p.detach().flatten() for p in parameters]))
    return states


def test_ttt_is_sgd_over_the_scored_chunks(corpus, evaluator, tiny, random_model):
    """Against a plain loop; micro-batches and the flat buffer change nothing."""
    hp = tiny(
        ttt_lr=0.01, ttt_epochs=2, ttt_chunk_tokens=200, ttt_batch_seqs=4,
        micro_batch_tokens=96, **SHALLOW,
    )  # fmt: skip
    tokens = corpus.val_tokens[:430]
    model = random_model(hp)
    adapt(evaluator(hp, tokens), model)
    result = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in random_model(hp).parameters()])
    expected = ttt_reference(random_model(hp), hp, tokens)[-1]
    assert (expected - start).norm() > 0.01
    assert (result - expected).norm() < 1e-3 * (expected - start).norm()


@pytest.mark.parametrize(
    ("seconds", "fewest", "most"), [(math.inf, 24, 24), (60, 24, 24), (22, 9, 13), (5, 0, 0)]
)
def test_ttt_lowers_its_epochs_to_end_in_time_and_scores_all(
    corpus, evaluator, tiny, random_model, monkeypatch, seconds, fewest, most
):
    """9 chunks on a clock that is moved by hand: 1 s to score one, 1 s for each of its 3 epochs."""
    now = [100.0]
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: now[0])
    hp = tiny(ttt_chunk_tokens=64, **SHALLOW)
    scorer = evaluator(hp, corpus.val_tokens[:546])
    score, train_on = scorer.score, scorer.train_on

    def slow_score(*rest) -> torch.Tensor:
        now[0] += 1
        return score(*rest)

    def slow_train_on(*rest) -> None:
        now[0] += hp.ttt_epochs
        train_on(*rest)

    scorer.score, scorer.train_on = slow_score, slow_train_on
    adapt(scorer, random_model(hp), now[0] + seconds)
    [pairs] = scorer.log.of("legal_ttt_exact")
    done, planned = map(int, pairs["epochs"].split("/"))
    assert (pairs["tokens"], planned) == (545, 24)
    assert fewest <= done <= most
    assert now[0] - 100 == 9 + done
    assert now[0] - 100 <= max(seconds, 9), "scoring alone takes 9 s"


def test_the_first_chunk_is_not_trained_on_without_an_estimate(
    corpus, evaluator, tiny, random_model, monkeypatch
):
    """10 s to score each of 3 chunks, and 1 s left for training: epochs are dropped at once."""
    now, epochs = [100.0], []
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: now[0])
    hp = tiny(ttt_chunk_tokens=64, **SHALLOW)
    scorer = evaluator(hp, corpus.val_tokens[:193])
    score = scorer.score

    def slow_score(*rest) -> torch.Tensor:
        now[0] += 10
        return score(*rest)

    scorer.score, scorer.train_on = slow_score, lambda *rest: epochs.append(rest)
    adapt(scorer, random_model(hp), now[0] + 31)
    assert len(epochs) < 2


# ------------------------------------------------------------------------------------------- ranks


def scores_on_a_rank(runtime: Runtime, hp, weights, table, tokens, chunks) -> list[np.ndarray]:
    """Sliding, then TTT with each chunk size."""
    results = []
    for chunk in chunks:
        model = GPT(hp)
        FlatParameters(model).data.copy_(torch.from_numpy(weights))
        data, chunked = Data(None, tokens, table, []), replace(hp, ttt_chunk_tokens=chunk)
        scorer = Evaluator(chunked, data, runtime, Lines())
        if chunk == chunks[0]:
            results.append(scorer.run("sliding", model, hp.eval_stride, 2).numpy())
        results.append(adapt(scorer, model).numpy())
    return results


def test_ranks_agree_and_no_chunk_size_deadlocks(
    corpus, table, tiny, runtime, random_model, on_ranks
):
    """Fewer windows or sequences than ranks, chunks shorter than a window, a last one of 1."""
    hp = tiny(ttt_lr=0.02, ttt_epochs=1, ttt_batch_seqs=3, **SHALLOW)
    weights = FlatParameters(random_model(hp)).data.numpy()
    tokens, chunks = corpus.val_tokens[:142], (64, 35, 13, 70)
    arguments = (hp, weights, table, tokens, chunks)
    alone = scores_on_a_rank(runtime, *arguments)
    for world_size in (2, 3):
        for results in on_ranks(world_size, scores_on_a_rank, *arguments):
            for own, expected in zip(results, alone, strict=True):
                np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3)


def test_an_artifact_that_does_not_say_its_passes_is_scored_with_all_that_it_has(tiny):
    stored = tiny(vocab_size=320, passes_schedule="0:1,0.5:2")
    assert stored.eval_passes is None
    assert train_gpt.adopt(tiny(), stored).eval_passes == 2
    assert train_gpt.adopt(tiny(eval_passes=3), stored).eval_passes == 3


STOP, EARLY = "\nstop step:9 interrupted:0\n", "\nstop step:5 interrupted:1\n"
EXPORT, SCORED = "\nartifact path:a\n", "\nevaluated graphs_compiled:0\n"


@pytest.mark.parametrize(
    ("written", "files", "outcome"),
    [
        (STOP + EXPORT, "a.int6.xz", "scored"),
        (STOP + EXPORT + SCORED, "a.int6.xz", "refused"),
        (STOP + EXPORT, "", "refused"),  # the artifact lies elsewhere
        (STOP, "a.checkpoints", "trained"),
        (EARLY + EXPORT, "a.int6.xz", "scored"),
        (EARLY + EXPORT, "a.int6.xz a.checkpoints", "trained"),
        # What a log tells of the run before it went on does not count.
        (EARLY + EXPORT + STOP, "a.int6.xz a.checkpoints", "trained"),
        (EARLY + EXPORT + SCORED + STOP, "a.int6.xz a.checkpoints", "trained"),
        (EARLY + EXPORT + SCORED + STOP + EXPORT, "a.int6.xz a.checkpoints", "scored"),
        ("", "a.int6.xz a.checkpoints", "refused"),
    ],
)
def test_a_resumed_run_is_trained_or_scored_as_its_log_tells(
    tiny, runtime, tmp_path, written, files, outcome
):
    hp = tiny(resume=True, run_id="a", output_dir=str(tmp_path))
    (tmp_path / "a.txt").write_text("run run_id:a\n" + written)
    for name in files.split():
        kept = tmp_path / name
        if name.endswith("checkpoints"):
            kept.mkdir()
            kept = kept / "step_00000004.pt"
        kept.touch()
    if outcome == "refused":
        with pytest.raises(UserError, match=r"overwritten|not resumed"):
            train_gpt.run_files(hp, runtime)
    else:
        assert train_gpt.run_files(hp, runtime)[3] == (outcome == "scored")


def test_an_evaluation_may_have_the_name_of_the_run_whose_artifact_it_scores(
    tiny, runtime, tmp_path
):
    hp = tiny(evaluate="a.int6.xz", run_id="a", output_dir=str(tmp_path))
    (tmp_path / "a.int6.xz").touch()
    assert train_gpt.run_files(hp, runtime)[0] == tmp_path / "a.txt"
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt would be overwritten"):
        train_gpt.run_files(hp, runtime)
