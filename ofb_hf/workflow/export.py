"""From a checkpoint to a folder that another runtime can serve."""

from pathlib import Path

from ..families.loading import load_complete_classifier
from ..release.export import FORMATS, Exported
from .arguments import ExportArguments
from .inputs import image_shape, load_image_processor, require_same_size


def run_export(wanted: ExportArguments) -> Exported:
    """Exports a classifier; its config and image processor go beside the file.

    Raises:
        ValueError: if model or image processor cannot be loaded or do not go together, or the
            folder holds something.
        ExportError: if the exported model computes something else.
    """
    folder, name = Path(wanted.output_dir), wanted.model_name_or_path
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not an empty folder; give a new one.")
    processor, model = load_image_processor(name), load_complete_classifier(name)
    require_same_size(name, model, image_shape(processor))
    done = FORMATS[wanted.format](model, folder)
    model.config.dtype = "float32"  # as what was exported
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return done
