"""`fcmae evaluate`: measure a fine-tuned model."""

from dataclasses import KW_ONLY, dataclass

from fcmae.config.fields import ImageSizeConfig, SourceConfig, setting


@dataclass
class EvaluateConfig(ImageSizeConfig, SourceConfig):
    """Measure top-1, top-5 and each class on labelled images."""

    source: str
    """Run folder of fine-tuning (its best weights) or folder of weights."""

    data: str = setting(path="a folder with one folder per split, or one folder of classes")
    """Labelled images: a folder with one folder per split, or one folder of classes."""

    split: str = "val"
    """Folder inside data to measure on."""

    json: bool = False
    """Print one JSON object, top1 and top5 in percent, and nothing else."""

    out: str | None = None
    """File for the confusion matrix, .png or .csv. null writes none."""

    _: KW_ONLY

    img_size: int | list[int] | None = setting(None, multiple=1)


CONFIG = EvaluateConfig
RUN = "finetune.evaluate:evaluate"
