"""Public datasets to MeCoVQA's form. A module for each; `READERS` is the registry.

A reader takes the dataset's folder and yields, for every record, a function that makes its `ImportedExample` or raises
DataError; it raises DataError itself when the dataset is not there.
"""

from medplib_jax.datasets.importers import llava_med, med_grit, omnimedvqa, path_vqa, pmc_vqa, slake, vqa_med, vqa_rad

READERS = {
    "vqa_rad": vqa_rad.read,
    "slake": slake.read,
    "slake_en": slake.read_english,
    "path_vqa": path_vqa.read,
    "pmc_vqa": pmc_vqa.read,
    "pmc_vqa_2": pmc_vqa.read_second,
    "vqa_med": vqa_med.read,
    "omnimedvqa": omnimedvqa.read,
    "llava_med_alignment": llava_med.read,
    "med_grit": med_grit.read,
}
ALONGSIDE = {"vqa_med": vqa_med.ANSWERS}  # files that are read together with those from which the records come
