"""`fcmae evaluate`: measure the accuracy of a fine-tuned model."""

from dataclasses import KW_ONLY, dataclass

from fcmae.config.fields import ImageSizeConfig, SourceConfig, setting


@dataclass
class EvaluateConfig(ImageSizeConfig, SourceConfig):
    """Measure top-1, top-5 and per-class accuracy on labelled images."""

    source: str
    """Fine-tuning run (its best weights) or folder of weights."""

    data: str = setting(path="a folder with one folder per split, or one folder of classes")
    """Labelled images: a folder with one folder per split, or one folder of classes."""

    split: str = "val"
    """Folder in data to evaluate."""

    json: bool = False
    """Print only one JSON object, with top1 and top5 in percent."""

    out: str | None = None
    """Confusion matrix to write, .png or .csv. null writes none."""

    _: KW_ONLY

    img_size: int | list[int] | None = setting(None, multiple=1)


CONFIG = EvaluateConfig
RUN = "finetune.evaluate:evaluate"
