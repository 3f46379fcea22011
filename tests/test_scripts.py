"""Minified code, speed, and branches of a run."""

import ast
import dis
import hashlib
import inspect
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SETTINGS, SHALLOW, plain_attention
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import bench_speed
import compare_branches
import inspect_logs
import minify
import trainer_runs

import train_gpt

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------- minified code

# It prints what shorter names could break; `jit` reads a source as Triton does.
TOY = '''"""What --help shows."""
from __future__ import annotations
import dataclasses, inspect, os.path, sys
from collections.abc import Callable
from pathlib import Path

Rule = Callable[[int], int]
scale, size = 3, 4

def jit(function: Callable) -> tuple:
    constants = compile(inspect.getsource(function), "kernel", "exec").co_consts
    code = next(c for c in constants if inspect.iscode(c))
    return code.co_varnames[:3], code.co_names, function.__annotations__["block"]

class language:
    constexpr = int

@jit
def kernel(source, target, block: language.constexpr):
    """Gone."""
    half: language.constexpr = block // 2
    return source[:half] * scale + len(target)

@dataclasses.dataclass
class Settings:
    rate: float = 0.5
    size: int | None = size
    """Gone."""

    @property
    def half(self) -> float:
        return self.rate / 2

    @half.setter
    def half(self, value: float) -> None:
        self.rate = value * 2

class Log:
    """Gone."""
    def event(self, name: str = "", /, **pairs: int) -> dict[str, int]:
        """Gone."""
        total: int = sum(pairs.values())
        assert total >= 0, f"{total=}"
        return {"event": name, "total": total, **pairs}

def nothing() -> None:
    """Gone."""

def foreign(function: Callable) -> object:
    sum = function(**{"con" + "text": 7})
    return sum

def callback(context: int) -> int:
    return context

def join(first: str, second: str = "2") -> str:
    return first + second

def counter() -> Callable[[], int]:
    count = 0
    def step(by: int = 1) -> int:
        nonlocal count
        count += by
        return [count for count in range(count + 1)][-1]
    class Local:
        count = 5
    return lambda: (step(), step(by=2), count, Local.count)

def bump() -> None:
    global scale
    os = 1
    scale += os

def failure() -> str:
    try:
        Log().event(x=-1)
    except AssertionError as error:
        return f"{error} {scale = }"

def shape(value: object) -> object:
    match value:
        case {"a": found, **rest}:
            return found, rest
        case [head, *tail] as everything:
            return head, tail, everything

if __name__ == "__main__":
    settings = Settings(size=8)
    settings.half = 2
    bump()
    print(__doc__, kernel, [(f.name, f.type) for f in dataclasses.fields(settings)], settings.rate)
    print(Log().event("code", name=1), foreign(callback), join(**{"first": "1"}), counter()())
    print(failure(), shape({"a": 1, "b": 2}), shape([1, 2, 3]), os.path.basename(__file__))
    print(len(Path(__file__).read_bytes()) == int(sys.argv[1]), (lambda size=size: size)())
'''


def printed(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    command = [sys.executable, "-B", path, str(len(data))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_minified_code_does_what_the_source_does(tmp_path):
    path, code = tmp_path / "train_gpt.py", minify.minify(TOY)
    expected = printed(path, TOY.encode())
    assert "What --help shows." in expected
    assert "total=-1 scale = 4" in expected
    assert printed(path, code.encode()) == expected
    assert printed(path, minify.self_extracting(code)) == expected
    assert [word for word in ("Gone", "Callable", "counter", "Rule") if word in code] == []


VARIABLE = re.compile("(LOAD|STORE|DELETE)_(NAME|GLOBAL|FAST|DEREF|CLASSDEREF)")
# The order of names rules the first two, and a name that is imported somewhere the next one.
FREE_TO_DIFFER = {"MAKE_CELL", "LOAD_CLOSURE", "PUSH_NULL", "EXTENDED_ARG"}


def instructions(code) -> Iterator[tuple[str, object]]:
    jumps, cells = {*dis.hasjrel, *dis.hasjabs}, {*code.co_cellvars, *code.co_freevars}
    for i in dis.get_instructions(code):
        operations, values = [i.opname.replace("METHOD", "ATTR")], [i.argval]
        if isinstance(i.argval, tuple) and VARIABLE.match(i.opname):  # two in one, since 3.13
            operations, values = re.findall("[A-Z]+_FAST", i.opname), i.argval
        for operation, value in zip(operations, values, strict=True):
            closure = operation == "LOAD_FAST" and value in cells  # LOAD_CLOSURE until 3.12
            if operation not in FREE_TO_DIFFER and not closure:
                yield operation, None if i.opcode in jumps else value


def assert_renamed(old, new, top: dict[str, str], unit: dict[str, str]) -> None:
    """The code differs in names of variables alone: one for one in `unit`, globals as in `top`."""
    for (operation, a), (same, b) in zip(instructions(old), instructions(new), strict=True):
        assert operation == same
        if inspect.iscode(a):
            assert_renamed(a, b, top, unit if old.co_flags & inspect.CO_OPTIMIZED else {})
        elif VARIABLE.match(operation):
            assert unit.setdefault(a, b) == b
            assert "GLOBAL" not in operation or top.setdefault(a, b) == b
        elif a != b:  # the name of a class, or an annotation
            assert (operation, unit.setdefault(a, b)) == ("LOAD_CONST", b)
    assert len(set(unit.values())) == len(unit)


def texts(tree: ast.AST) -> Counter:
    values = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return Counter(value for value in values if isinstance(value, str))


@pytest.mark.parametrize(
    "source", [TOY, (ROOT / "train_gpt.py").read_text("utf-8")], ids=["toy", "trainer"]
)
def test_every_instruction_and_text_stays(source):
    """Those of the GPU's paths as well, which no run here reaches."""
    tree = minify.Strip().visit(ast.parse(source))
    minify.drop_unread(tree)
    expected, old = texts(tree), compile(ast.unparse(tree), "old", "exec")
    minify.rename(tree)
    names = {}
    assert_renamed(old, compile(ast.unparse(tree), "new", "exec"), names, names)
    assert sum(name != changed for name, changed in names.items()) > 10
    assert texts(ast.parse(minify.minify(source))) == expected


@pytest.mark.parametrize(
    "source",
    ["print(locals())", "vars()", "eval('f')", "from os import *", "def f():\n global x\n x = 1"],
)
def test_what_sees_or_hides_names_is_refused(source):
    with pytest.raises(minify.MinifyError, match=r"line [12]: .*: "):
        minify.minify(source)


def test_every_pair_of_bytes_survives_in_a_literal(tmp_path):
    data = b"".join(bytes(pair) for pair in itertools.product(range(256), repeat=2)) + b'\n""'
    path, literal = tmp_path / "bytes.py", minify.latin1_literal(data)
    path.write_bytes(f'# coding: latin-1\ndata = """{literal}"""\n'.encode("latin-1"))
    assert runpy.run_path(str(path))["data"].encode("latin-1") == data
    assert len(literal) < 1.02 * len(data)


# ------------------------------------------------------------------- the whole way, with real runs


@pytest.fixture(scope="session")
def env_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("env") / "tiny.env"
    data = {"DATA_PATH": corpus.data_path, "TOKENIZER_PATH": corpus.tokenizer_path}
    sizes = {"VOCAB_SIZE": corpus.vocab_size, "TTT_CHUNK_TOKENS": 256, "EVAL_BATCH_SEQS": 8}
    settings = trainer_runs.TINY_RUN | data | sizes
    path.write_text("# tiny\n" + "".join(f"{k}={v}\n" for k, v in settings.items()))
    return path


def in_this_process(env: dict[str, str], *arguments: str) -> int:
    """The readable trainer, without the seconds that another interpreter needs to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        patch.setattr(sys, "argv", ["train_gpt.py", *arguments])
        return train_gpt.main()


def test_model_flops_are_what_torch_counts(tiny, runtime, monkeypatch):
    """Plain attention multiplies the masked half too: torch counts it twice."""
    tokens = np.random.default_rng(0).integers(320, size=400).astype(np.uint16)
    monkeypatch.setattr(train_gpt, "attend", plain_attention)
    sizes = SHALLOW | {"train_batch_tokens": 64, "micro_batch_tokens": 32}
    for changes in ({}, {"feedback_mode": "none", "num_heads": 2, "num_kv_heads": 1}):
        hp = tiny(**sizes, **changes)
        trainer = bench_speed.build_trainer(hp, runtime, tokens)
        for passes in (1, 2, 3):
            with FlopCounterMode(display=False) as counter:
                trainer.accumulate(trainer.loader.batch(0), passes, None)
            flops = bench_speed.step_flops(trainer.model, passes)
            assert sum(flops.values()) + flops["attention"] == counter.get_total_flops()


def test_the_bench_adds_up(corpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = SETTINGS | SHALLOW | {"vocab_size": corpus.vocab_size, "train_batch_tokens": 64}
    sizes |= {"warmup_steps": 4, "late_qat_threshold": 0.5}
    for name, value in (sizes | corpus.settings).items():
        monkeypatch.setenv(name.upper(), str(value))
    options = ["--steps", "2", "--peak-tflops", "0.5"]
    assert bench_speed.main([*options, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = report["steps"]
    kinds = [(1, False), (2, False), (3, False), (3, True)]
    assert [(step["passes"], step["qat"]) for step in steps] == kinds
    for step in steps:
        assert 0 < step["outside_ms"] < step["step_ms"]
        assert set(step["shares"]) == set(bench_speed.SHARES)
        assert min(step["shares"].values()) > 0
        assert sum(step["shares"].values()) == pytest.approx(1)
        names, launches, times = zip(*step["kernels"], strict=True)
        assert list(times) == sorted(times, reverse=True)
        assert len(set(names)) == len(names) < sum(launches)
        rate = sum(step["flops"].values()) / (step["step_ms"] / 1000) / 1e12
        assert step["tflops_per_second"] == pytest.approx(rate)
        assert step["utilization"] == pytest.approx(rate / 0.5)
    assert steps[0]["flops"]["attention"] < steps[1]["flops"]["attention"]
    assert steps[2]["flops"] == steps[3]["flops"]
    assert min(report["evaluation"].values()) > 0
    assert report["compilation"] == pytest.approx(
        {"seconds": report["compilation"]["seconds"], "graphs": 0, "late_graphs": 0}
    )
    setup = report["setup"]
    assert (setup["tiny"], setup["text"]) == (True, "of fineweb_train_000000.bin")
    digest = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    assert (setup["attention"], setup["fused_mlp"]) == ("sdpa", False)
    assert setup["train_gpt_sha256"] == digest
    skipping = ["--skip", "compile,ttt", "--num-passes", "1", "--late-qat-threshold", "0"]
    options = ["--steps", "1", "--format", "markdown", "--kernels", "3"]
    assert bench_speed.main([*skipping, *options]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^\| .+ \| \d+ \| [0-9.]+ \|$", text, re.MULTILINE)) == 3
    assert "no GPU: a tiny configuration" in text
    assert re.search(r"\|  \| 1 pass \|\n.*\n\| step, ms \| [0-9.]+ \|\n", text)
    assert "cold start" not in text
    assert "sliding windows" not in text


def test_the_bench_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    mistakes = {
        ("--data-path", str(tmp_path)): "holds no fineweb_train",
        ("--no-such-setting", "1"): "unknown argument --no-such-setting",
    }
    for arguments, text in mistakes.items():
        assert bench_speed.main(list(arguments)) == 2
        assert text in capsys.readouterr().err
    for arguments in (["--skip", "steps"], ["--steps", "0"], ["--peak-tflops", "nan"]):
        with pytest.raises(SystemExit):
            bench_speed.main(arguments)
        assert arguments[0] in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench_speed.main([]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "kernel"),
    [
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7"),
        ("attention", "void cudnn::fusion::compute_dot_do_o_specialized<true>"),
        ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>"),
        ("attention", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        ("linear", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT"),
        ("linear", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas"),
        ("linear", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>"),
        ("linear", "void cublasLt::splitKreduce_kernel<32, 16, int>"),
        ("linear", "triton_tem_fused_mm_3"),
        ("linear", "fused_product_kernel"),
        ("elementwise", "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_mul_5"),
        ("elementwise", "triton_red_fused__to_copy_add_rms_norm_2"),
        ("elementwise", "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>"),
        ("elementwise", "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>"),
        ("other", "void at::native::elementwise_kernel<direct_copy_kernel_cuda>"),
        ("other", "void at::native::CatArrayBatchedCopy<OpaqueType<2u>>"),
        ("other", "Memcpy HtoD (Pinned -> Device)"),
        ("other", "Memset (Device)"),
        ("other", "void at::native::sbtopk::gatherTopK<float, unsigned int, 2>"),
    ],
)
def test_kernels_are_told_apart_by_name(share, kernel):
    assert bench_speed.category(kernel, bench_speed.KERNELS) == share


def branches(tmp_path: Path, *arguments: str) -> int:
    return compare_branches.main(["--output", str(tmp_path / "branches"), *arguments])


def test_a_branch_goes_on_as_if_never_cut(env_file, tmp_path, capsys, monkeypatch):
    env = trainer_runs.read_env_file(env_file) | {"ITERATIONS": "8", "RUN_ID": "whole"}
    env |= {"SLIDING_EVAL": "0", "TTT_ENABLED": "0", "EVAL_BATCH_SEQS": "64"}
    assert in_this_process(env | {"OUTPUT_DIR": str(tmp_path)}) == 0
    whole = inspect_logs.read_run(tmp_path / "whole.txt")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    changes = ("num_passes=1 muon_wd=0.5", "residual_scale_init=1.0")
    chosen = [word for text in changes for word in ("--branch", text)]
    assert branches(tmp_path, *chosen, "--format", "json") == 0
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("\n[\n") :])
    assert [row["branch"] for row in rows] == ["run", *changes]
    assert {row["steps"] for row in rows} == {8}
    scores = [row["pre_quant_exact"] for row in rows]
    assert scores[0] == whole.scores["pre_quant"].val_bpb
    assert len(set(scores)) == 3
    log = inspect_logs.read_run(tmp_path / "branches" / "num_passes=1_muon_wd=0.5.txt")
    assert log.config["num_passes"] == "1"
    assert compare_branches.table(rows)[1][3] == "+0.00000"
    assert compare_branches.labels(["", "a=1  b=2", ""]) == ["run", "a=1 b=2", "run (2)"]


def test_a_signal_ends_the_comparison(env_file, tmp_path, monkeypatch):
    for name, value in trainer_runs.read_env_file(env_file).items():
        monkeypatch.setenv(name, value)
    announce = compare_branches.BranchTrainer.announce

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return announce(self, *arguments)

    monkeypatch.setattr(compare_branches.BranchTrainer, "announce", interrupted)
    with pytest.raises(SystemExit) as end:
        branches(tmp_path, "--at", "0.9", "--branch", "muon_wd=0")
    assert end.value.code == train_gpt.EXIT_EXPORTED
    assert [path.name for path in (tmp_path / "branches").iterdir()] == ["trunk.txt"]


def test_branches_say_what_is_wrong(env_file, tmp_path, capsys, monkeypatch):
    for name, value in trainer_runs.read_env_file(env_file).items():
        monkeypatch.setenv(name, value)
    for arguments, text in (
        (["--branch", "seed=1"], "seed belongs to the trunk"),
        (["--branch", "no_setting=1"], "there is no setting no_setting"),
        (["--branch", "num_passes=x"], "'x' is no int"),
        (["--branch", "num_passes=65"], "num_passes=65 must be 1..64"),
        (["--at", "1"], "must be between 0 and 1"),
    ):
        assert branches(tmp_path, *arguments) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "branches").exists()
    (tmp_path / "branches").mkdir()
    assert branches(tmp_path) == 2
    assert "choose another" in capsys.readouterr().err
