"""Settings: where values come from, what is refused, and what the user is told."""

import re
from dataclasses import fields, replace

import pytest
from conftest import ROOT

from train_gpt import Hyperparameters, UserError, parameter_table, read_configuration

FIELDS = {f.name for f in fields(Hyperparameters)}


def mistakes(env=None, *argv: str) -> str:
    """The text of the error that the configuration must raise."""
    with pytest.raises(UserError) as caught:
        read_configuration(env or {}, argv)
    return str(caught.value)


def test_a_flag_wins_over_a_variable_and_that_over_the_file_and_that_over_the_default(tmp_path):
    file = tmp_path / "a.env"
    file.write_text("SEED=6\nEVAL_STRIDE=32\nTTT_EPOCHS=1\n")
    env = {"SEED": "7", "EVAL_STRIDE": "16", "UNRELATED": "1"}
    hp, sources = read_configuration(env, ["--seed", "8", "--env", str(file)])
    assert (hp.seed, hp.eval_stride, hp.ttt_epochs) == (8, 16, 1)
    given = {name: source for name, source in sources.items() if source != "default"}
    assert given == {"seed": "flag", "eval_stride": "env", "ttt_epochs": "file"}
    assert set(sources) == FIELDS


def test_the_file_of_a_windows_editor_reads_like_any_other(tmp_path):
    """A byte order mark, carriage returns, comments, blank lines, quotes, `=` in a value."""
    file = tmp_path / "a.env"
    lines = "\ufeff# mine\r\nDATA_PATH=größe/a=b\r\n\r\nSEED = 5\r\n"
    file.write_bytes((lines + 'export RUN_ID="a b"\r\n').encode())
    hp, _ = read_configuration({}, ["--env", str(file)])
    assert (hp.data_path, hp.seed, hp.run_id) == ("größe/a=b", 5, "a b")
    assert read_configuration({"RUN_ID": "a b\r"}, [])[0].run_id == "a b"


def test_a_file_that_is_no_list_of_settings_is_refused(tmp_path):
    file = tmp_path / "a.env"
    cases = [(b"SEDE=5\n", "sede"), (b"\xff\xfe\0", "cannot be read"), (b"SEED 5\n", "SEED 5")]
    for content, named in cases:
        file.write_bytes(content)
        assert named in mistakes({}, "--env", str(file))
    assert "cannot be read" in mistakes({}, "--env", str(tmp_path / "none"))


def test_the_published_settings_are_one_flag_away():
    """PR 1230: 1, 2, then 3 damped passes with diagonal error feedback and the proxy; 8 heads."""
    argv = ["--env", str(ROOT / "scripts" / "pr1230.env")]
    published, sources = read_configuration({"WORLD_SIZE": "8"}, argv)
    assert published == Hyperparameters(
        passes_schedule="0.0:1,0.626:2,0.813:3", residual_scale_init=0.5,
        feedback_mode="diagonal", feedback_rank=2, jacobian_proxy_weight=0.01, num_heads=8,
        num_kv_heads=4, rope_dims=16, train_seq_len=2048, attention_chunk=None,
        seq_len_schedule="0.0:1", muon_wd=0.04, ttt_lr=0.002,
    )  # fmt: skip
    assert published.schedule == ((0.0, 1), (0.626, 2), (0.813, 3))
    assert [name for name, source in sources.items() if source == "file"]
    assert set(parameter_table(replace(published, vocab_size=1024))) >= {
        "residual_scale", "feedback_U", "feedback_V", "feedback_d",
    }  # fmt: skip


def test_a_process_takes_98304_tokens_a_step_unless_told_otherwise():
    """The recipe's 786,432 on 8 GPUs; whole windows, and at least one."""
    for env, tokens in (
        ({}, 98_304),
        ({"WORLD_SIZE": "3"}, 294_912),
        ({"WORLD_SIZE": "8", "TRAIN_SEQ_LEN": "1000"}, 786_000),
        ({"TRAIN_SEQ_LEN": "100000", "MICRO_BATCH_TOKENS": "100000"}, 100_000),
        ({"WORLD_SIZE": "8", "TRAIN_BATCH_TOKENS": "4096"}, 4096),
    ):
        assert read_configuration(env, [])[0].train_batch_tokens == tokens


def test_booleans_and_optional_values():
    for text, value in (("0", False), ("false", False), ("1", True), ("True", True)):
        assert read_configuration({"SLIDING_EVAL": text}, [])[0].sliding_eval is value
    for text in ("2", "yes", "", "off", "None"):
        assert "sliding_eval" in mistakes({"SLIDING_EVAL": text})
    hp, _ = read_configuration({"SLIDING_EVAL": "1"}, ["--no-sliding-eval", "--ttt-enabled"])
    assert (hp.sliding_eval, hp.ttt_enabled) == (False, True)
    hp, _ = read_configuration({"MAX_WALLCLOCK_SECONDS": "none"}, ["--iterations", "5"])
    assert (hp.max_wallclock_seconds, hp.iterations) == (None, 5)


def test_all_mistakes_are_told_at_once():
    env = {"SEED": "x", "SLIDING_EVAL": "perhaps", "LOGIT_SOFTCAP": "-1", "MATRIX_LR": "nan"}
    text = mistakes(env, "--dtype", "float16", "--no-such-flag", "--eval", "f")
    named = [
        "seed=x", "sliding_eval=perhaps", "logit_softcap=-1", "matrix_lr=nan", "dtype=float16",
        "--no-such-flag", "--eval:",
    ]  # fmt: skip
    assert [name for name in named if name not in text] == []


def test_a_misspelt_flag_gets_a_suggestion_and_an_abbreviated_one_is_refused():
    assert "unknown argument --sede: did you mean --seed?" in mistakes({}, "--sede", "5")
    assert "unknown argument --see:" in mistakes({}, "--see", "5")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"TRAIN_BATCH_TOKENS": "786433"}, "use 786432"),
        ({"TRAIN_BATCH_TOKENS": "100"}, "train_batch_tokens=100"),
        ({"MICRO_BATCH_TOKENS": "4095"}, "micro_batch_tokens"),
        ({"CORE_END": "12"}, "core_end=12"),
        ({"CORE_START": "7"}, "core_start=7"),
        ({"NUM_LAYERS": "5", "VE_LAYERS": "none"}, "core_end=7"),
        ({"NUM_HEADS": "7"}, "num_heads=7"),
        ({"NUM_KV_HEADS": "3"}, "num_kv_heads=3"),
        ({"ROPE_DIMS": "15"}, "rope_dims"),
        ({"ROPE_DIMS": "130"}, "rope_dims"),
        ({"BIGRAM_VOCAB_SIZE": "1"}, "bigram_vocab_size"),
        ({"EVAL_STRIDE": "4097"}, "eval_stride"),
        ({"VE_LAYERS": "9,11"}, "ve_layers=9,11"),
        ({"VE_LAYERS": "9,9"}, "ve_layers=9,9"),
        ({"VE_LAYERS": "nine"}, "ve_layers=nine"),
        ({"MAX_WALLCLOCK_SECONDS": "none"}, "max_wallclock_seconds"),
        ({"RESUME": "1"}, "run-id"),
        ({"NUM_PASSES": "0"}, "num_passes=0"),
        ({"SEQ_LEN_SCHEDULE": "0.0:3"}, "parts divide train_seq_len=4096"),
        ({"SEQ_LEN_SCHEDULE": "0.0:0"}, "seq_len_schedule=0.0:0"),
        ({"SEQ_LEN_SCHEDULE": "0.1:2"}, "starts rise from 0"),
        ({"TRAIN_SEQ_LEN": "1002", "TRAIN_BATCH_TOKENS": "1002"}, "0.0:1 cuts nothing"),
        ({"EVAL_PASSES": "0"}, "eval_passes=0"),
        ({"NUM_PASSES": "1", "EVAL_PASSES": "2"}, "eval_passes"),
        ({"TRAIN_SEQ_LEN": "1" + "0" * 30}, "train_seq_len=1"),
        ({"MLP_MULT": "0.01", "MODEL_DIM": "16", "ROPE_DIMS": "2"}, "mlp_mult=0.01"),
        ({"VOCAB_SIZE": "65537"}, "vocab_size"),
        ({"RUN_ID": "../x"}, "run_id"),
        ({"RUN_ID": "a/b"}, "run_id"),
        ({"RUN_ID": "a" * 201}, "up to 200"),
        ({"SEED": str(1 << 63)}, f"seed={1 << 63} must be below"),
        ({"SWA_LR_SCALE": "inf"}, "swa_lr_scale=inf"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, named):
    assert named in mistakes(settings)


@pytest.mark.parametrize(
    "schedule",
    [
        "", "1", "0.0", "0.0:", ":1", "0.0:one", "0.0:1;0.5:2", "0.0:1,", "0.0:1.5", "nan.:1",
        "0.0:0", "0.0:1,0.5:65", "0.0:-1",  # passes
        "0.1:1,0.5:2", "5:1", "0.0:1,0.6:2,0.5:3", "0.0:1,0.5:2,0.5:3", "0:1,-5:2",  # starts
        "0.0:1,1.0:2", "0.0:1,1.5:2", "0:1,4500:2",  # no fractions
    ],
)  # fmt: skip
def test_a_bad_growth_schedule_is_refused(schedule):
    text = mistakes({"PASSES_SCHEDULE": schedule})
    assert re.search(rf"passes_schedule={re.escape(schedule)}[,:] ", text)


def test_growth_is_a_list_of_fractions():
    for text, growth in (
        ("0.0:1,0.626:2,0.813:3", ((0.0, 1), (0.626, 2), (0.813, 3))),
        ("0:2", ((0, 2),)),
    ):
        assert read_configuration({"PASSES_SCHEDULE": text}, [])[0].schedule == growth
    hp = Hyperparameters(num_passes=2)
    assert (hp.schedule, hp.max_passes) == (((0, 2),), 2)


def test_help_names_every_setting_with_its_variable_and_default(monkeypatch, capsys):
    """A bad environment does not hinder it."""
    monkeypatch.setenv("COLUMNS", "200")  # wide: lines are not broken inside a default
    with pytest.raises(SystemExit) as caught:
        read_configuration({"SEED": "x"}, ["--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for f in fields(Hyperparameters):
        assert f"--{f.name.replace('_', '-')}" in words
        assert f"{f.metadata['text']} [{f.name.upper()}={f.default}]" in words, f.name
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in words
