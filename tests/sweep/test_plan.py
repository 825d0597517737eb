"""The runs of a sweep: the grid, what is refused, and plans that go on."""

from __future__ import annotations

import json

import pytest

from pdarts_fast.errors import UsageError
from pdarts_fast.sweep.plan import Plan, extend_plan, make_plan

DEMO = ("--preset", "demo")


def test_every_setting_with_every_seed() -> None:
    plan = make_plan(2, ["lr=0.025,0.05", "channels=4,8"], [*DEMO, "--seed", "7"])
    assert [run.name for run in plan.runs] == [
        f"lr={lr}-channels={channels}-seed{seed}"
        for lr in ("0.025", "0.05")
        for channels in (4, 8)
        for seed in (7, 8)
    ]
    last = plan.runs[-1]
    assert last.setting == ("lr=0.05", "channels=8")
    assert last.seed == 8
    assert last.arguments == (
        *DEMO, "--seed", "7", "--lr", "0.05", "--channels", "8", "--seed", "8",
    )  # fmt: skip
    assert (last.settings["lr"], last.settings["channels"]) == (0.05, [8, 8, 8])
    assert last.settings["seed"] == 8


def test_four_seeds_unless_told() -> None:
    assert [run.name for run in make_plan(None, [], DEMO).runs] == [f"seed{n}" for n in range(4)]


def test_seeds_can_be_named() -> None:
    plan = make_plan(None, ["seed=5,3"], DEMO)
    assert [(run.name, run.seed, run.setting) for run in plan.runs] == [
        ("seed5", 5, ()),
        ("seed3", 3, ()),
    ]
    assert plan.seeds is None


@pytest.mark.parametrize(
    ("vary", "field", "values"),
    [
        ("cells=3 4 5,3 3 3", "cells", [[3, 4, 5], [3, 3, 3]]),
        ("amp=yes,no", "amp", [True, False]),
        ("--skip-dropout=0,0.3", "skip_dropout", [[0.0] * 3, [0.3] * 3]),
        ("max_skips=1,2", "max_skips", [1, 2]),
        ("preset=demo,cifar10", "preset", ["demo", "cifar10"]),
    ],
    ids=["several-numbers", "switch", "hyphens", "underscores", "preset"],
)
def test_any_search_flag_can_vary(vary: str, field: str, values: list[object]) -> None:
    flags = ["--dataset", "digits"] if field == "preset" else [*DEMO]
    assert [run.settings[field] for run in make_plan(1, [vary], flags).runs] == values


def test_names_of_folders_are_plain() -> None:
    plan = make_plan(1, ["cells=3 4 5,3 3 3"], DEMO)
    assert [run.name for run in plan.runs] == ["cells=3_4_5-seed0", "cells=3_3_3-seed0"]
    long = ",".join(" ".join(["3"] * 50 + [str(n)]) for n in (3, 4))
    flags = ["--ops-kept", *["8"] * 51, "--skip-dropout", "0", "--channels", "2", *DEMO]
    plan = make_plan(1, [f"cells={long}"], flags)
    assert [run.name for run in plan.runs] == ["setting1-seed0", "setting2-seed0"]


REFUSED = [
    ("unknown flag", None, [], ["--lerning-rate", "1"], "Unrecognized options: --lerning-rate"),
    ("word without a flag", None, [], ["0.1", "--lr", "1"], "'0.1' belongs to no flag"),
    ("bad value", None, [], ["--epochs", "many"], "--epochs"),
    ("run dir", None, [], ["--run-dir", "x"], "--run-dir belongs to a single search"),
    ("run dir =", None, [], ["--run_dir=x"], "--run-dir belongs to a single search"),
    ("overwrite", None, [], ["--overwrite"], "--overwrite belongs to a single search"),
    ("no seeds", 0, [], DEMO, "--seeds 0: wanted at least 1"),
    ("bad setting", 1, [], [*DEMO, "--lr", "-1"], "--lr -1.0: wanted a value from"),
    ("bad combination", 1, ["epochs=4,1"], [*DEMO], "--vary epochs=1: --warmup-epochs 1 leaves"),
    ("bad varied value", 1, ["lr=0.1,x"], [*DEMO], "--vary lr=x: "),
    ("unknown varied flag", 1, ["rl=1,2"], [*DEMO], "--rl is no flag that can be varied"),
    ("own varied flag", 1, ["run_dir=a,b"], [*DEMO], "--run-dir is no flag that can be varied"),
    ("no values", 1, ["lr="], [*DEMO], "--vary lr=: wanted FLAG=VALUE,VALUE"),
    ("no equals", 1, ["lr"], [*DEMO], "--vary lr: wanted FLAG=VALUE,VALUE"),
    ("empty value", 1, ["lr=1,,2"], [*DEMO], "wanted FLAG=VALUE,VALUE"),
    ("value twice", 1, ["lr=1,1"], [*DEMO], "--vary lr=1,1: a value stands twice"),
    ("value twice, written apart", 1, ["lr=0.1,.10"], [*DEMO], "are the same search"),
    ("flag twice", 1, ["lr=1,2", "--lr=3"], [*DEMO], "a flag stands twice"),
    ("varied and given", 1, ["lr=1,2"], [*DEMO, "--lr=3"], "--lr is given too"),
    ("switch varied and given", 1, ["amp=yes,no"], [*DEMO, "--no-amp"], "--amp is given too"),
    ("no switch value", 1, ["amp=1,0"], [*DEMO], "--vary amp: '1' is neither yes nor no"),
    ("seeds twice", 2, ["seed=1,2"], [*DEMO], "--seeds and --vary seed=... exclude each other"),
    ("seed out of range", 3, [], [*DEMO, "--seed", "4294967294"], "--seed 4294967296"),
    ("same folder", 1, ["data=a/b,a_b"], [*DEMO], "would share the folder data=a_b-seed0"),
    ("missing preset value", 1, [], ["--preset"], "--preset"),
]


@pytest.mark.parametrize(
    ("seeds", "vary", "flags", "said"),
    [row[1:] for row in REFUSED],
    ids=[row[0] for row in REFUSED],
)
def test_what_cannot_work_is_refused_in_one_line(
    seeds: int | None, vary: list[str], flags: list[str], said: str
) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(seeds, vary, flags)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_survives_its_file() -> None:
    plan = make_plan(2, ["lr=0.1,0.2"], DEMO)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_can_grow_but_not_change() -> None:
    old = make_plan(2, ["lr=0.1,0.2"], DEMO)
    grown = make_plan(3, ["lr=0.1,0.2,0.3"], [*DEMO, "--threads", "1"])
    assert len(extend_plan(old, grown, "DIR").runs) == 9
    with pytest.raises(UsageError, match=r"DIR holds another sweep: its run lr=0.1-seed1 is not"):
        extend_plan(old, make_plan(1, ["lr=0.1,0.2"], DEMO), "DIR")
    other = make_plan(2, ["lr=0.1,0.2"], [*DEMO, "--epochs", "5"])
    with pytest.raises(UsageError, match=r"settings of lr=0.1-seed0 differ: --epochs \(4, now 5\)"):
        extend_plan(old, other, "DIR")
