"""A DeepSpeed config and the recipe never say two things: what is filled, refused, and what DeepSpeed makes of it."""

import json
from pathlib import Path

import pytest

from tests.trainer.engine.zero_cases import CONFIGS, SHIPPED, changed, resolve, training
from trainer.config import EngineConfig
from trainer.engine.precision import types
from trainer.engine.zero import chosen_zero, load_zero
from trainer.engine.zero_facts import KNOWN_WRONG
from trainer.errors import UserError

NOT_ON_CPU = ("zeropp",)


def refusal(name, changes, **keywords):
    """The lines of the error, without the first and the last, which are the same for all."""
    with pytest.raises(UserError) as caught:
        resolve(name, raw=changed(name, changes), **keywords)
    first, *lines, last = str(caught.value).split("\n")
    assert first == f"{len(lines)} problem{'s' * (len(lines) > 1)} in DeepSpeed config {name}:"
    assert last.startswith('Do: write "auto"')
    return [line.removeprefix("  ") for line in lines]


def message(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# ---- filling ---------------------------------------------------------------------------------------------------


def test_these_are_all_that_ship():
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted(SHIPPED)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_resolve_for_every_precision(name, precision):
    found = resolve(name, training(precision=precision, engine={"nvme_path": Path("/nvme")}))
    assert "auto" not in json.dumps(found.config).replace("torch_autocast", "")
    assert (found.name, found.stage) == (name, found.config["zero_optimization"]["stage"])
    assert [found.config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu")] == [16, 2]
    assert found.config["gradient_accumulation_steps"] == 4 and found.config["gradient_clipping"] == 1.0
    by_autocast = name == "zero0" and precision != "fp32"
    half = {"bf16": "bf16", "fp8": "bf16", "fp16": "fp16"}.get(precision)
    assert found.config["bf16"]["enabled"] is (half == "bf16" and not by_autocast)
    assert found.config["fp16"]["enabled"] is (half == "fp16" and not by_autocast)
    if name == "zero0":
        dtype = {"dtype": {"bf16": "bfloat16", "fp16": "float16"}[half]} if half else {}
        assert found.config["torch_autocast"] == {"enabled": by_autocast} | dtype
    held = types(precision, found.converts)["parameters"]
    assert held == (precision if precision in ("bf16", "fp16") and not by_autocast else "fp32")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_suit_the_cpu_or_say_why_not(name):
    if name not in NOT_ON_CPU:
        resolve(name, on_cpu=True)
        return
    assert refusal(name, {}, on_cpu=True) == [
        "zero_optimization.zero_quantized_weights: true, but DeepSpeed quantizes on GPUs only",
        "zero_optimization.zero_quantized_gradients: true, but DeepSpeed quantizes on GPUs only",
    ]


def test_what_was_read_stays_as_it_was():
    raw = load_zero("zero3")
    resolve("zero3", raw=raw)
    assert raw == load_zero("zero3")


def test_sizes_follow_transformers_rule():
    zero = resolve("zero3").config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096 and zero["stage3_prefetch_bucket_size"] == 3686
    assert zero["stage3_param_persistence_threshold"] == 640


def test_a_config_that_says_nothing_gets_the_recipes_numbers_written_out():
    found = resolve("mine", training(max_grad_norm=None), raw={"zero_optimization": {"stage": 1}}).config
    assert found == {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},
    }


def test_hard_numbers_that_agree_are_taken():
    raw = changed("zero2", {"train_batch_size": 16, "gradient_clipping": 1, "bf16.enabled": True, "fp16": None})
    raw.pop("fp16")
    assert resolve("zero2", raw=raw).config["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    "name, devices",
    [
        ("zero2", ("none", "none")),
        ("zero2_offload", ("cpu", "none")),
        ("zero3_offload", ("cpu", "cpu")),
        ("zero_infinity", ("nvme", "nvme")),
    ],
)
def test_offload_is_told(name, devices):
    found = resolve(name)
    assert (found.offload_optimizer, found.offload_param) == devices
    assert found.config.get("zero_force_ds_cpu_optimizer") == (None if devices[0] == "none" else False)


def test_runs_that_share_a_drive_share_no_folder():
    paths = [
        resolve("zero_infinity", run_dir=Path(run)).config["zero_optimization"]["offload_param"]["nvme_path"]
        for run in ("/x/run", "/y/run", "/x/run")
    ]
    assert paths[0] == paths[2] != paths[1]
    assert all(Path(path).parent == Path("/nvme") for path in paths)


@pytest.mark.parametrize(
    "optim, untested",
    [({}, None), ({"name": "lamb"}, True), ({"name": "lion"}, True), ({"name": "lion", "backend": "deepspeed"}, None)],
)
def test_optimizers_that_deepspeed_has_not_tested_are_let_through(optim, untested):
    assert resolve("zero1", training(optim=optim)).config.get("zero_allow_untested_optimizer") is untested


def test_autocast_owns_the_precision_where_the_config_asks_for_it():
    found = resolve("zero2", raw=changed("zero2", {"torch_autocast": {"enabled": "auto"}})).config
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert found["bf16"] == found["fp16"] == {"enabled": False}


# ---- refusing --------------------------------------------------------------------------------------------------

REFUSED = {
    "batch": ("zero2", {"train_batch_size": 64}, ["train_batch_size: 64 here, 16 by the recipe (global_batch_size)"]),
    "micro-batch": (
        "zero2",
        {"train_micro_batch_size_per_gpu": 1},
        ["train_micro_batch_size_per_gpu: 1 here, 2 by the recipe (micro_batch_size)"],
    ),
    "accumulation": (
        "zero2",
        {"gradient_accumulation_steps": 1},
        ["gradient_accumulation_steps: 1 here, 4 by the recipe (global_batch_size / 2 rank(s) / micro_batch_size)"],
    ),
    "true is not 1": (
        "zero2",
        {"gradient_clipping": True},
        ["gradient_clipping: true here, 1.0 by the recipe (max_grad_norm)"],
    ),
    "clipping": (
        "zero3",
        {"gradient_clipping": 0.5},
        ["gradient_clipping: 0.5 here, 1.0 by the recipe (max_grad_norm)"],
    ),
    "the other half precision": (
        "zero2",
        {"fp16.enabled": True},
        ["fp16.enabled: true here, false by the recipe (precision: bf16)"],
    ),
    "full precision": (
        "zero2",
        {"bf16.enabled": False},
        ["bf16.enabled: false here, true by the recipe (precision: bf16)"],
    ),
    "bf16 without ZeRO": (
        "zero0",
        {"bf16.enabled": True},
        [
            "bf16.enabled: true, but at stage 0 DeepSpeed then steps the optimizer once before the first batch; "
            'write "auto": torch_autocast takes its place'
        ],
    ),
    "autocast in another type": (
        "zero0",
        {"torch_autocast.dtype": "float16"},
        ['torch_autocast.dtype: "float16" here, "bf16" by the recipe (precision: bf16)'],
    ),
    "autocast switched off": (
        "zero0",
        {"torch_autocast.enabled": False},
        ["torch_autocast.enabled: false here, true by the recipe (precision: bf16)"],
    ),
    "optimizer and scheduler": (
        "zero2",
        {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}},
        [
            "optimizer: not for a config: the recipe owns it (optim); take it out",
            "scheduler: not for a config: the recipe owns it (schedule); take it out",
        ],
    ),
    "another role for ranks": (
        "zero2",
        {"tensor_parallel": {"autotp_size": 2}},
        ["tensor_parallel: not for a config: ranks are data-parallel here; take it out"],
    ),
    "a removed key": (
        "zero2",
        {"amp": {"enabled": True}},
        ["amp: DeepSpeed has removed this (0.19.8 refuses it); take it out"],
    ),
    "a removed ZeRO key": (
        "zero3",
        {"zero_optimization.mics_shard_size": 2},
        ["zero_optimization.mics_shard_size: DeepSpeed has removed this (0.19.8 refuses it); take it out"],
    ),
    "a typo": (
        "zero2",
        {"gradient_cliping": 1.0},
        ["gradient_cliping: unknown key; did you mean 'gradient_clipping'?"],
    ),
    "a typo in ZeRO": (
        "zero3",
        {"zero_optimization.stage3_max_live_params": 1},
        ["zero_optimization.stage3_max_live_params: unknown key; did you mean 'stage3_max_live_parameters'?"],
    ),
    "a key in the wrong place": (
        "zero3",
        {"stage3_max_live_parameters": 1},
        ["stage3_max_live_parameters: unknown key; DeepSpeed has none like it"],
    ),
    "an old name": (
        "zero2",
        {"zero_optimization.cpu_offload": True},
        ['zero_optimization.cpu_offload: an old name; write offload_optimizer: {"device": "cpu"}'],
    ),
    "an auto that means nothing": (
        "zero3",
        {"zero_optimization.sub_group_size": "auto"},
        ['zero_optimization.sub_group_size: "auto", but the recipe has nothing for it'],
    ),
    "offload that the stage does not do": (
        "zero2",
        {"zero_optimization.offload_param": {"device": "cpu"}},
        ['zero_optimization.offload_param.device: "cpu", but that needs stage 3 or higher; the stage is 2'],
    ),
    "NVMe that the stage does not do": (
        "zero1",
        {"zero_optimization.offload_optimizer": {"device": "nvme"}},
        ['zero_optimization.offload_optimizer.device: "nvme", but that needs stage 3 or higher; the stage is 1'],
    ),
    "a device that is none": (
        "zero3",
        {"zero_optimization.offload_param": {"device": "gpu"}},
        ['zero_optimization.offload_param.device: "gpu", but it is none, cpu or nvme'],
    ),
    "another NVMe path": (
        "zero_infinity",
        {"zero_optimization.offload_param.nvme_path": "/scratch"},
        ['zero_optimization.offload_param.nvme_path: "/scratch" here, "/nvme" by the recipe (engine.nvme_path)'],
    ),
    "low-precision master weights": (
        "zero2",
        {"bf16.bf16_master_weights_and_grads": True},
        ["bf16.bf16_master_weights_and_grads: true, but master weights are fp32: false"],
    ),
    "no gradient norm": (
        "zero2",
        {"zero_optimization.compute_grad_norm": False},
        ["zero_optimization.compute_grad_norm: false, but the norm is reported, and clipped to: true"],
    ),
    "gradients that are summed": (
        "zero2",
        {"gradient_allreduce_op": "sum"},
        ['gradient_allreduce_op: "sum", but the engine counts on gradients averaged over ranks: "mean"'],
    ),
    "another optimizer in the recipe's place": (
        "zero2_offload",
        {"zero_force_ds_cpu_optimizer": True},
        ["zero_force_ds_cpu_optimizer: true here, false by the recipe (optim: adamw is to stay what it is)"],
    ),
    "ZeRO++ below stage 3": (
        "zero2",
        {"zero_optimization.zero_quantized_gradients": True},
        ["zero_optimization.zero_quantized_gradients: true, but that needs stage 3; the stage is 2"],
    ),
    "no stage": ("zero2", {"zero_optimization": {}}, ["zero_optimization.stage: null, but it is 0, 1, 2 or 3"]),
    "a section that is none": ("zero2", {"fp16": True}, ["fp16: true, but it is an object"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    name, changes, lines = REFUSED[what]
    assert refusal(name, changes) == lines


def test_all_problems_are_told_at_once():
    changes = {"train_batch_size": 64, "amp": {}, "zero_optimization.overlap_com": True, "scheduler": {}}
    assert refusal("zero2", changes, recipe=training(micro_batch_size=4), world=3) == [
        "amp: DeepSpeed has removed this (0.19.8 refuses it); take it out",
        "scheduler: not for a config: the recipe owns it (schedule); take it out",
        "zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        "train_batch_size: 64 here, 16 by the recipe (global_batch_size)",
        "global_batch_size 16 does not divide over 3 rank(s) x micro_batch_size 4; nearest: 12, 24, 36",
    ]


def test_nvme_needs_a_path():
    assert refusal("zero_infinity", {}, recipe=training()) == [
        f"zero_optimization.{part}.nvme_path: needs the recipe's engine.nvme_path, a folder on a node's own NVMe drive"
        for part in ("offload_optimizer", "offload_param")
    ]
    own = {f"zero_optimization.{part}.nvme_path": "/scratch" for part in ("offload_optimizer", "offload_param")}
    found = resolve("zero_infinity", training(), raw=changed("zero_infinity", own)).config
    assert found["zero_optimization"]["offload_param"]["nvme_path"] == "/scratch"


def test_ranks_that_fill_no_group_of_zeropp():
    assert refusal("zeropp", {}, world=12, recipe=training(global_batch_size=24)) == [
        "zero_optimization.zero_hpz_partition_size: 8, but 12 ranks do not divide into groups of 8"
    ]
    assert resolve("zeropp", training(global_batch_size=32), world=16).stage == 3


# Entry of KNOWN_WRONG by its thread -> a run that it touches, and a change that takes the run out of its reach.
TOUCHED = {
    "DeepSpeed#7718": ("zero2", {}, {}, {"zero_optimization.stage": 1}),
    "DeepSpeed#8224": ("zero2", {}, {}, {"torch_autocast": {"enabled": True}}),
    "DeepSpeed#7967, #7981": ("zero2_offload", {}, {}, {"zero_optimization.offload_optimizer": {"device": "none"}}),
    "DeepSpeed#7985": (
        "zero1",
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {},
        {"data_types": {"grad_accum_dtype": "bf16"}},
    ),
    "DeepSpeed#8061, #8080": (
        "zero1",
        {},
        {"recipe": training(compile=True)},
        {"zero_optimization.overlap_comm": False},
    ),
    "DeepSpeed#7837, #7839": ("zero0", {"bf16.enabled": True}, {}, {"bf16.enabled": False}),
    "DeepSpeed#7619": ("zero0", {}, {"recipe": training(precision="fp16")}, {"zero_optimization.stage": 1}),
    "DeepSpeed#8382": (
        "zero1",
        {"zero_optimization.contiguous_gradients": False},
        {"on_cpu": True},
        {"zero_optimization.contiguous_gradients": True},
    ),
}


@pytest.mark.parametrize("wrong", KNOWN_WRONG, ids=lambda wrong: wrong.thread)
def test_versions_that_are_wrong_are_refused_and_no_others(wrong):
    name, changes, keywords, cure = TOUCHED[wrong.thread]
    line = f"({wrong.thread}); install {wrong.fixed} or newer"

    def told(version, more=None):
        try:
            resolve(name, raw=changed(name, changes | (more or {})), version=version, **keywords)
        except UserError as error:
            return line in str(error)
        return False

    major, minor, patch = (int(part) for part in wrong.fixed.split("."))
    last = f"{major}.{minor}.{patch - 1}" if patch else f"{major}.{minor - 1}.99"
    assert told(last) and told(last + "+cu128")
    assert not told(wrong.fixed) and not told("0.100.0")
    assert not told(last, cure)
    if wrong.first != "0":
        assert told(wrong.first) and not told("0.15.1")


# ---- choosing --------------------------------------------------------------------------------------------------

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
NAMED = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero2.json")}


def test_the_recipe_or_the_launcher_chooses():
    assert chosen_zero(EngineConfig(), {}) is None
    assert chosen_zero(EngineConfig(strategy="ddp"), {"ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert chosen_zero(EngineConfig(zero="zero3"), {}) == "zero3"
    assert chosen_zero(EngineConfig(zero="zero3"), DEEPSPEED) == "zero3"
    assert chosen_zero(EngineConfig(), NAMED) == str(CONFIGS / "zero2.json")


def test_recipe_and_launcher_may_name_the_same(tmp_path):
    copied = tmp_path / "mine.json"
    copied.write_text(json.dumps(load_zero("zero2")))  # other spaces, same content
    assert chosen_zero(EngineConfig(zero="zero2"), NAMED) == "zero2"
    assert chosen_zero(EngineConfig(zero=str(copied)), NAMED) == str(copied)


DISAGREE = {
    "two configs": (
        {"zero": "zero3"},
        NAMED,
        f"the launcher names the DeepSpeed config {CONFIGS}/zero2.json, the recipe says engine.zero: zero3, "
        "and they are not the same\nNeeded: one config\nDo: take one of the two away",
    ),
    "ddp under a DeepSpeed launch": (
        {"strategy": "ddp"},
        NAMED,
        f"the launcher says DeepSpeed with {CONFIGS}/zero2.json, the recipe says engine.strategy: ddp\n"
        "Needed: one strategy\nDo: launch without DeepSpeed, or set engine.strategy: deepspeed",
    ),
    "fsdp2 under a DeepSpeed launch": (
        {"strategy": "fsdp2"},
        DEEPSPEED,
        "the launcher says DeepSpeed, the recipe says engine.strategy: fsdp2\n"
        "Needed: one strategy\nDo: launch without DeepSpeed, or set engine.strategy: deepspeed",
    ),
    "ZeRO under an FSDP launch": (
        {"zero": "zero2"},
        {"ACCELERATE_USE_FSDP": "true"},
        "the recipe says engine.zero: zero2, the launcher says FSDP\nNeeded: one strategy\n"
        "Do: launch without FSDP, or take engine.zero out and set engine.strategy: fsdp2",
    ),
    "numbers in the launch": (
        {"zero": "zero2"},
        DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "the launcher says DeepSpeed, and ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, ACCELERATE_DEEPSPEED_ZERO_STAGE=3\n"
        "Needed: accumulation and clipping from the recipe, stage and offload from a DeepSpeed JSON\n"
        "Do: take these settings out of the launch; name a JSON by deepspeed_config_file or the recipe's engine.zero",
    ),
    "no config in the launch": (
        {},
        DEEPSPEED,
        "the launcher says DeepSpeed, and neither it nor the recipe names a DeepSpeed config\n"
        f"Needed: one of: {', '.join(SHIPPED)}, or the path of a JSON\n"
        "Do: set engine.zero in the recipe, or deepspeed_config_file in the launcher's YAML",
    ),
    "no config in the recipe": (
        {"strategy": "deepspeed"},
        {},
        "engine.strategy is deepspeed, and neither the recipe nor the launcher names a DeepSpeed config\n"
        f"Needed: one of: {', '.join(SHIPPED)}, or the path of a JSON\nDo: set engine.zero, such as zero2",
    ),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_recipe_and_launcher_disagree(what):
    engine, environ, expected = DISAGREE[what]
    assert message(chosen_zero, EngineConfig(**engine), environ) == expected


# ---- reading ---------------------------------------------------------------------------------------------------

BROKEN = {
    "broken JSON": ('{"a": 1,\n "b": }', "c.json:2: Expecting value\nNeeded: JSON, without comments"),
    "a comment": (
        '{\n// no\n"a": 1}',
        "c.json:2: Expecting property name enclosed in double quotes\nNeeded: JSON, without comments",
    ),
    "a list": ("[1]", "c.json: holds list, not an object\nNeeded: a DeepSpeed config"),
    "a key twice": (
        '{"zero_optimization": {"stage": 1, "stage": 2}}',
        "c.json: duplicate key stage\nNeeded: each key once, and finite numbers",
    ),
    "no number": (
        '{"gradient_clipping": NaN}',
        "c.json: NaN is not a number\nNeeded: each key once, and finite numbers",
    ),
    "not UTF-8": (b'{"a": "\xff"}', "c.json: byte 7 is not UTF-8\nNeeded: JSON in UTF-8"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_unreadable_configs(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = BROKEN[what]
    Path("c.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message(load_zero, "c.json") == expected


def test_unknown_config_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in ("zero2_ofload", "deepspeed_configs/zero2_offload.json"):
        assert message(load_zero, asked) == (
            f"no DeepSpeed config {asked!r}; did you mean 'zero2_offload'?\n"
            f"Needed: one of: {', '.join(SHIPPED)}, or the path of a JSON\n"
            "Do: check the path; a relative one is seen from the working directory"
        )
