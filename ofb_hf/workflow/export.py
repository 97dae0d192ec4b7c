"""From a checkpoint to a folder that another runtime can serve."""

from pathlib import Path

from ..export import FORMATS, Exported
from .arguments import ExportArguments
from .inputs import load_checkpoint, load_image_processor


def run_export(wanted: ExportArguments) -> Exported:
    """Exports a classifier; its config and image processor go beside the file.

    Raises:
        ValueError: if the model or its image processor cannot be loaded, or the folder holds something already.
        ExportError: if the exported model computes something else.
    """
    folder = Path(wanted.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not an empty folder; give a new one.")
    processor, model = load_image_processor(wanted.model_name_or_path), load_checkpoint(wanted.model_name_or_path)
    done = FORMATS[wanted.format](model, folder)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return done
