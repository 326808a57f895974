"""What `mwm export` can write. Add a file and one line here.

An exporter is a function ``(source, folder) -> list[Difference]``: it writes a `pipelines.exportable.Exportable` into
an empty folder, loads that back with the library that will read it, and says how far its outputs are from the
original's.

An exporter of region stores is a class: its ``Options``, ``needs_images``, and ``write(source, folder)``, which writes
a `pipelines.exportable_store.ExportableStore`, reads the files back, and says how many were equal.
"""

from shared.registry import Registry

EXPORTERS = Registry(
    "exporter",
    {
        "huggingface": "pipelines.exporters.hub_folder:export_huggingface",
        "onnx": "pipelines.exporters.onnx_file:export_onnx",
        "timm": "pipelines.exporters.timm_folder:export_timm",
    },
)

STORE_EXPORTERS = Registry(
    "store_exporter",
    {
        "coco": "pipelines.exporters.coco_files:CocoFiles",
        "nifti": "pipelines.exporters.nifti_volumes:NiftiVolumes",
        "nnunet": "pipelines.exporters.nnunet_folder:NnunetFolder",
        "png": "pipelines.exporters.png_files:PngFiles",
    },
)
