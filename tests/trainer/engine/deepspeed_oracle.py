"""Asks the installed DeepSpeed, in a process of its own: JSON on stdin (configs by name), JSON on stdout.
`DeepSpeedConfig` itself says which configs it takes, which keys it reads and which it has removed."""

import contextlib
import json
import os
import socket
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start else, as `engine` says


ASKED = set()


class Recording(dict):
    """A config that remembers which of its keys were asked for."""

    def get(self, key, default=None):
        ASKED.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        ASKED.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        ASKED.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # `key in config.keys()` asks, too


def what_it_holds(config: dict) -> dict | str:
    """The numbers of a config as DeepSpeed understood them, or its error."""
    try:
        held = DeepSpeedConfig(Recording(config))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {
        "batch": [held.train_batch_size, held.train_micro_batch_size_per_gpu, held.gradient_accumulation_steps],
        "gradient_clipping": held.gradient_clipping,
        "bf16": held.bfloat16_config.enabled,
        "fp16": held.float16_config.enabled,
        "autocast": str(held.torch_autocast_dtype) if held.torch_autocast_enabled else None,
        "stage": int(held.zero_optimization_stage),
        "offload": [
            str(part.device.value if hasattr(part.device, "value") else part.device) if part else "none"
            for part in (held.zero_config.offload_optimizer, held.zero_config.offload_param)
        ],
        "reduce_bucket_size": held.zero_config.reduce_bucket_size,
        "untested": held.zero_allow_untested_optimizer,
        "force_cpu_optimizer": held.zero_force_ds_cpu_optimizer,
    }


def moved_before_the_first_batch(config: dict) -> bool:
    """Whether building the engine changes what the optimizer steps, or its state."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = model.weight.detach().clone()
    _, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    held = optimizer.param_groups[0]["params"][0].detach().reshape(-1)[:16].float()
    return not torch.allclose(held, before.reshape(-1), atol=0.01) or len(optimizer.state) > 0


with contextlib.redirect_stdout(sys.stderr):
    request = json.load(sys.stdin)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    deepspeed.init_distributed(dist_backend="gloo")
    answer = {
        "configs": {name: what_it_holds(config) for name, config in request["configs"].items()},
        "top_level": sorted(ASKED),
        "zero": {
            name: bool((field.json_schema_extra or {}).get("deprecated"))
            for key, field in DeepSpeedZeroConfig.model_fields.items()
            for name in {key, field.alias or key}
        },
        "moved": {name: moved_before_the_first_batch(config) for name, config in request["engines"].items()},
    }
print(json.dumps(answer), flush=True)
os._exit(0)  # gloo aborts in tear-down now and then
