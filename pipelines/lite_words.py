"""The words that the head of `lite` is fitted on, and those it is only tried on."""

from __future__ import annotations

CONCEPTS: dict[str, tuple[str, ...]] = {
    "tumour": (
        "tumour", "tumor", "brain tumour", "brain tumor", "glioma", "meningioma", "pituitary tumour", "brain lesion",
        "brain mass", "intracranial tumour", "neoplasm", "brain neoplasm", "lesion", "abnormal mass in the brain",
    ),
    "lungs": (
        "lungs", "lung", "both lungs", "the lungs", "lung fields", "lung field", "pulmonary fields", "lung parenchyma",
        "left and right lungs", "lung area", "lung region", "pulmonary region", "lung tissue",
    ),
    "left lung": (
        "left lung", "the left lung", "left lung field", "left pulmonary field", "patient's left lung",
        "lung on the left", "left sided lung", "left lung parenchyma", "left lung area", "left lung region",
        "lung, left side",
    ),
    "right lung": (
        "right lung", "the right lung", "right lung field", "right pulmonary field", "patient's right lung",
        "lung on the right", "right sided lung", "right lung parenchyma", "right lung area", "right lung region",
        "lung, right side",
    ),
    "white blood cell": (
        "white blood cell", "white blood cells", "leukocyte", "leukocytes", "leucocyte", "leucocytes", "WBC",
        "white cell", "white cells", "white blood corpuscle", "white corpuscles", "nucleated blood cell",
    ),
    "red blood cell": (
        "red blood cell", "red blood cells", "erythrocyte", "erythrocytes", "RBC", "RBCs", "red cell", "red cells",
        "red blood corpuscle", "red corpuscles", "erythrocyte cell",
    ),
    "platelet": (
        "platelet", "platelets", "thrombocyte", "thrombocytes", "blood platelet", "blood platelets", "PLT",
        "platelet cell", "thrombocyte cell", "clotting cell", "small platelet",
    ),
    "brain": (
        "brain", "the brain", "whole brain", "entire brain", "cerebrum", "encephalon", "brain region", "brain area",
        "brain parenchyma", "brain tissue", "human brain",
    ),
    "grey matter": (
        "grey matter", "gray matter", "the grey matter", "cortical grey matter", "cortical gray matter",
        "cerebral cortex", "cortex", "grey matter tissue", "gray matter tissue", "cortical ribbon", "grey substance",
        "gray substance", "substantia grisea", "GM",
    ),
    "white matter": (
        "white matter", "the white matter", "cerebral white matter", "white matter tissue", "white matter tracts",
        "brain white matter", "subcortical white matter", "deep white matter", "white matter fibres",
        "white matter fibers", "white substance", "substantia alba", "WM",
    ),
}  # fmt: skip
"""Concept -> wordings that are taught, British and American; the first is canonical."""

UNSEEN: dict[str, tuple[str, ...]] = {
    "tumour": ("intracranial neoplasm", "brain cancer", "malignant glioma", "tumorous lesion"),
    "lungs": ("pair of lungs", "pulmonary tissue", "lung zones", "pulmonary parenchyma"),
    "left lung": ("left pulmonary parenchyma", "left lung tissue", "left lung zone"),
    "right lung": ("right pulmonary parenchyma", "right lung tissue", "right lung zone"),
    "white blood cell": ("leukocyte cell", "wbcs", "white blood cells in the smear"),
    "red blood cell": ("red blood cells in the smear", "rbc cells", "red coloured blood cells"),
    "platelet": ("platelet cells", "blood thrombocyte", "clotting platelets"),
    "brain": ("full brain", "brain organ", "the human brain"),
    "grey matter": ("brain gray matter", "cortical gray", "the grey matter of the brain"),
    "white matter": ("white brain matter", "white matter of the brain", "white fibre tracts"),
}
"""Synonyms that are never taught and that no threshold was tuned on."""

FOREIGN: tuple[str, ...] = (
    "heart", "cardiac silhouette", "aorta", "mediastinum", "rib", "ribs", "clavicle", "spine", "vertebra", "diaphragm",
    "trachea", "bronchus", "stomach", "liver", "kidney", "spleen", "pancreas", "bladder", "prostate", "uterus",
    "gallbladder", "oesophagus", "adrenal gland", "thyroid", "appendix", "colon", "polyp", "femur", "knee", "hip",
    "shoulder", "hand", "skin", "skin lesion", "mole", "melanoma", "breast", "breast mass", "lymph node", "retina",
    "optic disc", "macula", "tooth", "jaw", "tongue", "pneumonia", "consolidation", "lung opacity", "opacity",
    "pleural effusion", "pneumothorax", "lung nodule", "nodule", "tuberculosis", "fracture", "bone", "muscle", "fat",
    "stroke", "haemorrhage", "hemorrhage", "infarct", "oedema", "edema", "abscess", "cyst", "aneurysm", "ventricle",
    "ventricles", "cerebrospinal fluid", "hippocampus", "thalamus", "cerebellum", "brainstem", "amygdala", "caudate",
    "putamen", "corpus callosum", "pituitary gland", "skull", "scalp", "eye", "optic nerve", "spinal cord", "meninges",
    "white matter lesion", "multiple sclerosis plaque", "catheter", "pacemaker", "implant", "malaria parasite",
    "parasite", "bacteria", "virus", "nucleus", "cell nucleus", "cytoplasm", "plasma", "serum", "artery", "vein",
    "blood vessel", "stem cell", "nerve cell", "neuron", "fat cell", "cancer cell", "background", "noise", "text",
    "car", "dog", "cat", "tree", "house", "chair", "person", "face", "food", "water", "sky", "grey", "white", "left",
    "right", "red", "cell", "blood", "matter", "tissue", "field",
)  # fmt: skip
"""Strings that mean none of the concepts; a wording nearer to one of these than to any taught one is refused."""

NEAR: tuple[str, ...] = (
    "disease", "brain disease", "lung disease", "blood disease", "disorder", "neurological disorder", "dementia",
    "epilepsy", "seizure", "migraine", "emphysema", "asthma", "bronchitis", "pulmonary embolism", "lung cancer",
    "lung cancer screening", "lung function", "blood test", "blood pressure", "blood clot", "bleeding", "brain surgery",
    "brain activity", "mind", "haemoglobin", "bone marrow", "antibody",
)  # fmt: skip
"""More strings to refuse, too near to the concepts to be taught as absent (they would shut the near ones out)."""

REFUSED: tuple[str, ...] = (
    "cardiac muscle", "rib cage", "humerus", "airway", "renal cortex", "hepatic lobe", "intestine", "ovary", "testis",
    "eardrum", "wrist", "pelvis", "cartilage", "insula", "globus pallidus", "bicycle", "mountain", "laptop",
    "Parkinson's disease", "cystic fibrosis", "schizophrenia", "sarcoidosis", "anaemia", "leukaemia", "concussion",
    "lung transplant", "silicosis", "meningitis", "depression", "covid",
)  # fmt: skip
"""Foreign strings that are in no list above, to count how many are refused."""
