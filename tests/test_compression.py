"""Compression: the quantizer, the size knob, and a reader that survives any file."""

import json
import lzma
import math
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import even_floors, time_limit

from train_gpt import (
    ARTIFACT_MAGIC,
    BANKS,
    FINEST_FLOOR_INDEX,
    GPT,
    SMALL_TENSOR,
    Hyperparameters,
    Log,
    UserError,
    compress,
    entropy_bytes,
    estimate_floor_index,
    export,
    fake_quantize,
    floor_value,
    huffman,
    pack,
    payload_bytes,
    quantize,
    read_artifact,
    row_scales,
    step_floors,
    storage_levels,
    unpack,
)

NO_FLOOR = torch.tensor(floor_value(FINEST_FLOOR_INDEX))


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows of log-normal scale, with an outlier in some."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w = w * torch.randn((*shape[:-1], 1), generator=generator).exp() * 0.05
    w[..., ::3, 0] *= 6
    return w


# ---------------------------------------------------------------------------------------- quantizer


@pytest.mark.parametrize("levels", [31, 127])
@pytest.mark.parametrize("floor", [2.0**-14, 1 / 31, 0.5])
def test_the_error_is_half_a_step_but_where_a_row_is_clipped(levels, floor):
    w = weights(5, 40, 333)
    scale = row_scales(w, levels, torch.tensor(floor))
    assert scale.shape == (5, 40, 1)
    assert torch.equal(scale, scale.half().float()), "the step is the one that is stored"
    assert (scale >= torch.tensor(floor).half()).all()
    integers = quantize(w, scale, levels)
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() <= levels
    inside = w.abs() <= levels * scale
    assert inside.float().mean() > 0.99
    error = (integers * scale - w).abs()
    assert (error <= scale / 2 * 1.0001)[inside].all()


def test_the_clip_is_searched_per_row_and_never_worse_than_none():
    """Each row's error is the least of all candidates', counted one by one in float64."""
    w = weights(64, 2000)
    scale = row_scales(w, 31, NO_FLOOR)

    def error(row: np.ndarray, clip: float) -> float:
        step = float(np.float16(max(clip / 31, float(NO_FLOOR))))
        integers = np.clip(np.round(row / step), -31, 31)
        return float(((integers * step - row) ** 2).sum())

    chosen = []
    for row, step in zip(w.double().numpy(), scale.flatten().tolist(), strict=True):
        quantiles = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
        errors = [error(row, float(np.quantile(np.abs(row), q))) for q in quantiles]
        own = float(((np.clip(np.round(row / step), -31, 31) * step - row) ** 2).sum())
        assert own <= errors[-1] * (1 + 1e-6), "never worse than no clipping"
        assert own == pytest.approx(min(errors), rel=1e-2)
        chosen.append(int(np.argmin(errors)))
    assert len(set(chosen)) > 2, "rows choose for themselves"


def test_rows_that_are_zero_or_tiny_stay_so():
    w = torch.zeros(4, 50)
    w[1, 3] = 1e-30
    w[2] = 1e-7
    scale = row_scales(w, 31, NO_FLOOR)
    assert (quantize(w, scale, 31) * scale)[:2].count_nonzero() == 0
    assert torch.isfinite(scale).all()


def test_fake_quantization_is_the_export_bit_for_bit(tiny, random_model):
    """QAT's forward value equals what a reader of the artifact gets; its gradient is 1."""
    model = random_model(tiny())
    for index in (FINEST_FLOOR_INDEX, 512 * 5):
        tensors = {name: model.get_parameter(name).detach() for name in BANKS}
        floor, floors = floor_value(index), even_floors(model.hp, index)
        stored = unpack(pack(tensors, floors), {name: t.shape for name, t in tensors.items()})
        for name in BANKS:
            for row, matrix in enumerate(model.get_parameter(name)):
                fake = fake_quantize(matrix, torch.tensor(floor))
                assert torch.equal(fake, stored[name][row])
                assert not torch.equal(fake, matrix)
    w = weights(3, 20).requires_grad_()
    (fake_quantize(w, NO_FLOOR) * 2).sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 2.0))


def test_qat_quantizes_the_matrices_of_the_core(tiny, random_model):
    model, L, layers = random_model(tiny()), 11, range(4, 7)
    floors, p = even_floors(model.hp, 512 * 5), dict(model.named_parameters())
    for bank in BANKS:  # another for each matrix
        floors[bank] *= torch.linspace(0.5, 2, len(floors[bank]))[:, None, None]
    for i, (with_qat, without) in enumerate(
        zip(model.layers(floors), model.layers(None), strict=True)
    ):
        for result, quantized in ((without, False), (with_qat, i in layers)):

            def row(bank, at, quantized=quantized):
                w, floor = p[bank][at], floors[bank][at, 0, 0]
                return fake_quantize(w, floor) if quantized else w

            q, k, v = row("qo_bank", i), row("kv_bank", i), row("kv_bank", L + i)
            expected = {
                "qkv": (i + 1) ** -0.5 * torch.cat([q, k, v]),
                "out": p["attn_scale"][i, :, None] * row("qo_bank", L + i),
                "mlp_up": (i + 1) ** -0.5 * row("mlp_up_bank", i),
                "mlp_down": p["mlp_scale"][i, :, None] * row("mlp_down_bank", i),
            }
            for name, w in expected.items():
                torch.testing.assert_close(getattr(result, name), w, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------ payload


def test_a_payload_is_read_as_it_was_written():
    tensors = {
        "qo_bank": weights(2, 8, 16),
        "tok_emb": weights(300, 256, seed=1),
        "small": weights(256, 256, seed=2),
        "scalar": torch.tensor(0.123),
        "empty": torch.zeros(0),
    }
    shapes = {name: t.shape for name, t in tensors.items()}
    assert [storage_levels(name, shape) for name, shape in shapes.items()] == [31, 127, 0, 0, 0]
    assert shapes["small"].numel() == SMALL_TENSOR
    payload = pack(tensors, {"qo_bank": torch.tensor(1 / 31)})
    assert len(payload) == payload_bytes(shapes)
    read = unpack(payload, shapes)
    assert list(read) == list(tensors)
    for name in ("small", "scalar", "empty"):
        assert torch.equal(read[name], tensors[name].half().float())
    scale = row_scales(tensors["qo_bank"], 31, torch.tensor(1 / 31))
    assert torch.equal(read["qo_bank"], quantize(tensors["qo_bank"], scale, 31) * scale)
    spread = tensors["tok_emb"].abs().amax(1, keepdim=True)
    assert ((read["tok_emb"] - tensors["tok_emb"]).abs() / spread).max() < 0.6
    inside = (read["tok_emb"] - tensors["tok_emb"]).abs() <= spread / 127
    assert inside.float().mean() > 0.99, "the floor is the banks', not the embedding's"


def test_an_artifact_brings_back_architecture_and_weights(tiny, random_model, tmp_path):
    model = random_model(tiny(ve_layers="none", passes_schedule="0:1,0.5:2", logit_softcap=20.5))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    path = tmp_path / "a.xz"
    floors = even_floors(model.hp, FINEST_FLOOR_INDEX)
    path.write_bytes(compress(model.hp.architecture(), tensors, floors))
    hp, read = read_artifact(path)
    assert hp.architecture() == model.hp.architecture()
    assert list(read) == list(tensors)
    fresh = GPT(hp)
    fresh.load_state_dict(read)
    ids = torch.randint(hp.vocab_size, (2, 33), dtype=torch.int32)
    with torch.no_grad():
        before, after = (m(ids[:, :-1], ids[:, 1:], 2)[0] for m in (model, fresh))
    assert (before - after).abs().max() < 0.3
    assert not torch.equal(before, after)


# ---------------------------------------------------------------------------------------- size knob


def test_the_size_grows_with_the_floor_index_and_its_estimate_is_close(tiny):
    hp = tiny(model_dim=64, mlp_mult=4.0)
    torch.manual_seed(0)
    model = GPT(hp)
    with torch.no_grad():
        for name in BANKS:
            p = model.get_parameter(name)
            p.copy_(torch.randn_like(p) * 0.05 * (0.3 * torch.randn((*p.shape[:-1], 1))).exp())
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    sizes = []
    for index in (512 * 4, 512 * 5, 512 * 6, FINEST_FLOOR_INDEX):
        floors = even_floors(hp, index)
        sizes.append(len(compress(hp.architecture(), tensors, floors)))
        assert entropy_bytes(tensors, floors) == pytest.approx(sizes[-1], rel=0.1)
    assert sizes == sorted(sizes)
    squares = {bank: torch.ones(len(tensors[bank]), 1, 1) for bank in BANKS}
    assert abs(estimate_floor_index(tensors, squares, sizes[1]) - 512 * 5) < 256
    assert sizes[0] < 0.7 * sizes[-1]


def test_steps_are_finer_where_rounding_costs_more(tiny, random_model, tmp_path, monkeypatch):
    """F s^2 is equal within the bounds, and at equal bytes rounding costs less than evenly."""
    model, generator = random_model(tiny(model_dim=64)), torch.Generator().manual_seed(0)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    even = {bank: torch.ones(len(tensors[bank]), 1, 1) for bank in BANKS}
    costs = {b: (1.2 * torch.randn(s.shape, generator=generator)).exp() for b, s in even.items()}
    floors = step_floors(2048, costs)
    within = torch.cat([(costs[b] * floors[b] ** 2).flatten() for b in BANKS])
    assert within.median().item() == pytest.approx((within.log().mean().exp()).item(), rel=0.01)
    assert (within / within.median() - 1).abs().quantile(0.8) < 0.01
    ratios = torch.cat([(floors[b] / 2.0**-4).flatten() for b in BANKS])
    assert ratios.min() >= 0.25
    assert ratios.max() <= 4
    monkeypatch.setattr("train_gpt.model_limit", lambda hp: hp.artifact_limit_bytes)
    limit, lost = len(compress({}, tensors, step_floors(512 * 3, even))), []
    for squares in (even, costs):
        path = tmp_path / f"{len(lost)}.int6.xz"
        export(tiny(model_dim=64, artifact_limit_bytes=limit), tensors, squares, path, Log(None))
        _, read = read_artifact(path)
        errors = [costs[b] * (read[b] - tensors[b]).square() for b in BANKS]
        lost.append(sum(e.sum().item() for e in errors))
    assert lost[1] < 0.8 * lost[0]


def test_export_spends_the_limit_and_never_exceeds_it(tiny, random_model, tmp_path, monkeypatch):
    model = random_model(tiny())
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    monkeypatch.setattr("train_gpt.model_limit", lambda hp: hp.artifact_limit_bytes - 5000)
    squares = {bank: torch.ones(len(tensors[bank]), 1, 1) for bank in BANKS}
    header, hp = model.hp.architecture(), model.hp
    full = len(compress(header, tensors, step_floors(FINEST_FLOOR_INDEX, squares)))
    coarse = len(compress(header, tensors, step_floors(0, squares)))
    limit = (full + coarse) // 2
    hp = tiny(artifact_limit_bytes=5000 + limit)
    path = tmp_path / "a.int6.xz"
    export(hp, tensors, squares, path, Log(None))
    assert limit * 0.99 < path.stat().st_size <= limit
    read_artifact(path)
    hp = tiny(artifact_limit_bytes=5000 + coarse - 1)
    path = tmp_path / "b.int6.xz"
    with pytest.raises(UserError, match=r"oversize.*smaller"):
        export(hp, tensors, squares, path, Log(None))
    assert not path.exists()
    kept = tmp_path / "b.int6.oversize.xz"
    assert kept.stat().st_size == coarse
    read_artifact(kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.int6.xz", kept.name]


# --------------------------------------------------------------------------------- untrusted files


@pytest.fixture(scope="module")
def smallest(tiny) -> tuple[Hyperparameters, bytes]:
    """The artifact of a model of a few hundred weights."""
    hp = tiny(
        vocab_size=8, model_dim=8, num_heads=1, num_kv_heads=1, num_layers=2, core_start=0,
        core_end=1, bigram_vocab_size=0, ve_layers="none", mlp_mult=1.0, xsa_last_n=0,
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in GPT(hp).named_parameters()}
    return hp, compress(hp.architecture(), tensors, even_floors(hp, FINEST_FLOOR_INDEX))


def outcome(path: Path, data: bytes) -> str:
    """`loads`, or the clean error; anything else fails."""
    path.write_bytes(data)
    try:
        read_artifact(path)
    except UserError as error:
        return str(error)
    return "loads"


def test_every_cut_of_an_artifact_is_refused(smallest, tmp_path):
    data = smallest[1]
    with time_limit(30):
        assert outcome(tmp_path / "a", data) == "loads"
        for length in [*range(0, len(data), 17), *range(len(data) - 40, len(data))]:
            assert outcome(tmp_path / "a", data[:length]) != "loads", length
        for tail in (b"\0", b"x", data):
            assert "too many bytes" in outcome(tmp_path / "a", data + tail)


def test_every_bit_flip_of_an_artifact_is_refused(smallest, tmp_path):
    """The checksum of the container finds what the reader does not; nothing crashes before."""
    data, places = smallest[1], set(range(48))
    places |= set(range(48, len(data), 13)) | set(range(len(data) - 48, len(data)))
    with time_limit(60):
        for place in sorted(places):
            for bit in (place % 8, (place + 3) % 8):
                flipped = bytearray(data)
                flipped[place] ^= 1 << bit
                assert outcome(tmp_path / "a", bytes(flipped)) != "loads", (place, bit)


def packed(start: bytes, payload: bytes = b"") -> bytes:
    return lzma.compress(start + huffman(payload))


def unpacked(artifact: bytes) -> tuple[bytes, bytes]:
    """What is before the payload, and the payload."""
    content = lzma.decompress(artifact)
    end = 8 + struct.unpack("<I", content[4:8])[0]
    return content[:end], zlib.decompress(content[end:], -15)


def test_every_bit_flip_under_a_valid_checksum_fails_cleanly_or_loads(smallest, tmp_path):
    """Whoever writes an artifact can write its checksum too: the header and numbers may be any."""
    (start, payload), results = unpacked(smallest[1]), []
    content, coded = start + payload, start + huffman(payload)
    with time_limit(60):
        for place in [*range(len(start)), *range(len(start), len(content), 37)]:
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 5)  # the low bits make other letters and digits
            parts = bytes(flipped[: len(start)]), bytes(flipped[len(start) :])
            results.append(outcome(tmp_path / "a", packed(*parts)))
        for place in range(len(start), len(coded), 37):
            flipped = bytearray(coded)
            flipped[place] ^= 1 << (place % 8)
            results.append(outcome(tmp_path / "a", lzma.compress(bytes(flipped))))
    assert "loads" not in results[:6], "magic and length are checked"
    assert "loads" in results
    assert len(set(results)) > 20


def hostile_headers(hp: Hyperparameters) -> dict[str, bytes]:
    """Headers that claim too much, or are no headers."""
    own = hp.architecture()

    def header(**changes) -> bytes:
        return json.dumps(own | changes).encode()

    wide = {"model_dim": 16_384, "num_layers": 256, "mlp_mult": 64.0, "core_end": 200}
    cases = {
        "huge model": header(**wide),
        "huge vocabulary": header(vocab_size=65_536, model_dim=16_384),
        "vocabulary beyond its bound": header(vocab_size=2**62),
        "huge hash table": header(bigram_vocab_size=1 << 20, bigram_dim=16_384),
        "huge window": header(train_seq_len=10**12),
        "window beyond 64 bits": header(train_seq_len=10**30),
        "window beyond floats": header(train_seq_len=10**400),
        "number beyond Python's digits": json.dumps(own).replace("32", "9" * 5000).encode(),
        "no heads": header(num_heads=0),
        "no kv heads": header(num_kv_heads=0),
        "no MLP": header(mlp_mult=0.01),
        "not a number": header(logit_softcap=math.nan),
        "infinite": header(logit_softcap=math.inf),
        "lists": header(num_layers=[11]),
        "objects": header(mlp_mult={"a": 1}),
        "truth for a number": header(model_dim=True),
        "null": header(vocab_size=None),
        "text for a boolean": header(feedback_mode="maybe"),
        "passes without end": header(num_passes=10**9),
        "a schedule without end": header(passes_schedule="0:1" + ",1:1" * 15_000),
        "layers without end": header(ve_layers="0," * 30_000),
        "deep": b"[" * 60_000 + b"]" * 5_000,
        "deep objects": b'{"a":' * 12_000,
        "a list": b"[]",
        "a number": b"1",
        "nothing": b"",
        "no JSON": b"{'a': 1}",
        "no UTF-8": b"\xff\xfe{}",
        "missing": json.dumps({k: v for k, v in own.items() if k != "model_dim"}).encode(),
        "unknown": header(evaluate="/etc/passwd"),
    }
    for name in ("feedback_rank", "ve_dim", "xsa_last_n", "rope_dims", "core_start", "core_end"):
        for value in (-1, 2**31, 2**63, 1.5, "x"):
            cases[f"{name}={value}"] = header(**{name: value})
    return cases


def read_hostile_files(runtime, hp: Hyperparameters, artifact: bytes, folder: str) -> dict:
    """For a process of its own, that may then take only a gigabyte more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results, path = {}, Path(folder) / "artifact"
    for name, header in hostile_headers(hp).items():
        content = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header
        for kind, payload in (("", b""), (" with bytes", bytes(100_000))):
            since = time.perf_counter()
            results[name + kind] = outcome(path, packed(content, payload))
            assert time.perf_counter() - since < 10, name
    start, weights = unpacked(artifact)
    stretched = start + zlib.compress(weights + bytes(1 << 27), wbits=-15)
    for name, data in {
        "bomb": lzma.compress(bytes(1 << 26)) * 3,  # 192 MiB in a few KiB
        "bomb of a header": lzma.compress(ARTIFACT_MAGIC + b"\xff" * 4 + bytes(1 << 26)),
        "bomb behind the weights": lzma.compress(stretched),
        "bomb behind the code": lzma.compress(start + huffman(weights) + bytes(1 << 27)),
        "code without an end": lzma.compress(start + huffman(weights)[:-1]),
        "dictionary of 4 GiB": with_largest_dictionary(artifact),
        "text": b"artifact",
        "nothing": b"",
    }.items():
        results[name] = outcome(path, data)
    return results


def with_largest_dictionary(artifact: bytes) -> bytes:
    """The same stream, but its block header (12 bytes after the stream's) asks for 4 GiB."""
    block = bytearray(artifact[12:24])
    assert block[:4] == b"\x02\x00\x21\x01", "12 bytes, LZMA2 with a property of 1 byte"
    block[4] = 40
    block[8:] = struct.pack("<I", zlib.crc32(block[:8]))
    return artifact[:12] + bytes(block) + artifact[24:]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_hostile_files_are_refused_without_taking_memory(smallest, on_ranks, tmp_path):
    [results] = on_ranks(1, read_hostile_files, *smallest, str(tmp_path))
    assert [name for name, result in results.items() if result == "loads"] == []
    for name in ("huge model", "huge vocabulary", "huge hash table"):
        assert "bytes of weights" in results[name], "refused before a byte of them is read"
    assert len(results) > 100


def test_a_missing_artifact_is_named(tmp_path):
    for path in (tmp_path / "none.xz", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_artifact(path)
