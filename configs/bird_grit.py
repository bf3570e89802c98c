"""BiRD: refers and grounds with boxes, on Med-GRIT's four tasks.

COMMAND
    python -m convert.from_torch --source Qwen-VL-Chat --out checkpoints/qwen-vl-chat
    python -m medplib_jax.datasets.import_dataset --dataset med_grit --source Med-GRIT
    python -m medplib_jax.train --config=configs/bird_grit.py:9b --workdir=runs/bird/9b
    python -m medplib_jax.train --config=configs/bird_grit.py:lora --workdir=runs/bird/lora
    python -m medplib_jax.train --config=configs/bird_grit.py:rough --workdir=runs/bird/rough
    python -m medplib_jax.train --config=configs/bird_grit.py:tiny --workdir=runs/bird/tiny \
        --config.init.base=runs/bird/rough

9b: the published recipe (Huang et al., MICCAI 2024). From Qwen-VL-Chat; the decoder with embedding and head, and the
resampler train, the ViT and what follows the resampler do not. Packed rows of 2048, 2 epochs, lr 2e-5 falling as a
cosine, weight decay 0.1 on all but biases. The authors' batch is 4 rows x 8 accumulated per device, their number of
devices is not stated: here 256 rows in all. Packed conversations see themselves only, which the original meant but did
not do. lora: Qwen-VL's own LoRA recipe (finetune.py) on the same data: rank 64 on c_attn, attn.c_proj, w1 and w2.
rough, then tiny: everything trains from nothing, on what `bash launch/demo.sh --bird` generates: pictures of
`medplib_jax.datasets.phantom` asked in Med-GRIT's form (`medplib_jax.datasets.phantom.grit`).

Other conversations join by weight, as long as they hold neither masks nor regions: MeCoVQA-Complex and public VQA do.
    --config.data.sources="('data/med_grit/med_grit_train.json','data/slake_en/slake_en_train.json')" \
    --config.data.weights="(3,1)"
"""

import dataclasses

from configs import common
from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import (
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    InitConfig,
    LossConfig,
    OptimConfig,
    ShardingConfig,
    TrainConfig,
)
from medplib_jax.config.model import LlmConfig, LoraConfig, ModelConfig, QwenVisionConfig
from medplib_jax.datasets.phantom import grit

QWEN_VL_CHAT = "checkpoints/qwen-vl-chat"  # as `convert.from_torch` makes it
LARGE = ModelConfig(
    family="bird",
    llm=LlmConfig(
        vocab_size=151936, mlp_dim=11008, rms_norm_eps=1e-6, max_positions=8192, fused_qkv=True, trained_length=2048
    ),
    dtype="bfloat16",
    remat="auto",
)
TINY = ModelConfig(
    family="bird",
    vit=QwenVisionConfig(
        image_size=112, hidden_size=96, num_layers=4, num_heads=4, mlp_dim=192, position_grid=8, num_queries=64
    ),
    llm=LlmConfig(
        vocab_size=768,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        mlp_dim=256,
        rms_norm_eps=1e-6,
        max_positions=1024,
        fused_qkv=True,
        trained_length=512,
    ),
    scan_unroll=3,  # a loop on a CPU copies what its steps keep for the backward pass
)
DEMO = f"{common.DEMO}/bird"  # where `bash launch/demo.sh --bird` leaves data and model
# All but what decides where the resampler's queries look. From nothing each looks at its own place, so sharply that the
# gradients there are noise. Adam makes full steps of it, and soon every query looks at one and the same patch.
FROM_NOTHING = (common.LLM, "^vit/", "^resampler/(kv|o)/", "^post_norm/", "^proj/")
# The vision part learns more slowly than the decoder. At the decoder's rate the patches' hundreds of pixels add up to
# steps that soon drown the positions, and no later layer knows where a patch lies.
VISION_RATES = (("^vit/patch_embed/", 0.02), ("^(vit|resampler|post_norm|proj)/", 0.1))
DECODER_AND_RESAMPLER = (common.LLM, "^resampler/")


def get_config(size: str = "9b"):
    sizes = {"9b": large, "lora": lora, "rough": rough, "tiny": tiny}
    return to_config_dict(common.choose(size, **sizes)())


def large() -> ExperimentConfig:
    data = DataConfig(
        sources=("data/med_grit/med_grit_train.json",),
        tokenizer=f"{QWEN_VL_CHAT}/tokenizer",
        template="chatml",
        bucket_lengths=(2048,),
        batch_size=256,
        pack=True,
        max_images=6,
        max_regions=0,
        max_masks=0,
        on_error="skip",
        workers=8,
    )
    return ExperimentConfig(
        model=LARGE,
        data=data,
        optim=OptimConfig(
            lr=2e-5,
            weight_decay=0.1,
            no_decay=("/bias$",),
            warmup=0.01,
            schedule="cosine",
            trainable=DECODER_AND_RESAMPLER,
            frozen_dtype="bfloat16",
        ),
        loss=LossConfig(ce_chunk=common.CE_CHUNK),
        mesh=common.POD,
        sharding=ShardingConfig(vision="fsdp"),
        init=InitConfig(base=QWEN_VL_CHAT),
        train=TrainConfig(epochs=2),
        eval=EvalConfig(max_new_tokens=100),
    )


def lora() -> ExperimentConfig:
    config = large()
    adapters = LoraConfig(rank=64, alpha=16.0, dropout=0.05, targets=("qkv", "o", "up", "gate"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora=adapters),
        optim=dataclasses.replace(config.optim, lr=1e-5, trainable=(common.LORA,), no_decay=()),
        train=TrainConfig(epochs=5),
    )


def rough() -> ExperimentConfig:
    """What `tiny` starts from: it finds, to a tenth of the picture, what may lie anywhere.

    Where a structure lies can be guessed from its name. Asked of all, a model learns to guess and does not look.
    """
    config = _small((grit.ROUGH,), lengths=(136, 176), lr=1e-3)
    return dataclasses.replace(config, train=TrainConfig(steps=1800, checkpoint_every=900))


def tiny() -> ExperimentConfig:
    config = _small((grit.LOOK, grit.FINDINGS, grit.FIND), lengths=(136, 176, 240, 288, 352), lr=1.5e-3)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, weights=(5, 4, 6)),
        train=TrainConfig(steps=5000, checkpoint_every=1250),
        init=InitConfig(base=f"{DEMO}/rough"),
    )


def _small(files: tuple[str, ...], lengths: tuple[int, ...], lr: float) -> ExperimentConfig:
    """From nothing on files of the generated phantom, in rows of these lengths."""
    data = dataclasses.replace(
        common.phantom(bucket_lengths=lengths, max_regions=0, max_masks=0),
        sources=tuple(f"{DEMO}/phantom/{name}" for name in files),
        root=f"{DEMO}/phantom",
        tokenizer=f"{DEMO}/tokenizer",
        template="chatml",
        batch_size=4,
    )
    return ExperimentConfig(
        model=TINY,
        data=data,
        optim=OptimConfig(
            lr=lr, b2=0.98, warmup=0.05, schedule="cosine", trainable=FROM_NOTHING, lr_scale=VISION_RATES
        ),
        eval=EvalConfig(max_new_tokens=100),
    )
