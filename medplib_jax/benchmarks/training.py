"""One training step (stage IV: forward, backward, clipping, AdamW) beside the same step in PyTorch."""

from collections.abc import Callable

import jax

from medplib_jax.benchmarks.measure import Table, interleave, side_by_side
from medplib_jax.benchmarks.workload import Rival, dense, example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.layers import draw_params, params_of
from medplib_jax.parallel.compilation import compiler_options, release_memory
from medplib_jax.parallel.mesh import one_device
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.step import Knobs, abstract_model, make_state, make_train_step


def compare(config: ExperimentConfig, rival: Rival | None, rounds: int, name: str = "train_step") -> Table:
    """Our step, beside the rival's where there is one."""
    runs: dict[str, Callable[[], float]] = {"ours": JaxStep(config)}
    runs |= {side: torch_step(config, rival, side == "torch compile") for side in (rival.sides if rival else ())}
    for run in runs.values():  # compiles, and the first step of all allocates
        run(), run()
    llm, data = config.model.llm, config.data
    title = f"Training step: {llm.num_layers} layers of width {llm.hidden_size}, "
    title += f"batch {data.batch_size} x {data.bucket_lengths[-1]}, {config.model.dtype}"
    return side_by_side(title, name, interleave(runs, rounds), "step")


def moe_over_dense(config: ExperimentConfig, rounds: int) -> Table:
    """What a mixture costs beside one MLP of the same active parameters."""
    runs = {"dense": JaxStep(dense(config)), "mixture": JaxStep(config)}
    for run in runs.values():
        run(), run()
    table = side_by_side("Top-1 mixture of experts beside one MLP", "moe", interleave(runs, rounds), "step")
    table.flat["moe.over_dense"] = table.flat.pop("moe.speedup_over_mixture")
    return table


class JaxStep:
    """Calls run one step each and return the loss; the batch lies on the device already."""

    def __init__(self, config: ExperimentConfig):
        model = abstract_model(config.model)
        tx = make_optimizer(config.optim, partition(params_of(model), config.optim.trainable)[0])
        state = jax.jit(lambda params: make_state(params, config, tx))(draw_params(model, 0))
        self.batch = jax.device_put(example_batch(config))
        step = jax.jit(
            make_train_step(model, config, tx), donate_argnums=0, compiler_options=compiler_options(one_device())
        )
        self.knobs = jax.device_put(Knobs(make_schedule(config.optim, 1000, 1000), config.train.seed))
        self.compiled = step.lower(state, self.batch, self.knobs).compile()
        self.state = state
        release_memory()  # as `train_step.CompiledStep` does

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch, self.knobs)
        return float(jax.block_until_ready((self.state, metrics))[1]["loss"])


def torch_step(config: ExperimentConfig, rival: Rival, compiled: bool = False) -> Callable[[], float]:
    """The peer's step, with the parameters and data of `JaxStep`.

    Everything is in the config's type; ours keeps trainable parameters in float32.
    """
    import torch

    peer, inputs, optim = rival.model(config.model, config.optim.trainable).train(), rival.inputs(config), config.optim
    trainable = peer.trainable()
    optimizer = torch.optim.AdamW(trainable, optim.lr, (optim.b1, optim.b2), optim.eps, optim.weight_decay)
    weights = {name: getattr(config.loss, name) for name in ("ce", "dice", "bce")}
    forward = torch.compile(peer) if compiled else peer

    def step() -> float:
        loss = forward(inputs, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
