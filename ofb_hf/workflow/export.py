"""Write a checkpoint into a folder that another runtime can serve."""

from pathlib import Path

from ..families.loading import load_complete_classifier
from ..release.export import FORMATS, Exported
from .arguments import ExportArguments
from .inputs import image_shape, load_image_processor, require_findable, require_same_size


def run_export(wanted: ExportArguments) -> Exported:
    """Export a classifier, with its config and image processor next to the file.

    Raises:
        ValueError: if model or image processor cannot be loaded or do not go together, or if the
            folder is not empty.
        ExportError: if the exported model computes something else.
    """
    folder = Path(wanted.output_dir)
    name = wanted.model_name_or_path
    is_occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_occupied:
        raise ValueError(f"--output_dir {folder} is not an empty folder; give a new one.")
    require_findable(name)
    processor = load_image_processor(name)
    model = load_complete_classifier(name)
    require_same_size(name, model, image_shape(processor))
    done = FORMATS[wanted.format](model, folder)
    model.config.dtype = "float32"  # of the exported file, whatever the checkpoint has
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return done
