"""One training step (stage IV: forward, backward, clipping, AdamW) beside the same step in PyTorch."""

from collections.abc import Callable

import jax
import optax

from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.experiment import ExperimentConfig
from medplib_jax.models.layers import draw_params, params_of
from medplib_jax.optim import make_optimizer, partition
from medplib_jax.train_step import abstract_model, make_state, make_train_step

STEPS = 1000  # length of the schedule


class JaxStep:
    """Calls run one step each and return the loss; the batch lies on the device already."""

    def __init__(self, config: ExperimentConfig):
        model = abstract_model(config.model)
        schedule = optax.constant_schedule(config.optim.lr)
        tx = make_optimizer(config.optim, schedule, partition(params_of(model), config.optim.trainable)[0])
        state = jax.jit(lambda params: make_state(params, config, tx))(draw_params(model, 0))
        self.batch = jax.device_put(example_batch(config))
        self.compiled = jax.jit(make_train_step(model, config, tx, schedule), donate_argnums=0).lower(state, self.batch).compile()
        self.state = state

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch)
        return float(jax.block_until_ready((self.state, metrics))[1]["loss"])


def torch_step(config: ExperimentConfig, device: str = "cpu", compiled: bool = False) -> Callable[[], float]:
    """The peer's step, parameters and data as in `JaxStep`; float32 on a CPU, bfloat16 with float32 moments where the config says so."""
    import torch

    from medplib_jax.benchmarks.torch_peer import Peer, to_torch

    dtype = getattr(torch, config.model.dtype)
    peer = Peer(config.model).load(draw_params(abstract_model(config.model), 0)).train()
    trainable = peer.trainable()
    peer = peer.to(device, dtype)
    optimizer = torch.optim.AdamW(trainable, config.optim.lr, (config.optim.b1, config.optim.b2), config.optim.eps, config.optim.weight_decay)
    inputs = to_torch(example_batch(config), device, dtype)
    weights = {name: getattr(config.loss, name) for name in ("ce", "dice", "bce")}
    forward = torch.compile(peer) if compiled else peer

    def step() -> float:
        loss = forward(inputs, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
