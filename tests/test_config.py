"""Configuration: where values come from, what is refused, and what the user is told."""

from dataclasses import fields

import pytest

from train_gpt import Hyperparameters, UserError, read_configuration

FIELDS = [f.name for f in fields(Hyperparameters)]


def mistakes(env=None, *argv: str) -> str:
    """The text of the error that the configuration must raise."""
    with pytest.raises(UserError) as caught:
        read_configuration(env or {}, argv)
    return str(caught.value)


def test_a_flag_wins_over_the_environment_and_that_over_the_default():
    hp, sources = read_configuration({}, [])
    assert (hp.seed, sources["seed"]) == (1337, "default")
    hp, sources = read_configuration({"SEED": "7", "EVAL_STRIDE": "32"}, [])
    assert (hp.seed, sources["seed"]) == (7, "env")
    hp, sources = read_configuration({"SEED": "7", "EVAL_STRIDE": "32"}, ["--seed", "8"])
    assert (hp.seed, sources["seed"]) == (8, "flag")
    assert (hp.eval_stride, sources["eval_stride"]) == (32, "env")
    assert {name for name in FIELDS if sources[name] == "default"} == set(FIELDS) - {
        "seed",
        "eval_stride",
    }


def test_the_reference_launch_is_the_default():
    launch = (
        "--feedback-mode diagonal --feedback-rank 2 --residual-scale-init 0.5 "
        "--jacobian-proxy-weight 0.01 --no-interpass-rmsnorm"
    )
    assert read_configuration({"WORLD_SIZE": "8"}, launch.split())[0] == Hyperparameters()


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


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("false", False), ("1", True), ("True", True)]
)
def test_booleans_of_the_environment(text, value):
    assert read_configuration({"SHUFFLE": text, "INTERPASS_RMSNORM": text}, [])[0].shuffle is value


@pytest.mark.parametrize("text", ["2", "yes", "", "off", "None"])
def test_no_other_word_is_a_boolean(text):
    assert "shuffle" in mistakes({"SHUFFLE": text})


def test_booleans_of_flags_and_optional_values():
    hp, _ = read_configuration({"SHUFFLE": "1"}, ["--no-shuffle", "--interpass-rmsnorm"])
    assert (hp.shuffle, hp.interpass_rmsnorm) == (False, True)
    hp, _ = read_configuration({"MAX_WALLCLOCK_SECONDS": "none"}, ["--iterations", "5"])
    assert (hp.max_wallclock_seconds, hp.iterations) == (None, 5)


def test_all_mistakes_are_told_at_once():
    env = {"SEED": "x", "SHUFFLE": "perhaps", "LOGIT_SOFTCAP": "-1", "MATRIX_LR": "nan"}
    flags = ["--dtype", "float16", "--warmdown-frac", "1.5", "--no-such-flag", "--eval", "f"]
    text = mistakes(env, *flags)
    named = [
        "seed=x", "shuffle=perhaps", "logit_softcap=-1", "matrix_lr=nan", "dtype=float16",
        "warmdown_frac=1.5", "--no-such-flag", "--eval:",
    ]  # fmt: skip
    assert [name for name in named if name not in text] == []


def test_abbreviated_flags_are_refused():
    assert "--see" in mistakes({}, "--see", "5")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"TRAIN_BATCH_TOKENS": "786433"}, "train_batch_tokens=786433"),
        ({"TRAIN_BATCH_TOKENS": "100"}, "train_batch_tokens=100"),
        ({"MICRO_BATCH_TOKENS": "2047"}, "micro_batch_tokens=2047"),
        ({"CORE_END": "12"}, "core_end=12"),
        ({"CORE_START": "7"}, "core_start=7"),
        ({"NUM_LAYERS": "5", "VE_LAYERS": "none"}, "core_end=7"),
        ({"NUM_HEADS": "7"}, "num_heads=7"),
        ({"NUM_KV_HEADS": "3"}, "num_kv_heads=3"),
        ({"ROPE_DIMS": "15"}, "rope_dims=15"),
        ({"ROPE_DIMS": "66"}, "rope_dims=66"),
        ({"BIGRAM_VOCAB_SIZE": "1"}, "bigram_vocab_size=1"),
        ({"EVAL_STRIDE": "2049"}, "eval_stride=2049"),
        ({"VE_LAYERS": "9,11"}, "ve_layers=9,11"),
        ({"VE_LAYERS": "9,9"}, "ve_layers=9,9"),
        ({"VE_LAYERS": "nine"}, "ve_layers=nine"),
        ({"MAX_WALLCLOCK_SECONDS": "none"}, "max_wallclock_seconds=None"),
        ({"NUM_PASSES": "0"}, "num_passes=0"),
        ({"EVAL_PASSES": "0"}, "eval_passes=0"),
        ({"NUM_PASSES": "1", "EVAL_PASSES": "2"}, "eval_passes=2"),
        ({"PASSES_SCHEDULE": "0.0:1,0.5:0"}, "passes_schedule=0.0:1,0.5:0"),
        ({"TRAIN_SEQ_LEN": "1" + "0" * 30}, "train_seq_len=1"),
        ({"MLP_MULT": "0.01", "MODEL_DIM": "16", "ROPE_DIMS": "2"}, "mlp_mult=0.01"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, named):
    assert named in mistakes(settings)


def test_a_bad_batch_is_told_the_nearest_good_one():
    assert "786432" in mistakes({"TRAIN_BATCH_TOKENS": "786433"})


@pytest.mark.parametrize(
    "schedule",
    [
        "", "1", "0.0", "0.0:", ":1", "0.0:one", "0.0:1;0.5:2", "0.0:1,", "0.0:1.5", "nan.:1",
        "0.0:0", "0.0:1,0.5:65", "0.0:-1",  # passes
        "0.1:1,0.5:2", "5:1", "0.0:1,0.6:2,0.5:3", "0.0:1,0.5:2,0.5:3", "0:1,-5:2",  # starts
        "0.0:1,1.0:2", "0.0:1,1.5:2", "0:1,0.5:2,4500:3",  # fractions
    ],
)  # fmt: skip
def test_a_bad_growth_schedule_is_refused(schedule):
    text = mistakes({"PASSES_SCHEDULE": schedule})
    assert f"passes_schedule={schedule}: " in text


def test_growth_is_a_list_of_steps_or_fractions():
    def growth(text: str):
        return read_configuration({"PASSES_SCHEDULE": text}, [])[0].growth

    assert growth("0.0:1,0.626:2,0.813:3") == ((0.0, 1), (0.626, 2), (0.813, 3))
    assert growth("0:1,4500:2,5500:3") == ((0, 1), (4500, 2), (5500, 3))
    assert growth("0:2") == ((0, 2),)
    hp = Hyperparameters(num_passes=2)
    assert (hp.growth, hp.max_passes, hp.passes_in_evaluation) == (((0, 2),), 2, 2)
    assert Hyperparameters().passes_in_evaluation == Hyperparameters().max_passes == 3
    assert Hyperparameters(eval_passes=4).passes_in_evaluation == 4


def test_help_names_every_setting_with_its_variable_and_default(monkeypatch, capsys):
    """A bad environment does not hinder it."""
    monkeypatch.setenv("COLUMNS", "200")  # wide: lines are not broken inside a default
    with pytest.raises(SystemExit) as caught:
        read_configuration({"SEED": "x"}, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for f in fields(Hyperparameters):
        flag = f"--{f.name.replace('_', '-')}"
        no_flag = f"--no-{f.name.replace('_', '-')}"
        assert f"{flag} {str(f.type).split()[0].upper()}" in words or no_flag in words, f.name
        assert f"[{f.name.upper()}={f.default}]" in words, f.name
        assert f.metadata["text"] in words, f.name
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in words
