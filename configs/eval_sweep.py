"""The evaluation sweep: every checkpoint on every task whose data is there.

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_sweep.py --workdir=runs/sweep --config.checkpoints='runs/7b/*' \
        [--config.select='MeCoVQA*,SLAKE'] [--config.protocol=both] [--config.baseline=7b-stage4-3000]

checkpoints: workdirs of training runs (their newest step, or --config.steps=all), single steps, or folders of PyTorch weights, which are converted
once. protocol: `exact`, or `reference` to evaluate with the original program's quirks (prompt cut at the last colon, regions left out, threshold
0.1, one mask whether it says <SEG> or not, un-padding slip), so that its published figures can be compared; `both` for both.

Where the files come from (below data/, or --config=configs/eval_sweep.py:FOLDER); a task without its file is named and left out:
    MeCoVQA-*, zeroshot-*   the published MeCoVQA files, put together with SA-Med2D-20M by `medplib_jax.datasets.assemble.dataset`
    VQA-RAD ... OmniMedVQA  the public datasets, imported by `medplib_jax.datasets.import_dataset --dataset NAME --out data/NAME`
    Med-GRIT-*              Med-GRIT-270k's test files, imported one task at a time by `import_dataset --dataset med_grit`
    BRISC                   BRISC 2025's classification test set as grounding questions ("Please segment the tumor."), of which those about healthy
                            brains have no mask: how often is a mask drawn where there is nothing? Any set with answers without masks does.
"""

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.sweep import SweepConfig, TaskConfig

MECOVQA = "MeCoVQA (Huang et al., AAAI 2025)"
ZERO_SHOT = ("endoscopy", "fundus", "mr", "ultrasound", "xray")
IMPORTED = {  # name: (dataset of import_dataset, where it is from)
    "VQA-RAD": ("vqa_rad", "VQA-RAD (Lau et al. 2018)"),
    "SLAKE": ("slake_en", "SLAKE, English part (Liu et al. 2021)"),
    "PathVQA": ("path_vqa", "PathVQA (He et al. 2020)"),
    "PMC-VQA": ("pmc_vqa", "PMC-VQA (Zhang et al. 2023)"),
    "ImageCLEF": ("vqa_med", "ImageCLEF 2019 VQA-Med (Ben Abacha et al. 2019)"),
    "OmniMedVQA": ("omnimedvqa", "OmniMedVQA, open-access part (Hu et al. 2024)"),
}
MED_GRIT = "Med-GRIT-270k (Huang et al., MICCAI 2024)"


def get_config(data: str = "data"):
    tasks = [
        TaskConfig(
            "MeCoVQA-Grounding", f"{data}/MeCoVQA/test/MeCoVQA_Grounding_test.json", kind="grounding", about=MECOVQA
        ),
        *(
            TaskConfig(
                f"zeroshot-{name}",
                f"{data}/MeCoVQA/zeroshot4grounding/{name}.json",
                kind="grounding",
                about=f"{MECOVQA}, zero-shot grounding",
            )
            for name in ZERO_SHOT
        ),
        TaskConfig("MeCoVQA-Complex", f"{data}/MeCoVQA/test/MeCoVQA_Complex_VQA_test.json", kind="vqa", about=MECOVQA),
        TaskConfig("MeCoVQA-Region", f"{data}/MeCoVQA/test/MeCoVQA_Region_VQA_test.json", kind="region", about=MECOVQA),
        *(
            TaskConfig(name, f"{data}/{dataset}/{dataset}_test.json", kind="vqa", about=about)
            for name, (dataset, about) in IMPORTED.items()
        ),
        *(
            TaskConfig(
                f"Med-GRIT-{part}",
                f"{data}/med_grit_{part}/med_grit_test.json",
                kind="refer_box",
                part=part,
                about=MED_GRIT,
            )
            for part in ("VG", "ROC", "RC", "MIA")
        ),
        TaskConfig("BRISC", f"{data}/brisc/brisc_test.json", kind="grounding", about="BRISC 2025: no target, no mask"),
    ]
    return to_config_dict(SweepConfig(tasks=tuple(tasks)))
