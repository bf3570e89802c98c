"""The evaluation sweep: every checkpoint on every task whose data is there.

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_sweep.py --workdir=runs/sweep \
        --config.checkpoints='runs/7b/*' [--config.select='MeCoVQA*,SLAKE'] [--config.protocol=both] \
        [--config.baseline=7b-stage4-3000]

checkpoints: workdirs of training runs (their newest step, or --config.steps=all), single steps, or folders of PyTorch
weights, which are converted once. protocol: `exact`, or `reference` to evaluate with the original program's quirks,
so that its published figures can be compared: prompt cut at the last colon, regions left out, threshold 0.1, one mask
whether it says <SEG> or not, un-padding slip. `both` for both.

Where the data comes from, below data/ or --config=configs/eval_sweep.py:FOLDER. A task without its data is named and
left out.

    MeCoVQA-*, zeroshot-*   medplib_jax.datasets.assemble --annotations MeCoVQA --images SA-Med2D-20M
                            --out data/assembled
    VQA-RAD ... OmniMedVQA  medplib_jax.datasets.import_dataset --dataset NAME --source FOLDER --out data/NAME, NAME one
                            of vqa_rad, slake_en, path_vqa, pmc_vqa, vqa_med, omnimedvqa
    Med-GRIT-*              import_dataset --dataset med_grit --source FOLDER --out data/med_grit_VG, a task at a time
    BRISC                   data/brisc/brisc_test.json: BRISC 2025's classification test set as grounding questions
                            ("Please segment the tumor."). Those about healthy brains have no mask: how often is a mask
                            drawn where there is nothing? Any set with answers without masks does.
"""

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.sweep import SweepConfig, TaskConfig

from .common import assembled

MECOVQA = "MeCoVQA (Huang et al., AAAI 2025)"
OF_MECOVQA = {"Grounding": ("grounding", "grounding"), "Complex": ("complex", "vqa"), "Region": ("region", "region")}
ZERO_SHOT = ("endoscopy", "fundus", "mr", "pet", "ultrasound", "xray")
IMPORTED = {  # name: (dataset of import_dataset, where it is from)
    "VQA-RAD": ("vqa_rad", "VQA-RAD (Lau et al. 2018)"),
    "SLAKE": ("slake_en", "SLAKE, English part (Liu et al. 2021)"),
    "PathVQA": ("path_vqa", "PathVQA (He et al. 2020)"),
    "PMC-VQA": ("pmc_vqa", "PMC-VQA (Zhang et al. 2023)"),
    "ImageCLEF": ("vqa_med", "ImageCLEF 2019 VQA-Med (Ben Abacha et al. 2019)"),
    "OmniMedVQA": ("omnimedvqa", "OmniMedVQA, open-access part (Hu et al. 2024)"),
}
MED_GRIT = "Med-GRIT-270k (Huang et al., MICCAI 2024)"
MED_GRIT_PARTS = ("VG", "ROC", "RC", "MIA")


def get_config(data: str = "data"):
    """The tasks on the datasets below `data`."""
    tasks = [
        TaskConfig(f"MeCoVQA-{name}", assembled(part, "test", data), kind=kind, about=MECOVQA)
        for name, (part, kind) in OF_MECOVQA.items()
    ]
    about = f"{MECOVQA}, zero-shot grounding"
    tasks += [
        TaskConfig(f"zeroshot-{name}", assembled("zeroshot", name, data), kind="grounding", about=about)
        for name in ZERO_SHOT
    ]
    tasks += [
        TaskConfig(name, f"{data}/{dataset}/{dataset}_test.json", kind="vqa", about=about)
        for name, (dataset, about) in IMPORTED.items()
    ]
    tasks += [
        TaskConfig(
            f"Med-GRIT-{part}",
            f"{data}/med_grit_{part}/med_grit_test.json",
            kind="refer_box",
            part=part,
            about=MED_GRIT,
        )
        for part in MED_GRIT_PARTS
    ]
    about = "BRISC 2025: no target, no mask"
    tasks.append(TaskConfig("BRISC", f"{data}/brisc/brisc_test.json", kind="grounding", about=about))
    return to_config_dict(SweepConfig(tasks=tuple(tasks)))
